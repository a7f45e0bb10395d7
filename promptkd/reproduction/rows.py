"""The rows of the paper's table: which script trains each, and which folders it reads and writes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from promptkd.errors import UserError
from promptkd.utils.project import project_root

PAPER_METHODS = ("sft", "kd", "seqkd", "gkd", "minillm", "promptkd")
FROM_BASE = ("sft", "kd", "seqkd")  # start from the pre-trained model, the others from a fine-tuned student
PREPARATION = ("eval_main", "process", "generate", "run", "minillm_init", "ablation", "reproduce")


@dataclass(frozen=True)
class Family:
    """A model family. Folders are below the base path.

    Attributes:
        name: Folder of its scripts, and first part of its models' folders.
        teacher_size: Size of the teacher.
        corpus: Catalog key of the pre-training corpus.
    """

    name: str
    teacher_size: str
    corpus: str

    @property
    def scripts(self) -> Path:
        return project_root() / "scripts" / self.name

    @property
    def teacher(self) -> str:
        """Folder of the fine-tuned teacher."""
        return f"checkpoints/{self.name}/train/sft/{self.name}-{self.teacher_size}"

    def base_model(self, size: str) -> str:
        """Return the folder of a pre-trained model."""
        return f"checkpoints/{self.name}/{self.name}-{size}"

    def start(self, size: str) -> str:
        """Return the folder of a fine-tuned student, from which most methods start."""
        return f"checkpoints/{self.name}/train/minillm_init/{self.name}-{size}"

    def sizes(self) -> list[str]:
        """List the students' sizes, the smallest first."""
        order = {size: place for place, size in enumerate(("base", "medium", "large"))}
        found = [path.stem.split("_", 1)[1] for path in self.scripts.glob("promptkd/promptkd_*.sh")]
        return sorted(found, key=lambda size: (order.get(size, 0), size))

    def methods(self) -> list[str]:
        """List the methods that have a script for any size."""
        named = (re.fullmatch(r"(.+)_[^_]+", path.stem) for path in self.scripts.glob("*/*.sh"))
        return sorted({match[1] for match in named if match and not match[1].startswith(PREPARATION)})

    def script(self, method: str, size: str) -> Path | None:
        """Return the script that trains a student with a method, if there is one."""
        return next(self.scripts.glob(f"*/{method}_{size}.sh"), None)


FAMILIES = {
    "gpt2": Family("gpt2", "xlarge", "processed/openwebtext"),
    "opt": Family("opt", "13B", "processed/roberta-opt"),
    "llama": Family("llama", "13B", "processed/roberta-llama"),
}


class Row(NamedTuple):
    """A trained student of the table.

    Attributes:
        seed: Seed of the training run, None for the published seeds.
        script: The script that trains it.
    """

    family: Family
    method: str
    size: str
    seed: int | None
    script: Path

    @property
    def name(self) -> str:
        seed = "" if self.seed is None else f"-seed{self.seed}"
        return f"{self.method}-{self.size}{seed}"

    @property
    def run(self) -> str:
        """Folder of the training run."""
        family, seed = self.family, "" if self.seed is None else f"-seed{self.seed}"
        return f"results/{family.name}/train/{self.method}/{family.name}-{self.size}-{family.teacher_size}{seed}"

    @property
    def needs_corpus(self) -> bool:
        return "--lm-data-dir" in self.script.read_text(encoding="utf-8")


def make_rows(family: Family, methods: list[str], sizes: list[str], seeds: list[int | None]) -> list[Row]:
    """List the rows of a family, by size, method and seed.

    Raises:
        UserError: A size or method is unknown, or a method has no script for a size.
    """
    for size in sizes:
        if size not in family.sizes():
            raise UserError(f"--sizes {size}: choose from {', '.join(family.sizes())}")
    for method in methods:
        if method not in family.methods():
            raise UserError(f"--methods {method}: {family.name} has scripts for {', '.join(family.methods())}")
    named: dict[str, list[Any]] = {"--sizes": sizes, "--methods": methods, "--train-seeds": seeds}
    for option, values in named.items():
        if twice := next((value for value in values if values.count(value) > 1), None):
            raise UserError(f"{option} names {twice} twice: leave one out")
    rows = []
    for size in sizes:
        for method in methods:
            script = family.script(method, size)
            if script is None:
                raise UserError(f"--methods {method}: {family.name} has no script of it for {size}: leave it out")
            rows += [Row(family, method, size, seed, script) for seed in seeds]
    return rows
