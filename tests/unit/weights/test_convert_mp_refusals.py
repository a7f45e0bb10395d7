"""tools/convert_mp.py: everything that must be refused, with one line and nothing written."""

from __future__ import annotations

import json
import os
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.tiny_models import make_model, run
from safetensors.torch import load_file, save_file

from promptkd.errors import UserError
from promptkd.utils.files import FileDigest
from promptkd.weights import safetensors_io


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    make_model("llama", tmp_path / "llama")
    return tmp_path / "llama"


@pytest.fixture
def llama2(llama: Path) -> Path:
    """A folder that holds only shards of size 2 and a config.json."""
    run(llama, 1, 2, format="bin")
    (llama / "model.safetensors").unlink()
    return llama


def snapshot(folder: Path) -> list[tuple[str, bytes]]:
    return sorted((str(p), p.read_bytes() if p.is_file() else b"") for p in folder.rglob("*"))


def refused(root: Path, source: int, target: int, message: str, **options: object) -> None:
    """One line that says `message`, and nothing in the folder has changed."""
    before = snapshot(root)
    with pytest.raises(UserError) as caught:
        run(root, source, target, **options)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert snapshot(root) == before


def test_convert_refuses_sizes_that_do_not_divide(llama: Path) -> None:
    refused(llama, 1, 3, "8 attention heads and 4 key-value heads; sizes that would: 1, 2, 4")
    refused(llama, 1, 8, "does not divide the model's 4 key-value heads; sizes that would: 1, 2, 4")
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**config, "num_attention_heads": None}))
    refused(llama, 1, 2, "lacks num_attention_heads")
    (llama / "config.json").write_text(json.dumps({**config, "num_attention_heads": "8"}))
    refused(llama, 1, 2, "num_attention_heads is '8', not a positive integer")
    (llama / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    refused(llama, 1, 2, "48 wide in all, but config.json says 64")
    (llama / "config.json").unlink()
    refused(llama, 1, 2, "no config.json", model_type="llama")


def test_convert_joins_without_config(llama2: Path) -> None:
    (llama2 / "config.json").unlink()
    assert "no config.json" in run(llama2, 2, 1, model_type="llama")


def test_convert_refuses_shards_of_different_models(llama2: Path) -> None:
    first, second = (llama2 / f"mp2/pytorch_model_{rank}.bin" for rank in range(2))
    kept = torch.load(second, weights_only=True)
    shutil.copyfile(second, llama2 / "mp2/pytorch_model_2.bin")
    refused(llama2, 2, 1, "pytorch_model_2.bin, which is not a shard of size 2")
    (llama2 / "mp2/pytorch_model_2.bin").unlink()
    other = {**kept, "model.layers.1.input_layernorm.weight": kept["model.norm.weight"]}
    torch.save(other, second)
    refused(llama2, 2, 1, "model.layers.1.input_layernorm.weight must be the same in every shard but differs")
    torch.save({name: t for name, t in kept.items() if name != "model.norm.weight"}, second)
    refused(llama2, 2, 1, "pytorch_model_1.bin lacks model.norm.weight")
    torch.save({**kept, "model.norm.weight": torch.ones(40)}, second)
    refused(llama2, 2, 1, "shards of two models?")
    save_file(kept, llama2 / "mp2/model_1.safetensors")
    refused(llama2, 2, 1, "two formats")
    (llama2 / "mp2/model_1.safetensors").unlink()
    second.unlink()
    refused(llama2, 2, 1, "pytorch_model_1.bin is missing")
    first.unlink()
    refused(llama2, 2, 1, "holds no shards")
    refused(llama2, 4, 1, "the folder has shards of size 2")
    refused(llama2, 1, 2, "it holds shards of size 2: give --source_mp_size")


def test_convert_refuses_swapped_shards(llama: Path) -> None:
    run(llama, 1, 2)
    first, second = (llama / f"mp2/model_{rank}.safetensors" for rank in range(2))
    shutil.copyfile(first, second)
    refused(llama, 2, 1, "was written as shard 0 of 2, not as 1 of 2")


@pytest.mark.parametrize("change", ["missing", "unknown", "layer", "head"])
def test_convert_refuses_incomplete_or_unknown_weights(llama: Path, change: str) -> None:
    tensors = load_file(llama / "model.safetensors")
    if change == "missing":
        tensors.pop("model.layers.1.mlp.up_proj.weight")
        message = "lacks mlp.up_proj.weight of layer 1"
    elif change == "unknown":
        tensors["model.layers.0.self_attn.q_proj.lora_A.weight"] = torch.ones(2, 2)
        message = "the model type has no tensor model.layers.0.self_attn.q_proj.lora_A.weight"
    elif change == "layer":
        tensors = {name: tensor for name, tensor in tensors.items() if "layers.1" not in name}
        message = "of layer 1: the weights are incomplete"
    else:
        tensors.pop("lm_head.weight")
        message = "lacks lm_head.weight"
    save_file(tensors, llama / "model.safetensors")
    refused(llama, 1, 2, message)


def test_convert_refuses_a_tied_head_that_differs(tmp_path: Path) -> None:
    make_model("opt", tmp_path)
    run(tmp_path, 1, 2)
    for rank in range(2):
        path = tmp_path / f"mp2/model_{rank}.safetensors"
        tensors = load_file(path)
        save_file({**tensors, "lm_head.weight": tensors["lm_head.weight"] + 1}, path)
    refused(tmp_path, 2, 1, "lm_head.weight differs from the embedding", output_path=tmp_path / "out")
    refused(tmp_path, 2, 4, "lm_head.weight differs from the embedding")


def test_convert_refuses_targets_in_use(llama: Path, tmp_path: Path) -> None:
    refused(llama, 1, 1, "give an --output_path")
    run(llama, 1, 2)
    refused(llama, 1, 2, "is in use: it holds model_0.safetensors")
    refused(llama, 2, 1, "is in use: it holds model.safetensors")
    (llama / "mp2/notes.txt").write_text("mine")
    refused(llama, 1, 2, "it holds notes.txt, which is not a shard", overwrite=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.json").write_text("{}")
    refused(llama, 1, 2, "config.json is another model's", output_path=tmp_path / "out")
    (tmp_path / "file").write_text("")
    refused(llama, 1, 2, "is not a folder", output_path=tmp_path / "file")
    refused(llama / "nowhere", 1, 2, "is not a folder")
    refused(llama, 1, 2, "config.json says llama", model_type="opt", output_path=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_convert_refuses_a_disk_that_is_too_small(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    refused(llama, 1, 2, "but only 1 kB are free there")


def test_convert_refuses_numbers_too_large_for_the_dtype(llama: Path) -> None:
    tensors = {name: t.float() for name, t in load_file(llama / "model.safetensors").items()}
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, llama / "model.safetensors")
    refused(llama, 1, 2, "model.norm.weight holds numbers too large for float16", dtype="fp16")


def test_convert_safetensors_damaged_on_disk_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = safetensors_io.write_tensors

    def write_damaged(path: Path, *arguments: object) -> FileDigest:
        digest = real(path, *arguments)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        return digest

    monkeypatch.setattr(safetensors_io, "write_tensors", write_damaged)
    refused(llama, 1, 2, "reads back with another checksum")


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_convert_refuses_hostile_files(llama: Path, tmp_path: Path) -> None:
    weights = llama / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-10])
    refused(llama, 1, 2, "damaged")
    weights.unlink()
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(good)
    weights.symlink_to(outside)
    refused(llama, 1, 2, "leads out of its folder")
    weights.unlink()
    index = llama / "model.safetensors.index.json"
    for name, message in (("../outside.safetensors", "not the name of a file"), ("gone.safetensors", "is missing")):
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
        refused(llama, 1, 2, message)
    index.write_text("[")
    refused(llama, 1, 2, "no readable JSON")
    index.unlink()
    pickled = llama / "pytorch_model.bin"
    torch.save({"model.norm.weight": Evil(tmp_path / "was_here")}, pickled)
    refused(llama, 1, 2, "holds more than tensors")
    assert not (tmp_path / "was_here").exists()
    torch.save({"model.norm.weight": torch.ones(1).expand(1 << 40)}, pickled)
    refused(llama, 1, 2, "would unfold to")
    torch.save([torch.ones(1)], pickled)
    refused(llama, 1, 2, "not tensors by name")
    pickled.write_bytes(b"\x80\x02}q\x00.")
    refused(llama, 1, 2, "older than PyTorch 1.6")


def test_convert_bin_damaged_on_disk_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.save

    def save(tensors: dict[str, torch.Tensor], path: Path) -> None:
        real({**tensors, "model.norm.weight": tensors["model.norm.weight"] + 1}, path)

    monkeypatch.setattr(torch, "save", save)
    refused(llama, 1, 2, "reads back with other tensors", format="bin")


@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_convert_full_disk_is_one_line(llama: Path, form: str) -> None:
    """The safetensors files just fit, the zip archives of `torch.save` are larger."""
    run(llama, 1, 2, output_path=llama / "out")
    limit = (llama / "out/mp2/model_0.safetensors").stat().st_size - (form == "safetensors")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        message = "File too large" if form == "safetensors" else "pytorch_model_0.bin cannot be written"
        refused(llama, 1, 2, message, format=form)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
