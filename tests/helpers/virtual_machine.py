"""Runs of train.py, evaluate.py and tools/generate.py on a virtual GPU (virtual_cuda.py).

A `VirtualMachine` is a process that imports the project once and forks for each rank of each run, so that a run takes
seconds and leaves nothing behind. The child enters a VirtualCuda and takes the script's own main path: options,
models, engines, loop, files. gloo stands in for NCCL.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent


@dataclass
class VirtualRun:
    """What one rank's run left.

    Args:
        status: Exit status. -1 after an exception that the script does not expect.
        output: What the run printed, a traceback included.
        phases: Phase -> launches, waits, collectives and peak bytes.
        waits: See `VirtualCuda.wait_lines`.
        facts: Arguments of the process group, the allocator's settings at that time, and the precisions of parameters.
    """

    status: int
    output: str
    phases: dict[str, dict[str, int]]
    waits: list[list]
    facts: dict[str, Any]

    def count(self, kind: str, phase: str) -> int:
        """Launches, waits or collectives of a phase and the phases inside it."""
        return sum(row[kind] for name, row in self.phases.items() if f"{name}/".startswith(f"{phase}/"))


class VirtualMachine:
    """A process that waits for runs."""

    def __init__(self) -> None:
        # DeepSpeed believes in CUDA from its import on.
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTORCH_")}
        environment |= {
            "DS_ACCELERATOR": "cuda",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{TESTS}:{TESTS / 'helpers'}:{ROOT}",
        }
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen([sys.executable, __file__], **pipes, text=True, cwd=ROOT, env=environment)

    def run(self, script: str, argv: list[str], ranks: int = 1, **how: Any) -> list[VirtualRun]:
        """Run a script with these options on all ranks; see `_child` for `how`."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            how["port"] = free.getsockname()[1]
        self.process.stdin.write(json.dumps({"script": script, "argv": argv, "ranks": ranks, **how}) + "\n")
        self.process.stdin.flush()
        return [VirtualRun(**answer) for answer in json.loads(self.process.stdout.readline())]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


def _serve() -> None:
    """Fork for each rank that a line of stdin asks for; answer with a line of JSON on stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _preload()
    for line in sys.stdin:
        wanted = json.loads(line)
        ranks = wanted.pop("ranks")
        children = [_fork(rank, ranks, wanted) for rank in range(ranks)]
        answers.write(json.dumps([_answer(*child) for child in children]) + "\n")
        answers.flush()
    os._exit(0)  # tearing the interpreter down takes seconds


def _fork(rank: int, ranks: int, wanted: dict[str, Any]) -> tuple[int, int]:
    """Start one rank. Returns its process and the pipe that its answer comes through."""
    reading, writing = os.pipe()
    process = os.fork()
    if process:
        os.close(writing)
        return process, reading
    os.close(reading)
    # Each process sees one GPU, as Slurm's tasks do, so the second rank's LOCAL_RANK is past the count.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    with os.fdopen(writing, "w") as pipe:
        json.dump(_child(**wanted), pipe)
    os._exit(0)


def _answer(process: int, reading: int) -> dict[str, Any]:
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    os.waitpid(process, 0)
    lost = {"status": -1, "output": "the process ended without an answer", "phases": {}, "waits": [], "facts": {}}
    return json.loads(text) if text else lost


def _preload() -> None:
    with contextlib.suppress(ImportError):
        importlib.import_module("bitsandbytes")  # it reads attributes that only a CUDA build of torch has
    for name in ("matplotlib.figure", "peft", "transformers.models.gpt2.modeling_gpt2", "torch"):
        importlib.import_module(name)
    from helpers.virtual_cuda import VirtualCuda

    sys.modules["torch"].set_num_threads(1)
    with VirtualCuda(ROOT):
        for name in ("deepspeed", "train", "evaluate", "promptkd.training.setup", "tools.generate"):
            importlib.import_module(name)
        importlib.import_module("promptkd.evaluation.exposure_bias")


def _child(
    script: str, argv: list[str], port: int, stop: int = 0, memory: int | None = None, bf16: bool = True, **environment
) -> dict[str, Any]:
    """One run. stop: The step in which SIGTERM comes. memory, bf16: As VirtualCuda's."""
    import torch.distributed as dist

    from helpers.virtual_cuda import VirtualCuda

    os.environ |= {"MASTER_PORT": str(port), **environment}
    facts: dict[str, Any] = {}
    join = dist.init_process_group

    def init_process_group(backend=None, device_id=None, **options):
        facts["process_group"] = {"backend": backend, "device_id": device_id and str(device_id)}
        facts["allocator"] = os.environ.get("PYTORCH_ALLOC_CONF")
        return join("gloo", **options)

    dist.init_process_group = init_process_group
    gpu, status = VirtualCuda(ROOT, memory=memory, bf16=bf16), 0
    output = tempfile.TemporaryFile("w+")  # noqa: SIM115 - for as long as the process lives
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    try:
        with gpu:
            _count_phases(gpu)
            _run(gpu, script, argv, stop, facts)
    except SystemExit as leaving:
        status = leaving.code or 0
    except BaseException:
        status = -1
        traceback.print_exc()
    with contextlib.suppress(Exception):
        dist.destroy_process_group()
    sys.stdout.flush()
    output.seek(0)
    return {
        "status": status,
        "output": output.read(),
        "phases": gpu.summary(),
        "waits": gpu.wait_lines(),
        "facts": facts,
    }


def _count_phases(gpu) -> None:
    """The phases that `--profile` shows are the device's, too."""
    import promptkd.utils.profiling as profiling

    class Phase(contextlib.ContextDecorator):
        def __init__(self, name: str) -> None:
            self.name = name.removeprefix(profiling.PHASE).removeprefix(profiling.PART)

        def __enter__(self) -> None:
            self.inner = gpu.phase(self.name)
            self.inner.__enter__()

        def __exit__(self, *raised) -> None:
            self.inner.__exit__(*raised)

    profiling.record_function = Phase


def _run(gpu, script: str, argv: list[str], stop: int, facts: dict[str, Any]) -> None:
    """A script's main path, with phases for what a run consists of."""
    from promptkd.errors import exit_with

    sys.argv = [f"{script}.py", *argv]
    exit_with(lambda: _train(gpu, argv, stop, facts) if script == "train" else _other(gpu, script))


def _other(gpu, script: str) -> None:
    import evaluate
    import tools.generate

    with gpu.phase(script):
        {"evaluate": evaluate.main, "generate": tools.generate.main}[script]()


def _train(gpu, argv: list[str], stop: int, facts: dict[str, Any]) -> None:
    from promptkd.training.setup import build_trainer
    from train import resolve

    with gpu.phase("build"):
        trainer = build_trainer(resolve(argv))
    for name in ("train_step", "evaluate", "maybe_checkpoint", "save", "measure_exposure_bias"):
        setattr(trainer, name, _in_phase(gpu, name, getattr(trainer, name), stop))
    parameters = [p for learner in trainer.method.learners().values() for p in learner.module.parameters()]
    assert {str(p.device) for p in parameters} == {"cuda:0"}
    facts["dtypes"] = sorted({str(p.dtype) for p in parameters})
    trainer.fit()


def _in_phase(gpu, name: str, method, stop: int):
    def call(*args):
        with gpu.phase("step" if name == "train_step" else name):
            if name == "train_step" and args[0] == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return method(*args)

    return call


if __name__ == "__main__":
    _serve()
