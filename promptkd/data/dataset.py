"""Examples as token ids, from published token files or straight from jsonl; both give the same examples.

promptkd/data/templates.py says what rows of jsonl look like, and how they become prompts.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from promptkd.data.encoding import TextEncoder
from promptkd.data.prompt_format import PromptFormat, template_of_prompts
from promptkd.data.reading import say, say_reading
from promptkd.data.row_counts import RowCounts
from promptkd.data.row_files import KINDS, find_rows, is_folder, named_files, read_rows
from promptkd.data.templates import reference_texts, template_of
from promptkd.data.token_check import doubt_about_text, doubt_about_tokens, format_of_file
from promptkd.data.token_file import TokenFile, split_row
from promptkd.errors import UserError
from promptkd.utils.jsonl import read_jsonl

MAKE = "run python tools/process_data.py instructions --raw RAW.jsonl --tokenizer MODEL"  # a folder of examples
_BATCH = 1024  # rows tokenised together
Pair = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Example:
    index: int  # row in its data set: names it in errors, seeds its sampling noise
    prompt: np.ndarray  # int64 token ids
    response: np.ndarray  # int64 token ids, the end (end-of-text, or a turn's) included; may be empty: prompts only


@dataclass
class ExampleSet:
    """The examples of one split: `len(examples)`, `examples[i]` -> Example.

    Attributes:
        rows: (prompt, response) ids of each example.
        references: The gold texts of each row, None where there are only token files.
        files: The files that were read.
        counts: What became of the rows.
        format: How the prompts were made.
        stale: One line where the token files are not those of the text beside them, else "".
        warning: One line where the token files may be another tokenizer's, else "".
        unread: Fields of the rows that were not read -> in how many rows.
    """

    rows: Sequence[Pair]
    references: list[list[str]] | None
    files: list[Path]
    counts: RowCounts = field(default_factory=RowCounts)
    format: PromptFormat = PromptFormat()
    stale: str = ""
    warning: str = ""
    unread: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        prompt, response = self.rows[index]
        return Example(int(index), prompt, response)

    def record(self) -> dict[str, Any]:
        """What became of the rows, for the run's record."""
        return self.counts.as_dict() | ({"fields_not_read": self.unread} if self.unread else {})

    @property
    def dropped(self) -> int:
        return self.counts.dropped

    @classmethod
    def open(
        cls,
        folder: str | Path,
        split: str,
        tokenizer,
        max_prompt_length: int,
        max_length: int,
        limit: int = -1,
        prompts_only: bool = False,
        as_text: bool = False,
        template: str = "published",
        option: str = "--data-dir",
        make: str = MAKE,
        special_tokens: str = "auto",
    ) -> ExampleSet:
        """Open `<split>_0.bin/.idx` in `folder`, or else its rows (row_files.py); the first `limit` examples (-1: all).

        `as_text` reads the rows even beside token files: with a folder of prompts it has the responses.
        `template` (promptkd.data.templates) makes the prompts of jsonl; token files have theirs already.
        `special_tokens` is the rule for prompts (promptkd.data.encoding); auto: a token file's own, else "own".

        Prompt and response together are cut to `max_length` tokens, as the published loader does. A prompt
        over `max_prompt_length` is an error in a token file (its maker drops them) and is left out of jsonl.
        A token row without a marker is text, its first token the prompt; with `prompts_only` it is a prompt.
        `option` named the folder and `make` says what makes one, for errors.
        Raises UserError naming file and row or line for whatever is missing or broken.
        """
        source, folder = folder, Path(folder)
        if not is_folder(source):
            raise UserError(f"{option} {folder}: no such folder: correct the path, or {make} --save {folder}")
        limits = _Limits(max_prompt_length, max_length, limit, prompts_only)
        prefix, text = folder / f"{split}_0", folder / f"{split}.jsonl"
        parts = [os.path.isfile(f"{prefix}{end}") for end in (".bin", ".idx")]
        if any(parts) and not as_text:
            _check_token_files(prefix, parts, template)
            unused = [f"{split}{kind}" for kind in KINDS[1:] if os.path.isfile(folder / f"{split}{kind}")]
            if unused:
                say(f"{prefix}.bin is read; {', '.join(unused)} beside it is not")
            return _from_tokens(prefix, text, tokenizer, limits, special_tokens)
        if (rows := find_rows(source, split)) is not None:
            return _from_rows(rows, tokenizer, limits, template, special_tokens)
        others = f", only {names}" if (names := named_files(folder)) else ""
        raise UserError(
            f"{option} {source}: neither {prefix.name}.bin/.idx nor {text.name} ({', '.join(KINDS[1:])}) is there"
            f"{others}: put {text.name} there, or {make} --save {folder}"
        )


@dataclass(frozen=True)
class _Limits:
    """Which rows of a file are read, and how much of them. See `ExampleSet.open`."""

    max_prompt_length: int
    max_length: int
    limit: int
    prompts_only: bool


def _check_token_files(prefix: Path, parts: list[bool], template: str) -> None:
    """Raise UserError when one of the two files is missing, or a template is asked for that they cannot follow."""
    if not all(parts):
        missing = ".idx" if parts[0] else ".bin"
        raise UserError(f"{prefix}{missing} is missing beside the other: process the data anew")
    if template != "published":
        raise UserError(
            f"{prefix}.bin: the prompts of a token file are ready: leave --template out (tools/process_data.py "
            f"instructions --template {template} makes such files)"
        )


