"""Test sets: where they lie, and their prompts as the published evaluation tokenises them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from promptkd.data.reading import say_reading
from promptkd.data.row_files import digest_of_rows, find_rows, is_folder, is_hub, read_rows
from promptkd.data.templates import prompt_and_references, template_of
from promptkd.errors import UserError

PROJECT = Path(__file__).resolve().parents[2]
FILE = "valid.jsonl"
SET_NAME = r"\w[\w.+-]*"  # it is a folder's, too
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
    """prompts: int64 token ids of each row; references: its gold texts; cut: rows that lost part of the prompt."""

    __test__ = False  # pytest: no test, whatever its name

    name: str
    path: Path
    prompts: list[np.ndarray]
    references: list[list[str]]
    cut: int

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def published_rows(self) -> int | None:
        return PUBLISHED_ROWS.get(canonical(self.name))

    @property
    def partial(self) -> bool:
        """Fewer rows than the paper's table stands on."""
        return self.published_rows is not None and len(self) < self.published_rows

    def sha256(self) -> str:
        return digest_of_rows(self.path)


def find_sets(data_dir: str, names: list[str]) -> tuple[dict[str, Path], list[Missing]]:
    """The files of the named sets, and the sets that are not there.

    Raises UserError when `data_dir` or all sets are missing, or a name is unfit or occurs twice.
    """
    root = Path(data_dir)
    seen: set[str] = set()
    for name in names:
        if not re.fullmatch(SET_NAME, name):
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
) -> TestSet:
    """Read and tokenise the first `dev_num` rows (-1: all, or FIRST_ROWS of the set).

    Special tokens included, the first max_prompt_length tokens kept (evaluate_main.py, data_utils/prompt_datasets.py
    of the published code); `cut_start` keeps the end and a leading begin-of-text. A chat template brings all special
    tokens itself. UserError names file and line.
    """
    rows = read_rows(path)
    if dev_num < 0:
        dev_num = FIRST_ROWS.get(canonical(name), len(rows))
    render = template_of(template, tokenizer)
    texts = [prompt_and_references(row, where, render) for where, row in rows[:dev_num]]
    say_reading(path, rows[:dev_num])
    special = template != "chat"
    encoded = tokenizer([prompt for prompt, _ in texts], add_special_tokens=special, verbose=False)["input_ids"]
    if not all(encoded):
        raise UserError(f"{rows[encoded.index([])][0]}: its prompt has no token: give it a text")
    over = sum(len(ids) > max_prompt_length for ids in encoded)
    prompts = [np.array(_cut(ids, max_prompt_length, cut_start, tokenizer), dtype=np.int64) for ids in encoded]
    return TestSet(name, path, prompts, [references for _, references in texts], over)


def _cut(ids: list[int], most: int, cut_start: bool, tokenizer) -> list[int]:
    if len(ids) <= most or not cut_start:
        return ids[:most]
    begin = ids[: int(ids[0] == tokenizer.bos_token_id and most > 1)]
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
