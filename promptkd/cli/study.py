"""Run a declared study: tune each method's rate on dev data, train several seeds, and compare.

    bash scripts/study/run.sh scripts/study/small.yaml --save results/study/small
    bash scripts/study/run.sh scripts/study/small.yaml --save results/study/small --plan

May be stopped at any time. The same command continues: finished runs are kept, and an interrupted training resumes.
The report is <save>/report.md with pictures, and the settings and scores of every run are in <save>/study.json.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from promptkd.cli import program_name
from promptkd.config.parser import parse
from promptkd.config.values import at_least, option
from promptkd.errors import UserError


@dataclass
class StudySettings:
    """The options of the command."""

    save: str = option("results/study", "folder of all models, runs and reports")
    only: str | None = option(None, "run one stage: prepare, timing, rates, or the name of an experiment")
    parallel: int = option(2, "number of runs at a time")
    plan: bool = option(False, "print the numbers of runs and the hours that are left, and run nothing")
    report: bool = option(False, "write the report on what is done, and run nothing")

    def __post_init__(self) -> None:
        at_least(1, parallel=self.parallel)
        if not self.save:
            raise UserError("--save is empty: name a folder")


def main() -> None:
    """Run the study, or print its plan, or write its report."""
    if not {"-h", "--help"} & set(sys.argv) and (len(sys.argv) < 2 or sys.argv[1].startswith("-")):
        raise UserError("the study's YAML file comes first, such as scripts/study/small.yaml")
    path, argv = (sys.argv[1], sys.argv[2:]) if not sys.argv[1].startswith("-") else ("", sys.argv[1:])
    prog = f"{program_name('study.py')} FILE"
    settings = parse({"options": StudySettings}, argv, prog, dry_run=False, description=__doc__).options
    from promptkd.study.declaration import read_study
    from promptkd.study.plan import plan_text
    from promptkd.study.report import write_report
    from promptkd.study.runner import Runner

    study = read_study(path, Path(settings.save).resolve())
    if settings.only not in (None, *study.stages):
        raise UserError(f"--only {settings.only}: {path} has the stages {', '.join(study.stages)}")
    if settings.plan:
        print(plan_text(study, settings.parallel))
        return
    if not settings.report:
        Runner(study, settings.parallel, settings.only).run()
    print(write_report(study))
