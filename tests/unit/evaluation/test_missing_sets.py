"""Test sets that are not there: the command that is advised fetches what was looked for, and nothing besides."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from helpers.training import ROOT

from promptkd.cli.download import parse
from promptkd.downloads.catalog import load_catalog, select
from promptkd.errors import UserError
from promptkd.evaluation.test_sets import FOLDERS, find_sets

TABLE = load_catalog(ROOT / "configs/downloads.json")


def fetched(text: str) -> dict[str, Path]:
    """The items that the command within an error gets, and where each goes."""
    command = re.search(r"bash download_requirements.sh (.*?) downloads the test sets?", text)[1]
    args = parse(shlex.split(command), TABLE)
    assert args.only, "without --only it would fetch corpora of many GB"
    return {item.key: item.folder(args.base_path) for item in select(TABLE, args.only, args.models, args.data)}


def test_find_sets_reports_one_missing_set(tmp_path):
    root = tmp_path / "other base/data"
    (root / "dolly").mkdir(parents=True)
    (root / "dolly/valid.jsonl").touch()
    _, missing = find_sets(str(root), ["dolly", "vicuna", "sinst", "own"])
    for lost, key in zip(missing, ("data/vicuna", "data/sinst")):
        (place,) = fetched(str(lost)).values()
        assert fetched(lost.remedy).keys() == {key} and place.resolve() in Path(lost.file).resolve().parents
    assert str(missing[2]).endswith("own/valid.jsonl does not exist: create it, or correct --data-names")


@pytest.mark.parametrize("there", [True, False])
def test_find_sets_without_any_set_is_refused(there, tmp_path):
    if there:
        (tmp_path / "data").mkdir()
    with pytest.raises(UserError) as refused:
        find_sets(str(tmp_path / "data"), list(FOLDERS))
    assert set(fetched(str(refused.value)).values()) == {
        tmp_path / "data" / folder for folder in ("dolly", "self-inst", "vicuna", "sinst", "uinst")
    }


@pytest.mark.parametrize("name", FOLDERS)
def test_find_sets_remedy_for_the_folder_of_one_set(name, tmp_path):
    folder = tmp_path / "data" / FOLDERS[name]
    with pytest.raises(UserError, match="no such folder") as refused:
        find_sets(str(folder), [name])
    (place,) = fetched(str(refused.value)).values()
    assert place == folder or place in folder.parents


def test_find_sets_remedy_for_the_project_has_no_base_path(monkeypatch, tmp_path):
    monkeypatch.setattr("promptkd.evaluation.test_sets.PROJECT", tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"requirements\.sh --only data/vicuna downloads the test set$"):
        find_sets("data", ["vicuna"])


def test_find_sets_remedy_for_another_layout_names_the_folder(tmp_path):
    with pytest.raises(UserError, match=re.escape(f"into {ROOT / 'data'}: then give that folder as --data-dir")):
        find_sets(str(tmp_path), ["vicuna"])
