"""Compare trained and evaluated models: tables, curves, costs, answers side by side.

    python tools/report.py results/demo/{sft,kd,promptkd} --references results/demo/{teacher,start} \
        --baseline sft --save results/demo

A folder holds what train.py --save wrote, with the results of evaluate.py in its folder "eval", or what evaluate.py
--save wrote. Exposure bias is expected in its folder "exposure_bias". NAME=FOLDER gives a result a name other than its
folder's. The report consists of report.md with curves.png, report.html and report.json below --save. The scores are
printed.
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

    references: list[str] | None = option(None, "folders of models shown as reference lines, such as teacher and start")
    baseline: str | None = option(None, "name of the result that the others are compared to by paired bootstrap")
    mixed: bool = option(False, "allow results of different protocols, seeds or test sets in one table")
    save: str = option("results/report", "folder to write to")
    title: str = option("Comparison", "the report's heading", nargs="+")
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
    settings = parse({"options": ReportSettings}, argv, f"{program_name('report.py')} FOLDER...", dry_run=False).options
    from promptkd.reporting.report import Contents, find_baseline, write_report
    from promptkd.reporting.results import check_comparable, read_result

    compared = [read_result(folder) for folder in folders]
    references = [read_result(folder) for folder in settings.references or []]
    check_comparable([*compared, *references], settings.mixed)
    baseline = find_baseline(settings.baseline, [*compared, *references])
    contents = Contents(settings.title, compared, references, baseline, settings.samples)
    print(write_report(contents, Path(settings.save)))
    print(f"\nwritten to {settings.save}/report.md, report.html and report.json")
