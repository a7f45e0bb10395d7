"""Turn text into the token files that train.py reads.

    python tools/process_data.py instructions --raw raw.jsonl --tokenizer MODEL --save DIR --dev-num 1000
    python tools/process_data.py corpus --raw text.txt --tokenizer MODEL --save DIR --dev-num 1000
    python tools/process_data.py pseudo --generated generated.jsonl --data-dir FULL --tokenizer MODEL --save DIR

instructions: rows of any shape (promptkd/data/rows.py) of .jsonl, .json, .csv, .parquet or hub:NAME become
train_0.bin/.idx and train.jsonl, the first --dev-num rows valid_0.bin/.idx and valid.jsonl; too long prompts are left
out.
corpus: each line is a document ("<@x(x!>" stands for a newline within it); all are packed into rows of
--max-length tokens, the first --dev-num rows are the valid split.
pseudo: the teacher's answers of tools/generate.py become the responses; the valid split is copied.
--help after the command lists its options, --dry-run prints their values as JSON and runs nothing.
"""

from __future__ import annotations

import difflib
import json
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from promptkd.cli import program_name
from promptkd.config.parser import parse
from promptkd.config.template_options import TemplateSettings
from promptkd.config.values import at_least, option
from promptkd.data.chat_arguments import bind_settings, now
from promptkd.data.corpus import EncodeDocuments, Pieces, packed
from promptkd.data.dataset import vocabulary_size
from promptkd.data.encoding import Encoded, TextEncoder
from promptkd.data.pseudo import PseudoSettings, pseudo
from promptkd.data.reading import Reading, say
from promptkd.data.row_counts import RowCounts
from promptkd.data.row_files import is_lines, iterate_rows, lines_of
from promptkd.data.rows import Row, read_row
from promptkd.data.saved_rows import is_source
from promptkd.data.templates import Template, template_of
from promptkd.data.token_file import TokenFileWriter, join_row, token_dtype
from promptkd.data.workers import chunks_of_lines, ordered_map
from promptkd.errors import UserError
from promptkd.utils.files import atomic_files
from promptkd.utils.jsonl import numbered_lines, parse_line
from promptkd.utils.machine import usable_cores

SPLITS = ("valid", "train")


@dataclass
class Common:
    raw: str = option("", "file to read")
    tokenizer: str = option("", "folder of the model whose tokenizer is used")
    save: str = option("", "folder to write to")
    dev_num: int = option(0, "rows of the valid split, taken from the start")
    workers: int = option(usable_cores(), "worker processes; the output is the same for any number")
    overwrite: bool = option(False, "replace token files that --save holds already")

    def __post_init__(self) -> None:
        for name in ("raw", "tokenizer", "save"):
            if not getattr(self, name):
                raise UserError(f"--{name} is missing: see --help")
        at_least(1, dev_num=self.dev_num, workers=self.workers)


@dataclass
class InstructionSettings(TemplateSettings, Common):
    max_prompt_length: int = option(256, "leave out rows whose prompt has more tokens")
    max_length: int | None = option(None, "cut rows to this many tokens (train.py cuts anyway); default: whole")
    only_prompt: bool = option(False, "write prompts without marker and response to the token files")
    special_tokens: Literal["own", "none", "published"] = option(
        "own", "special tokens in front of prompts: once those that the tokenizer begins texts with; published: none"
    )

    def __post_init__(self) -> None:
        TemplateSettings.__post_init__(self)
        Common.__post_init__(self)
        at_least(1, max_prompt_length=self.max_prompt_length)
        if self.max_length is not None and self.max_length <= self.max_prompt_length:
            raise UserError(
                f"--max-length {self.max_length} has to be over --max-prompt-length {self.max_prompt_length}"
            )


@dataclass
class CorpusSettings(Common):
    max_length: int = option(512, "tokens of each row")
    train_num: int = option(-1, "rows of the train split; -1: all there are")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, max_length=self.max_length)
        if self.train_num != -1:
            at_least(1, train_num=self.train_num)


