"""Token files from instruction rows, from plain text, and from a teacher's answers (SeqKD)."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from promptkd.data.dataset import vocabulary_size
from promptkd.data.encoding import Encoded, FieldCounts, RowCounts, TextEncoder
from promptkd.data.row_files import find_rows, iterate_raw, say
from promptkd.data.rows import Row
from promptkd.data.special_tokens import SpecialTokens, Tokenizer
from promptkd.data.templates import Template
from promptkd.data.token_file import Ids, join_row, token_dtype, write_token_file
from promptkd.data.workers import map_lines
from promptkd.errors import UserError
from promptkd.utils.files import atomic_files
from promptkd.utils.jsonl import decode, numbered_lines, parse_line, read_jsonl

SPLITS = ("valid", "train")
NEWLINE_MARK = "<@x(x!>"  # a newline within a document of plain text


@dataclass
class SplitSummary:
    """Counts of a split for the closing line.

    Attributes:
        rows: The number of rows that were written.
        counts: What became of the rows that were read.
        parts: Name of a part of rows -> (sum, largest) of its numbers of tokens.
    """

    rows: int = 0
    counts: RowCounts = field(default_factory=RowCounts)
    parts: dict[str, tuple[int, int]] = field(default_factory=dict)

    def add(self, **parts: Ids) -> None:
        """Count a row that was written."""
        self.rows += 1
        for name, ids in parts.items():
            total, largest = self.parts.get(name, (0, 0))
            self.parts[name] = (total + len(ids), max(largest, len(ids)))

    def __str__(self) -> str:
        shown = [f"{name} {n / self.rows:.1f} tokens (at most {most})" for name, (n, most) in self.parts.items()]
        return ", ".join([f"{self.rows} rows", f"{self.counts.dropped} dropped", *shown, *self.counts.others()])


@dataclass(frozen=True)
class EncodeInstructions:
    """Makes, of each row, the row as read, its line of jsonl and its token ids. Runs in worker processes."""

    encoder: TextEncoder
    template: Template

    def __call__(self, items: list[tuple[str, Any]]) -> list[tuple[Row, str, Encoded]]:
        raw = [(where, parse_line(item, where) if isinstance(item, bytes) else item) for where, item in items]
        texts = [self.encoder.read(row, where, self.template) for where, row in raw]
        lines = [json.dumps(text.row.fields(self.encoder.specials.unmark(text.prompt))) for text in texts]
        encoded = self.encoder.pairs([(text.prompt, text.references[0]) for text in texts])
        return list(zip((text.row for text in texts), lines, encoded))


@dataclass(frozen=True)
class EncodeDocuments:
    """Makes, of numbered lines of text, their token ids with end-of-text after each document. Runs in workers.

    Also returns the number of documents that spell a special token, which stays text.
    """

    specials: SpecialTokens
    path: str

    def __call__(self, lines: list[tuple[int, bytes]]) -> tuple[Ids, int]:
        documents: list[str] = []
        for number, line in lines:
            # As in text files: a line ends with its newline, and a carriage return counts as one.
            text = io.StringIO(decode(line, f"{self.path}, line {number}"), newline=None)
            documents += [document.replace(NEWLINE_MARK, "\n") for document in text]
        spelling = [self.specials.count(document) > 0 for document in documents]
        ordinary = iter(self.specials.tokenize([text for text, spells in zip(documents, spelling) if not spells]))
        rows = (
            self.specials.plain_ids(text) if spells else next(ordinary) for text, spells in zip(documents, spelling)
        )
        end = self.specials.tokenizer.eos_token_id
        return np.array([token for row in rows for token in (*row, end)], dtype=np.int64), sum(spelling)


def write_instructions(
    raw: str,
    save: Path,
    job: EncodeInstructions,
    *,
    dev_num: int,
    max_prompt_length: int,
    max_length: int | None,
    only_prompt: bool,
    workers: int,
) -> dict[str, SplitSummary]:
    """Write token files and jsonl of both splits, and return the summary of each.

    Args:
        raw: A source of rows, see `row_files`.
        save: The folder to write to.
        job: Encodes rows with the student's tokenizer.
        dev_num: The number of rows of the valid split, taken from the start.
        max_prompt_length: Rows with a longer prompt are dropped.
        max_length: Rows are cut to so many tokens. None: they are not cut.
        only_prompt: Write prompts without marker and response to the token files.
        workers: The number of worker processes. The output does not depend on it.

    Raises:
        UserError: A row is broken, or a split is empty.
    """
    dtype = token_dtype(vocabulary_size(job.encoder.tokenizer))
    summaries, fields, seen = {split: SplitSummary() for split in SPLITS}, FieldCounts(), 0
    too_long = f"are over --max-prompt-length {max_prompt_length}: raise it"
    with atomic_files(save) as folder, ExitStack() as stack:
        tokens = {s: stack.enter_context(write_token_file(folder / f"{s}_0", dtype)) for s in SPLITS}
        texts = {s: stack.enter_context(open(folder / f"{s}.jsonl", "w", encoding="utf-8")) for s in SPLITS}
        rows = chain.from_iterable(map_lines(job, iterate_raw(raw), raw, workers, stack))
        for seen, (row, text, encoded) in enumerate(rows, 1):
            split = "valid" if seen <= dev_num else "train"
            fields.add(row)
            if summaries[split].counts.take(encoded, max_prompt_length, max_length):
                prompt, response = encoded.within(max_length)
                texts[split].write(text + "\n")
                tokens[split].add(prompt if only_prompt else join_row(prompt, response, dtype))
                summaries[split].add(prompt=prompt, response=response)
        if seen <= dev_num:
            raise UserError(f"{raw} has {seen} rows, --dev-num {dev_num} leaves none to train on: lower it")
        for split in SPLITS:
            if not summaries[split].rows:
                raise UserError(f"{raw}: all {summaries[split].counts.dropped} prompts of the {split} split {too_long}")
    fields.say(raw)
    return summaries


def write_corpus(
    raw: str, save: Path, tokenizer: Tokenizer, *, dev_num: int, train_num: int, max_length: int, workers: int
) -> dict[str, SplitSummary]:
    """Write token files of plain text, packed into rows, for both splits, and return the summary of each.

    Args:
        raw: A text file with one document a line.
        train_num: The number of rows of the train split; -1 for all.
        max_length: The number of tokens of each row. The other arguments are those of `write_instructions`.

    Raises:
        UserError: A line is not UTF-8, or no row is left for the train split.
    """
    dtype = token_dtype(vocabulary_size(tokenizer))
    summaries, read, spelled = {split: SplitSummary() for split in SPLITS}, 0, 0
    most = None if train_num < 0 else dev_num + train_num

    def counted(encoded: Iterable[tuple[Ids, int]]) -> Iterator[Ids]:
        nonlocal read, spelled
        for ids, spelling in encoded:
            read, spelled = read + len(ids), spelled + spelling
            yield ids

    with atomic_files(save) as folder, ExitStack() as stack:
        tokens = {s: stack.enter_context(write_token_file(folder / f"{s}_0", dtype)) for s in SPLITS}
        job = EncodeDocuments(SpecialTokens(tokenizer), raw)
        pieces = counted(map_lines(job, numbered_lines(raw), raw, workers, stack))
        for number, row in enumerate(islice(packed(pieces, max_length), most)):
            split = "valid" if number < dev_num else "train"
            tokens[split].add(row)
            summaries[split].add(row=row)
        if not summaries["train"].rows:
            raise UserError(
                f"{raw} fills {summaries['valid'].rows} rows of {max_length} tokens, --dev-num {dev_num} leaves none "
                "to train on: lower --dev-num or --max-length, or add text"
            )
    rows = sum(summary.rows for summary in summaries.values())
    if rows != most and (rest := read - rows * max_length):
        say(f"{raw}: the last {rest} tokens do not fill a row and are left out")
    if spelled:
        say(f"{raw}: {spelled} documents spell a special token, which stays text")
    if summaries["train"].rows < train_num:
        say(f"{raw} ended before --train-num {train_num} rows were full")
    return summaries


def packed(pieces: Iterable[Ids], length: int) -> Iterator[Ids]:
    """Cut a stream of tokens into rows of `length`, without an incomplete last row."""
    rest = np.empty(0, dtype=np.int64)
    for piece in pieces:
        rest = np.concatenate([rest, piece])
        full = len(rest) // length * length
        yield from rest[:full].reshape(-1, length)
        rest = rest[full:]


def write_pseudo(
    generated: Path, data_dir: Path, save: Path, encoder: TextEncoder, max_prompt_length: int
) -> dict[str, str]:
    """Write a train split whose responses are the teacher's answers, beside a copy of the valid split.

    Args:
        generated: The generated.jsonl of tools/generate.py.
        data_dir: The processed folder that the prompts came from.
        save: The folder to write to.
        encoder: The encoder with the student's tokenizer.
        max_prompt_length: Rows with a longer prompt are dropped.

    Returns:
        A line about each split.

    Raises:
        UserError: A prompt is not one of the folder's train split, or all are too long.
    """
    answers = _read_answers(generated, data_dir, encoder)
    counts, dtype = RowCounts(), token_dtype(vocabulary_size(encoder.tokenizer))
    encoded = zip(answers, encoder.pairs(answers))
    kept = [(pair, ids) for pair, ids in encoded if counts.take(ids, max_prompt_length, None)]
    if not kept:
        raise UserError(f"all prompts are over --max-prompt-length {max_prompt_length}: raise it")
    with atomic_files(save) as folder:
        with write_token_file(folder / "train_0", dtype) as tokens:
            for _, ids in kept:
                tokens.add(join_row(ids.prompt, ids.response, dtype))
        with open(folder / "train.jsonl", "w", encoding="utf-8") as texts:
            rows = ({"prompt": encoder.specials.unmark(prompt), "output": answer} for (prompt, answer), _ in kept)
            texts.writelines(json.dumps(row) + "\n" for row in rows)
        for name in output_names("valid"):
            if (data_dir / name).is_file():
                shutil.copyfile(data_dir / name, folder / name)
    train = ", ".join([f"{len(kept)} rows", f"{counts.dropped} dropped", *counts.others()])
    return {"valid": f"copied from {data_dir}", "train": train}


def output_names(*splits: str, ends: tuple[str, ...] = ("_0.bin", "_0.idx", ".jsonl")) -> list[str]:
    """Return the names of the files of splits."""
    return [f"{split}{end}" for split in splits for end in ends]


def _read_answers(path: Path, folder: Path, encoder: TextEncoder) -> list[tuple[str, str]]:
    """Return (marked prompt, the teacher's answer) of each row of generated.jsonl."""
    if (train := find_rows(folder, "train")) is None:
        raise UserError(f"{folder}/train.jsonl is missing: --data-dir is the processed folder the prompts came from")
    marked = [text.prompt for text in encoder.read_source(train, "published")]
    known = {encoder.specials.unmark(prompt): prompt for prompt in marked}
    answers = []
    for number, row in enumerate(read_jsonl(path), 1):
        where = f"{path}, line {number}"
        if not isinstance(row.get("prompt"), str) or not isinstance(row.get("gen_answer"), str):
            raise UserError(f'{where}: "prompt" and "gen_answer" are needed, as tools/generate.py writes them')
        if row["prompt"] not in known:
            raise UserError(
                f"{where}: its prompt is not in {train}: the file was generated for another split or other data; "
                "name that folder as --data-dir, or generate again"
            )
        answers.append((known[row["prompt"]], row["gen_answer"]))
    return answers
