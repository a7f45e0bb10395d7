"""tools/process_data.py: the published bytes, whatever the number of workers; nothing written on bad input."""

# ruff: noqa: F811 - a fixture that is imported
from __future__ import annotations

import json
import os
import signal
import subprocess
import time

import numpy as np
import pytest
from helpers.processing import GOLDEN, RAW, TEXT, TOKENIZER, command, contents, instructions, run  # noqa: F401
from helpers.training import ROOT
from transformers import AutoTokenizer

from promptkd.data import workers as data_workers
from promptkd.data.preprocess import EncodeDocuments, packed
from promptkd.data.special_tokens import SpecialTokens
from promptkd.data.token_file import TokenFile
from promptkd.utils.jsonl import read_jsonl

SHARED = ROOT.parent / "shared"


def corpus(save, *more, raw=TEXT):
    options = ("--max-length", 128, "--dev-num", 8)
    return "corpus", "--raw", raw, "--tokenizer", TOKENIZER, "--save", save, *options, *more


def test_process_data_in_a_process_of_its_own(tmp_path):
    done = subprocess.run(command(*instructions(tmp_path / "out")), cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0].startswith("valid: 8 rows, 4 dropped, prompt 66.6 tokens (at most 68)")
    assert contents(tmp_path / "out") == contents(GOLDEN / "processed/dolly/full/gpt2")


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("make", "more", "published"),
    [
        (instructions, (), "dolly/full/gpt2"),
        (instructions, ("--only-prompt",), "dolly/prompt/gpt2"),
        (corpus, ("--train-num", 64), "corpus/gpt2"),
    ],
)
def test_process_data_writes_the_published_bytes(run, tmp_path, monkeypatch, workers, make, more, published):
    chunks = data_workers._chunks
    monkeypatch.setattr(data_workers, "_chunks", lambda lines: chunks(lines, most_lines=5))
    status, _, errors = run(*make(tmp_path / "a/b", *more, "--workers", workers))
    assert (status, errors) == (0, "")
    assert contents(tmp_path / "a/b") == contents(GOLDEN / "processed" / published)


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "data/dolly/raw.jsonl").is_file(), reason="../shared holds the real Dolly data")
def test_process_data_writes_the_published_dolly(run, tmp_path):
    """The train split equals the published file byte by byte.

    So do the published dev rows. An unordered pool of workers wrote them, so their blocks of 50 rows are sorted here.
    """
    tokenizer, published = SHARED / "models/gpt2-dolly-student", SHARED / "data/minillm_processed/dolly/full/gpt2"
    raw = SHARED / "data/dolly/raw.jsonl"
    assert run(*instructions(tmp_path, raw=raw, tokenizer=tokenizer, prompt=256, dev=1000))[0] == 0
    for name in ("train_0.bin", "train_0.idx"):
        assert (tmp_path / name).read_bytes() == (published / name).read_bytes()
    ours, theirs = ([row.tolist() for row in TokenFile(folder / "valid_0")] for folder in (tmp_path, published))
    blocks = [ours[first : first + 50] for first in range(0, 1000, 50)]
    order = [blocks.index(theirs[first : first + 50]) for first in range(0, 1000, 50)]
    assert sorted(order) == list(range(20))


def test_corpus_uses_all_rows(run, tmp_path):
    assert run(*corpus(tmp_path))[0] == 0
    valid, train = TokenFile(tmp_path / "valid_0"), TokenFile(tmp_path / "train_0")
    assert (len(valid), len(train)) == (8, 271)
    status, _, errors = run(*corpus(tmp_path, "--overwrite", "--train-num", 300))
    assert status == 0 and "ended before --train-num 300 rows were full" in errors


def test_encode_documents_of_lines(tmp_path):
    class Letters:
        eos_token_id, name_or_path = 0, "letters"

        def __call__(self, texts, **_):
            return {"input_ids": [list(text.encode()) for text in texts]}

    job = EncodeDocuments(SpecialTokens(Letters()), "raw")
    ids, spelled = job([(1, b"a<@x(x!>b\n"), (2, b"\n"), (3, b"c\rd\r\n"), (4, b"e")])
    assert bytes(ids.tolist()) == b"a\nb\n\0\n\0c\nd\n\0e\0".replace(b"c\nd", b"c\n\0d") and not spelled


def test_corpus_keeps_spelled_special_tokens_as_text(run, tmp_path):
    raw = tmp_path / "text.txt"
    raw.write_text("learn data <|endoftext|> token\n" + "learn data token\n" * 40)
    save = tmp_path / "out"
    status, _, said = run("corpus", "--raw", raw, "--tokenizer", TOKENIZER, "--save", save, "--max-length", 32,
                          "--dev-num", 1, "--workers", 1)  # fmt: skip
    ids = np.concatenate([*TokenFile(save / "valid_0"), *TokenFile(save / "train_0")])
    text = AutoTokenizer.from_pretrained(TOKENIZER).decode(ids[: list(ids).index(0)])
    assert status == 0 and text == "learn data <|endoftext|> token\n"
    assert "1 documents spell a special token, which stays text" in said
    assert "tokens do not fill a row and are left out" in said


