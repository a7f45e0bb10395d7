"""Compare the answers of two result folders by a judge behind an OpenAI-compatible server.

    python tools/judge.py results/promptkd results/sft --base-url http://localhost:8000/v1 --model JUDGE

The two folders are the --save folders of train.py or of evaluate.py, as for report.py. Each pair of answers is judged
in both orders. OPENAI_API_KEY in the environment is sent as the key, if it is set. The same command continues an
interrupted comparison.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from promptkd.cli import program_name
from promptkd.config.parser import parse
from promptkd.config.values import at_least, option
from promptkd.errors import UserError
from promptkd.reporting.judge_server import JudgeServer


@dataclass
class JudgeSettings:
    """The options of the command that do not describe the server."""

    save: str = option("results/judge", "output folder")
    overwrite: bool = option(False, "replace replies of another comparison in --save")
    rows: int | None = option(None, "judge only the first N rows of each test set")
    mixed: bool = option(False, "allow results of different protocols, seeds or test sets")

    def __post_init__(self) -> None:
        at_least(1, rows=1 if self.rows is None else self.rows)


def main() -> None:
    """Judge all pairs and print the table."""
    folders = [argument for argument in sys.argv[1:3] if not argument.startswith("-")]
    if len(folders) != 2 and not {"-h", "--help"} & set(sys.argv):  # The parser does not know the folders.
        raise UserError("two result folders come first: judge.py FOLDER FOLDER [options]; --help lists the options")
    prog, groups = f"{program_name('judge.py')} FOLDER FOLDER", {"server": JudgeServer, "comparison": JudgeSettings}
    settings = parse(groups, sys.argv[1 + len(folders) :], prog, dry_run=False, description=__doc__)
    options = settings.comparison
    # Imported here because --help needs no model libraries.
    from promptkd.reporting.judge import judge, read_pairs
    from promptkd.reporting.results import check_comparable, read_result

    first, second = (read_result(folder) for folder in folders)
    check_comparable([first, second], options.mixed)
    pairs, save = read_pairs(first, second, options.rows), Path(options.save)
    print(judge((first, second), pairs, settings.server, save, options.overwrite))
    print(f"written to {save}/judge.md, judge.json and judgments.jsonl")
