"""Token files have the published bytes, survive round trips, and are refused where they are damaged."""

from __future__ import annotations

import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from promptkd.data.token_file import HEADER, TokenFile, join_row, marker_of, split_row, token_dtype, write_token_file
from promptkd.errors import UserError

GOLDEN = Path(__file__).parents[2] / "golden/processed"
UINT16, INT32 = np.dtype("<u2"), np.dtype("<i4")


def write(prefix, rows, dtype=UINT16):
    with write_token_file(prefix, dtype) as file:
        for row in rows:
            file.add(row)
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx")


@pytest.fixture
def prefix(tmp_path):
    """Write a small valid file with prompts of 2, 1 and 3 tokens and a vocabulary of 10."""
    write(tmp_path / "train_0", [[1, 2, 65535, 3], [4, 65535, 5, 9], [6, 7, 8, 65535]])
    return tmp_path / "train_0"


@pytest.mark.parametrize("name", ["dolly/full/gpt2/train_0", "dolly/prompt/gpt2/valid_0", "corpus/gpt2/train_0"])
def test_token_file_round_trip_of_published_bytes(tmp_path, name):
    rows = list(TokenFile(GOLDEN / name, vocab_size=1500))
    for path in write(tmp_path / "copy", rows):
        assert path.read_bytes() == (GOLDEN / name).with_name(f"{Path(name).name}{path.suffix}").read_bytes()


@settings(max_examples=40, deadline=None)
@given(data=st.data(), wide=st.booleans())
def test_token_file_round_trip(data, wide):
    dtype = INT32 if wide else UINT16
    ids = st.lists(st.integers(0, marker_of(dtype) - 1), min_size=1, max_size=8)
    pairs = data.draw(st.lists(st.tuples(ids, ids), min_size=1, max_size=8))
    with tempfile.TemporaryDirectory() as folder:
        write(f"{folder}/x", [join_row(prompt, response, dtype) for prompt, response in pairs], dtype)
        file = TokenFile(f"{folder}/x", vocab_size=marker_of(dtype))
        assert file.dtype == dtype and len(file) == len(pairs)
        assert file.prompt_lengths().tolist() == [len(prompt) for prompt, _ in pairs]
        for row, (prompt, response) in zip(file, pairs):
            assert row.dtype == np.int64
            assert [part.tolist() for part in split_row(row, file.marker)] == [prompt, response]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_token_file_refuses_or_survives_a_flipped_byte(data):
    """A changed byte of the index gives one clear error, or the file is read unchanged."""
    rows = [[1, 2, 65535, 3], [4, 65535, 5], [6]]
    with tempfile.TemporaryDirectory() as folder:
        _, idx = write(f"{folder}/x", rows)
        content = bytearray(idx.read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        idx.write_bytes(content)
        try:
            assert [row.tolist() for row in TokenFile(f"{folder}/x", vocab_size=7)] == rows
        except UserError as error:
            assert str(idx) in str(error)


def test_token_dtype_follows_the_vocabulary():
    assert (token_dtype(50257), token_dtype(65500), token_dtype(65501)) == (UINT16, UINT16, INT32)
    assert (marker_of(UINT16), marker_of(INT32)) == (65535, 2147483647)


def test_split_row_without_marker_is_text():
    prompt, response = split_row(np.array([5, 6, 7]), 65535)
    assert (prompt.tolist(), response.tolist()) == ([5], [6, 7])
    with pytest.raises(UserError, match="2 markers"):
        split_row(np.array([5, 9, 9]), 9)


@pytest.mark.parametrize("kept", range(0, 34 + 3 * 12 + 8))
def test_token_file_refuses_a_truncated_index(prefix, kept):
    idx = prefix.with_name("train_0.idx")
    idx.write_bytes(idx.read_bytes()[:kept])
    with pytest.raises(UserError, match="make it again"):
        TokenFile(prefix)


@pytest.mark.parametrize("change", [-1, -7, 1, 1000])
def test_token_file_refuses_another_bin_size(prefix, change):
    path = prefix.with_name("train_0.bin")
    content = path.read_bytes()
    path.write_bytes(content[:change] if change < 0 else content + bytes(change))
    with pytest.raises(UserError, match=r"the \.bin beside it has"):
        TokenFile(prefix)


def index(rows, sizes, pointers, documents=(0,), code=8, version=1):
    head = HEADER.pack(b"MMIDIDX\0\0", version, code, rows, len(documents))
    parts = [(sizes, "i"), (pointers, "q"), (documents, "q")]
    return head + b"".join(struct.pack(f"<{len(numbers)}{kind}", *numbers) for numbers, kind in parts)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (index(3, [4, 4, 4], [0, 8, 16]), None),
        (index(3, [4, 4, 4], [0, 8, 16], code=3), "dtype code 3"),
        (index(3, [4, 4, 4], [0, 8, 16], version=2), "version 2"),
        (index(3, [4, 4, 4], [0, 8, 24]), "row 2: it does not begin"),
        (index(3, [4, 4, 4], [-8, 0, 8]), "row 0: it does not begin"),
        (index(3, [4, 4, 4], [0, 2**63 - 1, 16]), "row 1: it does not begin"),
        (index(3, [4, 12, -4], [0, 8, 32]), "row 2: -4 tokens"),
        (index(3, [6, 0, 6], [0, 12, 12]), "row 1: 0 tokens"),
        (index(3, [2**31 - 1] * 3, [0, 8, 16]), "its rows fill"),
        (index(3, [4, 4, 4], [0, 8, 16], documents=[0, 4]), "documents begin outside"),
        (index(3, [4, 4, 4], [0, 8, 16], documents=[]), "no rows"),
        (index(0, [], []), "no rows"),
        (index(2**64 - 1, [4], [0]), "rows need"),
        (index(2**62, [4], [0]), "rows need"),  # 12 * 2**62 is 0 in 64 bits
        (index(100, [1] * 100, range(100)), "100 rows do not fit"),
        (b"", "not a token index"),
        (b"{}" * 50, "not a token index"),
    ],
)
def test_token_file_refuses_a_wrong_index(prefix, content, message):
    prefix.with_name("train_0.idx").write_bytes(content)
    if message is None:
        assert len(TokenFile(prefix)) == 3
    else:
        with pytest.raises(UserError, match=message):
            TokenFile(prefix)