def test_packed_cuts_rows():
    pieces = [np.arange(3), np.arange(3, 10), np.arange(10, 11)]
    assert [row.tolist() for row in packed(pieces, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_instructions_of_other_rows_and_wide_vocabularies(run, tmp_path, monkeypatch):
    raw = tmp_path / "raw.jsonl"
    rows = [
        {"prompt": "Q:", "response": "a"},
        {"instruction": "Say é", "output": ["b", "c"], "topic": "t"},
        {"prompt": "R:", "instruction": "i", "input": "j", "output": "d"},
    ]
    raw.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr("promptkd.data.preprocess.vocabulary_size", lambda tokenizer: 151_936)
    assert run(*instructions(tmp_path / "out", raw=raw, dev=1))[0] == 0
    valid, train = (read_jsonl(tmp_path / f"out/{split}.jsonl") for split in ("valid", "train"))
    assert valid == [{"prompt": "Q:", "output": "a"}]
    assert [list(row) for row in train] == [["instruction", "prompt", "input", "output"]] * 2
    assert train[0]["output"] == ["b", "c"] and train[0]["input"] == "" and train[1]["prompt"] == "R:"
    file = TokenFile(tmp_path / "out/valid_0")
    assert file.dtype == np.int32 and file.prompt_lengths().tolist() == [list(file[0]).index(2**31 - 1)]


def test_instructions_max_length_cuts_responses(run, tmp_path):
    assert run(*instructions(tmp_path, "--max-length", 97))[0] == 0
    file, whole = TokenFile(tmp_path / "train_0"), TokenFile(GOLDEN / "processed/dolly/full/gpt2/train_0")
    assert max(file.row_lengths()) == 98  # the marker is no token of the model's
    assert all(np.array_equal(row, full[:98]) for row, full in zip(file, whole))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("instrutions",), "unknown command instrutions: did you mean instructions?"),
        (instructions("{save}", "--over-write"), "unknown option --over-write: did you mean --overwrite?"),
        (("corpus", "--raw", "x"), "--tokenizer is missing"),
        (instructions("{save}", dev="many"), "--dev-num"),
        (instructions("{save}", dev=0), "--dev-num 0 is under 1"),
        (instructions("{save}", dev=60), "has 60 rows, --dev-num 60 leaves none"),
        (instructions("{save}", prompt=5), "all 12 prompts of the valid split are over --max-prompt-length 5"),
        (instructions("{save}", "--max-length", 96), "--max-length 96 has to be over"),
        (instructions("{save}", "--workers", 0), "--workers 0 is under 1"),
        (instructions("{save}", raw="none.jsonl"), "--raw none.jsonl: no such file"),
        (instructions("{save}", raw="/dev/null"), "--raw /dev/null: no such file"),
        (instructions("{save}", tokenizer="/none"), "/none: no tokenizer"),
        (instructions("{save}", raw=TEXT), "corpus.txt, line 1: this is no JSON"),
        (instructions(RAW), "raw.jsonl is a file"),
        (corpus("{save}", "--dev-num", 279), "fills 279 rows of 128 tokens"),
        (corpus("{save}", "--train-num", 0), "--train-num 0 is under 1"),
    ],
)
def test_process_data_refuses_bad_input(run, tmp_path, arguments, message):
    status, out, errors = run(*(str(part).replace("{save}", str(tmp_path / "a/b")) for part in arguments))
    assert (status, out) == (2, "") and message in errors and errors.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["instructions", "corpus", "pseudo"])
def test_process_data_dry_run_prints_the_settings(run, tmp_path, command):
    given = ("--data-dir", "x", "--generated", "y") if command == "pseudo" else ("--raw", "none.jsonl", "--dev-num", 7)
    options = (*given, "--tokenizer", "/none", "--save", tmp_path / "out")
    status, out, errors = run(command, *options, "--dry-run")
    settings = json.loads(out)
    assert (status, errors, settings["save"]) == (0, "", str(tmp_path / "out"))
    assert settings["overwrite"] is False and not list(tmp_path.iterdir())


@pytest.mark.parametrize("workers", [1, 2])
def test_instructions_name_a_late_broken_line(run, tmp_path, workers):
    raw, save = tmp_path / "raw.jsonl", tmp_path / "out"
    raw.write_bytes(RAW.read_bytes() * 20 + b'{"instruction": "x"}\n' + RAW.read_bytes() * 20)
    status, _, errors = run(*instructions(save, "--workers", workers, raw=raw))
    assert status == 2 and 'raw.jsonl, line 1201: it has no "output"' in errors and not save.exists()


def test_process_data_keeps_existing_files(run, tmp_path):
    save = tmp_path / "out"
    assert run(*instructions(save))[0] == 0
    before = contents(save)
    status, _, errors = run(*instructions(save, "--only-prompt"))
    assert status == 2 and "valid_0.bin exists already: --overwrite replaces it" in errors
    status, _, errors = run(*instructions(save, "--only-prompt", "--overwrite", prompt=5))
    assert status == 2 and contents(save) == before
    status, _, errors = run(*instructions(save, "--overwrite", raw=save / "train.jsonl"))
    assert status == 2 and "would be replaced by the output" in errors
    status, _, errors = run(*corpus(save, "--overwrite"))
    assert status == 2 and "belongs to instructions" in errors and contents(save) == before
    assert run(*instructions(save, "--only-prompt", "--overwrite"))[0] == 0
    assert contents(save) == contents(GOLDEN / "processed/dolly/prompt/gpt2")


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_process_data_leaves_nothing_when_stopped(tmp_path, number):
    raw, save = tmp_path / "raw.jsonl", tmp_path / "out"
    raw.write_bytes(RAW.read_bytes() * 5000)
    process = subprocess.Popen(command(*instructions(save, "--workers", 2, raw=raw)), cwd=ROOT, stderr=subprocess.PIPE)
    until = time.monotonic() + 60
    while not save.exists() and time.monotonic() < until:
        time.sleep(0.05)
    os.kill(process.pid, number)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (128 + number, b"")
    assert not save.exists()
