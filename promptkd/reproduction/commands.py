"""The commands of a reproduction: downloads, data, training, evaluation and the report of each size."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from promptkd.downloads.catalog import Item
from promptkd.reporting.results import METHOD_LABELS
from promptkd.reproduction.rows import FROM_BASE, Family, Row
from promptkd.reproduction.stages import Stage
from promptkd.utils.project import project_root

TEST_SETS = ("data/dolly", "data/self-inst", "data/vicuna", "data/sinst", "data/uinst")


@dataclass(frozen=True)
class Commands:
    """What all commands of a reproduction share.

    Attributes:
        base: The folder of checkpoints/, data/, processed_data/ and results/.
        catalog: The items that can be downloaded.
        gpus: Number of GPUs for training, None for the visible ones.
        checkpoint: Folder of a run that is evaluated.
        train_options, eval_options, generate_options: Options at the end of these scripts.
    """

    family: Family
    base: Path
    catalog: list[Item]
    gpus: int | None = None
    checkpoint: str = "best_rougeL"
    train_options: tuple[str, ...] = ()
    eval_options: tuple[str, ...] = ()
    generate_options: tuple[str, ...] = ()

    @property
    def base_path(self) -> str:
        """The base path as the scripts get it: short if it is the project's root."""
        return "." if self.base == project_root() else str(self.base)

    @property
    def shared(self) -> str:
        """Folder of what belongs to no row: the record, the teacher's answers and the reports."""
        return f"results/{self.family.name}/reproduce"

    def below(self, folder: str) -> str:
        return folder if self.base_path == "." else f"{self.base_path}/{folder}"

    def script(self, path: Path, *arguments: str) -> tuple[str, ...]:
        return ("bash", path.relative_to(project_root()).as_posix(), self.base_path, *arguments)

    def stages(self, rows: list[Row]) -> list[Stage]:
        """List the stages that make these rows, in order."""
        listed = [*self.downloads(rows), *self.data(rows)]
        for row in rows:
            listed += [self.train(row), self.evaluate(row.name, f"{row.run}/{self.checkpoint}", f"{row.run}/eval")]
        teacher = self.evaluate("teacher", self.family.teacher, f"{self.shared}/teacher")
        return [*listed, teacher, *self.reports(rows)]

    def downloads(self, rows: list[Row]) -> Iterator[Stage]:
        """Download models, test sets and corpus, one item after the other."""
        folders = {self.family.teacher: None}
        for row in rows:
            folders[_start(row)] = None
        keys = [*TEST_SETS, *([self.family.corpus] if any(row.needs_corpus for row in rows) else [])]
        for item in self.catalog:
            if item.key in keys or str(item.target) in folders:
                command = ("bash", "download_requirements.sh", "--only", item.key, "--base-path", str(self.base))
                folder = self.base / item.target
                yield Stage(
                    f"download {item.key}", command, tuple(folder / n for n in item.needs) or (folder,), (), True
                )

    def data(self, rows: list[Row]) -> Iterator[Stage]:
        """Turn texts into token files, and let teacher and student answer for the methods that need it."""
        family, tools, methods = self.family, self.family.scripts / "tools", {row.method for row in rows}
        processed, tokenizer = self.base / "processed_data/dolly", ("--tokenizer", self.below(family.teacher))
        kinds = ["full", *(["prompt"] if "minillm" in methods else [])]
        products = tuple(processed / kind / family.name / "train_0.bin" for kind in kinds)
        yield Stage("process", self.script(tools / "process_data_dolly.sh", *tokenizer), products, (), True)
        place = ("0", "" if self.gpus is None else str(self.gpus))
        if "seqkd" in methods:
            pseudo = processed / "pseudo" / f"{family.name}-{family.teacher_size}-sft" / "train_0.bin"
            script, answers = tools / "generate_data_seqkd.sh", self.base / f"results/{family.name}/gen/generated.jsonl"
            command = self.script(script, *place, family.teacher, *self.generate_options)
            if not pseudo.exists():
                yield Stage("generate-seqkd", command, (answers,))
            yield Stage("process-seqkd", self.script(tools / "process_data_pseudo.sh", *tokenizer), (pseudo,), (), True)
        for size in dict.fromkeys(row.size for row in rows if row.method == "distillm2"):
            pairs, script = processed / "distillm2" / f"{family.name}-{size}", tools / "generate_data_distillm2.sh"
            command = self.script(script, *place, family.start(size), *self.generate_options)
            yield Stage(f"generate-distillm2-{size}", command, (pairs / "train_0.bin",), (), True)

    def train(self, row: Row) -> Stage:
        """Train the student of a row. An interrupted run is resumed."""
        options = ["--save", self.below(row.run), "--resume", "auto"]
        if row.method in FROM_BASE:
            options += ["--model-path", self.below(_start(row))]
        if row.seed is not None:
            options += ["--seed", str(row.seed), "--seed-order", str(row.seed)]
            if row.method == "minillm":
                options += ["--seed-ppo", str(row.seed), "--seed-lm", str(row.seed)]
        place = ("0", "" if self.gpus is None else str(self.gpus))
        command = self.script(row.script, *place, *options, *self.train_options)
        folder = self.base / row.run
        return Stage(f"train-{row.name}", command, (folder / "last",))

    def evaluate(self, name: str, model: str, save: str) -> Stage:
        """Answer and score all test sets with a model."""
        options = ("--save", self.below(save), "--overwrite", *self.eval_options)
        command = self.script(self.family.scripts / "eval/run_eval.sh", model, *options)
        return Stage(f"evaluate-{name}", command, (self.base / save / "results.json",), (f"train-{name}",))

    def reports(self, rows: list[Row]) -> Iterator[Stage]:
        """Compare the students of each size."""
        for size in dict.fromkeys(row.size for row in rows):
            named = {_label(row): row for row in rows if row.size == size}
            baseline = next((label for label, row in named.items() if row.method == "sft"), next(iter(named)))
            save = f"{self.shared}/{size}"
            command = [sys.executable, "tools/report.py"]
            command += [f"{label}={self.below(row.run)}" for label, row in named.items()]
            command += ["--references", f"teacher={self.below(f'{self.shared}/teacher')}", "--baseline", baseline]
            command += ["--save", self.below(save), "--title", f"{self.family.name}-{size}: the paper's table"]
            after = ("evaluate-teacher", *(f"evaluate-{row.name}" for row in named.values()))
            yield Stage(f"report-{size}", tuple(command), (self.base / save / "report.md",), after)


def _start(row: Row) -> str:
    """Return the folder of the model that a row's training starts from."""
    return row.family.base_model(row.size) if row.method in FROM_BASE else row.family.start(row.size)


def _label(row: Row) -> str:
    return row.method if row.seed is None else f"{METHOD_LABELS.get(row.method, row.method)} seed {row.seed}"
