"""SeqKD's training data: the teacher's answers in the place of the gold ones."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from promptkd.config.values import SPECIAL_TOKENS_HELP, SpecialTokensRule, at_least, option
from promptkd.data.dataset import vocabulary_size
from promptkd.data.encoding import TextEncoder
from promptkd.data.row_counts import RowCounts
from promptkd.data.row_files import find_rows, read_rows
from promptkd.data.templates import render_prompt
from promptkd.data.token_check import rule_of_folder
from promptkd.data.token_file import TokenFileWriter, join_row, token_dtype
from promptkd.errors import UserError
from promptkd.utils.files import atomic_files
from promptkd.utils.jsonl import read_jsonl

TRAIN = ("train_0.bin", "train_0.idx", "train.jsonl")
VALID = ("valid_0.bin", "valid_0.idx", "valid.jsonl")


@dataclass
class PseudoSettings:
    generated: str = option("", "generated.jsonl of tools/generate.py")
    data_dir: str = option("", "processed folder its prompts came from: they are checked, its valid split is copied")
    tokenizer: str = option("", "folder of the model whose tokenizer is used")
    save: str = option("", "folder to write to")
    max_prompt_length: int = option(256, "leave out rows whose prompt has more tokens")
    special_tokens: SpecialTokensRule = option("auto", SPECIAL_TOKENS_HELP)
    overwrite: bool = option(False, "replace token files that --save holds already")

    def __post_init__(self) -> None:
        for name in ("generated", "data_dir", "tokenizer", "save"):
            if not getattr(self, name):
                raise UserError(f"--{name.replace('_', '-')} is missing: see --help")
        at_least(1, max_prompt_length=self.max_prompt_length)


def pseudo(settings: PseudoSettings) -> dict[str, str]:
    """Write token files and train.jsonl whose responses are the teacher's answers; says how many of each split."""
    save, source = Path(settings.save), Path(settings.data_dir)
    valid = [source / name for name in VALID if (source / name).is_file()]
    if not valid:
        raise UserError(f"--data-dir {source} has no valid split: name the processed folder the prompts came from")
    if save.exists() and (not save.is_dir() or save.samefile(source)):
        raise UserError(f"--save {save} is a file, or --data-dir itself: name another folder")
    there = [save / name for name in (*TRAIN, *VALID) if (save / name).exists()]
    if there and not settings.overwrite:
        raise UserError(f"{there[0]} is there already: --overwrite replaces it, or choose another --save")
    from promptkd.models.loading import load_tokenizer  # here: it takes seconds, and bad options are known before

    tokenizer = load_tokenizer(settings.tokenizer)
    dtype = token_dtype(vocabulary_size(tokenizer))
    encoder = TextEncoder(tokenizer, rule_of_folder(source, tokenizer, settings.special_tokens) or "own")
    answers = read_generated(Path(settings.generated), source, encoder)
    counts = RowCounts()
    made = zip(answers, encoder.pairs(answers))
    kept = [(pair, ids) for pair, ids in made if counts.take(ids, settings.max_prompt_length, None)]
    if not kept:
        raise UserError(f"all prompts are over --max-prompt-length {settings.max_prompt_length}: raise it")
    with atomic_files(save) as folder:
        with TokenFileWriter(folder / "train_0", dtype) as tokens:
            for _, ids in kept:
                tokens.add(join_row(ids.prompt, ids.response, dtype))
        with open(folder / "train.jsonl", "w", encoding="utf-8") as texts:
            rows = ({"prompt": encoder.text(prompt), "output": said} for (prompt, said), _ in kept)
            texts.writelines(json.dumps(row) + "\n" for row in rows)
        for file in valid:
            shutil.copyfile(file, folder / file.name)
    said = [f"{len(kept)} rows", f"{counts.dropped} dropped", *counts.others()]
    return {"valid": f"copied from {source}", "train": ", ".join(said)}


def read_generated(path: Path, folder: Path, encoder: TextEncoder) -> list[tuple[str, str]]:
    """(marked prompt, the teacher's answer) of each row.

    Raises:
        UserError: A prompt is not one of the folder's train split.
    """
    if (train := find_rows(folder, "train")) is None:
        raise UserError(f"{folder}/train.jsonl is missing: --data-dir is the processed folder the prompts came from")
    marked = [encoder.read(row, where, render_prompt)[0] for where, row in read_rows(train)]
    known = {encoder.text(prompt): prompt for prompt in marked}
    answers = []
    for number, row in enumerate(read_jsonl(path), 1):
        where = f"{path}, line {number}"
        if not isinstance(row.get("prompt"), str) or not isinstance(row.get("gen_answer"), str):
            raise UserError(f'{where}: "prompt" and "gen_answer" are needed, as tools/generate.py writes them')
        if row["prompt"] not in known:
            raise UserError(
                f"{where}: its prompt is not in {train}: the file was generated for another split or other data; "
                "name that folder as --data-dir, or generate anew"
            )
        answers.append((known[row["prompt"]], row["gen_answer"]))
    return answers
