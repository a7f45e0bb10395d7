"""Turn text into the token files that train.py reads.

    python tools/process_data.py instructions --raw raw.jsonl --tokenizer MODEL --save DIR --dev-num 1000
    python tools/process_data.py corpus --raw text.txt --tokenizer MODEL --save DIR --dev-num 1000
    python tools/process_data.py pseudo --generated generated.jsonl --data-dir FULL --tokenizer MODEL --save DIR

instructions: Read rows from .jsonl, .json, .csv, .parquet or hub:NAME (docs/data.md lists their fields). The first
--dev-num rows become valid_0.bin/.idx and valid.jsonl, the others train_0.bin/.idx and train.jsonl. Rows with too long
prompts are dropped.
corpus: Read a document from each line, in which "<@x(x!>" stands for a newline. All documents are packed into rows of
--max-length tokens. The first --dev-num rows are the valid split.
pseudo: Use the teacher's answers from tools/generate.py as responses. The valid split is copied from --data-dir.
COMMAND --help lists the options of a command. COMMAND --dry-run prints their values as JSON and exits.
"""

from __future__ import annotations

import difflib
import os
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from promptkd.cli import program_name
from promptkd.config.parser import parse
from promptkd.config.template_options import TemplateSettings
from promptkd.config.values import SPECIAL_TOKENS_HELP, SpecialTokensRule, at_least, option
from promptkd.data.encoding import TextEncoder
from promptkd.data.preprocess import (
    SPLITS,
    EncodeInstructions,
    output_names,
    write_corpus,
    write_instructions,
    write_pseudo,
)
from promptkd.data.prompt_format import rule_of_folder
from promptkd.data.row_files import is_data_set
from promptkd.data.templates import bind_settings, now, template_of
from promptkd.errors import UserError
from promptkd.utils.machine import usable_cores


@dataclass
class Common:
    """Options of the commands that read --raw."""

    raw: str = option("", "file, folder#split or hub:NAME#split to read (corpus: a text file)")
    tokenizer: str = option("", "folder or hub name of the model whose tokenizer is used")
    save: str = option("", "output folder")
    dev_num: int = option(0, "number of rows of the valid split, taken from the start")
    workers: int = option(usable_cores(), "number of worker processes. The output does not depend on it")
    overwrite: bool = option(False, "replace existing token files in --save")

    def __post_init__(self) -> None:
        require(self, "raw", "tokenizer", "save")
        at_least(1, dev_num=self.dev_num, workers=self.workers)


@dataclass
class InstructionSettings(TemplateSettings, Common):
    """Options of `instructions`."""

    max_prompt_length: int = option(256, "maximum number of tokens of a prompt. Rows with longer prompts are dropped")
    max_length: int | None = option(
        None, "cut rows to this number of tokens; train.py cuts them in any case (default: no cut)"
    )
    only_prompt: bool = option(False, "write only prompts to the token files, as MiniLLM reads them")
    special_tokens: Literal["own", "none", "published"] = option(
        "own",
        "special tokens in front of prompts. own: those that the tokenizer puts before a text, once. published: none",
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
    """Options of `corpus`."""

    max_length: int = option(512, "number of tokens of each row")
    train_num: int = option(-1, "number of rows of the train split. -1: all rows")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, max_length=self.max_length)
        if self.train_num != -1:
            at_least(1, train_num=self.train_num)


@dataclass
class PseudoSettings:
    """Options of `pseudo`."""

    generated: str = option("", "file generated.jsonl that tools/generate.py wrote")
    data_dir: str = option(
        "", "processed folder that the prompts came from. They are compared, and its valid split is copied"
    )
    tokenizer: str = option("", "folder or hub name of the model whose tokenizer is used")
    save: str = option("", "output folder")
    max_prompt_length: int = option(256, "maximum number of tokens of a prompt. Rows with longer prompts are dropped")
    special_tokens: SpecialTokensRule = option("auto", SPECIAL_TOKENS_HELP)
    overwrite: bool = option(False, "replace existing token files in --save")

    def __post_init__(self) -> None:
        require(self, "generated", "data_dir", "tokenizer", "save")
        at_least(1, max_prompt_length=self.max_prompt_length)


def require(settings: Any, *names: str) -> None:
    """Raise UserError where one of these options is missing."""
    for name in names:
        if not getattr(settings, name):
            raise UserError(f"--{name.replace('_', '-')} is missing: see --help")


