"""Print the table of benchmarks/gpu.sh: `python benchmarks/gpu_table.py ROWS TEST_LOG [--markdown FILE]`."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
from pathlib import Path

import torch
import transformers
from gpu_common import ROOT

from promptkd.utils.tables import Table


def heading() -> str:
    """Name the card, the versions and the commit."""
    card = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    return f"{card}, torch {torch.__version__}, transformers {transformers.__version__}, commit {commit}"


def tests_row(log: Path) -> str:
    """Return pytest's last words, such as "120 passed, 2 skipped in 60 s"."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    ends = re.findall(r"^=* ?((?:\d+ \w+(?:, )?)+ in [\d.]+s.*?)=*$", text, re.MULTILINE)
    return ends[-1].strip() if ends else "not run or not finished"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path)
    parser.add_argument("tests", type=Path)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    table = Table(["measurement", "this project", "others and parts"])
    table.texts = 3
    table.add("tests/gpu", tests_row(args.tests))
    lines = args.rows.read_text(encoding="utf-8").splitlines() if args.rows.exists() else []
    for row in map(json.loads, lines):
        others = [f"{name} {value:,.4g}" for name, value in row["others"].items()]
        table.add(row["what"], f"{row['ours']:,.4g} {row['unit']}", "; ".join(others))
    if args.markdown:
        args.markdown.write_text(f"{heading()}\n\n{table.markdown()}\n", encoding="utf-8")
    print(heading())
    print(table.text())


if __name__ == "__main__":
    main()
