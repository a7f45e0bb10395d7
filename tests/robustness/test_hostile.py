"""Hostile inputs, one a row: each ends with one line that names it, exit status 2, and nothing overwritten."""

# ruff: noqa: F811 - fixtures that are imported
from __future__ import annotations

import signal

import pytest
from helpers.hostile import (  # noqa: F401
    TOO_LONG,
    arguments,
    refused,
    room,
    template,
)
from helpers.hostile_rows_inputs import INPUTS
from helpers.hostile_rows_options import ENVIRONMENTS, OPTIONS
from helpers.hostile_rows_saved import SAVED


def give_up(*_) -> None:
    raise AssertionError(f"still at it after {TOO_LONG} seconds")


@pytest.fixture(autouse=True)
def alarm():
    before = signal.signal(signal.SIGALRM, give_up)
    yield
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    ("entry", "file", "spoil", "words"),
    [pytest.param(*row, id=f"{row[0]}-{row[1]}-{row[2].__name__}") for row in [*INPUTS, *SAVED]],
)
def test_a_spoilt_file(entry, file, spoil, words, room, monkeypatch, capfd):
    spoil(room / file)
    said = refused(entry, arguments(entry, room), room, monkeypatch, capfd)
    for word in words.split(" & "):
        assert word in said


@pytest.mark.parametrize(
    ("entry", "options", "words"), [pytest.param(*row, id=f"{row[0]} {' '.join(row[1])}"[:60]) for row in OPTIONS]
)
def test_a_bad_option(entry, options, words, room, monkeypatch, capfd):
    argv = [option.replace("ROOM", str(room)) for option in options]
    said = refused(entry, [*arguments(entry, room), *argv], room, monkeypatch, capfd)
    for word in words.split(" & "):
        assert word in said


@pytest.mark.parametrize("said", ENVIRONMENTS, ids=str)
def test_a_bad_environment(said, room, monkeypatch, capfd):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert list(said)[-1] in refused("train", arguments("train", room), room, monkeypatch, capfd)


def test_the_table_is_as_long_as_promised():
    assert len(INPUTS) + len(SAVED) + len(OPTIONS) + len(ENVIRONMENTS) >= 80
