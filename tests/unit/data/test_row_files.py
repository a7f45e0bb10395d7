"""Every kind of file gives the same examples, and errors name broken files."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
from helpers.processing import command, contents, instructions, run  # noqa: F401
from helpers.training import GOLDEN
from transformers import AutoTokenizer

from promptkd.data.dataset import ExampleSet
from promptkd.data.row_files import digest_of_rows, find_rows, read_rows
from promptkd.errors import UserError
from promptkd.evaluation.test_sets import find_sets, read_set

ROWS = [{"instruction": f"Say {i}", "input": "a, b\nc" if i else "", "output": f'"{i}" é'} for i in range(6)]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(GOLDEN / "models/gpt2_student")


def write(folder, name, rows=ROWS):
    """Write rows as a file of the kind that its name says, or with `save_to_disk` for "saved"."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    if name == "saved":
        datasets = pytest.importorskip("datasets", reason="the optional library datasets is not installed")
        splits = {"train": datasets.Dataset.from_list(rows), "validation": datasets.Dataset.from_list(rows[:3])}
        datasets.DatasetDict(splits).save_to_disk(folder)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".csv":
        quoted = [[value.replace('"', '""') for value in row.values()] for row in rows]
        lines = [",".join(rows[0]), *(",".join(f'"{value}"' for value in values) for values in quoted)]
        path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\r\n")
    else:
        arrow = pytest.importorskip("pyarrow", reason="pyarrow, which datasets brings, is not installed")
        from pyarrow import parquet

        parquet.write_table(arrow.Table.from_pylist(rows), path)
    return folder


def ids(examples):
    return [(each.prompt.tolist(), each.response.tolist()) for each in examples]


@pytest.mark.parametrize("name", ["train.json", "train.csv", "train.parquet", "saved"])
def test_example_set_is_the_same_from_every_kind_of_file(tokenizer, tmp_path, name):
    plain = ExampleSet.open(write(tmp_path / "a", "train.jsonl"), "train", tokenizer, 96, 128)
    other = ExampleSet.open(write(tmp_path / "b", name), "train", tokenizer, 96, 128)
    assert ids(other) == ids(plain) and other.references == plain.references and len(other) == 6


def test_read_rows_content_decides_between_array_and_lines(tmp_path):
    (tmp_path / "array.jsonl").write_text("\n " + json.dumps(ROWS))
    (tmp_path / "lines.json").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert read_rows(tmp_path / "array.jsonl")[1] == (f"{tmp_path}/array.jsonl, row 2", ROWS[1])
    assert read_rows(tmp_path / "lines.json")[1] == (f"{tmp_path}/lines.json, line 2", ROWS[1])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", b"[]", "x.json, line 1: the array is empty"),
        ("x.json", b'[{"a": 1}, 2]', "x.json, row 2: a JSON object is needed, not int"),
        ("x.json", b'[{"a": 1},', "x.json, line 1: not a JSON array"),
        ("x.json", b'{"data": [\n{"a": 1}]}', "x.json, line 1: this is no JSON"),
        ("x.csv", b"", "x.csv: the file is empty"),
        ("x.csv", b"instruction,output\n", "x.csv: the file is empty"),
        ("x.csv", b"instruction,output\na,b\n\"a\nb\",c,d\n", "x.csv, line 3: it has 3 fields, the header 2"),
        ("x.csv", b"instruction,output\na,b\n\"a,b\n", "x.csv, line 3: not CSV"),
        ("x.csv", b"output,output\na,b\n", "header has 'output' twice"),
        ("x.csv", b"instruction,output\na,\xff\n", "x.csv, line 2: byte 3 is not UTF-8"),
        ("x.parquet", b"PAR1 PAR1", "x.parquet"),
    ],
)  # fmt: skip
def test_read_rows_names_file_and_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        read_rows(tmp_path / name)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_example_set_names_what_is_there_where_a_split_is_missing(tokenizer, tmp_path):
    for name in ("train.csv", "valid.tsv"):
        (tmp_path / name).write_text("instruction,output\na,b\n")
    with pytest.raises(
        UserError, match=r"nor valid.jsonl \(.json, .csv, .parquet\) is there, only train.csv, valid.tsv"
    ):
        ExampleSet.open(tmp_path, "valid", tokenizer, 96, 128)