def test_token_file_refuses_wrong_rows(tmp_path):
    write(tmp_path / "x", [[1, 65535, 2], [3, 65535, 65535], [1, 65535, 10], [65535, 1]])
    file = TokenFile(tmp_path / "x", vocab_size=10)
    assert file[0].tolist() == [1, 65535, 2]
    for row, message in [(1, "row 1: it has more than one marker"), (2, "row 2: token 10 is outside")]:
        with pytest.raises(UserError, match=message):
            file[row]
        with pytest.raises(UserError, match=message if row == 1 else "row 1"):
            file.prompt_lengths()
    with pytest.raises(IndexError):
        file[4]
    write(tmp_path / "y", [[65535, 1]])
    with pytest.raises(UserError, match="row 0: it has no token before"):
        TokenFile(tmp_path / "y").prompt_lengths()


def test_token_file_refuses_negative_ids(tmp_path):
    binary, _ = write(tmp_path / "x", [[70000, 2147483647, 2], [3, 2147483647, 4]], INT32)
    assert TokenFile(tmp_path / "x", vocab_size=70001)[0].tolist() == [70000, 2147483647, 2]
    content = np.frombuffer(binary.read_bytes(), INT32).copy()
    content[4:] = -1
    binary.write_bytes(content.tobytes())
    with pytest.raises(UserError, match="row 1: token -1 is outside"):
        TokenFile(tmp_path / "x", vocab_size=70001).prompt_lengths()


def test_prompt_lengths_do_not_depend_on_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("promptkd.data.token_file._BLOCK", 5)
    rows = [[1] * n + ([65535, 2] if n % 2 else []) for n in range(1, 20)]
    write(tmp_path / "x", rows)
    file = TokenFile(tmp_path / "x")
    assert file.prompt_lengths().tolist() == [n if n % 2 else -1 for n in range(1, 20)]
    assert file.prompt_lengths(4).tolist() == [1, -1, 3, -1]
    assert file.row_lengths().tolist() == [len(row) for row in rows]


def test_token_file_names_missing_files(tmp_path, prefix):
    with pytest.raises(UserError, match="no such file"):
        TokenFile(tmp_path / "none")
    prefix.with_name("train_0.bin").unlink()
    prefix.with_name("train_0.bin").mkdir()
    with pytest.raises(UserError, match=r"train_0\.bin: no such file"):
        TokenFile(prefix)


def test_write_token_file_keeps_the_old_file_on_failure(tmp_path, prefix):
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="do not fit"), write_token_file(prefix, UINT16) as file:
        file.add([1, 2])
        file.add([65536])
    with pytest.raises(UserError, match="no row to write"), write_token_file(tmp_path / "empty", UINT16):
        pass
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("row", [[], [-1], [1.5], [[1]]])
def test_write_token_file_refuses_what_is_not_a_row(tmp_path, row):
    with pytest.raises(ValueError), write_token_file(tmp_path / "x", UINT16) as file:
        file.add(row)
    assert not list(tmp_path.iterdir())
