#!/usr/bin/env python
"""Change the tensor-parallel size of a model: any size to any other, without loading the model.

    python tools/convert_mp.py --input_path results/llama/13B --source_mp_size 4 --target_mp_size 1 --model_type llama

Size 1 is an ordinary Hugging Face folder, DIR/model.safetensors or DIR/pytorch_model.bin (several files have an index).
Size N > 1 is DIR/mpN/model_0.safetensors ... or, as the published checkpoints have it, DIR/mpN/pytorch_model_0.bin ...
The output goes beside the input, or into --output_path together with config.json and the tokenizer. It appears when it
is complete and has been read back; nothing is left of a run that fails. Memory: some hundred MB, whatever the model.
Exit status: 0 done, 2 bad input and nothing written.
"""

from __future__ import annotations

import argparse
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from promptkd.errors import UserError, exit_with
from promptkd.option_values import check_arguments

MODEL_TYPES = ("opt", "llama", "mistral", "qwen2", "gpt2")


class Parser(argparse.ArgumentParser):
    """Options with underscores as published, or with hyphens; a bad one is one line."""

    def option(self, name: str, *others: str, **how: object) -> None:
        names = dict.fromkeys(spelt for each in (name, *others) for spelt in (each, each.replace("_", "-")))
        self.add_argument(*(f"--{each}" for each in names), **how)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def parse(self, argv: list[str]) -> argparse.Namespace:
        check_arguments(argv)
        args, unknown = self.parse_known_args(argv)
        if unknown:
            near = get_close_matches(unknown[0].partition("=")[0], self._option_string_actions, 1, 0)[0]
            raise UserError(f"{unknown[0]} is no option here; the nearest is {near}, --help shows all")
        return args


def size(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1024:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 to 1024")
    return int(text)


def model_type(text: str) -> str:
    return {"llama2": "llama"}.get(text, text)  # published scripts use both names


def build_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.option("input_path", type=Path, required=True, metavar="DIR", help="holds the weights, or mp<source>/")
    parser.option("source_mp_size", type=size, default=1, metavar="N", help="default: 1, a whole model")
    parser.option("target_mp_size", type=size, required=True, metavar="N", help="any size that cuts no head in two")
    parser.option("model_type", type=model_type, choices=MODEL_TYPES, help="default: what config.json says")
    parser.option("output_path", type=Path, metavar="DIR", help="default: beside the input")
    parser.option("format", choices=("safetensors", "bin"), default="safetensors", help="default: safetensors")
    parser.option(
        "dtype", choices=("keep", "fp16", "bf16", "fp32"), default="keep", help="of the output; default: keep"
    )
    parser.option("half", dest="dtype", action="store_const", const="fp16", help="the same as --dtype fp16")
    parser.option("overwrite", "exist_ok", action="store_true", help="replace an output that is there")
    return parser


def main() -> None:
    args = build_parser().parse(sys.argv[1:])
    from promptkd.weights.convert import Request, convert  # here, so that --help does not wait for torch

    print(convert(Request(**vars(args))))


if __name__ == "__main__":
    exit_with(main)
