"""What can be downloaded, the options, what is on the disk already. The hub is tests/helpers/fake_hub.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import fake_hub
from helpers.fake_hub import DOLLY, FILES, RAW, ROOT, TABLE, FakeHub, get, item, tree
from huggingface_hub import constants, hf_hub_download

from promptkd.downloads import run
from promptkd.downloads.catalog import MANIFEST, select, state


@pytest.fixture
def hub(monkeypatch):
    with fake_hub.serving(monkeypatch) as hub:
        yield hub


def command(*arguments, **environment):
    """The real program in a process of its own, which can reach nothing but what it is given."""
    env = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", **environment}
    return subprocess.Popen(
        [sys.executable, ROOT / "tools/download.py", *map(str, arguments)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcome(*arguments, **environment):
    process = command(*arguments, **environment)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_catalog_covers_every_folder_of_the_published_scripts():
    targets = {str(item.target) for item in TABLE}
    read = {
        "checkpoints/gpt2/gpt2-xlarge",
        *(f"checkpoints/gpt2/train/minillm_init/gpt2-{size}" for size in ("base", "medium", "large")),
        *(f"checkpoints/opt/train/minillm_init/opt-{size}" for size in ("1.3B", "2.7B", "6.7B")),
        "checkpoints/gpt2/train/sft/gpt2-xlarge",
        "checkpoints/opt/train/sft/opt-13B",
        "checkpoints/llama/train/minillm_init/llama-7B",
        "checkpoints/llama/train/sft/llama-13B",
        *(f"data/{name}" for name in ("dolly", "self-inst", "vicuna", "sinst", "uinst")),
        "processed_data/dolly",
        "processed_data/openwebtext/gpt2/512/10M",
        "processed_data/roberta/opt",
        "processed_data/roberta/llama",
    }
    assert read <= targets
    evaluated = {
        f"checkpoints/{family}/train/{method}/{family}-{size}"
        for family, sizes in {"gpt2": "base medium large", "opt": "1.3B 2.7B 6.7B", "llama": "7B"}.items()
        for method in ("sft", "kd", "seqkd", "minillm", "promptkd")
        for size in sizes.split()
    }
    assert evaluated <= targets


def test_catalog_rows_are_consistent():
    assert len({item.key for item in TABLE}) == len({item.target for item in TABLE}) == len(TABLE)
    for row in TABLE:
        assert not row.target.is_absolute() and ".." not in row.target.parts
        assert row.target.parts[0] in ("checkpoints", "data", "processed_data")
        # Baselines of MiniLLM beyond GPT-2: names by pattern.
        guessed = row.key.startswith(("opt/", "llama/")) and row.repo.startswith("MiniLLM/")
        assert row.unverified == (guessed or row.key == "processed/roberta-llama")
        assert row.repo or row.note


def test_select_by_key_family_and_data():
    assert {i.key for i in select(TABLE, ["gpt2/promptkd/*"], [], False)} == {
        f"gpt2/promptkd/{size}" for size in ("base", "medium", "large")
    }
    assert all(i.target.parts[:2] == ("checkpoints", "gpt2") for i in select(TABLE, [], ["gpt2"], False))
    assert {i.key for i in select(TABLE, [], [], True)} == {i.key for i in TABLE if i.kind == "dataset"}
    assert select(TABLE, [], [], False) == TABLE


def test_list_needs_no_network(tmp_path):
    (tmp_path / "checkpoints/llama/llama-7B").mkdir(parents=True)
    (tmp_path / "checkpoints/llama/llama-7B/config.json").write_text("{}")
    status, out, err = outcome("--list", "--base-path", tmp_path)
    assert (status, err) == (0, "")
    lines = {line.split()[0]: line for line in out.splitlines()}
    for row in TABLE:
        assert str(row.target) in lines[row.key] and (row.repo or "") in lines[row.key]
        assert ("unverified" in lines[row.key]) == row.unverified
    assert "by hand" in lines["base/llama-7B"] and "missing" in lines["base/llama-13B"]
    assert "253 MB" in lines["gpt2/promptkd/base"] and "CC-BY-SA-3.0" in lines["data/dolly"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "gpt2/promtkd/base"], ["gpt2/promtkd/base", "gpt2/promptkd/base", "--list"]),
        (["--onyl", "data/dolly"], ["--onyl", "--only"]),
        (["--models", "gpt3"], ["gpt3", "gpt2"]),
        (["--only", "base/llama-7B"], ["checkpoints/llama/llama-7B", "licence"]),
        (["--base-path", "nowhere"], ["nowhere"]),
        (
            ["--only", "data/dolly"],
            ["127.0.0.1:9", "HF_ENDPOINT", "HTTPS_PROXY", "HF_HUB_OFFLINE", "data/dolly"],
        ),
    ],
)
def test_bad_input_is_one_line(tmp_path, arguments, words):
    where = [] if "--base-path" in arguments else ["--base-path", tmp_path]
    status, out, err = outcome(*arguments, *where)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert all(word in err for word in words), err
    assert not tree(tmp_path) and not list(tmp_path.iterdir())


def test_download_interrupted_run_can_be_repeated(tmp_path):
    content = os.urandom(1 << 20) * 24
    with FakeHub({DOLLY: {**FILES, "raw.jsonl": content}}, {"raw.jsonl": [fake_hub.slow(6)]}) as hub:
        arguments = ["--only", "data/dolly", "--base-path", tmp_path]
        process = command(*arguments, HF_ENDPOINT=hub.url)
        parts = lambda: list(tmp_path.rglob("*.incomplete"))  # noqa: E731
        deadline = time.monotonic() + 30
        while not (parts() and parts()[0].stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=10)[1]
        assert process.returncode == 130 and "stopped" in err and "Traceback" not in err
        assert not parts() and state(item("data/dolly"), tmp_path) == "partial"

        hub.log.clear()
        status, _, err = outcome(*arguments, HF_ENDPOINT=hub.url)
        assert status == 0, err
        assert (tmp_path / "data/dolly/raw.jsonl").read_bytes() == content
        assert tree(tmp_path / "data") == {f"dolly/{name}" for name in [*FILES, MANIFEST]}


def test_download_requirements_script(tmp_path):
    for name in ("download_requirements.sh", "tools", "promptkd", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "download_requirements.sh").unlink()
    (tmp_path / "download_requirements.sh").write_text((ROOT / "download_requirements.sh").read_text())
    python = tmp_path / ".venv/bin/python"
    (tmp_path / "install.sh").write_text(f"echo installing; mkdir -p {python.parent}; ln -s {sys.executable} {python}")
    script = ["bash", tmp_path / "download_requirements.sh", "--list", "--only", "data/dolly"]
    ours = {name: value for name, value in os.environ.items() if name != "PROMPTKD_PYTHON"}
    own = {"PROMPTKD_PYTHON": sys.executable}
    for note, said in (("", own), ("installing\n", {}), ("", {})):
        result = subprocess.run(script, capture_output=True, text=True, cwd="/", timeout=60, env={**ours, **said})
        assert (result.returncode, result.stderr) == (0, note)
        assert "data/dolly" in result.stdout
    lost = subprocess.run(script, capture_output=True, text=True, env={**ours, "PROMPTKD_PYTHON": "/no/python"})
    assert (lost.returncode, lost.stdout, lost.stderr.count("\n")) == (2, "", 1) and "/no/python" in lost.stderr


def test_download_keeps_equal_files_that_exist(hub, tmp_path):
    folder = tmp_path / "data/dolly"
    folder.mkdir(parents=True)
    (folder / "raw.jsonl").write_bytes(RAW)
    (folder / "mine.txt").write_text("mine")
    assert state(item("data/dolly"), tmp_path) == "by hand"
    assert get(tmp_path, "data/dolly") == 0
    assert not hub.asked("raw.jsonl")
    assert tree(folder) == {*FILES, "mine.txt", MANIFEST}


def test_download_does_not_overwrite_different_files(hub, tmp_path, capfd):
    folder = tmp_path / "data/dolly"
    folder.mkdir(parents=True)
    (folder / "valid.jsonl").write_text("my own rows")
    assert get(tmp_path, "data/dolly") == 1
    assert "data/dolly holds another valid.jsonl" in capfd.readouterr().err
    assert tree(tmp_path) == {"data/dolly/valid.jsonl"}


def test_download_replaces_only_damaged_files(hub, tmp_path):
    assert get(tmp_path, "data/dolly") == 0
    (tmp_path / "data/dolly/raw.jsonl").write_bytes(RAW[:100])
    assert state(item("data/dolly"), tmp_path) == "partial"
    hub.log.clear()
    assert get(tmp_path, "data/dolly") == 0
    assert (tmp_path / "data/dolly/raw.jsonl").read_bytes() == RAW
    assert not hub.asked("README.md")


@pytest.mark.parametrize("moves", [0, 1, 2, 3, 4])
def test_download_stopped_while_files_move_can_be_repeated(hub, tmp_path, monkeypatch, moves):
    real, done = os.replace, []

    def replace(source, destination):
        if Path(destination).parent.name == "dolly":
            if len(done) == moves:
                raise KeyboardInterrupt
            done.append(destination)
        real(source, destination)

    with monkeypatch.context() as patch:
        patch.setattr(run.os, "replace", replace)
        if moves < 4:
            with pytest.raises(KeyboardInterrupt):
                get(tmp_path, "data/dolly")
            assert state(item("data/dolly"), tmp_path) != "present"
        else:
            assert get(tmp_path, "data/dolly") == 0
    hub.log.clear()
    assert get(tmp_path, "data/dolly") == 0
    assert not any(hub.asked(name) for name in FILES)
    assert tree(tmp_path / "data") == {f"dolly/{name}" for name in [*FILES, MANIFEST]}


def test_download_offline_uses_the_hub_cache(hub, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for name in FILES:
        hf_hub_download("MiniLLM/dolly", name, repo_type="dataset", cache_dir=tmp_path / "cache")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.log.clear()
    assert get(tmp_path, "data/dolly", "data/vicuna") == 1
    assert "HF_HUB_OFFLINE" in capfd.readouterr().err
    assert {name: (tmp_path / "data/dolly" / name).read_bytes() for name in FILES} == FILES
    assert not hub.log
