"""Downloaded weights: which are taken, and how pickle files become safetensors without running anything."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import fake_hub
from helpers.fake_hub import get, item, tree

from promptkd.downloads import run
from promptkd.downloads.catalog import MANIFEST, state
from promptkd.errors import UserError
from promptkd.weights import safetensors_io

BASE = "gpt2/promptkd/base"
REPO = "models/gmkim/GPT-2-120M-distilled-PromptKD-Dolly-v1.0"
FOLDER = "checkpoints/gpt2/train/promptkd/gpt2-base"


@pytest.fixture
def hub(monkeypatch):
    with fake_hub.serving(monkeypatch) as hub:
        yield hub


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random GPT-2, and its files: the weights as a pickle in which head and embedding are one."""
    torch = pytest.importorskip("torch")
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_positions=32, n_embd=16, n_layer=2, n_head=2)).half()
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    weights = dict(model.state_dict())
    assert weights["lm_head.weight"].is_set_to(weights["transformer.wte.weight"])
    small = {name: (folder / name).read_bytes() for name in ("config.json", "generation_config.json")}
    return SimpleNamespace(torch=torch, model=model, weights=weights, small=small, folder=folder)


def pickled(tiny, weights, **options):
    path = tiny.folder / "pytorch_model.bin"
    tiny.torch.save(weights, path, **options)
    return path.read_bytes()


def same_logits(tiny, folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=tiny.torch.float16)
    ids = tiny.torch.arange(12)[None]
    return tiny.torch.equal(model(ids).logits, tiny.model.eval()(ids).logits)


@pytest.mark.parametrize("zipped", [True, False])  # the format since PyTorch 1.6, and the one before
def test_download_converts_pickled_weights_to_safetensors(hub, tmp_path, tiny, zipped):
    from safetensors.torch import load_file

    others = {
        "modeling_evil.py": b"raise SystemExit",
        "training_args.bin": b"pickle",
        "onnx/config.json": b"{}",
        "tf_model.h5": b"tf",
        "merges.txt": b"a b",
        "LICENSE": b"MIT",
    }
    weights = pickled(tiny, tiny.weights, _use_new_zipfile_serialization=zipped)
    hub.repos[REPO] = {**tiny.small, **others, "pytorch_model.bin": weights}
    assert get(tmp_path, BASE) == 0
    assert tree(tmp_path) == {
        f"{FOLDER}/{name}" for name in [*tiny.small, "merges.txt", "LICENSE", "model.safetensors", MANIFEST]
    }
    loaded = load_file(tmp_path / FOLDER / "model.safetensors")
    assert set(loaded) == set(tiny.weights) - {"lm_head.weight"}
    assert all(tiny.torch.equal(loaded[name], tiny.weights[name]) for name in loaded)
    assert same_logits(tiny, tmp_path / FOLDER)


def test_download_converts_weights_in_several_files(hub, tmp_path, tiny):
    names = sorted(set(tiny.weights) - {"lm_head.weight"})
    parts = {
        f"pytorch_model-0000{i + 1}-of-00002.bin": pickled(tiny, {n: tiny.weights[n] for n in names[i::2]})
        for i in range(2)
    }
    hub.repos[REPO] = {**tiny.small, **parts, "pytorch_model.bin.index.json": b"{}"}
    assert get(tmp_path, BASE) == 0
    written = [*(f"model-0000{i}-of-00002.safetensors" for i in (1, 2)), "model.safetensors.index.json"]
    assert tree(tmp_path / FOLDER) == {*tiny.small, *written, MANIFEST}
    assert same_logits(tiny, tmp_path / FOLDER)


