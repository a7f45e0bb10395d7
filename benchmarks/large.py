"""A PromptKD step at the paper's GPT-2 base <- XL sizes (124M <- 1.5B, random weights) on a CPU, in bfloat16.

    python benchmarks/large.py [--window 8] [--response 64] [--precision bf16] [--folder DIR: where 7 GB are free]

Prints one JSON line: seconds and tokens of each of two steps, peak memory in GB.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from scaling import ROOT, make_models, train

SHAPES = {
    "student": {"n_layer": 12, "n_embd": 768, "n_head": 12},
    "teacher": {"n_layer": 48, "n_embd": 1600, "n_head": 25},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "tests/golden/models/gpt2_student")
    parser.add_argument("--window", type=int, default=8)
    parser.add_argument("--response", type=int, default=64)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--folder", help="for the models, while it runs")
    o = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=o.folder) as place:
        make_models(Path(place), o.tokenizer, 50257, SHAPES)
        rows, peak = train(Path(place), o.window, o.response, o.precision, steps=2)
    told = {key: [row[key] for row in rows] for key in ("step_seconds", "response_tokens")}
    print(json.dumps({**told, "peak_gb": peak}))


if __name__ == "__main__":
    main()
