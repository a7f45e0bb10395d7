"""Fetching from a hub (tests/helpers/fake_hub.py) with the faults of a real one, onto a disk that may be full."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import fake_hub
from helpers.fake_hub import DOLLY, FILES, RAW, get, item, tree
from huggingface_hub import file_download, hf_hub_download

from promptkd.downloads import hub as hub_module
from promptkd.downloads import plan, run
from promptkd.downloads.catalog import MANIFEST, read_manifest, state
from promptkd.errors import UserError


@pytest.fixture
def hub(monkeypatch):
    with fake_hub.serving(monkeypatch) as hub:
        yield hub


def test_fake_hub_serves_huggingface_hub(hub, tmp_path):
    for name, content in FILES.items():
        path = hf_hub_download("MiniLLM/dolly", name, repo_type="dataset", local_dir=tmp_path)
        assert Path(path).read_bytes() == content


def test_download_skips_complete_items(hub, tmp_path):
    assert get(tmp_path, "data/dolly") == 0
    assert {name: (tmp_path / "data/dolly" / name).read_bytes() for name in FILES} == FILES
    assert tree(tmp_path) == {f"data/dolly/{name}" for name in [*FILES, MANIFEST]}
    assert read_manifest(tmp_path / "data/dolly") == {name: len(content) for name, content in FILES.items()}
    hub.log.clear()
    assert get(tmp_path, "data/dolly") == 0
    assert not hub.log


def test_download_follows_links_and_takes_only_the_subfolder(hub, tmp_path):
    pair = {"512/20M/train_0.bin": b"tokens", "512/20M/train_0.idx": b"index"}
    hub.repos["datasets/MiniLLM/roberta-corpus-processed"] = {
        **{f"opt/{name}": content for name, content in pair.items()},
        "llama/512/20M/train_0.bin": b"no index beside it",
    }
    (tmp_path / "disk").mkdir()
    (tmp_path / "base").mkdir()
    (tmp_path / "base/processed_data").symlink_to(tmp_path / "disk")
    assert get(tmp_path / "base", "processed/roberta-*") == 1
    assert tree(tmp_path / "disk/roberta") == {f"opt/{name}" for name in [*pair, MANIFEST]}


def test_download_missing_repository_does_not_stop_other_items(hub, tmp_path, capfd):
    assert get(tmp_path, "data/dolly", "data/vicuna", "opt/kd/1.3B") == 2
    assert state(item("data/dolly"), tmp_path) == "present"
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("failed")]
    assert [line.split()[1] for line in lines] == ["opt/kd/1.3B:", "data/vicuna:"]
    assert "MiniLLM/Vicuna" in lines[1] and "HF_TOKEN" in lines[1] and "unverified" in lines[0]
    assert not (tmp_path / "data/vicuna").exists()


def test_download_resumes_after_a_broken_connection(hub, tmp_path):
    hub.faults["raw.jsonl"] = [fake_hub.cut(20_000), fake_hub.cut(10_000)]
    assert get(tmp_path, "data/dolly") == 0
    assert [r.range for r in hub.asked("raw.jsonl")] == [None, "bytes=20000-", "bytes=30000-"]
    assert (tmp_path / "data/dolly/raw.jsonl").read_bytes() == RAW


def test_download_keeps_complete_files_when_the_hub_fails(hub, tmp_path, capfd):
    hub.faults["valid.jsonl"] = [fake_hub.refused(503)] * 9
    assert get(tmp_path, "data/dolly") == 1
    assert "503" in capfd.readouterr().err
    assert state(item("data/dolly"), tmp_path) == "partial" and not (tmp_path / "data/dolly").exists()
    hub.faults.clear()
    hub.log.clear()
    assert get(tmp_path, "data/dolly") == 0
    assert len(hub.asked("valid.jsonl")) == 1
    assert not hub.asked("raw.jsonl") and not hub.asked("README.md"), "complete files are not downloaded again"


def test_download_gives_up_after_repeated_broken_connections(hub, tmp_path, capfd):
    hub.faults["raw.jsonl"] = [fake_hub.cut(20_000)] + [fake_hub.cut(0)] * 5
    assert get(tmp_path, "data/dolly") == 1
    assert "complete files are kept" in capfd.readouterr().err
    assert not list(tmp_path.rglob("*.incomplete")) and state(item("data/dolly"), tmp_path) == "partial"
    assert get(tmp_path, "data/dolly") == 0
    assert (tmp_path / "data/dolly/raw.jsonl").read_bytes() == RAW


def test_download_unreachable_hub_gets_no_further_requests(hub, tmp_path, monkeypatch, capfd):
    """Each question would wait for its own timeout."""
    asked, real = [], plan.list_files

    def listing(repo, kind):
        asked.append(repo)
        if len(asked) > 1:
            raise hub_module.Unreachable("timed out")
        return real(repo, kind)

    monkeypatch.setattr(plan, "list_files", listing)
    assert get(tmp_path, "data/*") == 4
    assert asked == ["MiniLLM/dolly", "MiniLLM/self-inst"] and state(item("data/dolly"), tmp_path) == "present"
    assert capfd.readouterr().err.count("the hub does not answer (timed out)") == 4


def test_download_replaces_files_of_another_revision(hub, tmp_path):
    """A run was stopped between two files; since then the hub has other contents of the same size."""
    staging = item("data/dolly").staging(tmp_path)
    staging.mkdir(parents=True)
    for name, content in FILES.items():
        (staging / name).write_bytes(content[::-1] if name != "README.md" else content)
    assert get(tmp_path, "data/dolly") == 0
    assert {name: (tmp_path / "data/dolly" / name).read_bytes() for name in FILES} == FILES
    assert not hub.asked("README.md"), "what is right is kept"


def test_download_refuses_a_truncated_file(hub, tmp_path, capfd):
    hub.faults["raw.jsonl"] = [fake_hub.shortened(5000)]
    assert get(tmp_path, "data/dolly") == 1
    assert "cut short" in capfd.readouterr().err
    assert state(item("data/dolly"), tmp_path) == "partial"
    assert get(tmp_path, "data/dolly") == 0
    assert (tmp_path / "data/dolly/raw.jsonl").read_bytes() == RAW


@pytest.mark.parametrize("name", ["raw.jsonl", "valid.jsonl"])  # sha256, and git's id of a small file
def test_download_refuses_a_file_with_another_hash(hub, tmp_path, capfd, name):
    hub.faults[name] = [fake_hub.garbled]
    assert get(tmp_path, "data/dolly") == 1
    assert f"{name} arrived damaged" in capfd.readouterr().err
    assert get(tmp_path, "data/dolly") == 0
    assert (tmp_path / "data/dolly" / name).read_bytes() == FILES[name]


@pytest.mark.parametrize(("status", "word"), [(503, "later"), (403, "HF_TOKEN")])
def test_download_reports_status_codes_with_advice(hub, tmp_path, capfd, status, word):
    hub.faults["raw.jsonl"] = [fake_hub.refused(status)]
    assert get(tmp_path, "data/dolly") == 1
    err = capfd.readouterr().err
    assert str(status) in err and word in err


def test_download_reports_an_endpoint_that_is_not_a_hub(hub, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", lambda *_, **__: {}["sha"])
    assert get(tmp_path, "data/dolly") == 1
    assert "HF_ENDPOINT" in capfd.readouterr().err


def test_download_from_a_mirror_without_sizes(hub, tmp_path):
    hub.gives_sizes = False
    assert get(tmp_path, "data/dolly") == 0
    assert {name: (tmp_path / "data/dolly" / name).read_bytes() for name in FILES} == FILES


def test_download_sends_the_token_only_to_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert get(tmp_path, "data/dolly") == 0
    hub_port = int(hub.url.rpartition(":")[2])
    wanted = [r for r in hub.log if "MiniLLM" in r.path or "/cdn/" in r.path]
    assert {(r.port == hub_port, r.authorization) for r in wanted} == {
        (True, "Bearer hf_secret"),
        (False, None),
    }


@pytest.mark.parametrize("name", ["../evil.json", "/etc/evil.json", "a/../../evil.json", "a\\..\\evil.json", "C:/x"])
def test_download_refuses_file_names_outside_the_folder(hub, tmp_path, capfd, name):
    hub.repos[DOLLY][name] = b"{}"
    (tmp_path / "base").mkdir()
    assert get(tmp_path / "base", "data/dolly") == 1
    assert "leaves its folder" in capfd.readouterr().err
    assert not tree(tmp_path)


def test_download_refuses_a_data_set_without_a_needed_file(hub, tmp_path, capfd):
    del hub.repos[DOLLY]["valid.jsonl"]
    assert get(tmp_path, "data/dolly") == 1
    assert "valid.jsonl, which the scripts read" in capfd.readouterr().err


def test_download_refuses_an_item_locked_by_another_process(hub, tmp_path, capfd):
    with run.locked(item("data/dolly"), item("data/dolly").staging(tmp_path)):
        assert get(tmp_path, "data/dolly") == 1
    assert "another process" in capfd.readouterr().err


def test_download_checks_disk_space_before_writing(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(run.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"54\.9 kB are needed and 1 kB are free"):
        get(tmp_path, "data/dolly")
    assert not list(tmp_path.iterdir())


def test_download_checks_disk_space_by_the_catalog_without_sizes(hub, tmp_path, monkeypatch):
    hub.gives_sizes = False
    monkeypatch.setattr(run.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    with pytest.raises(UserError, match="17 MB are needed"):
        get(tmp_path, "data/dolly")


def test_download_full_disk_fails_one_item_and_keeps_complete_files(hub, tmp_path, monkeypatch, capfd):
    hub.repos["datasets/MiniLLM/self-inst"] = {"valid.jsonl": b"{}\n"}
    real = file_download.http_get

    def http_get(url, stream, **options):
        if "/cdn/" in url:  # the large file
            stream.write(RAW[:7000])
            raise OSError(errno.ENOSPC, "No space left on device")
        real(url, stream, **options)

    monkeypatch.setattr(file_download, "http_get", http_get)
    assert get(tmp_path, "data/dolly", "data/self-inst") == 1
    assert "failed: data/dolly: the disk is full" in capfd.readouterr().err
    assert state(item("data/self-inst"), tmp_path) == "present"
    monkeypatch.setattr(file_download, "http_get", real)
    assert get(tmp_path, "data/dolly") == 0
    assert (tmp_path / "data/dolly/raw.jsonl").read_bytes() == RAW
