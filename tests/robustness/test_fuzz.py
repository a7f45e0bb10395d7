"""Readers fed with anything: a sound result or a UserError, never another exception. The same each time."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from helpers.hostile_damage import sign
from helpers.made_results import make_result
from helpers.training import GOLDEN
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoTokenizer

from promptkd.checkpointing.integrity import verified_state
from promptkd.data.dataset import ExampleSet
from promptkd.data.token_file import HEADER, MAGIC
from promptkd.downloads.catalog import load_catalog
from promptkd.errors import UserError
from promptkd.evaluation.answer_store import _read_answers
from promptkd.models.soft_prompt import load_prompt
from promptkd.reporting.report import ranking
from promptkd.reporting.results import read_result
from promptkd.reporting.tables import score_table
from promptkd.utils.jsonl import read_jsonl, read_metrics
from promptkd.utils.strict_json import parse_json, read_object

FIXTURES = [HealthCheck.function_scoped_fixture]
fuzzed = settings(max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=FIXTURES)
leaves = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8)
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)
numbers = st.integers(-(2**63), 2**63 - 1) | st.integers(0, 9)
STATE = {
    "step": 2, "best": {"best_loss": 2.0}, "skipped": 0, "metrics_bytes": 0, "method_tensors": ["a"],
    "identity": {
        "options": {"batch_size": 1, "gradient_accumulation_steps": 1, "lr": 0.1}, "deepspeed": {}, "ranks": 1,
        "inputs": {"student": {"path": "a", "files": 1, "bytes": 2, "sha256_of_ends": "b"}, "corpus": None},
    },
    "learners": {"student": {
        "stage": 0, "groups": [{"lr": 0.1}], "schedule": {"last_epoch": 1, "_step_count": 2, "_last_lr": [0.1]},
        "counters": {"global_steps": 1, "global_samples": 1, "micro_steps": 1, "skipped_steps": 0}, "loss_scale": {},
    }},
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(GOLDEN / "models/gpt2_student")


def read(reader, *arguments):
    """The reader's result; None for a UserError, whose text has to be one line that is not empty."""
    try:
        return reader(*arguments)
    except UserError as error:
        assert str(error) and "\n" not in str(error)
        return None


def spoilt(content, place: int, value):
    """A copy of a JSON value with one of its inner values replaced; `place` counts them in order."""
    content = copy.deepcopy(content)
    places = []

    def walk(inner) -> None:
        for key in inner if isinstance(inner, dict) else range(len(inner)):
            places.append((inner, key))
            if isinstance(inner[key], (dict, list)):
                walk(inner[key])

    walk(content)
    inner, key = places[place % len(places)]
    inner[key] = value
    return content


@fuzzed
@given(index=st.binary(max_size=80), rows=st.binary(max_size=40))
def test_token_files_of_any_bytes(index, rows, tokenizer, tmp_path):
    (tmp_path / "train_0.idx").write_bytes(index)
    (tmp_path / "train_0.bin").write_bytes(rows)
    read(ExampleSet.open, tmp_path, "train", tokenizer, 96, 128)


@fuzzed
@given(
    version=st.integers(0, 2), code=st.integers(3, 9), rows=st.integers(0, 3) | st.integers(0, 2**64 - 1),
    documents=st.integers(0, 2), sizes=st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(1, 3), max_size=3),
    pointers=st.lists(numbers, max_size=3), starts=st.lists(numbers, max_size=2), tokens=st.binary(max_size=24),
)  # fmt: skip
def test_token_files_whose_index_says_anything(
    version, code, rows, documents, sizes, pointers, starts, tokens, tokenizer, tmp_path
):
    parts = [HEADER.pack(MAGIC, version, code, rows, documents)]
    parts += [struct.pack(f"<{len(n)}{kind}", *n) for n, kind in ((sizes, "i"), (pointers, "q"), (starts, "q"))]
    (tmp_path / "train_0.idx").write_bytes(b"".join(parts))
    (tmp_path / "train_0.bin").write_bytes(tokens)
    examples = read(ExampleSet.open, tmp_path, "train", tokenizer, 96, 128)
    for example in examples or ():
        assert len(example.prompt) >= 1


