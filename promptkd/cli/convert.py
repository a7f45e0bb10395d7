"""Convert a model from one tensor-parallel size to another, one tensor in memory at a time.

    python tools/convert_mp.py --input_path results/llama/13B --source_mp_size 4 --target_mp_size 1 --model_type llama

Size 1 is a Hugging Face folder with DIR/model.safetensors or DIR/pytorch_model.bin, or several files and an index.
Size N > 1 is DIR/mpN/model_0.safetensors ... or, like the published checkpoints, DIR/mpN/pytorch_model_0.bin ...
The output is written into the input folder, or into --output_path together with config.json and the tokenizer. It
appears when it is complete and its checksums are verified. A run that fails leaves nothing behind.
Exit status: 0 for success, 2 for bad input, with nothing written.
"""

from __future__ import annotations

import argparse
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from promptkd.cli import program_name
from promptkd.config.values import check_arguments
from promptkd.errors import UserError
from promptkd.weights.families import FAMILIES


class Parser(argparse.ArgumentParser):
    """A parser that accepts options with underscores, as published, or hyphens, and reports errors in one line."""

    def option(self, *names: str, **settings: Any) -> None:
        """Add an option in both spellings."""
        spellings = dict.fromkeys(spelling for name in names for spelling in (name, name.replace("_", "-")))
        self.add_argument(*(f"--{spelling}" for spelling in spellings), **settings)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def parse(self, argv: list[str]) -> argparse.Namespace:
        check_arguments(argv)
        args, unknown = self.parse_known_args(argv)
        if unknown:
            near = get_close_matches(unknown[0].partition("=")[0], self._option_string_actions, 1, 0)[0]
            raise UserError(f"{unknown[0]} is not an option; the nearest is {near}, --help shows all")
        return args


def size(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1024:
        raise argparse.ArgumentTypeError(f"{text} is not an integer from 1 to 1024")
    return int(text)


def model_type(text: str) -> str:
    """Map the published scripts' second name of llama to the first."""
    return {"llama2": "llama"}.get(text, text)


def build_parser() -> Parser:
    parser = Parser(
        prog=program_name("convert_mp.py"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.option("input_path", type=Path, required=True, metavar="DIR", help="folder with the weights or with mp<N>/")
    parser.option("source_mp_size", type=size, default=1, metavar="N", help="size of the input (default: 1)")
    parser.option("target_mp_size", type=size, required=True, metavar="N", help="size of the output")
    parser.option("model_type", type=model_type, choices=tuple(FAMILIES), help="family (default: config.json's)")
    parser.option("output_path", type=Path, metavar="DIR", help="folder of the output (default: --input_path)")
    parser.option(
        "format",
        choices=("safetensors", "bin"),
        default="safetensors",
        help="default: safetensors",
    )
    parser.option(
        "dtype", choices=("keep", "fp16", "bf16", "fp32"), default="keep", help="dtype of the output (default: keep)"
    )
    parser.option("half", dest="dtype", action="store_const", const="fp16", help="same as --dtype fp16")
    parser.option("overwrite", "exist_ok", action="store_true", help="replace an existing output")
    return parser


def main() -> None:
    args = build_parser().parse(sys.argv[1:])
    from promptkd.weights.convert import (
        GenerationRequest,
        convert,
    )  # not at the top, so that --help does not wait for torch

    print(convert(GenerationRequest(**vars(args))))
