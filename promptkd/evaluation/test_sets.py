"""Test sets: where they lie, and their prompts."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import regex

from promptkd.data.encoding import TextEncoder
from promptkd.data.prompt_format import PromptFormat, mismatch, template_of_prompts
from promptkd.data.reading import say_reading
from promptkd.data.row_files import digest_of_rows, find_rows, is_folder, is_hub, read_rows
from promptkd.data.templates import template_of
from promptkd.errors import UserError
from promptkd.utils.project import project_root

PROJECT = project_root()
FILE = "valid.jsonl"
SET_NAME = regex.compile(r"\w[\w.+-]*")  # of a folder, too; unlike re's, this \w includes the marks of letters
FOLDERS = {"dolly": "dolly", "self_inst": "self-inst", "vicuna": "vicuna", "sinst": "sinst/11_", "uinst": "uinst/11_"}
PUBLISHED_ROWS = {"dolly": 500, "self_inst": 242, "vicuna": 80, "sinst": 1694, "uinst": 10_000}
FIRST_ROWS = {"uinst": PUBLISHED_ROWS["uinst"]}  # its file has more; the paper's table stands on these


def canonical(name: str) -> str:
    """The published scripts call sinst and uinst by their folders, and OPT's call sinst by an older one."""
    return {"sinst_11_": "sinst", "sinst_new_11_": "sinst", "uinst_11_": "uinst"}.get(name, name)


@dataclass(frozen=True)
class Missing:
    """A set that was asked for and is not there; `remedy` says how to get it."""

    name: str
    file: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.name}: {self.file} is not there: {self.remedy}"


@dataclass(frozen=True)
class TestSet:
    """A test set.

    Attributes:
        prompts: int64 token ids of each row.
        references: The gold texts of each row.
        cut: Rows that lost part of the prompt.
        spelled: Rows whose prompt spells a special token, which stays text.
        format: How the prompts were made.
    """

    __test__ = False  # pytest: no test, whatever its name

    name: str
    path: Path
    prompts: list[np.ndarray]
    references: list[list[str]]
    cut: int
    spelled: int = 0
    format: PromptFormat = PromptFormat()

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def published_rows(self) -> int | None:
        return PUBLISHED_ROWS.get(canonical(self.name))

    @property
    def partial(self) -> bool:
        """Fewer rows than the paper's table stands on."""
        return self.published_rows is not None and len(self) < self.published_rows

    def note(self) -> str:
        """What has to be said of the rows; empty where every row is used as it is."""
        parts = []
        if self.cut:
            parts.append(f"{self.cut:,} lose part of the prompt (over --max-prompt-length, see --prompt-cut)")
        if self.spelled:
            parts.append(f"{self.spelled:,} spell a special token, which stays text (see --special-tokens)")
        return f"of {len(self):,} rows {', '.join(parts)}" if parts else ""

    def record(self) -> dict[str, Any]:
        """Describe the rows for results.json."""
        return {
            "file": str(self.path),
            "sha256": digest_of_rows(self.path),
            "rows": len(self),
            "rows_cut": self.cut,
            "rows_spelling_special_tokens": self.spelled,
            "published_rows": self.published_rows,
            "partial": self.partial,
        }


def find_sets(data_dir: str, names: list[str]) -> tuple[dict[str, Path], list[Missing]]:
    """The files of the named sets, and the sets that are not there.

    Raises UserError when `data_dir` or all sets are missing, or a name is unfit or occurs twice.
    """
    root = Path(data_dir)
    seen: set[str] = set()
    for name in names:
        if not SET_NAME.fullmatch(name):
            raise UserError(f"--data-names {name}: a set's name is the name of its folder, without path")
        if canonical(name) in seen:
            raise UserError(f"--data-names names {name} twice: leave one out")
        seen.add(canonical(name))
    if not is_folder(root):
        raise UserError(f"--data-dir {root}: no such folder: correct it, or: {_remedy(root, names)}")
    found = {name: path for name in names if (path := _file(root, name, alone=len(names) == 1))}
    files = {name: str(root / FOLDERS.get(canonical(name), name) / FILE) for name in names if name not in found}
    if not found:
        others = "" if len(names) == 1 else f", nor is any of {', '.join(names[1:])}"
        lost = f"{names[0]}: {files[names[0]]} is not there{others}"
        raise UserError(f"--data-dir {root}: {lost}: {_remedy(root, names)}")
    return found, [Missing(name, file, _remedy(root, [name])) for name, file in files.items()]