@dataclass(frozen=True)
class EncodeInstructions:
    """Rows and their places -> of each the row, the jsonl text and the ids."""

    encoder: TextEncoder
    settings: InstructionSettings
    template: Template

    def __call__(self, items: list[tuple[str, bytes | dict[str, Any]]]) -> list[tuple[Row, str, Encoded]]:
        texts, pairs, rows = [], [], []
        for where, item in items:
            raw = parse_line(item, where) if isinstance(item, bytes) else item
            prompt, references = self.encoder.read(raw, where, self.template)
            rows.append(read_row(raw, where))
            texts.append(json.dumps(rows[-1].fields(self.encoder.text(prompt))))
            pairs.append((prompt, references[0]))
        return list(zip(rows, texts, self.encoder.pairs(pairs)))


class Lengths:
    """Counts of a split for the closing line."""

    def __init__(self) -> None:
        self.rows = 0
        self.counts = RowCounts()
        self.parts: dict[str, tuple[int, int]] = {}  # name -> (sum, largest)

    def add(self, **parts: np.ndarray) -> None:
        self.rows += 1
        for name, ids in parts.items():
            total, largest = self.parts.get(name, (0, 0))
            self.parts[name] = (total + len(ids), max(largest, len(ids)))

    def __str__(self) -> str:
        shown = [f"{name} {n / self.rows:.1f} tokens (at most {most})" for name, (n, most) in self.parts.items()]
        return ", ".join([f"{self.rows} rows", f"{self.counts.dropped} dropped", *shown, *self.counts.others()])


def instructions(settings: InstructionSettings) -> dict[str, Lengths]:
    """Write token files and jsonl of both splits; the lengths of each split."""
    tokenizer, dtype = prepare(settings, [f"{s}{end}" for s in SPLITS for end in ("_0.bin", "_0.idx", ".jsonl")])
    bind_settings(tokenizer, settings, now())
    template = template_of(settings.template, tokenizer)
    lengths, reading = {split: Lengths() for split in SPLITS}, Reading()
    seen = 0
    with atomic_files(Path(settings.save)) as folder, ExitStack() as stack:
        tokens = {s: stack.enter_context(TokenFileWriter(folder / f"{s}_0", dtype)) for s in SPLITS}
        texts = {s: stack.enter_context(open(folder / f"{s}.jsonl", "w", encoding="utf-8")) for s in SPLITS}
        job = EncodeInstructions(TextEncoder(tokenizer, settings.special_tokens), settings, template)
        lines = lines_of(settings.raw) if is_lines(settings.raw) else iterate_rows(settings.raw)
        rows = chain.from_iterable(encoded(job, lines, settings, stack))
        for seen, (row, text, made) in enumerate(rows, 1):
            split = "valid" if seen <= settings.dev_num else "train"
            reading.add(row.read, row.unread)
            if not lengths[split].counts.take(made, settings.max_prompt_length, settings.max_length):
                continue
            prompt, response = made.within(settings.max_length)
            texts[split].write(text + "\n")
            tokens[split].add(prompt if settings.only_prompt else join_row(prompt, response, dtype))
            lengths[split].add(prompt=prompt, response=response)
        if seen <= settings.dev_num:
            raise UserError(
                f"{settings.raw} has {seen} rows, --dev-num {settings.dev_num} leaves none to train on: lower it"
            )
        for split in SPLITS:
            if not lengths[split].rows:
                raise UserError(
                    f"{settings.raw}: all {lengths[split].counts.dropped} prompts of the {split} split are over "
                    f"--max-prompt-length {settings.max_prompt_length}: raise it"
                )
    if line := reading.line(settings.raw):
        say(line)
    return lengths


