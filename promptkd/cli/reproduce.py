"""Reproduce the paper's table: download, train every row, evaluate it and compare.

    bash scripts/gpt2/reproduce.sh [base_path] --dry-run                print each command
    bash scripts/gpt2/reproduce.sh [base_path] --plan --gpu a100        memory and steps of each row
    bash scripts/gpt2/reproduce.sh [base_path] --sizes base --methods sft kd promptkd --train-seeds 1 2 3

May be stopped at any time. The same command continues: finished stages are kept, and training resumes from its newest
checkpoint. The reports are in results/<family>/reproduce/<size>. Options for the scripts are given in one word with an
equals sign: --train-options="--total-iters 100 --dev-num 50".
"""

from __future__ import annotations

import re
import shlex
import statistics
import sys
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Literal

from promptkd.cli import plan, program_name
from promptkd.config.parser import parse
from promptkd.config.values import at_least, option
from promptkd.downloads.catalog import load_catalog
from promptkd.errors import UserError
from promptkd.planning.hardware import GPUS
from promptkd.planning.show import plan_of
from promptkd.reproduction.commands import Commands
from promptkd.reproduction.rows import FAMILIES, PAPER_METHODS, Family, Row, make_rows
from promptkd.reproduction.stages import Record, run_stages
from promptkd.utils.jsonl import read_metrics
from promptkd.utils.project import CONFIGS, project_root
from promptkd.utils.strict_json import read_object
from promptkd.utils.tables import Table


@dataclass
class ReproductionSettings:
    """The options of the command."""

    methods: list[str] | None = option(None, f"methods; default: the paper's ({' '.join(PAPER_METHODS)})")
    sizes: list[str] | None = option(None, "sizes of the students; default: all of the family")
    train_seeds: list[int] | None = option(None, "train each row once per seed; default: once, with published seeds")
    gpus: int | None = option(None, "GPUs for training; default: the visible ones, for --plan the published number")
    checkpoint: Literal["best_rougeL", "best_loss", "last"] = option("best_rougeL", "student of a run to evaluate")
    dry_run: bool = option(False, "print each command and run none")
    plan: bool = option(False, "print memory and steps of each row, and GPU-hours of rows that have run")
    gpu: str = option("a100", "kind of GPU for --plan", choices=[*GPUS])
    train_options: str = option("", "options at the end of every training script")
    eval_options: str = option("", "options at the end of every evaluation")
    generate_options: str = option("", "options at the end of the scripts that let a model answer prompts")

    def __post_init__(self) -> None:
        at_least(0, train_seeds=min(self.train_seeds or [0]))
        at_least(1, gpus=1 if self.gpus is None else self.gpus)


def split_arguments(argv: list[str]) -> tuple[Family, Path, list[str]]:
    """Return the family and the base path, which come before the options, and the options."""
    words = list(takewhile(lambda argument: not argument.startswith("-"), argv))
    options = argv[len(words) :]
    if not words or words[0] not in FAMILIES or len(words) > 2:
        if {"-h", "--help"} & set(argv):
            return FAMILIES["gpt2"], project_root(), argv
        given, expected = " ".join(words) or "are missing", " or ".join(FAMILIES)
        raise UserError(f"arguments {given}: give {expected}, then the base path, then options")
    base = Path(words[1]) if len(words) == 2 else project_root()
    if not base.is_dir():
        raise UserError(f"base path {base}: no such folder: create it first")
    return FAMILIES[words[0]], base.resolve(), options


def split_options(name: str, text: str) -> tuple[str, ...]:
    """Split the options for a script as a shell does."""
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise UserError(f"--{name} {text}: {error}: correct its quotation marks") from None


def published_gpus(script: Path) -> int:
    """Return the number of GPUs that a training script is written for."""
    match = re.search(r"^published_gpus=(\d+)$", script.read_text(encoding="utf-8"), re.MULTILINE)
    return int(match[1]) if match else 1


def plan_text(rows: list[Row], settings: ReproductionSettings, base: Path) -> str:
    """Plan each row: GPUs, steps, memory, whether it fits, and GPU-hours if a run of it has measured its steps."""
    table = Table(["row", "GPUs", "steps", "peak GB", f"fits {settings.gpu}", "GPU-hours, measured"])
    notes = []
    for row in rows:
        gpus = settings.gpus or published_gpus(row.script)
        argv = ["--script", str(row.script), "--gpus", str(gpus), "--gpu", settings.gpu]
        figures = ["-", "-", "-"]
        try:
            if row.method == "minillm":
                raise UserError("MiniLLM cannot be planned")
            planned = plan_of(plan.make([*argv, *split_options("train-options", settings.train_options)])[0])
            fits = "yes" if planned["fits"] else "no"
            figures = [str(planned["steps"]), f"{planned['peak'] / 1e9:.1f}", fits]
        except UserError as error:
            notes.append(f"{row.name}: {error}")
        table.add(row.name, str(gpus), *figures, measured_hours(base / row.run))
    notes.append(
        "Memory is that of one GPU. GPU-hours are those of steps that were measured here, without evaluations."
    )
    return "\n".join([table.text(), *notes])


def measured_hours(run: Path) -> str:
    """Return the GPU-hours of a finished run's steps, evaluations excluded, or "-"."""
    metrics, memory = run / "metrics.jsonl", run / "memory.json"
    if not (metrics.is_file() and memory.is_file()):
        return "-"
    rows = [row for row in read_metrics(metrics) if "step_seconds" in row]
    ranks = len(read_object(memory, f"train.py --save {run} writes it").get("peak_memory_gb", []))
    seconds = statistics.mean(row["step_seconds"] for row in rows) * rows[-1]["step"] if rows else 0
    return f"{seconds * ranks / 3600:.2f}" if seconds and ranks else "-"


def main() -> None:
    """Print the plan or the commands, or run them."""
    family, base, options = split_arguments(sys.argv[1:])
    if {"-h", "--help"} & set(options):
        print(__doc__)
    program = f"{program_name('reproduce.py')} FAMILY [base_path]"
    settings = parse({"options": ReproductionSettings}, options, program, dry_run=False).options
    if not family.scripts.is_dir():
        raise UserError(f"{family.scripts}: no such folder: reproduce runs in a checkout of the project")
    rows = make_rows(
        family, settings.methods or [*PAPER_METHODS], settings.sizes or family.sizes(), settings.train_seeds or [None]
    )
    if settings.plan:
        print(plan_text(rows, settings, base))
        return
    commands = Commands(
        family, base, load_catalog(CONFIGS / "downloads.json"), settings.gpus, settings.checkpoint,
        train_options=split_options("train-options", settings.train_options),
        eval_options=split_options("eval-options", settings.eval_options),
        generate_options=split_options("generate-options", settings.generate_options),
    )  # fmt: skip
    stages = commands.stages(rows)
    record = Record(base / commands.shared / "stages.json", stages)
    if settings.dry_run:
        for stage in stages:
            print(f"# {stage.name}{' (done)' if record.is_done(stage) else ''}\n{stage}")
        return
    run_stages(stages, record)
    for stage in stages:
        if stage.name.startswith("report-"):
            print(f"{stage.name}: {stage.products[0]}")
