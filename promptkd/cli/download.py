"""Download the published checkpoints and data into checkpoints/, data/ and processed_data/.

    python tools/download.py --list                          all items and their state on this machine
    python tools/download.py --only gpt2/promptkd/base       one item; may be repeated and hold * and ?
    python tools/download.py --models gpt2                   all checkpoints and bases of a family
    python tools/download.py --data                          all data sets
    python tools/download.py                                 everything: about 450 GB

May be stopped and run again: complete files are kept, an incomplete file starts again. Set HF_ENDPOINT for a
mirror, HF_TOKEN for gated repositories, HF_HUB_OFFLINE=1 to use this machine's hub cache, HTTPS_PROXY for a proxy.
Exit status: 0 if all items are complete, 1 if some failed, 2 if nothing was started.
"""

from __future__ import annotations

import argparse
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

from promptkd.cli import program_name
from promptkd.config.values import check_arguments
from promptkd.downloads import catalog
from promptkd.errors import UserError
from promptkd.utils.project import CONFIGS, project_root


class Parser(argparse.ArgumentParser):
    """A parser that reports errors in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def parse(self, argv: list[str]) -> argparse.Namespace:
        check_arguments(argv)
        args, unknown = self.parse_known_args(argv)
        if unknown:
            near = get_close_matches(unknown[0], self._option_string_actions, 1, 0)[0]
            raise UserError(f"{unknown[0]} is not an option; the nearest is {near}, --help shows all")
        return args


def parse(argv: list[str], items: list[catalog.Item]) -> argparse.Namespace:
    parser = Parser(
        prog=program_name("download.py"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--list", action="store_true", help="list the items and their state, without network")
    parser.add_argument("--only", action="append", default=[], metavar="KEY", help="item, or pattern of items")
    parser.add_argument(
        "--models", nargs="+", default=[], choices=catalog.families(items), help="all models of a family"
    )
    parser.add_argument("--data", action="store_true", help="all raw and processed data sets")
    parser.add_argument(
        "--base-path",
        type=Path,
        default=project_root(),
        metavar="DIR",
        help="default: the checkout, or the working directory where the package is installed",
    )
    return parser.parse(argv)


def main() -> None:
    items = catalog.load_catalog(CONFIGS / "downloads.json")
    args = parse(sys.argv[1:], items)
    if not args.base_path.is_dir():
        raise UserError(f"--base-path {args.base_path} is not a folder: create it first")
    items = catalog.select(items, args.only, args.models, args.data)
    if args.list:
        print(catalog.show(items, args.base_path))
        return
    from promptkd.downloads.run import download  # not at the top, so that --list starts fast

    try:
        failed = download(items, args.base_path)
    except KeyboardInterrupt:
        print("stopped; run the same command again to continue", file=sys.stderr)
        raise
    sys.exit(1 if failed else 0)
