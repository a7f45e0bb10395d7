"""Convert a model from one tensor-parallel size to another, one tensor in memory at a time.

    python tools/convert_mp.py --input_path results/llama/13B --source_mp_size 4 --target_mp_size 1 --model_type llama

A model of size 1 is a Hugging Face folder: model.safetensors or pytorch_model.bin, or several files and an index.
A model of size N > 1 is mpN/model_0.safetensors ... or, like the published checkpoints, mpN/pytorch_model_0.bin ...
The output is written to the input folder, or to --output_path together with config.json and the tokenizer. It
appears when it is complete and its checksums are verified. A run that fails leaves nothing behind.
Exit status: 0 for success, 2 for bad input, with nothing written.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from promptkd.cli import CommandParser
from promptkd.weights.families import FAMILIES


def parallel_size(text: str) -> int:
    """Read a tensor-parallel size."""
    if not text.isdecimal() or not 1 <= int(text) <= 1024:
        raise argparse.ArgumentTypeError(f"{text} is not an integer from 1 to 1024")
    return int(text)


def model_type(text: str) -> str:
    """Map the published scripts' second name of llama to the first."""
    return {"llama2": "llama"}.get(text, text)


def build_parser() -> CommandParser:
    """Return the command's parser. Options are accepted with underscores, as published, and with hyphens."""
    parser = CommandParser("convert_mp.py", __doc__)
    parser.add_argument(
        "--input_path",
        "--input-path",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder with the weights, or with mp<N>/",
    )
    parser.add_argument(
        "--source_mp_size",
        "--source-mp-size",
        type=parallel_size,
        default=1,
        metavar="N",
        help="tensor-parallel size of the input (default: 1)",
    )
    parser.add_argument(
        "--target_mp_size",
        "--target-mp-size",
        type=parallel_size,
        required=True,
        metavar="N",
        help="tensor-parallel size of the output",
    )
    parser.add_argument(
        "--model_type",
        "--model-type",
        type=model_type,
        choices=tuple(FAMILIES),
        help="model family (default: the one in config.json)",
    )
    parser.add_argument(
        "--output_path", "--output-path", type=Path, metavar="DIR", help="output folder (default: --input_path)"
    )
    parser.add_argument(
        "--format", choices=("safetensors", "bin"), default="safetensors", help="file format (default: safetensors)"
    )
    parser.add_argument(
        "--dtype", choices=("keep", "fp16", "bf16", "fp32"), default="keep", help="output data type (default: keep)"
    )
    parser.add_argument("--half", dest="dtype", action="store_const", const="fp16", help="same as --dtype fp16")
    parser.add_argument(
        "--overwrite", "--exist_ok", "--exist-ok", action="store_true", help="replace an existing output"
    )
    return parser


def main() -> None:
    """Run the command."""
    args = build_parser().parse(sys.argv[1:])
    from promptkd.weights.convert import ConversionRequest, convert  # imported late: --help does not wait for torch

    print(convert(ConversionRequest(**vars(args))))
