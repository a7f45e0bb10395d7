"""Distill a teacher into a student.

python train.py --method promptkd --model-path S --teacher-model-path T --data-dir D --save R      (one device)
torchrun --nproc_per_node 8 train.py ...                                                            (8 GPUs)
deepspeed --hostfile configs/hostfiles/two_nodes train.py ...                                       (several nodes)
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from promptkd.cli import program_name
from promptkd.config import resolve as settings
from promptkd.config.resolve import RunConfig, RunOptions
from promptkd.distributed.device import device_type
from promptkd.methods.registry import method_class, method_names

if TYPE_CHECKING:
    from promptkd.training.trainer import Trainer


def resolve(argv: list[str], device: str | None = None) -> RunConfig:
    """Resolve a command line with the methods of the registry (see `promptkd.config.resolve.resolve`).

    Args:
        argv: The arguments.
        device: "cpu" or "cuda". The default is the device that the run would use here.
    """
    return settings.resolve(argv, method_class, lambda: device or device_type(), program_name("train.py"))


def read_settings(argv: list[str]) -> RunOptions:
    """Read a command line without the DeepSpeed files (see `promptkd.config.resolve.read_options`)."""
    return settings.read_options(argv, method_class, program_name("train.py"))


def main() -> None:
    """Train as the command line says."""
    argv = sys.argv[1:]
    if {"-h", "--help"} & set(argv) and not any(word.partition("=")[0] == "--method" for word in argv):
        print("Distill a teacher into a student. These are the options of --method promptkd.")
        print(f"To list the options of another method, add --method and one of: {', '.join(method_names())}.\n")
        argv = ["--method", "promptkd", *argv]
    config = resolve(argv)
    from promptkd.training.setup import build_trainer  # not needed, and slow to import, for a dry run

    trainer = build_trainer(config)
    trainer.fit()
    push_run(trainer, config)


def push_run(trainer: Trainer, config: RunConfig) -> None:
    """Push a finished run to the hub if --push-to-hub says so. One rank does."""
    if (repo := config.reporting.push_to_hub) and trainer.ranks.is_main:
        from promptkd.reporting.upload import push

        push(trainer.folder, repo, public=False, option="--push-to-hub")