def _from_tokens(prefix: Path, text: Path, tokenizer, limits: _Limits, special_tokens: str) -> ExampleSet:
    size = vocabulary_size(tokenizer)
    file = TokenFile(prefix, size)
    if (next_part := prefix.with_name(f"{prefix.name[:-1]}1.idx")).exists():
        raise UserError(f"{next_part}: only {prefix.name} is read: put all rows into one token file")
    count = len(file) if limits.limit < 0 else min(limits.limit, len(file))
    rows = _TokenRows(file, count, limits.max_length, limits.prompts_only)
    lengths = _check_prompt_lengths(file, count, limits.max_prompt_length, limits.prompts_only)
    over = file.row_lengths()[:count] - (lengths >= 0) > limits.max_length
    counts = RowCounts(count, shortened=int(over.sum()))
    rule, template = format_of_file(file, TextEncoder(tokenizer), limits.prompts_only)
    if special_tokens not in ("auto", rule, "published"):
        raise UserError(
            f"--special-tokens {special_tokens}: the prompts of {file.bin_path} are ready, their rule is {rule}: leave "
            f"it out, or process the data anew with --special-tokens {special_tokens}"
        )
    rule = "published" if special_tokens == "published" else rule
    examples = ExampleSet(rows, None, [file.bin_path, file.idx_path], counts, PromptFormat(template, rule))
    if os.path.isfile(text):
        texts = read_jsonl(text)
        examples.references = _references_beside(text, texts, file)[:count]
        examples.files.append(text)
        examples.stale = doubt_about_text(file, text, texts, tokenizer)
    else:
        examples.warning = doubt_about_tokens(file, tokenizer, size)
    if special_tokens == "auto" and rule == "none" and not examples.warning:
        examples.warning = (
            f"{file.bin_path}: its prompts have no special token in front, though this tokenizer adds one; evaluation "
            "of the trained model leaves it out, too"
        )
    return examples


def _from_rows(source: str, tokenizer, limits: _Limits, template: str, special_tokens: str) -> ExampleSet:
    path, render = Path(source), template_of(template, tokenizer)
    encoder = TextEncoder(tokenizer, "own" if special_tokens == "auto" else special_tokens)
    raw = read_rows(source)
    texts = [encoder.read(row, where, render) for where, row in raw]
    unread = say_reading(source, raw)
    rows: list[Pair] = []
    references: list[list[str]] = []
    counts = RowCounts()
    for first in range(0, len(texts), _BATCH):
        if limits.limit >= 0 and len(rows) == limits.limit:
            break
        batch = texts[first : first + _BATCH]
        for made, (_, gold) in zip(encoder.pairs([(prompt, gold[0]) for prompt, gold in batch]), batch):
            if limits.limit >= 0 and len(rows) == limits.limit:
                break
            if counts.take(made, limits.max_prompt_length, limits.max_length):
                rows.append(made.within(limits.max_length))
                references.append(gold)
    if not rows and limits.limit:
        raise UserError(
            f"{path}: all {counts.dropped} prompts are over --max-prompt-length {limits.max_prompt_length}: raise it"
        )
    shown = template_of_prompts(template, encoder, [prompt for prompt, _ in texts])
    return ExampleSet(rows, references, [path], counts, PromptFormat(shown, encoder.rule), unread=unread)


class _TokenRows(Sequence):
    """(prompt, response) of the first `count` rows of a token file, read when they are asked for."""

    def __init__(self, file: TokenFile, count: int, max_length: int, prompts_only: bool) -> None:
        self._file, self._count, self._max_length, self._prompts_only = file, count, max_length, prompts_only

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Pair:
        if not 0 <= index < self._count:
            raise IndexError(f"example {index} of {self._count}")
        row = self._file[index]
        if self._prompts_only and self._file.marker not in row:
            return row, row[:0]
        prompt, response = split_row(row, self._file.marker)
        return prompt, response[: max(self._max_length - len(prompt), 0)]


def _check_prompt_lengths(file: TokenFile, rows: int, most: int, whole: bool) -> np.ndarray:
    """Tokens before the marker in each row, -1 where there is none.

    UserError when one of the first `rows` prompts is over `most` tokens; `whole`: without marker all is prompt.
    """
    lengths = prompts = file.prompt_lengths(rows)
    if whole:
        prompts = np.where(lengths < 0, file.row_lengths()[:rows], lengths)
    if (over := np.flatnonzero(prompts > most)).size:
        raise UserError(
            f"{file.bin_path}, row {over[0]}: its prompt has {prompts[over[0]]} tokens, over --max-prompt-length "
            f"{most}: raise it, or process the data anew with --max-prompt-length {most}"
        )
    return lengths


def _references_beside(path: Path, texts: list[dict[str, Any]], file: TokenFile) -> list[list[str]]:
    """The gold texts in the jsonl beside a token file, row by row."""
    references = [reference_texts(row, f"{path}, line {n}") for n, row in enumerate(texts, 1)]
    if len(references) != len(file):
        raise UserError(
            f"{path} has {len(references)} rows, {file.bin_path.name} beside it {len(file)}: they must come from "
            "one run of tools/process_data.py; make both anew"
        )
    return references


def vocabulary_size(tokenizer) -> int:
    """One more than the tokenizer's largest token id (its ids may have gaps)."""
    return max(tokenizer.get_vocab().values()) + 1
