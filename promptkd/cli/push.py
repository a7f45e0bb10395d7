"""Push a run's model, adapter or soft prompt to the Hugging Face hub, with a model card.

    promptkd push results/run --to user/name          the best model: best_rougeL, else best_loss, else last
    promptkd push results/run/prompt --to user/name   another folder of the run

The environment variable HF_TOKEN holds a token that may write. A repository that does not exist is created, and only
its owner can read it unless --public is given. An interrupted push can be run again.
"""

from __future__ import annotations

import sys
from pathlib import Path

from promptkd.cli import CommandParser


def main() -> None:
    """Run the command."""
    parser = CommandParser("push.py", __doc__)
    parser.add_argument("path", type=Path, metavar="RUN", help="the --save folder of train.py, or a folder in it")
    parser.add_argument("--to", required=True, metavar="NAME", help="the repository, such as user/name")
    parser.add_argument("--public", action="store_true", help="let anyone read a repository that is created")
    args = parser.parse(sys.argv[1:])
    from promptkd.reporting.upload import push  # slow to import

    push(args.path, args.to, args.public, "promptkd push")
