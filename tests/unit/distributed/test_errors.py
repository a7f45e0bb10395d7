"""Exit statuses and one line on stderr for memory that is used up and ranks that are lost."""

import errno
import sys

import pytest
import torch

from promptkd.errors import LESS_MEMORY, exit_with, is_out_of_memory
from promptkd.models.loading import load_causal_lm

HOST = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"
NCCL = "NCCL error in: NCCLUtils.cpp:77, remote process exited or there was a network error, NCCL version 2.28\n"


def run(error: BaseException, script: str, monkeypatch, capsys) -> tuple[int, str]:
    def main():
        raise error

    monkeypatch.setattr(sys, "argv", [script])
    with pytest.raises(SystemExit) as left:
        exit_with(main)
    return left.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    "error, place",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has"), "the GPU"),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), "the GPU"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "the GPU"),
        (RuntimeError("NCCL error in: x.cpp:1, unhandled cuda error\nCuda failure 2 'out of memory'"), "the GPU"),
        (RuntimeError(HOST), "this machine"),
        (MemoryError(), "this machine"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "this machine"),
    ],
)
@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_exit_with_out_of_memory_names_the_options(error, place, script, monkeypatch, capsys):
    status, text = run(error, script, monkeypatch, capsys)
    assert status == 1 and text == f"{script}: error: {place} has not enough memory: {LESS_MEMORY[script]}\n"


@pytest.mark.parametrize(
    "text",
    [
        NCCL
        + "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
        "NCCL communicator was aborted on rank 1.",
        "[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3) ran for 1800 milliseconds",
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:2",
        "[/gloo/transport/tcp/pair.cc] Read error [127.0.0.1]:1: Connection reset by peer",
    ],
)
def test_exit_with_lost_peer_is_one_line(text, monkeypatch, capsys):
    for kind in (RuntimeError, torch.distributed.DistBackendError):
        status, said = run(kind(text), "train.py", monkeypatch, capsys)
        assert status == 1 and said == "train.py: error: another rank has ended: its last line says why\n"


def test_exit_with_leaves_other_errors_alone(monkeypatch):
    def main():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        exit_with(main)
    assert not is_out_of_memory(ValueError("out of memory"))


def test_less_memory_names_existing_options():
    """Every option that an error names exists."""
    import evaluate
    import train
    from promptkd.cli import generate

    known = {"train.py": train, "evaluate.py": evaluate, "generate.py": generate}
    base = ["--model-path", "m", "--data-dir", "d"]
    for script, text in LESS_MEMORY.items():
        method = ["--method", "sft"] if script == "train.py" else []
        settings = known[script].read_settings([*base, *method])
        names = {name for group in vars(settings).values() if hasattr(group, "__dict__") for name in vars(group)}
        named = [word.strip(",.;()") for word in text.split() if word.startswith("--")]
        missing = [word for word in named if word[2:].replace("-", "_") not in names]
        assert missing in ([], ["--rollout-token-budget"])  # the latter comes with the rollouts' own limit


def test_load_causal_lm_passes_missing_memory_on(monkeypatch):
    """Memory that runs out while a model is loaded is no fault of the model's folder."""
    from helpers.training import GOLDEN

    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("promptkd.models.loading.AutoModelForCausalLM.from_pretrained", fail)
    with pytest.raises(torch.OutOfMemoryError):
        load_causal_lm(str(GOLDEN / "models/gpt2_student"), torch.float32, "--model-path")
