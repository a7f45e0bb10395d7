"""ExampleSet reads equal examples from token files and text, and names broken input by file and line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from promptkd.data.dataset import ExampleSet
from promptkd.data.encoding import TextEncoder
from promptkd.data.rows import read_row, reference_texts, render_prompt
from promptkd.data.token_file import write_token_file
from promptkd.errors import UserError
from promptkd.utils.jsonl import read_jsonl

GOLDEN = Path(__file__).parents[2] / "golden"
FULL, PROMPTS, CORPUS = (
    GOLDEN / "processed" / name for name in ("dolly/full/gpt2", "dolly/prompt/gpt2", "corpus/gpt2")
)
GOOD = {"instruction": "Name a token.", "input": "", "output": "alpha"}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(GOLDEN / "models/gpt2_student")


def put(folder, *rows, split="train"):
    """Write `<split>.jsonl`. Rows are dicts, or bytes that are written unchanged."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    (folder / f"{split}.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return folder


def same(one: ExampleSet, other: ExampleSet) -> bool:
    assert len(one) == len(other) and one.references == other.references
    return all(
        a.index == b.index and np.array_equal(a.prompt, b.prompt) and np.array_equal(a.response, b.response)
        for a, b in zip(one, other)
    )


def test_jsonl_and_token_files_give_the_same_examples(tokenizer, tmp_path):
    tokens = ExampleSet.open(FULL, "train", tokenizer, 96, 128)
    assert len(tokens) == 34 and tokens.counts.dropped == 0
    shutil.copy(FULL / "train.jsonl", tmp_path)
    assert same(tokens, ExampleSet.open(tmp_path, "train", tokenizer, 96, 128))
    # raw rows 12.. are the train split: the same examples, fourteen prompts too long
    put(tmp_path, *(GOLDEN / "data/raw.jsonl").read_bytes().splitlines()[12:])
    raw = ExampleSet.open(tmp_path, "train", tokenizer, 96, 128)
    assert same(tokens, raw) and raw.counts.dropped == 14


def test_example_set_example(tokenizer):
    examples = ExampleSet.open(FULL, "valid", tokenizer, 96, 128)
    example, row = examples[1], read_jsonl(FULL / "valid.jsonl")[1]
    assert example.index == 1 and example.prompt.dtype == example.response.dtype == np.int64
    assert tokenizer.decode(example.prompt) == row["prompt"]
    assert tokenizer.decode(example.response) == row["output"] + tokenizer.eos_token
    assert examples.references[1] == [row["output"]]
    assert [path.name for path in examples.files] == ["valid_0.bin", "valid_0.idx", "valid.jsonl"]


@pytest.mark.parametrize("limit", [0, 3, 8, 100])
def test_example_set_limit(tokenizer, tmp_path, limit):
    shutil.copy(FULL / "valid.jsonl", tmp_path)
    for folder in (FULL, tmp_path):
        examples = ExampleSet.open(folder, "valid", tokenizer, 96, 128, limit)
        assert len(examples) == len(examples.references) == len(list(examples)) == min(limit, 8)


@pytest.mark.parametrize("max_length", [64, 75, 80])
def test_example_set_cuts_rows_to_max_length(tokenizer, tmp_path, max_length):
    whole = ExampleSet.open(FULL, "valid", tokenizer, 96, 512)
    shutil.copy(FULL / "valid.jsonl", tmp_path)
    for folder in (FULL, tmp_path):
        for full, cut in zip(whole, ExampleSet.open(folder, "valid", tokenizer, 96, max_length)):
            assert np.array_equal(full.prompt, cut.prompt)
            assert np.array_equal(full.response[: max(max_length - len(full.prompt), 0)], cut.response)


def test_example_set_rows_without_marker_are_text_or_prompts(tokenizer):
    text = ExampleSet.open(CORPUS, "valid", tokenizer, 96, 100)
    assert text.references is None
    assert all((len(row.prompt), len(row.response)) == (1, 99) for row in text)
    prompts = ExampleSet.open(PROMPTS, "train", tokenizer, 96, 128, prompts_only=True)
    full = ExampleSet.open(FULL, "train", tokenizer, 96, 128, prompts_only=True)
    assert all(np.array_equal(a.prompt, b.prompt) and not len(a.response) for a, b in zip(prompts, full))
    with pytest.raises(UserError, match="row 0: its prompt has 128 tokens"):
        ExampleSet.open(CORPUS, "valid", tokenizer, 96, 100, prompts_only=True)