def instructions(settings: InstructionSettings) -> Mapping[str, object]:
    """Run `instructions`; return a summary of each split."""
    check_raw(settings, output_names(*SPLITS))
    tokenizer = load_tokenizer(settings.tokenizer)
    bind_settings(tokenizer, settings, now())
    encoder = TextEncoder(tokenizer, settings.special_tokens)
    return write_instructions(
        settings.raw,
        Path(settings.save),
        EncodeInstructions(encoder, template_of(settings.template, tokenizer)),
        dev_num=settings.dev_num,
        max_prompt_length=settings.max_prompt_length,
        max_length=settings.max_length,
        only_prompt=settings.only_prompt,
        workers=settings.workers,
    )


def corpus(settings: CorpusSettings) -> Mapping[str, object]:
    """Run `corpus`; return a summary of each split."""
    for name in output_names(*SPLITS, ends=(".jsonl",)):
        if (other := Path(settings.save) / name).exists():
            raise UserError(f"{other} belongs to instructions: choose another --save for the corpus")
    check_raw(settings, output_names(*SPLITS, ends=("_0.bin", "_0.idx")))
    return write_corpus(
        settings.raw,
        Path(settings.save),
        load_tokenizer(settings.tokenizer),
        dev_num=settings.dev_num,
        train_num=settings.train_num,
        max_length=settings.max_length,
        workers=settings.workers,
    )


def pseudo(settings: PseudoSettings) -> Mapping[str, object]:
    """Run `pseudo`; return a summary of each split."""
    save, source = Path(settings.save), Path(settings.data_dir)
    if not any((source / name).is_file() for name in output_names("valid")):
        raise UserError(f"--data-dir {source} has no valid split: name the processed folder the prompts came from")
    if save.exists() and (not save.is_dir() or save.samefile(source)):
        raise UserError(f"--save {save} is a file, or --data-dir itself: name another folder")
    check_outputs(save, output_names("train", "valid"), settings.overwrite)
    tokenizer = load_tokenizer(settings.tokenizer)
    encoder = TextEncoder(tokenizer, rule_of_folder(source, tokenizer, settings.special_tokens) or "own")
    return write_pseudo(Path(settings.generated), source, save, encoder, settings.max_prompt_length)


def check_raw(settings: Common, outputs: Iterable[str]) -> None:
    """Raise UserError where --raw cannot be read or would be replaced, or --save may not be written."""
    save = Path(settings.save)
    if not is_data_set(settings.raw) and not (os.path.isfile(settings.raw) and os.path.getsize(settings.raw)):
        raise UserError(f"--raw {settings.raw}: no such file, or it is empty: correct the path")
    if save.exists() and not save.is_dir():
        raise UserError(f"--save {save} is a file: name a folder")
    existing = check_outputs(save, outputs, settings.overwrite)
    if os.path.exists(settings.raw) and any(path.samefile(settings.raw) for path in existing):
        raise UserError(f"--raw {settings.raw} would be replaced by the output: choose another --save")


def check_outputs(save: Path, names: Iterable[str], overwrite: bool) -> list[Path]:
    """Return the outputs that exist. Raise UserError unless they may be replaced."""
    existing = [save / name for name in names if (save / name).exists()]
    if existing and not overwrite:
        raise UserError(f"{existing[0]} exists already: --overwrite replaces it, or choose another --save")
    return existing


def load_tokenizer(path: str) -> Any:
    """Load the tokenizer beside a model."""
    from promptkd.models import loading  # imported late: it takes seconds, and wrong options are found before

    return loading.load_tokenizer(path)


COMMANDS: dict[str, tuple[type, Callable[[Any], Mapping[str, object]]]] = {
    "instructions": (InstructionSettings, instructions),
    "corpus": (CorpusSettings, corpus),
    "pseudo": (PseudoSettings, pseudo),
}


def main() -> None:
    """Run the command that the first argument names."""
    name, *argv = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(__doc__)
        return
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0)[0]
        raise UserError(f"unknown command {name}: did you mean {near}?")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # --workers says how many cores are used
    tqdm.monitor_interval = 0  # its thread must not exist when workers are forked
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that unfinished files are removed
    kind, run = COMMANDS[name]
    settings = parse({"options": kind}, argv, f"{program_name('process_data.py')} {name}").options
    for split, summary in run(settings).items():
        print(f"{split}: {summary}")
