"""Examples as token ids, from published token files or straight from jsonl; both give the same examples.

promptkd/data/templates.py says what rows of jsonl look like, and how they become prompts.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from promptkd.data.format import TokenFile, split_row
from promptkd.data.jsonl import read_jsonl
from promptkd.data.reading import say_reading
from promptkd.data.row_files import KINDS, find_rows, is_folder, named_files, read_rows
from promptkd.data.templates import prompt_and_references, reference_texts, response_ends, template_of
from promptkd.errors import UserError

MAKE = "run python tools/process_data.py instructions --raw RAW.jsonl --tokenizer MODEL"  # a folder of examples
_BATCH = 1024  # rows tokenised together
Pair = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Example:
    index: int  # row in its data set: names it in errors, seeds its sampling noise
    prompt: np.ndarray  # int64 token ids
    response: np.ndarray  # int64 token ids, the end (end-of-text, or a turn's) included; may be empty: prompts only


class ExampleSet:
    """The examples of one split: `len(examples)`, `examples[i]` -> Example.

    `references` holds the gold texts of each row, None when there are token files alone; `dropped` counts the
    rows left out because their prompt is over max_prompt_length; `files` are those that were read.
    """

    def __init__(
        self, rows: Sequence[Pair], references: list[list[str]] | None, files: list[Path], dropped: int = 0
    ) -> None:
        self._rows = rows
        self.references = references
        self.files = files
        self.dropped = dropped

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        prompt, response = self._rows[index]
        return Example(int(index), prompt, response)

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
    ) -> ExampleSet:
        """Open `<split>_0.bin/.idx` in `folder`, or else its rows (row_files.py); the first `limit` examples (-1: all).

        `as_text` reads the rows even beside token files: with a folder of prompts it has the responses.
        `template` (promptkd.data.templates) makes the prompts of jsonl; token files have theirs already.

        Prompt and response together are cut to `max_length` tokens, as the published loader does. A prompt
        over `max_prompt_length` is an error in a token file (its maker drops them) and is left out of jsonl.
        A token row without a marker is text, its first token the prompt; with `prompts_only` it is a prompt.
        `option` named the folder and `make` says what makes one, for errors.
        Raises UserError naming file and row or line for whatever is missing or broken.
        """
        source, folder = folder, Path(folder)
        if not is_folder(source):
            raise UserError(f"{option} {folder}: no such folder: correct the path, or {make} --save {folder}")
        prefix, text = folder / f"{split}_0", folder / f"{split}.jsonl"
        parts = [os.path.isfile(f"{prefix}{end}") for end in (".bin", ".idx")]
        if any(parts) and not as_text:
            if not all(parts):
                missing = ".idx" if parts[0] else ".bin"
                raise UserError(f"{prefix}{missing} is missing beside the other: process the data anew")
            if template != "published":
                raise UserError(
                    f"{prefix}.bin: the prompts of a token file are ready: leave --template out (tools/process_data.py "
                    f"instructions --template {template} makes such files)"
                )
            return cls._from_tokens(prefix, text, tokenizer, max_prompt_length, max_length, limit, prompts_only)
        if (rows := find_rows(source, split)) is not None:
            return cls._from_rows(rows, tokenizer, max_prompt_length, max_length, limit, template)
        others = f", only {names}" if (names := named_files(folder)) else ""
        raise UserError(
            f"{option} {source}: neither {prefix.name}.bin/.idx nor {text.name} ({', '.join(KINDS[1:])}) is there"
            f"{others}: put {text.name} there, or {make} --save {folder}"
        )

    @classmethod
    def _from_tokens(
        cls, prefix: Path, text: Path, tokenizer, max_prompt_length: int, max_length: int, limit: int, whole: bool
    ) -> ExampleSet:
        file = TokenFile(prefix, vocabulary_size(tokenizer))
        if (next_part := prefix.with_name(f"{prefix.name[:-1]}1.idx")).exists():
            raise UserError(f"{next_part}: only {prefix.name} is read: put all rows into one token file")
        rows = _TokenRows(file, len(file) if limit < 0 else min(limit, len(file)), max_length, whole)
        _check_prompt_lengths(file, len(rows), max_prompt_length, whole)
        references, files = None, [file.bin_path, file.idx_path]
        if os.path.isfile(text):
            references = _references_beside(text, file)[: len(rows)]
            files.append(text)
        return cls(rows, references, files)

    @classmethod
    def _from_rows(
        cls, source: str, tokenizer, max_prompt_length: int, max_length: int, limit: int, template: str
    ) -> ExampleSet:
        path, render = Path(source), template_of(template, tokenizer)
        raw = read_rows(source)
        texts = [prompt_and_references(row, where, render) for where, row in raw]
        say_reading(source, raw)
        rows: list[Pair] = []
        references: list[list[str]] = []
        dropped = 0
        for first in range(0, len(texts), _BATCH):
            batch = texts[first : first + _BATCH]
            pairs = encode_pairs(tokenizer, [(prompt, gold[0]) for prompt, gold in batch])
            for (prompt, response), (_, gold) in zip(pairs, batch):
                if limit >= 0 and len(rows) == limit:
                    return cls(rows, references, [path], dropped)
                if len(prompt) > max_prompt_length:
                    dropped += 1
                    continue
                rows.append((prompt, response[: max(max_length - len(prompt), 0)]))
                references.append(gold)
        if not rows:
            raise UserError(f"{path}: all {dropped} prompts are over --max-prompt-length {max_prompt_length}: raise it")
        return cls(rows, references, [path], dropped)


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


def _check_prompt_lengths(file: TokenFile, rows: int, most: int, whole: bool) -> None:
    """UserError when one of the first `rows` prompts is over `most` tokens; `whole`: without marker all is prompt."""
    lengths = file.prompt_lengths(rows)
    if whole:
        lengths = np.where(lengths < 0, file.row_lengths()[:rows], lengths)
    if (over := np.flatnonzero(lengths > most)).size:
        raise UserError(
            f"{file.bin_path}, row {over[0]}: its prompt has {lengths[over[0]]} tokens, over --max-prompt-length "
            f"{most}: raise it, or process the data anew with --max-prompt-length {most}"
        )


def _references_beside(text: Path, file: TokenFile) -> list[list[str]]:
    """The gold texts in the jsonl beside a token file, row by row."""
    references = [reference_texts(row, f"{text}, line {n}") for n, row in enumerate(read_jsonl(text), 1)]
    if len(references) != len(file):
        raise UserError(
            f"{text} has {len(references)} rows, {file.bin_path.name} beside it {len(file)}: they must come from "
            "one run of tools/process_data.py; make both anew"
        )
    return references


def vocabulary_size(tokenizer) -> int:
    """One more than the tokenizer's largest token id (its ids may have gaps)."""
    return max(tokenizer.get_vocab().values()) + 1


def encode_pair(tokenizer, prompt: str, response: str) -> Pair:
    """(prompt ids, response ids with the token that ends it), int64. The response is tokenised behind its prompt."""
    return encode_pairs(tokenizer, [(prompt, response)])[0]


def encode_pairs(tokenizer, pairs: list[tuple[str, str]]) -> list[Pair]:
    """`encode_pair` for many, which is several times faster."""

    def ids(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    prompts = ids([prompt for prompt, _ in pairs])
    wholes = ids([prompt + response for prompt, response in pairs])
    if not all(prompts):
        empty = pairs[prompts.index([])][0]
        raise UserError(f"the prompt {empty[:40]!r} has no token in this tokenizer: give it a text")
    ends = response_ends(tokenizer, [prompt for prompt, _ in pairs])
    return [
        (np.array(prompt, dtype=np.int64), np.array([*whole, end][len(prompt) :], dtype=np.int64))
        for prompt, whole, end in zip(prompts, wholes, ends)
    ]