def corpus(settings: CorpusSettings) -> dict[str, Lengths]:
    """Write token files of packed rows for both splits; the lengths of each split."""
    for split in SPLITS:
        if (other := Path(settings.save) / f"{split}.jsonl").exists():
            raise UserError(f"{other} belongs to instructions: choose another --save for the corpus")
    tokenizer, dtype = prepare(settings, [f"{s}_0{end}" for s in SPLITS for end in (".bin", ".idx")])
    lengths = {split: Lengths() for split in SPLITS}
    most = None if settings.train_num < 0 else settings.dev_num + settings.train_num
    with atomic_files(Path(settings.save)) as folder, ExitStack() as stack:
        tokens = {s: stack.enter_context(TokenFileWriter(folder / f"{s}_0", dtype)) for s in SPLITS}
        job = EncodeDocuments(TextEncoder(tokenizer), settings.raw)
        pieces = Pieces(encoded(job, numbered_lines(settings.raw), settings, stack))
        for number, row in enumerate(islice(packed(pieces, settings.max_length), most)):
            split = "valid" if number < settings.dev_num else "train"
            tokens[split].add(row)
            lengths[split].add(row=row)
        if not lengths["train"].rows:
            raise UserError(
                f"{settings.raw} fills {lengths['valid'].rows} rows of {settings.max_length} tokens, --dev-num "
                f"{settings.dev_num} leaves none to train on: lower --dev-num or --max-length, or add text"
            )
    rows = sum(each.rows for each in lengths.values())
    if rows != most and (rest := pieces.tokens - rows * settings.max_length):
        print(f"{settings.raw}: the last {rest} tokens do not fill a row and are left out", file=sys.stderr)
    if pieces.spelled:
        print(f"{settings.raw}: {pieces.spelled} documents spell a special token, which stays text", file=sys.stderr)
    if lengths["train"].rows < settings.train_num:
        print(f"{settings.raw} ended before --train-num {settings.train_num} rows were full", file=sys.stderr)
    return lengths


def encoded(job, lines: Iterable[tuple[Any, Any]], settings: Common, stack: ExitStack) -> Iterator[Any]:
    """`job` over chunks of lines, with a progress bar on a terminal; `stack` ends workers and bar."""
    size = os.path.getsize(settings.raw) if os.path.isfile(settings.raw) else None
    bar = tqdm(total=size, unit="B", unit_scale=True, disable=not sys.stderr.isatty())

    def watched() -> Iterator[tuple[Any, Any]]:
        for place, item in lines:
            bar.update(len(item) if isinstance(item, bytes) else 0)
            yield place, item

    results = ordered_map(job, chunks_of_lines(watched()), settings.workers)
    stack.callback(bar.close)
    stack.callback(results.close)
    return results


def prepare(settings: Common, outputs: list[str]) -> tuple[Any, np.dtype]:
    """(tokenizer, dtype of the token files), after looking at what is read and what would be replaced."""
    save = Path(settings.save)
    if not is_source(settings.raw) and not (os.path.isfile(settings.raw) and os.path.getsize(settings.raw)):
        raise UserError(f"--raw {settings.raw}: no such file, or it is empty: correct the path")
    if save.exists() and not save.is_dir():
        raise UserError(f"--save {save} is a file: name a folder")
    there = [save / name for name in outputs if (save / name).exists()]
    if there and not settings.overwrite:
        raise UserError(f"{there[0]} is there already: --overwrite replaces it, or choose another --save")
    if os.path.exists(settings.raw) and any(path.samefile(settings.raw) for path in there):
        raise UserError(f"--raw {settings.raw} would be replaced by the output: choose another --save")
    from promptkd.models.loading import load_tokenizer  # here: it takes seconds, and bad options are known before

    tokenizer = load_tokenizer(settings.tokenizer)
    return tokenizer, token_dtype(vocabulary_size(tokenizer))


COMMANDS = {
    "instructions": (InstructionSettings, instructions),
    "corpus": (CorpusSettings, corpus),
    "pseudo": (PseudoSettings, pseudo),
}


def main() -> None:
    name, *argv = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(__doc__)
        return
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0)[0]
        raise UserError(f"unknown command {name}: did you mean {near}?")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # --workers says how many cores are used
    tqdm.monitor_interval = 0  # its thread must not be there when workers are forked
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is unfinished is cleared away
    kind, run = COMMANDS[name]
    settings = parse({"options": kind}, argv, f"{program_name('process_data.py')} {name}").options
    for split, lengths in run(settings).items():
        print(f"{split}: {lengths}")
