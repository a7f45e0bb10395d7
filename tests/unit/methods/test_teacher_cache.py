"""The cache of the teacher's hidden states: the same training without the teacher's layers."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from helpers.runs import Crash, assert_same_run, crash_at
from helpers.tiny_models import make_model
from helpers.training import GOLDEN, golden_argv, metrics_of, start, train_here

from promptkd.engine.engine import FrozenModel
from promptkd.errors import UserError
from promptkd.models.loading import load_causal_lm, load_without_layers
from promptkd.training.setup import build_trainer
from train import resolve

SHORT = ("--batch-size", "4", "--total-iters", "3")


def argv_of(save, *extra: str, method: str = "kd") -> list[str]:
    return golden_argv(method, save, *SHORT, *extra)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The folder of a KD run without a cache."""
    save = tmp_path_factory.mktemp("plain") / "run"
    train_here(argv_of(save))
    return save


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """The folders of a cache and of the run that made it."""
    folder = tmp_path_factory.mktemp("cached")
    train_here(argv_of(folder / "run", "--teacher-cache", str(folder / "cache")))
    return folder / "cache", folder / "run"


def assert_close_losses(one, other) -> None:
    rows, others = metrics_of(one), metrics_of(other)
    assert len(rows) == 3 and [row.keys() for row in rows] == [row.keys() for row in others]
    for name in ("loss", "ds_loss", "lm_loss", "grad_norm", "response_tokens"):
        assert [row[name] for row in rows] == pytest.approx([row[name] for row in others], rel=1e-6), name


def test_kd_with_cache_has_losses_of_run_without(plain, cached, tmp_path):
    cache, first = cached
    assert_close_losses(first, plain)
    method = train_here(argv_of(tmp_path / "run", "--teacher-cache", str(cache))).method
    assert_same_run(tmp_path / "run", first)
    assert not any("attn" in name for name, _ in method.teacher.module.named_modules())


def test_seqkd_and_gkd_on_the_data_read_the_cache(plain, cached, tmp_path, monkeypatch):
    monkeypatch.setattr(FrozenModel, "hidden_states", None)
    cache = ["--teacher-cache", str(cached[0])]
    train_here(argv_of(tmp_path / "seqkd", *cache, method="seqkd"))
    assert_same_run(tmp_path / "seqkd", cached[1])
    gkd = ["--student-data-fraction", "0", "--divergence", "forward_kl", "--kd-ratio", "0.5"]
    train_here(argv_of(tmp_path / "gkd", *cache, *gkd, method="gkd"))
    assert_close_losses(tmp_path / "gkd", plain)


def test_run_with_cache_resumes_bit_for_bit(cached, tmp_path):
    argv = argv_of(tmp_path / "run", "--teacher-cache", str(tmp_path / "cache"), "--checkpoint-every", "1")
    crash_at(3, argv)
    without = argv_of(tmp_path / "run", "--checkpoint-every", "1", "--resume")
    with pytest.raises(UserError, match="--teacher-cache None "):
        build_trainer(resolve(without))
    train_here([*argv, "--resume"])
    assert_same_run(tmp_path / "run", cached[1])


def test_interrupted_cache_is_made_again(cached, tmp_path, monkeypatch):
    def crash(*_):
        raise Crash

    argv = argv_of(tmp_path / "run", "--teacher-cache", str(tmp_path / "cache"))
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(FrozenModel, "hidden_states", crash)
        build_trainer(resolve(argv))
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.name[0] != "."] == []
    build_trainer(resolve(argv))
    assert (tmp_path / "cache/states.bin").read_bytes() == (cached[0] / "states.bin").read_bytes()
    assert (tmp_path / "cache/manifest.json").read_text() == (cached[0] / "manifest.json").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--teacher-model-path", str(GOLDEN / "models/gpt2_student")], "another teacher or precision"),
        (["--teacher-dtype", "bf16"], "another teacher or precision"),
        (["--max-length", "100"], "other data, prompts or lengths"),
    ],
)
def test_cache_of_other_teacher_or_data_is_refused(change, message, cached, tmp_path):
    config = resolve(argv_of(tmp_path / "run", "--teacher-cache", str(cached[0]), *change))
    with pytest.raises(UserError, match=f"made with {message}: name another folder"):
        build_trainer(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("damage", ["states", "width", "manifest"])
def test_damaged_cache_is_refused(damage, cached, tmp_path):
    cache = shutil.copytree(cached[0], tmp_path / "cache")
    manifest = json.loads((cache / "manifest.json").read_text())
    if damage == "states":
        (cache / "states.bin").write_bytes((cache / "states.bin").read_bytes()[:-4])
    elif damage == "width":
        (cache / "manifest.json").write_text(json.dumps({**manifest, "width": "32"}))
    else:
        (cache / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"is damaged: remove it|no readable JSON"):
        build_trainer(resolve(argv_of(tmp_path / "run", "--teacher-cache", str(cache))))


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("gkd", [], "--teacher-cache has no states of fresh responses"),
        ("gkd", ["--student-data-fraction", "0", "--seq-kd"], "--teacher-cache has no states of fresh responses"),
        ("distillm", [], "--teacher-cache"),
        ("promptkd", [], "--teacher-cache"),
        ("kd", ["--kd-ratio", "0"], "--kd-ratio 0 uses no teacher"),
        ("kd", ["--exposure-bias-every", "1", "--dev-num", "4"], "--exposure-bias-every runs the teacher"),
        ("kd", ["--model-parallel", "--model-parallel-size", "2"], "--teacher-model-parallel-size 1"),
        ("kd", ["--teacher-cache", ""], "--teacher-cache is empty"),
    ],
)
def test_options_that_need_more_than_the_cache_are_refused(method, options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        resolve(argv_of(tmp_path / "run", "--teacher-cache", str(tmp_path / "cache"), *options, method=method))


@pytest.mark.parametrize("kind", ["opt", "qwen2"])
def test_load_without_layers_keeps_the_head(kind, tmp_path):
    make_model(kind, tmp_path / kind, tie_word_embeddings=kind == "opt")
    complete, head = (f(str(tmp_path / kind), torch.float32, "--x") for f in (load_causal_lm, load_without_layers))
    assert torch.equal(complete.get_output_embeddings().weight, head.get_output_embeddings().weight)
    assert head.num_parameters() < complete.num_parameters() and not any("attn" in n for n, _ in head.named_modules())


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_make_and_read_the_cache(cached, tmp_path):
    argv = golden_argv("kd", tmp_path / "run", "--batch-size", "2", "--total-iters", "3")
    done = start([*argv, "--teacher-cache", str(tmp_path / "cache")], ranks=2)
    assert done.returncode == 0, done.stderr
    made, expected = (np.fromfile(folder / "states.bin", np.float32) for folder in (tmp_path / "cache", cached[0]))
    np.testing.assert_allclose(made, expected, rtol=1e-4, atol=1e-5)
    assert [row["loss"] for row in metrics_of(tmp_path / "run")] == pytest.approx(
        [row["loss"] for row in metrics_of(cached[1])], rel=1e-5
    )
