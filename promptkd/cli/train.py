"""Distil a teacher into a student.

python train.py --method promptkd --model-path S --teacher-model-path T --data-dir D --save R      (one device)
torchrun --nproc_per_node 8 train.py ...                                                            (8 GPUs)
deepspeed --hostfile configs/hostfiles/two_nodes train.py ...                                       (several nodes)
"""

from __future__ import annotations

import sys

from promptkd.cli import program_name
from promptkd.config.options import DataSettings, DecodingSettings, ModelSettings, RunSettings, TrainingParallelSettings
from promptkd.config.parser import parse
from promptkd.distributed.device import DeviceSettings
from promptkd.errors import UserError
from promptkd.methods.registry import METHODS, method_class


def read_settings(argv: list[str]):
    """Settings in groups (run, device, models, data, optimizer, decoding, method_settings) and the method's name."""
    named = [value for flag, value in zip(argv, [*argv[1:], ""]) if flag == "--method"]
    named += [argument.partition("=")[2] for argument in argv if argument.startswith("--method=")]
    if not named and {"-h", "--help"} & set(argv):
        named = ["promptkd"]
        print(f"Options of --method promptkd. Choose another method to see its options: {', '.join(METHODS)}.\n")
    if not named or named[-1] not in METHODS:
        raise UserError(f"--method {named[-1] if named else 'is missing'}: choose one of {', '.join(METHODS)}")
    method = named[-1]
    kind = method_class(method)
    return parse(
        {
            "run": RunSettings,
            "device": DeviceSettings,
            "models": ModelSettings,
            "parallel": TrainingParallelSettings,
            "data": DataSettings,
            "optimizer": kind.OptimizerSettings,
            "decoding": DecodingSettings,
            "method_settings": kind.Settings,
        },
        argv,
        prog=program_name("train.py"),
        choice={"method": method},
    )


def main() -> None:
    settings = read_settings(sys.argv[1:])
    from promptkd.training.setup import build_trainer  # loads what a dry run does not need

    build_trainer(settings).fit()
