"""promptkd/utils/files.py: atomic writes, locks and checksums."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import filelock
import pytest
from helpers.training import ROOT

from promptkd.errors import UserError
from promptkd.utils import files


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(("mode", "content"), [("w", "naïve"), ("wb", b"\x00\xff")])
def test_atomic_file_replaces_at_the_end(tmp_path, mode, content):
    path = tmp_path / "state"
    path.write_text("old")
    with files.atomic_file(path, mode) as file:
        file.write(content)
        assert path.read_text() == "old"
    assert path.read_bytes() == (content.encode() if mode == "w" else content) and names(tmp_path) == {"state"}


@pytest.mark.parametrize("error", [OSError(28, "full"), KeyboardInterrupt()])
def test_atomic_file_error_keeps_the_old_file(tmp_path, error):
    path = tmp_path / "state.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(type(error)), files.atomic_file(path) as file:
        file.write("half")
        raise error
    assert json.loads(path.read_text()) == {"a": 1} and names(tmp_path) == {"state.json"}


def test_atomic_file_does_not_write_through_a_planted_link(tmp_path):
    (tmp_path / "other").write_text("mine")
    (tmp_path / ".state.new").symlink_to(tmp_path / "other")
    with files.atomic_file(tmp_path / "state") as file:
        file.write("new")
    assert (tmp_path / "other").read_text() == "mine" and (tmp_path / "state").read_text() == "new"


def test_write_json_unserializable_content_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        files.write_json(tmp_path / "x.json", {"a": object()})
    assert names(tmp_path) == set()


def test_atomic_folder_replaces_at_the_end(tmp_path):
    folder = tmp_path / "last"
    for text in ("one", "two"):
        with files.atomic_folder(folder) as temporary:
            (temporary / "inner").mkdir()
            (temporary / "inner/file").write_text(text)
            assert text == "one" or (folder / "inner/file").read_text() == "one"
        assert (folder / "inner/file").read_text() == text and names(tmp_path) == {"last"}


def test_atomic_folder_error_keeps_the_old_folder(tmp_path):
    (tmp_path / "last").mkdir()
    (tmp_path / "last/file").write_text("old")
    with pytest.raises(OSError, match="full"), files.atomic_folder(tmp_path / "last") as temporary:
        (temporary / "file").write_text("half")
        raise OSError(28, "full")
    assert (tmp_path / "last/file").read_text() == "old" and names(tmp_path) == {"last"}


def test_replace_folder_failed_move_restores_the_old_folder(tmp_path, monkeypatch):
    real = Path.rename

    def rename(path, target):
        if path.name == "source":
            raise OSError(errno.EIO, "Input/output error")
        return real(path, target)

    for name in ("source", "last"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="Input/output"):
        files.replace_folder(tmp_path / "source", tmp_path / "last")
    assert (tmp_path / "last/file").read_text() == "last" and names(tmp_path) == {"source", "last"}


@pytest.mark.parametrize("moved", [False, True])
def test_restore_folder_after_a_kill_between_the_moves(tmp_path, moved):
    """Killed before the new folder was in place: the old one returns. Killed after that: it is removed."""
    (tmp_path / ".last.old").mkdir()
    (tmp_path / ".last.old/file").write_text("old")
    if moved:
        (tmp_path / "last").mkdir()
        (tmp_path / "last/file").write_text("new")
    files.restore_folder(tmp_path / "last")
    assert (tmp_path / "last/file").read_text() == ("new" if moved else "old") and names(tmp_path) == {"last"}


def test_atomic_folder_keeps_what_a_kill_left_when_it_fails(tmp_path):
    """The copy that a kill between the moves left is the only one: an error in the next write must not remove it."""
    (tmp_path / ".last.old").mkdir()
    (tmp_path / ".last.old/file").write_text("old")
    with pytest.raises(OSError, match="full"), files.atomic_folder(tmp_path / "last"):
        raise OSError(28, "full")
    files.restore_folder(tmp_path / "last")
    assert (tmp_path / "last/file").read_text() == "old"


def test_digest_of_is_size_and_sha256(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK_BYTES", 7)
    content = os.urandom(100)
    (tmp_path / "x").write_bytes(content)
    assert files.digest_of(tmp_path / "x") == {"bytes": 100, "sha256": hashlib.sha256(content).hexdigest()}
    assert files.hash_file(tmp_path / "x", hashlib.sha1(b"blob")) == hashlib.sha1(b"blob" + content).hexdigest()


def test_try_lock_excludes_others_until_it_is_released(tmp_path):
    first = files.try_lock(tmp_path / ".lock")
    assert first is not None and files.try_lock(tmp_path / ".lock") is None
    first.release()
    again = files.try_lock(tmp_path / ".lock")
    assert again is not None
    again.release()


def test_try_lock_is_free_after_its_process_was_killed(tmp_path):
    code = (
        "import os, sys, signal, pathlib; from promptkd.utils.files import try_lock\n"
        "lock = try_lock(pathlib.Path(sys.argv[1])); print(lock is not None, flush=True); signal.pause()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / ".lock")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline() == "True\n"
    assert files.try_lock(tmp_path / ".lock") is None
    process.kill()
    process.communicate()
    lock = files.try_lock(tmp_path / ".lock")
    assert lock is not None
    lock.release()


def test_try_lock_without_locks_keeps_nobody_away(tmp_path, monkeypatch):
    def acquire(lock, **_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    assert files.try_lock(tmp_path / ".lock") is not None


def test_try_lock_does_not_follow_a_planted_link(tmp_path):
    (tmp_path / "target").write_text("mine")
    (tmp_path / ".lock").symlink_to(tmp_path / "target")
    with pytest.raises(OSError):
        files.try_lock(tmp_path / ".lock")
    assert (tmp_path / "target").read_text() == "mine"


def test_atomic_files_adds_to_a_folder(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/kept").write_text("old")
    with files.atomic_files(tmp_path / "data") as staging:
        (staging / "new").write_text("new")
        assert "new" not in names(tmp_path / "data")
    assert names(tmp_path / "data") == {"kept", "new"}


def test_atomic_files_error_removes_the_folders_that_it_created(tmp_path):
    with pytest.raises(UserError, match="cannot be written: full"), files.atomic_files(tmp_path / "a/b") as staging:
        (staging / "half").write_text("half")
        raise OSError(28, "full")
    assert names(tmp_path) == set()


def test_lock_folder_refuses_a_second_process_and_what_is_no_folder(tmp_path):
    lock = files.lock_folder(tmp_path / "run")
    with pytest.raises(UserError, match=r"--save .*run is in use by another run: name another folder"):
        files.lock_folder(tmp_path / "run")
    lock.release()
    files.lock_folder(tmp_path / "run").release()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--save .*file is a file"):
        files.lock_folder(tmp_path / "file")
    (tmp_path / "odd/.lock").mkdir(parents=True)
    with pytest.raises(UserError, match=r"\.lock in it is not a file"):
        files.lock_folder(tmp_path / "odd")


def test_fingerprint_changes_with_the_ends_of_a_file(tmp_path):
    content = bytearray(3 * files.END_BYTES)
    seen = []
    for place in (None, 0, -1):
        if place is not None:
            content[place] = 1
        (tmp_path / "model").write_bytes(content)
        seen.append(files.fingerprint(tmp_path)["sha256_of_ends"])
    assert len(set(seen)) == 3 and files.fingerprint(tmp_path)["bytes"] == len(content)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc tells whether the worker runs")
def test_exit_with_parent_ends_a_worker_of_a_killed_parent(tmp_path):
    code = (
        "import multiprocessing, pathlib, sys, time\n"
        "from promptkd.utils.machine import exit_with_parent\n"
        "def work(path):\n"
        "    exit_with_parent(); path.write_text(str(multiprocessing.current_process().pid)); time.sleep(60)\n"
        "worker = multiprocessing.get_context('fork').Process(target=work, args=(pathlib.Path(sys.argv[1]),))\n"
        "worker.start(); worker.join()"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "pid")], cwd=ROOT)
    end = time.monotonic() + 30
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < end
        time.sleep(0.01)
    parent.kill()
    parent.wait()
    worker = Path(f"/proc/{(tmp_path / 'pid').read_text()}/status")
    while worker.exists() and "State:\tZ" not in worker.read_text():
        assert time.monotonic() < end
        time.sleep(0.01)
