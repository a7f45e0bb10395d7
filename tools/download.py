#!/usr/bin/env python
"""Download the published checkpoints and data into checkpoints/, data/ and processed_data/.

    python tools/download.py --list                          what there is, and what of it is here
    python tools/download.py --only gpt2/promptkd/base       one item; may be repeated, may hold * and ?
    python tools/download.py --models gpt2                   all checkpoints and bases of a family
    python tools/download.py --data                          all data sets
    python tools/download.py                                 everything: about 450 GB

Asks nothing. May be stopped and started again. HF_ENDPOINT (a mirror), HF_TOKEN, HF_HUB_OFFLINE=1 (take what
this machine's hub cache holds) and HTTPS_PROXY are honoured. Exit status: 0 all complete, 1 some items
failed, 2 nothing was begun.
"""

from __future__ import annotations

import argparse
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from promptkd.downloads import table
from promptkd.errors import UserError, exit_with
from promptkd.option_values import check_arguments


class Parser(argparse.ArgumentParser):
    """One line for a bad option, as everywhere in this project."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def parse(self, argv: list[str]) -> argparse.Namespace:
        check_arguments(argv)
        args, unknown = self.parse_known_args(argv)
        if unknown:
            near = get_close_matches(unknown[0], self._option_string_actions, 1, 0)[0]
            raise UserError(f"{unknown[0]} is no option here; the nearest is {near}, --help shows all")
        return args


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--list", action="store_true", help="show the items and what is there; needs no network")
    parser.add_argument("--only", action="append", default=[], metavar="KEY", help="an item, or a pattern of items")
    parser.add_argument("--models", nargs="+", default=[], choices=table.FAMILIES, help="all models of a family")
    parser.add_argument("--data", action="store_true", help="all data sets, raw and processed")
    parser.add_argument("--base-path", type=Path, default=ROOT, metavar="DIR", help="default: this project's folder")
    return parser.parse(argv)


def main() -> None:
    args = parse(sys.argv[1:])
    if not args.base_path.is_dir():
        raise UserError(f"--base-path {args.base_path} is no folder: make it first")
    items = table.select(table.load_table(ROOT / "configs/downloads.json"), args.only, args.models, args.data)
    if args.list:
        print(table.show(items, args.base_path))
        return
    from promptkd.downloads.run import download  # here, so that --list needs none of its packages

    try:
        failed = download(items, args.base_path)
    except KeyboardInterrupt:
        print("stopped; the same command continues where it was", file=sys.stderr)
        raise
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    exit_with(main)