@fuzzed
@given(content=st.binary(max_size=60) | st.lists(values, max_size=3).map(lambda rows: "\n".join(map(json.dumps, rows))))
def test_jsonl_of_anything(content, tokenizer, tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    rows = read(read_jsonl, path)
    assert rows is None or all(isinstance(row, dict) for row in rows)
    read(ExampleSet.open, tmp_path, "train", tokenizer, 96, 128)
    for reader in (read_metrics, lambda path: list(_read_answers([path])), lambda path: read_object(path, "remedy")):
        read(reader, path)


@fuzzed
@given(text=st.text(max_size=40) | values.map(json.dumps))
def test_json_of_anything(text):
    try:
        parse_json(text)
    except ValueError as error:
        assert str(error)


@fuzzed
@given(manifest=st.binary(max_size=60) | values.map(lambda value: json.dumps({"files": value}).encode()))
def test_manifests_of_anything(manifest, tmp_path):
    folder = tmp_path / "step-2"
    folder.mkdir(exist_ok=True)
    (folder / "state.json").write_text("{}")
    (folder / "manifest.json").write_bytes(manifest)
    with pytest.raises(ValueError):
        verified_state(folder)


@fuzzed
@given(place=st.integers(0, 60), value=values)
def test_checkpoint_states_of_anything(place, value, tmp_path):
    folder = tmp_path / "step-2"
    folder.mkdir(exist_ok=True)
    save_file({"0": torch.ones(2)}, folder / "student-rank0.safetensors")
    (folder / "state.json").write_text(json.dumps(STATE))
    sign(folder)
    assert verified_state(folder)["step"] == 2
    (folder / "state.json").write_text(json.dumps(spoilt(STATE, place, value)))
    sign(folder)
    with contextlib.suppress(ValueError):
        assert verified_state(folder)["step"] == 2


@fuzzed
@given(
    weights=st.binary(max_size=80) | st.integers(0, 900),
    config=st.binary(max_size=40) | st.tuples(st.sampled_from(["peft_type", "num_virtual_tokens"]), values),
)
def test_prompt_files_of_anything(weights, config, tmp_path):
    held = tmp_path / "adapter_model.safetensors"
    save_file({"prompt_embeddings": torch.ones(7, 16)}, held)
    good = held.read_bytes()
    if isinstance(weights, int):  # a flipped byte
        place = weights % len(good)
        weights = good[:place] + bytes([good[place] ^ 0x41]) + good[place + 1 :]
    held.write_bytes(weights)
    said = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 7}
    content = config if isinstance(config, bytes) else json.dumps({**said, config[0]: config[1]}).encode()
    (tmp_path / "adapter_config.json").write_bytes(content)
    prompt = read(load_prompt, tmp_path, 16, 7)
    assert prompt is None or (prompt.shape == (7, 16) and bool(torch.isfinite(prompt).all()))


@fuzzed
@given(place=st.integers(0, 60), value=values, name=st.sampled_from(["config.json", "eval/results.json"]))
def test_results_of_anything(place, value, name, tmp_path):
    shutil.rmtree(tmp_path / "sft", ignore_errors=True)
    path = Path(make_result(tmp_path, "sft")) / name
    path.write_text(json.dumps(spoilt(json.loads(path.read_text()), place, value)))

    def tables():
        result = read_result(str(tmp_path / "sft"))
        return score_table([result], []).markdown(), ranking([result], [])

    read(tables)


@fuzzed
@given(place=st.integers(0, 12), value=values)
def test_download_tables_of_anything(place, value, tmp_path):
    row = {"key": "a", "repo": "b/c", "type": "model", "target": "d/e", "bytes": 1, "licence": None, "needs": ["x"]}
    (tmp_path / "table.json").write_text(json.dumps(spoilt({"items": [row]}, place, value)))
    read(load_catalog, tmp_path / "table.json")
