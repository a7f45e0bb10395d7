"""tools/convert_mp.py: tensors bit for bit, the loaded model's output, the command line."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import assert_same, logits, make_model, run, shards, whole
from helpers.training import GOLDEN
from safetensors.torch import load_file, save_file

from promptkd.cli import convert as convert_mp
from promptkd.errors import UserError
from promptkd.weights import convert as convert_module
from promptkd.weights import safetensors_io
from promptkd.weights.convert import ConversionRequest, convert
from promptkd.weights.families import FAMILIES
from promptkd.weights.layout import pieces
from promptkd.weights.reader import SourceModel


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


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden OPT teacher with the shards that the published tool made of it."""
    root = tmp_path_factory.mktemp("published") / "opt"
    shutil.copytree(GOLDEN / "models/opt_teacher", root, copy_function=shutil.copyfile)
    shutil.copytree(GOLDEN / "mp/opt/mp2", root / "mp2", copy_function=shutil.copyfile)
    return root


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_convert_reproduces_published_shards(published: Path, tmp_path: Path, kind: str) -> None:
    run(published, 1, 2, format=kind, dtype="fp16", output_path=tmp_path / "out")
    for ours, theirs in zip(shards(tmp_path / "out/mp2", kind), shards(published / "mp2", "bin")):
        assert_same(ours, theirs)


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_convert_joins_published_shards(published: Path, tmp_path: Path, kind: str) -> None:
    run(published, 2, 1, format=kind, output_path=tmp_path)
    expected = {name: tensor.half() for name, tensor in whole(published).items()}
    assert_same(whole(tmp_path), expected)
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)
    assert_same({name: loaded.state_dict()[name] for name in expected}, expected)
    assert loaded.lm_head.weight.data_ptr() == loaded.get_input_embeddings().weight.data_ptr()