def test_example_set_refuses_or_drops_long_prompts(tokenizer, tmp_path):
    with pytest.raises(
        UserError, match=r"train_0.bin, row \d+: its prompt has 9\d tokens, over --max-prompt-length 90"
    ):
        ExampleSet.open(FULL, "train", tokenizer, 90, 128)
    shutil.copy(FULL / "train.jsonl", tmp_path)
    examples = ExampleSet.open(tmp_path, "train", tokenizer, 90, 128)
    assert (
        examples.counts.dropped > 0
        and len(examples) + examples.counts.dropped == 34 == len(examples.references) + examples.counts.dropped
    )
    with pytest.raises(UserError, match="all 34 prompts are over --max-prompt-length 5"):
        ExampleSet.open(tmp_path, "train", tokenizer, 5, 128)


def test_example_set_reads_each_kind_of_row(tokenizer, tmp_path):
    rows = [
        {"instruction": "Say {a}.", "output": "x <n> y"},
        {"instruction": "Say {a}.", "input": "b", "output": ["one", "two"]},
        {"prompt": "Q:", "response": "A"},
        {"prompt": "Q:", "instruction": "ignored", "input": "", "output": ""},
    ]
    examples = ExampleSet.open(put(tmp_path, *rows), "train", tokenizer, 96, 512)
    assert examples.references == [["x <n> y"], ["one", "two"], ["A"], [""]]
    assert [tokenizer.decode(row.response[:-1]) for row in examples] == ["x <n> y", "one", "A", ""]
    assert all(row.response[-1] == tokenizer.eos_token_id for row in examples)
    assert "### Instruction:\nSay {a}.\n\n### Response:\n" in tokenizer.decode(examples[0].prompt)
    assert tokenizer.decode(examples[1].prompt).endswith("Say {a}.\n\n### Input:\nb\n\n### Response:\n")
    assert tokenizer.decode(examples[2].prompt) == tokenizer.decode(examples[3].prompt) == "Q:"


def test_render_prompt_equals_the_published_prompts():
    for row in read_jsonl(FULL / "train.jsonl"):
        bare = {key: row[key] for key in ("instruction", "input")}
        assert render_prompt(read_row(bare)) == row["prompt"] == render_prompt(read_row(row))


def test_pairs_tokenize_prompt_and_response_together(tokenizer):
    pairs = [("Say", " it"), ("a\n", "\nb"), ("Q", "")]
    for (prompt, response), pair in zip(pairs, TextEncoder(tokenizer).pairs(pairs)):
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        whole = [*tokenizer.encode(prompt + response, add_special_tokens=False), tokenizer.eos_token_id]
        assert [part.tolist() for part in pair.within(None)] == [ids, whole[len(ids) :]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"instruction": "x", "output": ', "no JSON"),
        (b'{"instruction": "x"} {}', "no JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "a number"),
        (b'{"instruction": "\xff"}', "byte 18 is not UTF-8"),
        (json.dumps(GOOD).encode("utf-16-le"), "not UTF-8|no JSON"),
        (b"[]", "object is needed, not list"),
        (b"null", "object is needed, not NoneType"),
        (b"NaN", "NaN is no JSON"),
        (b'{"a": 1, "a": 2}', "the key 'a' occurs twice"),
        (b"", "line 2: it is empty"),
        ({}, '"instruction" nor "prompt", only no key'),
        ({"question": "x", "output": "y"}, '"instruction" nor "prompt", only "question", "output"'),
        ({"instruction": "x", "answer": "y"}, 'no "output"'),
        ({"prompt": "x"}, 'no "output"'),
        ({"prompt": "", "output": "y"}, '"prompt" is empty'),
        ({"prompt": ["x"], "output": "y"}, '"prompt" has to be a text, not list'),
        ({"instruction": 3, "output": "y"}, '"instruction" has to be a text, not int'),
        ({"instruction": "x", "input": ["a"], "output": "y"}, '"input" has to be a text, not list'),
        ({"instruction": "x", "output": float("nan")}, "NaN is no JSON"),
        ({"instruction": "x", "output": 1.5}, '"output" has to be a text, not float'),
        ({"instruction": "x", "output": []}, 'list "output" is empty'),
        ({"instruction": "x", "output": ["a", 1]}, '"output" has to be a text, not int'),
        ({"instruction": "x\ud800", "output": "y"}, "lone surrogate"),
    ],
)
def test_example_set_names_broken_lines(tokenizer, tmp_path, line, message):
    put(tmp_path, GOOD, line, GOOD)
    with pytest.raises(UserError, match=message) as error:
        ExampleSet.open(tmp_path, "train", tokenizer, 96, 128)
    assert f"{tmp_path / 'train.jsonl'}, line 2" in str(error.value)