@pytest.mark.parametrize("moves", range(3))
def test_download_stopped_while_converted_files_move_can_be_repeated(hub, tmp_path, tiny, monkeypatch, moves):
    hub.repos[REPO] = {**tiny.small, "pytorch_model.bin": pickled(tiny, tiny.weights)}
    real, moved = os.replace, []

    def replace(source, destination):
        if Path(destination).name in (*tiny.small, "model.safetensors"):
            if len(moved) == moves:
                raise KeyboardInterrupt
            moved.append(destination)
        real(source, destination)

    with monkeypatch.context() as patch:
        patch.setattr(run.os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            get(tmp_path, BASE)
    assert state(item(BASE), tmp_path) == "partial"
    hub.log.clear()
    assert get(tmp_path, BASE) == 0
    assert not hub.asked("pytorch_model.bin") and same_logits(tiny, tmp_path / FOLDER)
    assert tree(tmp_path) == {f"{FOLDER}/{name}" for name in [*tiny.small, "model.safetensors", MANIFEST]}


def test_download_refuses_missing_weight_files(hub, tmp_path, tiny, capfd):
    hub.repos[REPO] = {
        **tiny.small,
        "pytorch_model-00001-of-00002.bin": b"x",
        "pytorch_model.bin.index.json": b"{}",
    }
    assert get(tmp_path, BASE) == 1
    assert "1 of the weight files" in capfd.readouterr().err


def test_download_prefers_safetensors(hub, tmp_path, tiny):
    whole = (tiny.folder / "model.safetensors").read_bytes()
    hub.repos[REPO] = {**tiny.small, "model.safetensors": whole, "pytorch_model.bin": b"x" * 5000}
    assert get(tmp_path, BASE) == 0
    assert not hub.asked("pytorch_model.bin")
    assert same_logits(tiny, tmp_path / FOLDER)


def test_convert_keeps_shared_tensors_of_an_untied_model(tmp_path, tiny):
    from safetensors.torch import load_file

    from promptkd.downloads.conversion import convert

    table = tiny.torch.arange(12.0).reshape(4, 3)
    weights = {"lm_head.weight": table, "embed.weight": table, "rows": table[1:3], "turned": table.t()}
    tiny.torch.save(weights, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": false}')
    convert([tmp_path / "pytorch_model.bin"], tmp_path / "config.json", tmp_path)
    loaded = load_file(tmp_path / "model.safetensors")
    assert set(loaded) == set(weights)
    assert all(tiny.torch.equal(loaded[name], weights[name]) for name in weights)


class Evil:
    """Unpickled, it would make a file."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (open, (str(self.trace), "w"))


@pytest.mark.parametrize("form", ["torch", "torch-old", "bare"])
def test_download_refuses_a_pickle_that_would_run_code(hub, tmp_path, tiny, capfd, form):
    trace = tmp_path / "trace"
    content = {**tiny.weights, "x": Evil(trace)}
    if form == "bare":
        hostile = pickle.dumps(content["x"], protocol=2) + b" " * 2000
    else:
        hostile = pickled(tiny, content, _use_new_zipfile_serialization=form == "torch")
    hub.repos[REPO] = {**tiny.small, "pytorch_model.bin": hostile}
    hub.repos["datasets/MiniLLM/self-inst"] = {"valid.jsonl": b"{}\n"}
    assert get(tmp_path, BASE, "data/self-inst") == 1
    assert "pytorch_model.bin was refused" in capfd.readouterr().err
    assert not trace.exists() and not (tmp_path / FOLDER).exists()
    assert not list(tmp_path.rglob("pytorch_model.bin")) and not list(tmp_path.rglob("*.safetensors"))
    assert state(item("data/self-inst"), tmp_path) == "present"


@pytest.mark.parametrize(
    "make",
    [
        lambda torch: [1, 2],
        lambda torch: {},
        lambda torch: {"step": 3},
        lambda torch: {"model": {"a": torch.ones(3)}},
        lambda torch: {"a": torch.ones(3, device="meta")},
        lambda torch: {"a": torch.eye(3).to_sparse()},
        lambda torch: {"a": torch.ones(1).expand(1 << 40)},
        lambda torch: dict.fromkeys("abcdefgh", torch.ones(9999)),
    ],
)
def test_download_refuses_a_pickle_without_plain_tensors(hub, tmp_path, tiny, capfd, make):
    hub.repos[REPO] = {**tiny.small, "pytorch_model.bin": pickled(tiny, make(tiny.torch))}
    assert get(tmp_path, BASE) == 1
    assert "was refused" in capfd.readouterr().err


def test_convert_full_disk_keeps_the_download(hub, tmp_path, tiny, monkeypatch, capfd):
    hub.repos[REPO] = {**tiny.small, "pytorch_model.bin": pickled(tiny, tiny.weights)}
    with monkeypatch.context() as patch:

        def write(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(safetensors_io, "_blocks", write)
        assert get(tmp_path, BASE) == 1
    assert "the disk is full" in capfd.readouterr().err
    hub.log.clear()
    assert get(tmp_path, BASE) == 0
    assert not hub.asked("pytorch_model.bin") and same_logits(tiny, tmp_path / FOLDER)


def test_convert_damaged_copy_is_not_used(hub, tmp_path, tiny, monkeypatch, capfd):
    hub.repos[REPO] = {**tiny.small, "pytorch_model.bin": pickled(tiny, tiny.weights)}
    with monkeypatch.context() as patch:
        patch.setattr(safetensors_io, "digest_of", lambda path: {"bytes": path.stat().st_size, "sha256": "0" * 64})
        assert get(tmp_path, BASE) == 1
    assert "model.safetensors reads back with another checksum" in capfd.readouterr().err
    assert not (tmp_path / FOLDER).exists() and list(tmp_path.rglob("pytorch_model.bin"))


def test_download_does_not_overwrite_a_trained_model(hub, tmp_path, tiny, capfd):
    hub.repos[REPO] = {**tiny.small, "pytorch_model.bin": pickled(tiny, tiny.weights)}
    (tmp_path / FOLDER).mkdir(parents=True)
    (tmp_path / FOLDER / "model.safetensors").write_bytes(b"my own training")
    assert get(tmp_path, BASE) == 1
    assert "holds another model.safetensors" in capfd.readouterr().err


def test_download_disk_space_includes_the_conversion(hub, tmp_path, tiny, monkeypatch):
    weights = pickled(tiny, tiny.weights)
    hub.repos[REPO] = {**tiny.small, "pytorch_model.bin": weights}
    size = sum(map(len, tiny.small.values())) + 2 * len(weights)
    monkeypatch.setattr(run.shutil, "disk_usage", lambda _: SimpleNamespace(free=size - 1))
    with pytest.raises(UserError, match="are needed"):
        get(tmp_path, BASE)
    monkeypatch.setattr(run.shutil, "disk_usage", lambda _: SimpleNamespace(free=size))
    assert get(tmp_path, BASE) == 0
