"""Download the published checkpoints and data into checkpoints/, data/ and processed_data/.

    python tools/download.py --list                          all items and their state on this machine
    python tools/download.py --only gpt2/promptkd/base       one item or pattern; may be repeated
    python tools/download.py --models gpt2                   all checkpoints and bases of a family
    python tools/download.py --data                          all data sets
    python tools/download.py                                 everything: about 450 GB

A stopped download can be run again: complete files are kept, and an incomplete file starts again. Set HF_ENDPOINT to
use a mirror, HF_TOKEN for gated repositories, HF_HUB_OFFLINE=1 to use the local hub cache, and HTTPS_PROXY to use a
proxy. Exit status: 0 if all items are complete, 1 if some failed, 2 if nothing was started.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from promptkd.cli import CommandParser
from promptkd.downloads import catalog
from promptkd.errors import UserError
from promptkd.utils.project import CONFIGS, project_root


def parse(argv: list[str], items: list[catalog.Item]) -> argparse.Namespace:
    """Parse the command's arguments. The catalog's items give the choices of `--models`."""
    parser = CommandParser("download.py", __doc__)
    parser.add_argument("--list", action="store_true", help="list the items and their state, without network access")
    parser.add_argument(
        "--only", action="append", default=[], metavar="KEY", help="item, or pattern with * and ?. May be repeated"
    )
    parser.add_argument(
        "--models", nargs="+", default=[], choices=catalog.families(items), help="download all models of these families"
    )
    parser.add_argument("--data", action="store_true", help="download all raw and processed data sets")
    parser.add_argument(
        "--base-path",
        type=Path,
        default=project_root(),
        metavar="DIR",
        help="folder to download to (default: the checkout, or the working directory of an installed package)",
    )
    return parser.parse(argv)


def main() -> None:
    """Run the command."""
    items = catalog.load_catalog(CONFIGS / "downloads.json")
    args = parse(sys.argv[1:], items)
    if not args.base_path.is_dir():
        raise UserError(f"--base-path {args.base_path} is not a folder: create it first")
    items = catalog.select(items, args.only, args.models, args.data)
    if args.list:
        print(catalog.show(items, args.base_path))
        return
    from promptkd.downloads.run import download  # imported late, so that --list does not wait for torch

    try:
        failed = download(items, args.base_path)
    except KeyboardInterrupt:
        print("stopped; run the same command again to continue", file=sys.stderr)
        raise
    sys.exit(1 if failed else 0)
