"""The device of this process: which GPU it uses, why it cannot use one, and how its kernels compute."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from promptkd.config.options import DeviceSettings
from promptkd.errors import UserError

if TYPE_CHECKING:
    import torch

USE_CPU = 'set CUDA_VISIBLE_DEVICES="" to run on the CPU'
# The oldest driver branch for each CUDA major version of a torch build (CUDA Compatibility, NVIDIA).
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
# Settings of torch's caching allocator. The second name is the older one.
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
WORKSPACES = (":4096:8", ":16:8")  # cuBLAS is deterministic with these two values


def choose_device(local_rank: int, settings: DeviceSettings) -> torch.device:
    """Return the device of this process, ready to use.

    Raises:
        UserError: As `device_type`. Or there is no GPU for this rank, or the device lacks what `settings` ask for.
    """
    import torch

    if device_type() == "cpu":
        device = torch.device("cpu")
    else:
        device = torch.device("cuda", local_device(local_rank, torch.cuda.device_count()))
        if not any(name in os.environ for name in ALLOCATOR):  # read at the first allocation
            os.environ[ALLOCATOR[0]] = "expandable_segments:True"
    _configure(device, settings)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def device_type() -> str:
    """Return "cuda" or "cpu", whichever this machine and environment call for.

    The CPU is used where the machine has no NVIDIA GPU, and where DS_ACCELERATOR=cpu or an empty CUDA_VISIBLE_DEVICES
    asks for it.

    Raises:
        UserError: A GPU is present and torch cannot use it.
    """
    import torch

    accelerator = os.environ.get("DS_ACCELERATOR", "cuda")
    if accelerator not in ("cpu", "cuda"):
        raise UserError(f"DS_ACCELERATOR={accelerator[:32]} in the environment: cpu and cuda are supported: unset it")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of an old driver in several lines
        if accelerator == "cuda" and torch.cuda.is_available():
            return "cuda"
    if accelerator == "cuda" and not is_cpu_requested():
        check_no_gpu(torch.__version__, torch.version.cuda)
    if os.environ.get("DS_ACCELERATOR") == "cuda":
        raise UserError("DS_ACCELERATOR=cuda in the environment, and torch finds no GPU: unset it")
    return "cpu"


def local_device(local_rank: int, count: int) -> int:
    """The index of a rank's GPU among the `count` GPUs that it sees.

    A launcher such as Slurm may show each rank a GPU of its own. That GPU is number 0 for all of them, whatever the
    rank. `distributed.check_own_gpus` refuses ranks that would share one.

    Raises:
        UserError: More ranks than GPUs.
    """
    if local_rank < count:
        return local_rank
    if count == 1:
        return 0
    raise UserError(
        f"LOCAL_RANK={local_rank}, and {count} GPUs are visible: start at most {count} ranks on this machine "
        f"(--nproc_per_node {count}), or show each rank one GPU of its own"
    )


def is_cpu_requested() -> bool:
    """Whether CUDA_VISIBLE_DEVICES hides all GPUs."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1")


def check_no_gpu(torch_version: str, cuda: str | None, root: Path = Path("/")) -> None:
    """Raise UserError where this machine has an NVIDIA GPU that torch cannot use: a run on the CPU would take days.

    Args:
        torch_version: torch's version, for the message.
        cuda: The CUDA version that torch was built for. None: a build for CPUs.
        root: Where /proc and /dev are.
    """
    if not _has_gpu(root):
        return
    driver = driver_version(root)
    name = f"NVIDIA driver {driver or '(unknown version)'}"
    oldest = OLDEST_DRIVER.get(int((cuda or "0").partition(".")[0]), 0)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if cuda is None:
        problem = f"torch {torch_version} is a build for CPUs only, and this machine has a GPU ({name})"
        remedy = "install a CUDA build of torch (remove .venv and run install.sh without PIP_EXTRA_INDEX_URL)"
    elif driver and int(driver.partition(".")[0]) < oldest:
        problem = f"{name} is too old for torch {torch_version}, which is built for CUDA {cuda}"
        remedy = f"install driver {oldest} or newer, or a torch build for this driver"
    elif visible is not None:
        problem = f"CUDA_VISIBLE_DEVICES={visible[:64]} names no GPU that torch can use ({name})"
        remedy = "name GPUs that nvidia-smi -L lists"
    else:
        problem = f"this machine has a GPU ({name}), and torch {torch_version} cannot use it"
        remedy = "make nvidia-smi work here (a container needs --gpus all)"
    raise UserError(f"{problem}: {remedy}, or {USE_CPU}")


def driver_version(root: Path = Path("/")) -> str | None:
    """The version of the NVIDIA driver, such as "580.65.06". None where it cannot be found out."""
    try:
        text = (root / "proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"Kernel Module\D*?(?:x86_64|aarch64)?\s+(\d+\.[\d.]+)", text)
    if found:
        return found[1]
    return _nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0] or None


def _has_gpu(root: Path) -> bool:
    """Whether an NVIDIA driver runs, or a GPU has a device file. The driver's module does not load without a GPU."""
    if (root / "proc/driver/nvidia/version").exists() or any(root.glob("dev/nvidia[0-9]*")):
        return True
    return "GPU " in _nvidia_smi("-L")  # Windows Subsystem for Linux has neither file


def _nvidia_smi(*arguments: str) -> str:
    """What nvidia-smi prints, "" where it is missing or fails."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return ""
    try:
        done = subprocess.run([command, *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _configure(device: torch.device, settings: DeviceSettings) -> None:
    """Set TF32 and determinism explicitly, both ways. It has to happen before the first matrix product.

    cuDNN's attention is turned off. It prepares a kernel for each new shape, which takes longer than the step itself:
    each decoded token and each micro-batch has a shape of its own.
    """
    import torch

    if settings.tf32 and not (device.type == "cuda" and torch.cuda.is_tf32_supported()):
        raise UserError("--tf32 needs an NVIDIA GPU of compute capability 8.0 or newer: leave it out")
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = settings.tf32
        torch.backends.cudnn.allow_tf32 = settings.tf32
        torch.backends.cuda.enable_cudnn_sdp(False)
    if settings.deterministic and os.environ.setdefault(WORKSPACE, WORKSPACES[0]) not in WORKSPACES:
        raise UserError(f"--deterministic needs {WORKSPACE}={' or '.join(WORKSPACES)} in the environment: unset it")
    torch.use_deterministic_algorithms(settings.deterministic)


def peak_memory_gb(device: torch.device) -> float:
    """Return this process's peak memory so far in 1e9 bytes: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status")  # on Linux ru_maxrss includes the memory of the process that started this one
    if status.exists() and (peak := re.search(r"VmHWM:\s+(\d+) kB", status.read_text("utf-8", "replace"))):
        return int(peak[1]) * 1024 / 1e9
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e9


def free_memory(device: torch.device) -> int | None:
    """Return the bytes of a GPU that nothing uses, and those that torch's allocator keeps for later. None on a CPU."""
    if device.type != "cuda":
        return None
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