@pytest.mark.parametrize(
    ("files", "split", "used", "said"),
    [
        (["train.csv"], "train", "train.csv", ""),
        (["train.csv", "train.jsonl"], "train", "train.jsonl", "train.csv beside it is not"),
        (["validation.json", "test.json"], "valid", "validation.json", ""),
        (["dev.json", "validation.json"], "valid", "validation.json", "dev.json beside it is not"),
        (["test.csv"], "valid", "test.csv", "is the dev set: there is no validation split"),
        (["test.json", "validation.json"], "test", "test.json", "validation.json beside it is not"),
        (["valid.jsonl", "train.jsonl"], "test", "valid.jsonl", ""),
    ],
)
def test_find_rows_says_which_of_several_is_read(tmp_path, capsys, files, split, used, said):
    for name in files:
        (tmp_path / name).touch()
    assert find_rows(tmp_path, split) == str(tmp_path / used)
    err = capsys.readouterr().err
    assert said in err and bool(err) == bool(said)


def test_evaluation_reads_a_saved_data_set(tokenizer, tmp_path):
    folder = write(tmp_path / "saved", "saved")
    found, _ = find_sets(str(folder), ["own"])
    tests = read_set("own", found["own"], tokenizer, 96, -1, False)
    assert len(tests) == 3 and tests.references[2] == [ROWS[2]["output"]]
    assert tests.record()["sha256"] == digest_of_rows(found["own"]) != digest_of_rows(f"{folder}#train")


def test_saved_data_set_without_the_library_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    for source in (f"{tmp_path}#train", "hub:nobody/nothing", tmp_path / "x.parquet"):
        with pytest.raises(UserError, match="pip install datasets"):
            read_rows(source)


def test_hub_name_without_a_network_is_one_line(tokenizer):
    pytest.importorskip("datasets", reason="the optional library datasets is not installed")
    with pytest.raises(UserError, match="hub:nobody/nothing: the datasets library cannot load it") as error:
        ExampleSet.open("hub:nobody/nothing", "train", tokenizer, 96, 128)
    assert "\n" not in str(error.value)


def test_hub_name_config_and_revision_reach_the_library(tokenizer, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="the optional library datasets is not installed")
    calls = []

    def load(name, config, revision):
        calls.append((name, config, revision))
        return {"train": ROWS, "test": ROWS[:2]}

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(ExampleSet.open("hub:a/b:main@v1", "valid", tokenizer, 96, 128)) == 2
    assert calls == [("a/b", "main", "v1")]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"train_sft": ROWS})
    with pytest.raises(UserError, match=r"neither .* is there, only the splits train_sft"):
        ExampleSet.open("hub:a/c", "train", tokenizer, 96, 128)
    with pytest.raises(UserError, match="has no split 'dev': name one of train, test"):
        read_rows("hub:a/b:main@v1#dev")


@pytest.mark.parametrize("name", ["raw.json", "raw.csv", "raw.parquet"])
def test_process_data_makes_the_same_files_from_every_kind(run, tmp_path, name):  # noqa: F811
    made = []
    for kind in ("raw.jsonl", name):
        raw = write(tmp_path / kind[4:], kind) / kind
        assert run(*instructions(tmp_path / f"out{kind}", raw=raw, dev=2))[0] == 0
        made.append(contents(tmp_path / f"out{kind}"))
    assert made[0] == made[1]


def test_files_beside_token_files_are_named(tokenizer, tmp_path, capsys):
    for end in ("bin", "idx"):
        shutil.copy(GOLDEN / f"processed/dolly/full/gpt2/train_0.{end}", tmp_path)
    (tmp_path / "train.csv").write_text("instruction,output\na,b\n")
    ExampleSet.open(tmp_path, "train", tokenizer, 96, 128)
    assert capsys.readouterr().err == f"{tmp_path}/train_0.bin is read; train.csv beside it is not\n"