def test_read_jsonl_accepts_unusual_lines(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 2}\r\n{"a": "\xe2\x80\xa8"}\n{}\n\n  \n')
    assert read_jsonl(path) == [{"a": 2}, {"a": "\u2028"}, {}]


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_read_jsonl_refuses_an_empty_file(tmp_path, content):
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(UserError, match="the file is empty"):
        read_jsonl(tmp_path / "x.jsonl")


def test_read_jsonl_refuses_a_line_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr("promptkd.utils.jsonl.LONGEST_LINE", 1000)
    (tmp_path / "x.jsonl").write_bytes(b'{}\n{"a": "' + b"a" * 5000)
    with pytest.raises(UserError, match="line 2: it is longer than 1000 bytes"):
        read_jsonl(tmp_path / "x.jsonl")
    with pytest.raises(UserError, match="no such file"):
        read_jsonl("/dev/zero")


def test_example_set_names_missing_files(tokenizer, tmp_path):
    def message(folder):
        with pytest.raises(UserError) as error:
            ExampleSet.open(folder, "train", tokenizer, 96, 128)
        return str(error.value)

    assert "no such folder" in message(tmp_path / "none")
    assert "neither train_0.bin/.idx nor train.jsonl" in message(tmp_path) and "process_data.py" in message(tmp_path)
    shutil.copy(FULL / "train_0.bin", tmp_path)
    assert "train_0.idx is missing" in message(tmp_path)
    shutil.copy(FULL / "train_0.idx", tmp_path)
    shutil.copy(FULL / "valid.jsonl", tmp_path / "train.jsonl")
    assert "train.jsonl has 8 rows, train_0.bin beside it 34" in message(tmp_path)
    shutil.copy(FULL / "train_0.idx", tmp_path / "train_1.idx")
    assert "only train_0 is read" in message(tmp_path)


def test_example_set_refuses_tokens_outside_the_vocabulary(tokenizer, tmp_path):
    with write_token_file(tmp_path / "train_0", np.dtype("<u2")) as file:
        file.add([5, 65535, 1499])
        file.add([5, 65535, 1500])
    with pytest.raises(UserError, match="row 1: token 1500 is outside the vocabulary of 1500"):
        ExampleSet.open(tmp_path, "train", tokenizer, 96, 128)


def test_example_set_reads_lists_of_references_beside_token_files(tokenizer, tmp_path):
    for end in ("bin", "idx"):
        shutil.copy(FULL / f"valid_0.{end}", tmp_path)
    put(tmp_path, *[{"output": ["a", "b"]}] * 7, {"output": 1}, split="valid")
    with pytest.raises(UserError, match=r"valid.jsonl, line 8: \"output\" has to be a text"):
        ExampleSet.open(tmp_path, "valid", tokenizer, 96, 128)
    put(tmp_path, *[{"output": ["a", "b"]}] * 7, {"output": "c"}, split="valid")
    examples = ExampleSet.open(tmp_path, "valid", tokenizer, 96, 128)
    assert examples.references[6:] == [["a", "b"], ["c"]] and not examples.stale
    assert reference_texts({"output": "c"}) == ["c"]
