"""Distil a teacher into a student.

python train.py --method promptkd --model-path S --teacher-model-path T --data-dir D --save R      (one device)
torchrun --nproc_per_node 8 train.py ...                                                            (8 GPUs)
deepspeed --hostfile configs/hostfiles/two_nodes train.py ...                                       (several nodes)
"""

from __future__ import annotations

import sys

from promptkd.cli import program_name
from promptkd.config.option_file import config_arguments, split_config
from promptkd.config.options import DataSettings, DecodingSettings, ModelSettings, RunSettings, TrainingParallelSettings
from promptkd.config.parser import parse
from promptkd.distributed.device import DeviceSettings
from promptkd.errors import UserError
from promptkd.methods.registry import METHODS, method_class


def read_settings(argv: list[str]):
    """Settings in groups (run, device, models, data, optimizer, decoding, method_settings) and the method's name."""
    path, words = split_config(argv)
    words = [*(config_arguments(path) if path is not None else []), *words]
    named = [
        word.partition("=")[2] if "=" in word else after
        for word, after in zip(words, [*words[1:], ""])
        if word == "--method" or word.startswith("--method=")
    ]
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
