"""Compare trained and evaluated models: tables, curves, costs, answers side by side.

    python tools/report.py results/demo/{sft,kd,promptkd} --references results/demo/{teacher,start} \\
        --baseline sft --save results/demo

FOLDER is the --save folder of train.py or of evaluate.py. In a training folder, the results of evaluate.py are read
from "eval" and "exposure_bias". NAME=FOLDER gives a result another name than its folder's. The report consists of
report.md with curves.png, report.html and report.json in --save. The scores are printed.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from promptkd.cli import program_name
from promptkd.config.parser import parse
from promptkd.config.values import at_least, option
from promptkd.errors import UserError


@dataclass
class ReportSettings:
    """The options of the command."""

    references: list[str] | None = option(
        None, "result folders of models to show as references, such as the teacher and the initial student"
    )
    baseline: str | None = option(
        None, "name of the result that the others are compared with by paired bootstrap (default: none)"
    )
    mixed: bool = option(False, "allow results of different protocols, seeds or test sets in one table")
    save: str = option("results/report", "output folder")
    title: str = option("Comparison", "title of the report", nargs="+")
    samples: int = option(6, "number of examples of each test set whose answers are shown")

    def __post_init__(self) -> None:
        at_least(0, samples=self.samples)
        if Path(self.save).exists() and not Path(self.save).is_dir():
            raise UserError(f"--save {self.save} is a file: name a folder")


def main() -> None:
    """Write the report and print the scores."""
    folders = list(takewhile(lambda argument: not argument.startswith("-"), sys.argv[1:]))
    if not folders and not {"-h", "--help"} & set(sys.argv):  # The parser does not know the folders.
        raise UserError("result folders come first: report.py FOLDER... [options]; --help lists the options")
    argv = sys.argv[1 + len(folders) :]
    prog = f"{program_name('report.py')} FOLDER..."
    settings = parse({"options": ReportSettings}, argv, prog, dry_run=False, description=__doc__).options
    from promptkd.reporting.report import Contents, find_baseline, write_report
    from promptkd.reporting.results import check_comparable, read_result

    compared = [read_result(folder) for folder in folders]
    references = [read_result(folder) for folder in settings.references or []]
    check_comparable([*compared, *references], settings.mixed)
    baseline = find_baseline(settings.baseline, [*compared, *references])
    contents = Contents(settings.title, compared, references, baseline, settings.samples)
    print(write_report(contents, Path(settings.save)))
    print(f"\nwritten to {settings.save}/report.md, report.html and report.json")
