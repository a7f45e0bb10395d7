"""Token files that do not fit the text beside them, or the tokenizer, are recognized."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.tokenizer_kinds import byte_level, metaspace
from helpers.training import GOLDEN, golden_argv, train_here

from promptkd.data.dataset import ExampleSet
from promptkd.data.encoding import TextEncoder
from promptkd.data.token_file import join_row, write_token_file
from promptkd.errors import UserError
from promptkd.utils.jsonl import read_jsonl

FULL = GOLDEN / "processed/dolly/full/gpt2"
ROWS = [{"prompt": f"Word {i}:\n", "output": f"data {i} teacher"} for i in range(12)]


def opened(folder, tokenizer=None, split="train", **how):
    return ExampleSet.open(folder, split, tokenizer or byte_level(), 96, 128, **how)


def processed(folder: Path, tokenizer, rule: str = "own", rows=ROWS, texts=None) -> Path:
    """Write token files by a rule for special tokens, and the text beside them."""
    pairs = TextEncoder(tokenizer, rule).pairs([(row["prompt"], row["output"]) for row in rows])
    dtype = np.dtype("<u2")
    with write_token_file(folder / "train_0", dtype) as file:
        for pair in pairs:
            file.add(join_row(pair.prompt, pair.response, dtype))
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts or rows))
    return folder


def edited(folder: Path, place: int, **changes) -> Path:
    """Copy the golden folder and change a row of its train.jsonl."""
    for file in FULL.iterdir():
        shutil.copy2(file, folder)
    rows = read_jsonl(FULL / "train.jsonl")
    rows[place] = {**rows[place], **changes}
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("place", [0, 17, 33])
@pytest.mark.parametrize("changes", [{"output": "learn data"}, {"prompt": "Name a teacher."}])
def test_stale_names_an_edited_row(tmp_path, place, changes):
    stale = opened(edited(tmp_path, place, **changes)).stale
    assert f"train.jsonl, line {place + 1} does not say what row {place} of train_0.bin holds" in stale


def test_stale_names_a_lengthened_answer(tmp_path):
    said = read_jsonl(FULL / "train.jsonl")[3]["output"]
    assert "line 4 does not say" in opened(edited(tmp_path, 3, output=f"{said} and more")).stale


def test_stale_samples_unless_the_text_is_newer(tmp_path, monkeypatch):
    monkeypatch.setattr("promptkd.data.prompt_format._SAMPLE", 2)
    folder = edited(tmp_path, 5, output="learn data")
    when = (folder / "train_0.bin").stat().st_mtime
    os.utime(folder / "train.jsonl", (when, when))
    assert not opened(folder).stale
    os.utime(folder / "train.jsonl", (when + 60, when + 60))
    assert "line 6 does not say" in opened(folder).stale


def test_training_refuses_stale_token_files_and_leaves_nothing(tmp_path, save):
    argv = [
        str(edited(tmp_path, 3, output="learn data")) if word == str(FULL) else word
        for word in golden_argv("sft", save)
    ]
    with pytest.raises(UserError, match=r"line 4 does not say .*process the data again, or remove the token files"):
        train_here(argv)
    assert not save.exists()


def test_stale_is_empty_for_published_files(tmp_path):
    for split in ("train", "valid"):
        examples = opened(FULL, split=split)
        assert not examples.stale and not examples.warning


@pytest.mark.parametrize("rule", ["published", "none", "own"])
def test_stale_is_empty_for_every_rule(tmp_path, rule):
    rows = [*ROWS, {"prompt": "Word: ", "output": "data"}, {"prompt": "hi", "output": "</s> end"}]
    examples = opened(processed(tmp_path, metaspace(begins=True), rule, rows), metaspace(begins=True))
    assert not examples.stale


def test_stale_is_empty_for_cut_rows(tmp_path):
    folder = processed(tmp_path, byte_level())
    long = ExampleSet.open(folder, "train", byte_level(), 96, 512)
    dtype = np.dtype("<u2")
    with write_token_file(folder / "train_0", dtype) as file:
        for example in long:
            file.add(join_row(example.prompt, example.response[:2], dtype))
    assert not opened(folder).stale


def test_warning_names_tokens_of_another_tokenizer(tmp_path):
    folder = processed(tmp_path, metaspace())
    assert "another tokenizer's" in opened(folder).stale
    (folder / "train.jsonl").unlink()
    assert "no response ends with a token that ends a text in this tokenizer" in opened(folder).warning
    shutil.copy(GOLDEN / "processed/corpus/gpt2/train_0.bin", folder)
    shutil.copy(GOLDEN / "processed/corpus/gpt2/train_0.idx", folder)
    assert not opened(folder).warning
    with write_token_file(folder / "train_0", np.dtype("<u2")) as file:
        file.add([7, 8, 9])
    assert "no row holds a token that ends a text" in opened(folder).warning


def test_warning_names_a_file_for_a_smaller_vocabulary(tmp_path, monkeypatch):
    folder = processed(tmp_path, byte_level())
    (folder / "train.jsonl").unlink()
    monkeypatch.setattr("promptkd.data.dataset.vocabulary_size", lambda tokenizer: 151_936)
    assert "made for a vocabulary under 65,500 tokens" in opened(folder).warning


@pytest.mark.parametrize(("rule", "found"), [("own", "own"), ("none", "none"), ("published", "none")])
def test_format_of_file_recognizes_the_rule(tmp_path, rule, found):
    tokenizer = metaspace(begins=True)
    examples = opened(processed(tmp_path, tokenizer, rule), tokenizer)
    assert examples.format.special_tokens == found
    assert (examples[0].prompt[0] == tokenizer.bos_token_id) == (found == "own")
    assert ("evaluation of the trained model leaves it out, too" in examples.warning) == (found == "none")
    other = {"own": "none", "none": "own"}[found]
    with pytest.raises(UserError, match=f"--special-tokens {other}: the prompts of .* their rule is {found}"):
        opened(tmp_path, tokenizer, special_tokens=other)
    assert opened(tmp_path, tokenizer, special_tokens="published").format.special_tokens == "published"
