"""The choice of the device: a GPU that torch cannot use, ranks and GPUs, TF32 and determinism."""

import json
import os

import pytest
import torch
import torch.distributed as dist
from helpers.deepspeed_files import zero_file
from helpers.training import golden_argv
from helpers.virtual_cuda import VirtualCuda

from promptkd.config.deepspeed import CONFIGS
from promptkd.config.options import DeviceSettings
from promptkd.distributed.device import check_no_gpu, choose_device, driver_version, local_device
from promptkd.distributed.rendezvous import check_own_gpus
from promptkd.errors import UserError
from promptkd.training.setup import build_trainer
from train import resolve

pytestmark = pytest.mark.cpu

OLD = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC version: 12"
NEW = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (root@build)\n"
ARM = "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  590.10  Release Build\n"


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A file system without a GPU, and no nvidia-smi; `root.driver(text)` loads a driver."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "bin").mkdir()
    (tmp_path / "dev").mkdir()
    return tmp_path


def load_driver(root, text: str) -> None:
    folder = root / "proc/driver/nvidia"
    folder.mkdir(parents=True)
    (folder / "version").write_text(text)


def add_nvidia_smi(root, script: str) -> None:
    path = root / "bin/nvidia-smi"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.mark.parametrize("text, version", [(OLD, "535.104.05"), (NEW, "580.65.06"), (ARM, "590.10")])
def test_driver_version_is_read_from_proc(root, text, version):
    load_driver(root, text)
    assert driver_version(root) == version


def test_driver_version_without_proc_comes_from_nvidia_smi(root):
    assert driver_version(root) is None
    add_nvidia_smi(root, "echo 551.23; echo 551.23")
    assert driver_version(root) == "551.23"


def test_check_no_gpu_accepts_machine_without_gpu(root):
    check_no_gpu("2.13.0", "13.0", root)
    check_no_gpu("2.13.0+cpu", None, root)
    add_nvidia_smi(root, "echo 'NVIDIA-SMI has failed'; exit 9")
    check_no_gpu("2.13.0", "13.0", root)


@pytest.mark.parametrize(
    "driver, cuda, visible, parts",
    [
        (OLD, "13.0", None, ["driver 535.104.05 is too old", "built for CUDA 13.0", "driver 580 or newer"]),
        (OLD, "12.8", None, ["driver 535.104.05", "cannot use it", "nvidia-smi"]),
        (NEW, None, None, ["2.13.0 is a build for CPUs only", "driver 580.65.06", "CUDA build of torch"]),
        (NEW, "13.0", "7", ["CUDA_VISIBLE_DEVICES=7", "nvidia-smi -L"]),
        (NEW, "13.0", None, ["driver 580.65.06", "--gpus all"]),
        ("", "13.0", None, ["driver (unknown version)"]),
    ],
)
def test_check_no_gpu_names_driver_and_remedy(root, monkeypatch, driver, cuda, visible, parts):
    load_driver(root, driver)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(UserError) as caught:
        check_no_gpu("2.13.0", cuda, root)
    assert all(part in str(caught.value) for part in [*parts, 'CUDA_VISIBLE_DEVICES=""'])


@pytest.mark.parametrize("sign", ["dev/nvidia0", "nvidia-smi"])
def test_check_no_gpu_sees_gpu_without_proc(root, sign):
    if sign == "nvidia-smi":
        add_nvidia_smi(root, '[ "$1" = -L ] && echo "GPU 0: NVIDIA A100 (UUID: GPU-1)" || echo 535.10')
    else:
        (root / sign).touch()
    with pytest.raises(UserError, match=r"535.10 is too old" if sign == "nvidia-smi" else "unknown version"):
        check_no_gpu("2.13.0", "13.0", root)


def test_choose_device_stops_unless_cpu_is_asked_for(monkeypatch):
    def check(*_):
        raise UserError("a GPU that torch cannot use")

    monkeypatch.setattr("promptkd.distributed.device.check_no_gpu", check)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("DS_ACCELERATOR")
    with pytest.raises(UserError, match="cannot use"):
        choose_device(0, DeviceSettings())
    for name, value in (("CUDA_VISIBLE_DEVICES", ""), ("CUDA_VISIBLE_DEVICES", "-1"), ("DS_ACCELERATOR", "cpu")):
        with monkeypatch.context() as environment:
            environment.setenv(name, value)
            assert choose_device(0, DeviceSettings()).type == "cpu"


@pytest.mark.parametrize("accelerator", ["xpu", "cuda"])
def test_choose_device_refuses_accelerator_that_is_missing(accelerator, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", accelerator)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UserError, match=f"DS_ACCELERATOR={accelerator}"):
        choose_device(0, DeviceSettings())


@pytest.mark.parametrize("local_rank, count, index", [(0, 1, 0), (3, 8, 3), (5, 1, 0)])
def test_local_device_of_rank(local_rank, count, index):
    assert local_device(local_rank, count) == index


def test_local_device_refuses_more_ranks_than_gpus():
    with pytest.raises(UserError, match=r"LOCAL_RANK=4, and 4 GPUs .*--nproc_per_node 4"):
        local_device(4, 4)


def test_check_own_gpus_refuses_ranks_that_share_one():
    store = dist.HashStore()
    with VirtualCuda():
        device = torch.device("cuda", 0)
        store.set("promptkd/gpu/0", "GPU-another")
        check_own_gpus(store, 1, 2, device)
        store.set("promptkd/gpu/0", f"virtual-{os.getpid()}")
        with pytest.raises(UserError, match="ranks 0 and 1 would use the same GPU"):
            check_own_gpus(store, 1, 2, device)


def test_choose_device_sets_tf32_both_ways(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        with VirtualCuda():
            for tf32 in (True, False):
                assert choose_device(0, DeviceSettings(tf32=tf32)) == torch.device("cuda", 0)
                assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (tf32, tf32)
                assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert os.environ.pop("PYTORCH_ALLOC_CONF") == "expandable_segments:True"
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
        torch.backends.cuda.enable_cudnn_sdp(True)


def test_choose_device_refuses_tf32_on_cpu():
    with pytest.raises(UserError, match="--tf32 needs an NVIDIA GPU"):
        choose_device(0, DeviceSettings(tf32=True))


def test_choose_device_deterministic_sets_algorithms_and_workspace(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    choose_device(0, DeviceSettings(deterministic=True))
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ.pop("CUBLAS_WORKSPACE_CONFIG") == ":4096:8"
    choose_device(0, DeviceSettings())
    assert not torch.are_deterministic_algorithms_enabled() and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(UserError, match="CUBLAS_WORKSPACE_CONFIG=:4096:8 or :16:8"):
        choose_device(0, DeviceSettings(deterministic=True))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_files_bound_their_buckets(path):
    zero = json.loads(path.read_text())["zero_optimization"]
    assert zero["stage"] == 0 or zero["reduce_bucket_size"] == 50_000_000


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_engine_of_a_prompt_takes_a_bucket_of_its_size(stage, tmp_path):
    """DeepSpeed's default of 5e8 elements would be 2 GB for a prompt of 7 embeddings."""
    argv = golden_argv("promptkd", tmp_path / "run", "--total-iters", "1", "--prompt-len", "7")
    trainer = build_trainer(resolve([*argv, "--deepspeed_config", zero_file(tmp_path, stage)]))
    for learner in trainer.method.learners().values():
        trained = sum(getattr(p, "ds_numel", p.numel()) for p in learner.module.parameters() if p.requires_grad)
        assert learner.engine.optimizer.reduce_bucket_size == trained
    trainer.checkpoints.unlock()