@pytest.mark.parametrize("form", ["bin", "safetensors"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_convert_round_trip_is_lossless(kind: str, form: str, tmp_path: Path) -> None:
    """1 -> 4 -> 2 -> 1: the tensors bit for bit, and the loaded model's output."""
    make_model(kind, tmp_path)
    options = {"format": form}
    run(tmp_path, 1, 4, **options)
    run(tmp_path, 1, 2, output_path=tmp_path / "direct", **options)
    run(tmp_path, 4, 2, **options)
    for by_four, direct in zip(shards(tmp_path / "mp2", form), shards(tmp_path / "direct/mp2", form)):
        assert_same(by_four, direct)
    run(tmp_path, 2, 1, output_path=tmp_path / "again", **options)
    assert_same(whole(tmp_path / "again"), whole(tmp_path))
    assert torch.equal(logits(tmp_path / "again"), logits(tmp_path))


def test_convert_cuts_gpt2_fused_projection_by_heads(tmp_path: Path) -> None:
    model = make_model("gpt2", tmp_path)
    run(tmp_path, 1, 2)
    query, key, value = model.transformer.h[0].attn.c_attn.weight.half().split(32, dim=1)
    second = shards(tmp_path / "mp2", "safetensors")[1]
    expected = torch.cat([query[:, 16:], key[:, 16:], value[:, 16:]], dim=1)
    assert torch.equal(second["transformer.h.0.attn.c_attn.weight"], expected)
    assert torch.equal(second["transformer.h.0.attn.c_proj.weight"], model.transformer.h[0].attn.c_proj.weight[16:])
    assert second["transformer.wte.weight"].shape == (97, 32), "gpt2's vocabulary is odd: it stands whole"


def test_pieces_join_shards_of_any_two_sizes() -> None:
    axis = torch.arange(72)

    def shard(blocks: int, size: int, rank: int) -> torch.Tensor:
        return torch.cat([block.chunk(size)[rank] for block in axis.chunk(blocks)])

    for blocks, source, target in itertools.product((1, 3), (1, 2, 3, 4, 6), (1, 2, 3, 4, 6)):
        for rank in range(target):
            ranges = pieces(72, blocks, source, target, rank)
            joined = torch.cat([shard(blocks, source, index)[start:stop] for index, start, stop in ranges])
            assert torch.equal(joined, shard(blocks, target, rank))


@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_convert_reads_and_writes_several_files_with_an_index(tmp_path: Path, form: str) -> None:
    """Read as transformers writes them, and written so that transformers reads them."""
    from transformers import AutoModelForCausalLM

    model = make_model("qwen2", tmp_path / "one")
    model.half().save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    run(tmp_path / "many", 1, 2, output_path=tmp_path / "out")
    convert(ConversionRequest(tmp_path / "out", 2, 1, format=form), max_file_bytes=20_000)
    assert len(list((tmp_path / "out").glob(f"*-of-*.{form}"))) > 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float16)
    assert_same(loaded.state_dict(), model.state_dict())


def test_source_model_piece_equal_when_mappings_are_released(llama2: Path, monkeypatch) -> None:
    """Mappings released after every tensor, or never: the same numbers, in memory of their own."""
    model = SourceModel(llama2, 2, FAMILIES["llama"])
    expected = {(name, rank): model.piece(name, 4, rank) for name in model.names for rank in range(4)}
    monkeypatch.setattr(safetensors_io, "RELEASE_BYTES", 1)
    for (name, rank), tensor in expected.items():
        piece = model.piece(name, 4, rank)
        assert torch.equal(piece, tensor) and piece.shape == model.shape(name, 4)
        assert piece.is_contiguous() and piece.untyped_storage().nbytes() == piece.nbytes
        assert all(piece.data_ptr() != shard[name].data_ptr() for shard in model.shards)


def test_write_tensors_refuses_tensors_that_differ_from_the_layout(tmp_path: Path) -> None:
    layout = {"a": torch.empty(2, 3, device="meta"), "b": torch.empty(2, device="meta")}
    first, path = torch.zeros(2, 3), tmp_path / "x.safetensors"
    for tensors in ([torch.zeros(3, 2)], [first.half()], [first], [first, torch.zeros(2), first]):
        with pytest.raises(ValueError, match=r"layout|shorter|longer"):
            safetensors_io.write_tensors(path, layout, tensors)
        assert not path.exists()
    safetensors_io.write_tensors(path, layout, [first, torch.ones(2)])
    assert_same(load_file(path), {"a": first, "b": torch.ones(2)})


def test_convert_reads_names_without_the_base_prefix(tmp_path: Path) -> None:
    """The hub's gpt2 and some opt files name the bare model's tensors."""
    make_model("gpt2", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    run(tmp_path, 1, 2, output_path=tmp_path / "full")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    mask = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()
    bare |= {"h.0.attn.bias": mask, "h.1.attn.bias": mask.clone()}
    save_file(bare, tmp_path / "model.safetensors")
    run(tmp_path, 1, 2)
    for left, right in zip(shards(tmp_path / "mp2", "safetensors"), shards(tmp_path / "full/mp2", "safetensors")):
        assert all(left.pop(f"transformer.h.{layer}.attn.bias").dtype == torch.bool for layer in range(2))
        assert_same(left, right)


def test_convert_keeps_an_untied_head(tmp_path: Path) -> None:
    model = make_model("gpt2", tmp_path, tie_word_embeddings=False)
    run(tmp_path, 1, 2)
    run(tmp_path, 2, 1, output_path=tmp_path / "again")
    assert torch.equal(whole(tmp_path / "again")["lm_head.weight"], model.lm_head.weight)


def test_convert_bin_is_a_valid_aligned_archive(published: Path, tmp_path: Path) -> None:
    run(published, 2, 1, format="bin", output_path=tmp_path)
    assert zipfile.ZipFile(tmp_path / "pytorch_model.bin").testzip() is None
    tensors = torch.load(tmp_path / "pytorch_model.bin", weights_only=True, mmap=True)
    assert all(tensor.data_ptr() % 16 == 0 and tensor.is_contiguous() for tensor in tensors.values())
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors.values())
    assert sorted(path.name for path in tmp_path.iterdir() if "model" in path.name) == ["pytorch_model.bin"]


def test_convert_dtype_changes_tensors_and_config(llama: Path, tmp_path: Path) -> None:
    run(llama, 1, 1, dtype="bf16", output_path=tmp_path / "out")
    assert_same(whole(tmp_path / "out"), {name: t.bfloat16() for name, t in whole(llama).items()})
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "bfloat16" in (config.get("dtype"), config.get("torch_dtype"))


def test_main_accepts_the_published_command_line(
    llama2: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    words = "--source_mp_size 2 --target_mp_size 1 --model_type llama"
    monkeypatch.setattr(sys, "argv", ["convert_mp.py", "--input_path", str(llama2), *words.split()])
    convert_mp.main()
    assert str(llama2) in capsys.readouterr().out
    assert (llama2 / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~current_umask()
    assert sorted(path.name for path in llama2.iterdir() if path.name.startswith(".")) == []


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_parser_spellings_aliases_and_errors() -> None:
    parser = convert_mp.build_parser()
    base = ["--input-path", "x", "--target-mp-size", "2"]
    args = parser.parse([*base, "--half", "--exist_ok", "--model_type", "llama2"])
    assert (args.dtype, args.overwrite, args.model_type, args.source_mp_size) == ("fp16", True, "llama", 1)
    for bad, message in (
        ("--targt_mp_size=2", "--target_mp_size"),
        ("--model_type=gptj", "gptj"),
        ("--format=x", "bin"),
    ):
        with pytest.raises(UserError, match=message):
            parser.parse([*base, bad])
    with pytest.raises(UserError, match="integer"):
        parser.parse(["--input_path", "x", "--target_mp_size", "0"])


def test_convert_overwrite_replaces_only_after_success(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(llama, 1, 2)
    before = {path.name: path.read_bytes() for path in (llama / "mp2").iterdir()}
    monkeypatch.setattr(convert_module, "write_verified", fail)
    with pytest.raises(UserError, match="no space"):
        run(llama, 1, 2, format="bin", overwrite=True)
    assert {path.name: path.read_bytes() for path in (llama / "mp2").iterdir()} == before
    monkeypatch.undo()
    run(llama, 1, 2, format="bin", overwrite=True)
    assert sorted(path.name for path in (llama / "mp2").iterdir()) == ["pytorch_model_0.bin", "pytorch_model_1.bin"]
    expected = whole(llama)
    convert(ConversionRequest(llama, 2, 1, format="safetensors", overwrite=True), max_file_bytes=20_000)
    assert not (llama / "model.safetensors").exists(), "the old weights would be loaded in place of the new ones"
    convert(ConversionRequest(llama, 2, 1, format="safetensors", overwrite=True), max_file_bytes=30_000)
    index = json.loads((llama / "model.safetensors.index.json").read_text())["weight_map"]
    assert {path.name for path in llama.glob("model-*")} == set(index.values())
    run(llama, 2, 1, format="bin", overwrite=True)
    assert not list(llama.glob("*.safetensors*"))
    assert_same(whole(llama), expected)


def fail(*_: object) -> None:
    raise OSError(28, "no space")
