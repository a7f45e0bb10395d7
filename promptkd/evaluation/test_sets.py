"""Find test sets, and read their prompts."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import regex

from promptkd.data.encoding import TextEncoder
from promptkd.data.prompt_format import PromptFormat, mismatch, template_of_prompts
from promptkd.data.row_files import digest_of_rows, find_rows, is_folder, is_hub
from promptkd.errors import UserError
from promptkd.utils.project import project_root

PROJECT = project_root()
FILE = "valid.jsonl"
SET_NAME = regex.compile(r"\w[\w.+-]*")  # of a folder, too; unlike re's, this \w includes the marks of letters
FOLDERS = {"dolly": "dolly", "self_inst": "self-inst", "vicuna": "vicuna", "sinst": "sinst/11_", "uinst": "uinst/11_"}
PUBLISHED_ROWS = {"dolly": 500, "self_inst": 242, "vicuna": 80, "sinst": 1694, "uinst": 10_000}
FIRST_ROWS = {"uinst": PUBLISHED_ROWS["uinst"]}  # its file has more; the paper's table uses these


def canonical(name: str) -> str:
    """Return a set's name for the names that published scripts give it, which are partly those of folders."""
    return {"sinst_11_": "sinst", "sinst_new_11_": "sinst", "uinst_11_": "uinst"}.get(name, name)


@dataclass(frozen=True)
class Missing:
    """A requested set that does not exist. `remedy` says how to get it."""

    name: str
    file: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.name}: {self.file} does not exist: {self.remedy}"


@dataclass(frozen=True)
class TestSet:
    """A test set.

    Attributes:
        prompts: int64 token ids of each row.
        references: The gold texts of each row.
        cut: Rows that lost part of the prompt.
        spelled: Rows whose prompt spells a special token, which stays text.
        format: Format of the prompts.
        responses: int64 token ids of each row's first reference with the token that ends it, empty if not asked for.
    """

    __test__ = False  # pytest must not collect it

    name: str
    path: Path
    prompts: list[np.ndarray]
    references: list[list[str]]
    cut: int
    spelled: int = 0
    format: PromptFormat = PromptFormat()
    responses: list[np.ndarray] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def published_rows(self) -> int | None:
        """Number of rows in the paper's table, or None for other sets."""
        return PUBLISHED_ROWS.get(canonical(self.name))

    @property
    def partial(self) -> bool:
        """Whether there are fewer rows than in the paper's table."""
        return self.published_rows is not None and len(self) < self.published_rows

    def note(self) -> str:
        """Describe rows that are cut or changed. The text is empty if there are none."""
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
    """Return the files of the named sets, and the sets that do not exist.

    Raises:
        UserError: `data_dir` or all sets are missing, or a name is invalid or occurs twice.
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
    files = {name: path for name in names if (path := _file(root, name, only=len(names) == 1))}
    lost = {name: str(root / FOLDERS.get(canonical(name), name) / FILE) for name in names if name not in files}
    if not files:
        others = "" if len(names) == 1 else f", nor is any of {', '.join(names[1:])}"
        problem = f"{names[0]}: {lost[names[0]]} does not exist{others}"
        raise UserError(f"--data-dir {root}: {problem}: {_remedy(root, names)}")
    return files, [Missing(name, file, _remedy(root, [name])) for name, file in lost.items()]


def read_set(
    name: str,
    path: Path,
    tokenizer,
    max_prompt_length: int,
    dev_num: int,
    cut_start: bool,
    template: str = "published",
    special_tokens: str = "own",
    max_length: int | None = None,
) -> TestSet:
    """Read and tokenize the first `dev_num` rows (-1: all, or FIRST_ROWS of the set).

    The prompts are those of training (promptkd.data.encoding). A longer prompt keeps its first max_prompt_length
    tokens, as in the published code (data_utils/prompt_datasets.py). With `cut_start` it keeps its last ones, and the
    special tokens in front. With `max_length`, each row's first reference is encoded, too. It is cut so that prompt and
    response have at most so many tokens, as in training.

    Raises:
        UserError: A row is broken.
    """
    encoder = TextEncoder(tokenizer, special_tokens)
    texts = encoder.read_source(path, template, dev_num if dev_num >= 0 else FIRST_ROWS.get(canonical(name), -1))
    marked = [text.prompt for text in texts]
    encoded = encoder.prompts(marked)
    if not all(encoded):
        raise UserError(f"{texts[encoded.index([])].where}: its prompt has no token: give it a text")
    over = sum(len(ids) > max_prompt_length for ids in encoded)
    prompts = [np.array(_cut(ids, max_prompt_length, cut_start, encoder.leading), dtype=np.int64) for ids in encoded]
    prompt_format = PromptFormat(template_of_prompts(template, encoder, marked), special_tokens)
    spelled = sum(map(encoder.specials.has_marks, marked))
    responses: list[np.ndarray] = []
    if max_length is not None:
        pairs = encoder.pairs([(text.prompt, text.references[0]) for text in texts])
        responses = [pair.response[: max_length - len(prompt)] for pair, prompt in zip(pairs, prompts)]
    references = [text.references for text in texts]
    return TestSet(name, path, prompts, references, over, spelled, prompt_format, responses)


def notes_on_sets(sets: list[TestSet], options: dict[str, str | None]) -> list[str]:
    """Describe rows that are cut or changed, and prompts unlike those of training.

    Args:
        sets: The sets that are evaluated.
        options: Option -> the path of the model that it names.
    """
    notes = [f"{each.name}: {note}" for each in sets if (note := each.note())]
    mismatches = (mismatch(each.format, path, option) for each in sets for option, path in options.items())
    return [*notes, *dict.fromkeys(f"warning: {line}" for line in mismatches if line)]


def _cut(ids: list[int], most: int, cut_start: bool, leading: list[int]) -> list[int]:
    if len(ids) <= most or not cut_start:
        return ids[:most]
    begin = leading if leading and ids[: len(leading)] == leading and len(leading) < most else []
    return begin + ids[len(ids) - most + len(begin) :]


def _file(root: Path, name: str, only: bool) -> Path | None:
    """Return a set's rows: in its published folder, in one of its own name, or in `root` for a single set."""
    published = FOLDERS.get(canonical(name), name)
    below = [] if is_hub(root) else [root / published, root / name]
    folders = [*below, *([root] if only else [])]
    path = next((rows for folder in folders if (rows := find_rows(folder, "test")) is not None), None)
    return None if path is None else Path(path)


def _remedy(root: Path, names: list[str]) -> str:
    """Return the command that downloads the published ones of the sets below `root`."""
    folders = [FOLDERS[canonical(name)] for name in names if canonical(name) in FOLDERS]
    if not folders:
        return "create it, or correct --data-names"
    items = " ".join(f"--only data/{folder.partition('/')[0]}" for folder in folders)
    command = f"bash download_requirements.sh {items}"
    sets = "the test sets" if len(folders) > 1 else "the test set"
    place, ends = root.absolute().as_posix(), ["/data", *(f"/data/{folder}" for folder in FOLDERS.values())]
    base = next((Path(place.removesuffix(end) or "/") for end in ends if place.endswith(end)), None)
    if base is None:  # not the layout of the downloads
        return f"{command} downloads {sets} into {PROJECT / 'data'}: then give that folder as --data-dir"
    where = "" if base.resolve() == PROJECT else f" --base-path {shlex.quote(str(base))}"
    return f"{command}{where} downloads {sets}"