def read_set(
    name: str,
    path: Path,
    tokenizer,
    max_prompt_length: int,
    dev_num: int,
    cut_start: bool,
    template: str = "published",
    special_tokens: str = "own",
) -> TestSet:
    """Read and tokenize the first `dev_num` rows (-1: all, or FIRST_ROWS of the set).

    The prompts are those of training (promptkd.data.encoding). Of a longer prompt the first max_prompt_length tokens
    are kept, as in the published code (data_utils/prompt_datasets.py); `cut_start` keeps the end, and the special
    tokens in front.

    Raises:
        UserError: A row is broken; the line names file and line.
    """
    rows = read_rows(path)
    if dev_num < 0:
        dev_num = FIRST_ROWS.get(canonical(name), len(rows))
    render, encoder = template_of(template, tokenizer), TextEncoder(tokenizer, special_tokens)
    texts = [encoder.read(row, where, render) for where, row in rows[:dev_num]]
    say_reading(path, rows[:dev_num])
    marked = [prompt for prompt, _ in texts]
    encoded = encoder.prompts(marked)
    if not all(encoded):
        raise UserError(f"{rows[encoded.index([])][0]}: its prompt has no token: give it a text")
    over = sum(len(ids) > max_prompt_length for ids in encoded)
    prompts = [np.array(_cut(ids, max_prompt_length, cut_start, encoder.leading), dtype=np.int64) for ids in encoded]
    made = PromptFormat(template_of_prompts(template, encoder, marked), special_tokens)
    spelled = sum(map(encoder.specials.has_marks, marked))
    return TestSet(name, path, prompts, [references for _, references in texts], over, spelled, made)


def notes_on_sets(sets: list[TestSet], options: dict[str, str | None]) -> list[str]:
    """What has to be said of test sets: rows that are not used as they are, prompts unlike those of training.

    Args:
        sets: The sets that are evaluated.
        options: Option -> the path of the model that it names.
    """
    notes = [f"{each.name}: {note}" for each in sets if (note := each.note())]
    unlike = (mismatch(each.format, path, option) for each in sets for option, path in options.items())
    return [*notes, *dict.fromkeys(f"warning: {line}" for line in unlike if line)]


def _cut(ids: list[int], most: int, cut_start: bool, leading: list[int]) -> list[int]:
    if len(ids) <= most or not cut_start:
        return ids[:most]
    begin = leading if leading and ids[: len(leading)] == leading and len(leading) < most else []
    return begin + ids[len(ids) - most + len(begin) :]


def _file(root: Path, name: str, alone: bool) -> Path | None:
    """A set's rows: in its published folder, in one of its own name, or in `root` if no other set is asked for."""
    published = FOLDERS.get(canonical(name), name)
    below = [] if is_hub(root) else [root / published, root / name]
    folders = [*below, *([root] if alone else [])]
    found = next((rows for folder in folders if (rows := find_rows(folder, "test")) is not None), None)
    return None if found is None else Path(found)


def _remedy(root: Path, names: list[str]) -> str:
    """The command that gets those of the sets that are published, into the folders below which `root` lies."""
    folders = [FOLDERS[canonical(name)] for name in names if canonical(name) in FOLDERS]
    if not folders:
        return "put it there, or correct --data-names"
    items = " ".join(f"--only data/{folder.partition('/')[0]}" for folder in folders)
    command = f"bash download_requirements.sh {items}"
    place, ends = root.absolute().as_posix(), ["/data", *(f"/data/{folder}" for folder in FOLDERS.values())]
    base = next((Path(place.removesuffix(end) or "/") for end in ends if place.endswith(end)), None)
    if base is None:  # no layout that the downloads know
        return f"{command} gets what is published into {PROJECT / 'data'}: name that folder as --data-dir"
    where = "" if base.resolve() == PROJECT else f" --base-path {shlex.quote(str(base))}"
    return f"{command}{where} gets what is published"
