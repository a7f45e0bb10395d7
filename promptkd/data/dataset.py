"""Examples as token ids, from token files or from rows of text; both give the same examples.

The way of a text file: `row_files` reads rows, `rows` gives each a prompt (`templates` with --template chat),
`encoding` makes token ids, and an `ExampleSet` holds them. `batching` makes micro-batches of examples.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from promptkd.data.encoding import RowCounts, TextEncoder
from promptkd.data.prompt_format import (
    PromptFormat,
    doubt_about_text,
    doubt_about_tokens,
    format_of_file,
    template_of_prompts,
)
from promptkd.data.row_files import KINDS, find_rows, is_folder, named_files, say
from promptkd.data.rows import reference_texts
from promptkd.data.special_tokens import Tokenizer
from promptkd.data.token_file import Ids, TokenFile, split_row
from promptkd.errors import UserError
from promptkd.utils.jsonl import read_jsonl

MAKE = "run python tools/process_data.py instructions --raw RAW.jsonl --tokenizer MODEL"  # a folder of examples
_BATCH = 1024  # rows that are tokenized together
Pair = tuple[Ids, Ids]


@dataclass(frozen=True)
class Example:
    """One example.

    Attributes:
        index: The row in its data set. It names the example in errors and seeds its sampling noise.
        prompt: The token ids of the prompt, (prompt tokens,).
        response: The token ids with the end of text or turn, (response tokens,). Empty where there are only prompts.
    """

    index: int
    prompt: Ids
    response: Ids


@dataclass
class ExampleSet:
    """The examples of one split: `len(examples)`, `examples[i]` -> Example.

    Attributes:
        rows: (prompt, response) ids of each example.
        references: The gold texts of each row, None where there are only token files.
        files: The files that were read.
        counts: How many rows were read, dropped and changed.
        format: How the prompts were made.
        stale: One line where the token files do not fit the text beside them, else "".
        warning: One line where another tokenizer may have made the token files, else "".
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
        """Return the counts of rows and fields for the run's record."""
        return dataclasses.asdict(self.counts) | ({"fields_not_read": self.unread} if self.unread else {})

    @classmethod
    def open(
        cls,
        folder: str | Path,
        split: str,
        tokenizer: Tokenizer,
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
        """Open a split: `<split>_0.bin/.idx` in `folder`, or else its rows (see `row_files`).

        Args:
            folder: The folder, or a data set that `row_files.find_rows` knows.
            split: "train" or "valid".
            tokenizer: The student's tokenizer.
            max_prompt_length: A longer prompt is an error in a token file, and a row with one is dropped from text.
            max_length: Prompt and response together are cut to so many tokens, as the published loader does.
            limit: The number of examples to read; -1 for all.
            prompts_only: A token row without a marker is a prompt. Otherwise it is text, its first token the prompt.
            as_text: Read the rows even beside token files. In a folder of prompts only they have the responses.
            template: Makes the prompts of rows. Token files have their prompts already.
            option: The option that named the folder, for errors.
            make: The command that makes such a folder, for errors.
            special_tokens: The rule for prompts (see `encoding`). "auto" is a token file's own, else "own".

        Raises:
            UserError: A file is missing or broken. The error names it, and its row or line.
        """
        source, folder = folder, Path(folder)
        if not is_folder(source):
            raise UserError(f"{option} {folder}: no such folder: correct the path, or {make} --save {folder}")
        limits = _Limits(max_prompt_length, max_length, limit, prompts_only)
        prefix, text = folder / f"{split}_0", folder / f"{split}.jsonl"
        parts = [os.path.isfile(f"{prefix}{end}") for end in (".bin", ".idx")]
        if any(parts) and not as_text:
            _check_token_files(prefix, text, parts, template)
            return _from_tokens(prefix, text, tokenizer, limits, special_tokens)
        if (rows := find_rows(source, split)) is not None:
            encoder = TextEncoder(tokenizer, "own" if special_tokens == "auto" else special_tokens)
            return _from_rows(rows, encoder, limits, template)
        names = f"neither {prefix.name}.bin/.idx nor {text.name} ({', '.join(KINDS[1:])}) is there"
        others = f", only {held}" if (held := named_files(folder)) else ""
        raise UserError(f"{option} {source}: {names}{others}: put {text.name} there, or {make} --save {folder}")


@dataclass(frozen=True)
class _Limits:
    """Which rows of a file are read, and how much of them. See `ExampleSet.open`."""

    max_prompt_length: int
    max_length: int
    limit: int
    prompts_only: bool


def _from_rows(source: str, encoder: TextEncoder, limits: _Limits, template: str) -> ExampleSet:
    texts = encoder.read_source(source, template)
    rows: list[Pair] = []
    references: list[list[str]] = []
    counts, wanted = RowCounts(), len(texts) if limits.limit < 0 else limits.limit
    for first in range(0, len(texts), _BATCH):
        batch = texts[first : first + _BATCH] if len(rows) < wanted else []
        for text, encoded in zip(batch, encoder.pairs([(text.prompt, text.references[0]) for text in batch])):
            if len(rows) == wanted:
                break
            if counts.take(encoded, limits.max_prompt_length, limits.max_length):
                rows.append(encoded.within(limits.max_length))
                references.append(text.references)
    if not rows and limits.limit:
        raise UserError(
            f"{source}: all {counts.dropped} prompts are over --max-prompt-length {limits.max_prompt_length}: raise it"
        )
    template = template_of_prompts(template, encoder, [text.prompt for text in texts])
    unread = Counter(name for text in texts for name in text.row.unread)
    prompt_format = PromptFormat(template, encoder.rule)
    return ExampleSet(rows, references, [Path(source)], counts, prompt_format, unread=dict(unread))


def _check_token_files(prefix: Path, text: Path, parts: list[bool], template: str) -> None:
    """Raise UserError where one of the two files is missing, or a template is asked for that they cannot follow.

    A line on stderr names files of rows beside them that are not read.
    """
    if not all(parts):
        missing = ".idx" if parts[0] else ".bin"
        raise UserError(f"{prefix}{missing} is missing beside the other: process the data again")
    if template != "published":
        raise UserError(
            f"{prefix}.bin: the prompts of a token file are ready: leave --template out (tools/process_data.py "
            f"instructions --template {template} makes such files)"
        )
    if (next_part := prefix.with_name(f"{prefix.name[:-1]}1.idx")).exists():
        raise UserError(f"{next_part}: only {prefix.name} is read: put all rows into one token file")
    if unused := [name for kind in KINDS[1:] if os.path.isfile(text.with_name(name := f"{text.stem}{kind}"))]:
        say(f"{prefix}.bin is read; {', '.join(unused)} beside it is not")


def _from_tokens(prefix: Path, text: Path, tokenizer: Tokenizer, limits: _Limits, special_tokens: str) -> ExampleSet:
    size = vocabulary_size(tokenizer)
    file = TokenFile(prefix, size)
    count = len(file) if limits.limit < 0 else min(limits.limit, len(file))
    rows = _TokenRows(file, count, limits)
    counts = RowCounts(count, shortened=_check_lengths(file, count, limits))
    prompt_format = format_of_file(file, TextEncoder(tokenizer), limits.prompts_only)
    rule = prompt_format.special_tokens
    if special_tokens not in ("auto", rule, "published"):
        raise UserError(
            f"--special-tokens {special_tokens}: the prompts of {file.bin_path} are ready, their rule is {rule}: leave "
            f"it out, or process the data again with --special-tokens {special_tokens}"
        )
    if special_tokens == "published":
        prompt_format = PromptFormat(prompt_format.template, "published")
    examples = ExampleSet(rows, None, [file.bin_path, file.idx_path], counts, prompt_format)
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


class _TokenRows(Sequence[Pair]):
    """(prompt, response) of the first `count` rows of a token file, read on access."""

    def __init__(self, file: TokenFile, count: int, limits: _Limits) -> None:
        self._file, self._count, self._limits = file, count, limits

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self._count:
            raise IndexError(f"example {index} of {self._count}")
        row = self._file[index]
        if self._limits.prompts_only and self._file.marker not in row:
            return row, row[:0]
        prompt, response = split_row(row, self._file.marker)
        return prompt, response[: max(self._limits.max_length - len(prompt), 0)]


def _check_lengths(file: TokenFile, rows: int, limits: _Limits) -> int:
    """Return how many of the first `rows` rows are cut. Raise UserError where a prompt is too long."""
    prompts, total = file.prompt_lengths(rows), file.row_lengths()[:rows]
    cut = int((total - (prompts >= 0) > limits.max_length).sum())  # the marker is not a token of the example
    if limits.prompts_only:
        prompts = np.where(prompts < 0, total, prompts)
    most = limits.max_prompt_length
    if (over := np.flatnonzero(prompts > most)).size:
        raise UserError(
            f"{file.bin_path}, row {over[0]}: its prompt has {prompts[over[0]]} tokens, over --max-prompt-length "
            f"{most}: raise it, or process the data again with --max-prompt-length {most}"
        )
    return cut


def _references_beside(path: Path, texts: list[dict[str, Any]], file: TokenFile) -> list[list[str]]:
    """Return the gold texts of each row in the jsonl beside a token file."""
    references = [reference_texts(row, f"{path}, line {number}") for number, row in enumerate(texts, 1)]
    if len(references) != len(file):
        raise UserError(
            f"{path} has {len(references)} rows, {file.bin_path.name} beside it {len(file)}: they must come from "
            "one run of tools/process_data.py; make both again"
        )
    return references


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Return one more than the tokenizer's largest token id. Its ids may have gaps."""
    return int(max(tokenizer.get_vocab().values())) + 1
