"""A saved soft prompt in evaluate.py and tools/generate.py, and as the start of a run."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from helpers.decoding import tiny
from helpers.evaluating import evaluated, options, refused, write_set
from helpers.generating import generated
from helpers.runs import tiny_argv
from helpers.stand_in_ranks import OneOf
from helpers.training import GOLDEN, metrics_of, train_here
from transformers import AutoConfig

from evaluate import read_settings
from promptkd.errors import UserError
from promptkd.evaluation import exposure_bias
from promptkd.generation.answers import decode_share
from promptkd.generation.sampling import Sampling
from promptkd.models.soft_prompt import load_prompt, save_prompt
from promptkd.training.setup import build_trainer
from train import resolve

TEACHER = GOLDEN / "models/gpt2_teacher"


@pytest.fixture(scope="module")
def prompt(tmp_path_factory):
    """A soft prompt of the golden teacher that changes its answers."""
    folder = tmp_path_factory.mktemp("prompts") / "prompt"
    config = AutoConfig.from_pretrained(TEACHER)
    torch.manual_seed(0)
    save_prompt(torch.randn(5, config.hidden_size), folder, str(TEACHER), config)
    return folder


def test_decode_share_with_a_prefix_equals_tokens_in_front():
    model = tiny("gpt2")
    prompts = [np.arange(5, 5 + length, dtype=np.int64) for length in (3, 9, 4)]
    front = np.array([7, 11], dtype=np.int64)
    common = {"end_ids": [3], "max_new_tokens": 6, "sampling": Sampling(), "token_budget": 40, "ranks": OneOf()}
    with_prefix, with_tokens = (
        sorted(answer for batch in decode_share(model, given, [1, 2], **common, **extra) for answer in batch)
        for given, extra in (
            (prompts, {"prefix": model.get_input_embeddings().weight[front].detach()}),
            ([np.concatenate([front, each]) for each in prompts], {}),
        )
    )
    assert with_prefix == with_tokens


def test_teacher_is_evaluated_with_and_without_its_prompt(prompt, tmp_path):
    """A prompt changes the answers, does not depend on the token budget, and is recorded."""
    write_set(tmp_path / "data/own", rows=3)
    answers = []
    for extra in ([], ["--prompt", str(prompt)], ["--prompt", str(prompt), "--token-budget", "60"]):
        save = tmp_path / str(len(answers))
        argv = options(tmp_path / "data", save, "--data-names", "own", "--model-path", str(TEACHER), *extra)
        results = evaluated(argv)
        answers.append((save / "own/seed10/answers.jsonl").read_text())
        assert ("prompt" in results["model"]) == bool(extra)
    assert answers[0] != answers[1] == answers[2]
    assert results["model"]["prompt"]["path"] == str(prompt) and results["model"]["prompt"]["fingerprint"]["files"] == 2


def test_generate_resumes_only_with_the_same_prompt(prompt, tmp_path):
    short = ["--max-length", "104", "--gen-num", "1"]
    plain, prompted = (
        generated(tmp_path / name, *short, *extra)[0]["gen_answer"]
        for name, extra in (("plain", []), ("prompted", ["--prompt", str(prompt)]))
    )
    assert plain != prompted
    with pytest.raises(UserError, match="prompt is None"):
        generated(tmp_path / "prompted", *short)


def test_evaluation_refuses_prompts_that_do_not_fit(prompt, tmp_path, capsys):
    write_set(tmp_path / "data/own", rows=1)
    argv = options(tmp_path / "data", tmp_path / "results", "--data-names", "own")
    assert "model's embeddings are 32 wide" in refused([*argv, "--prompt", str(prompt)], capsys)
    assert "no readable soft prompt" in refused([*argv, "--prompt", str(tmp_path / "data")], capsys)
    bias = ["--type", "exposure_bias", "--teacher-model-path", str(TEACHER), "--prompt", str(prompt)]
    with pytest.raises(UserError, match="takes --teacher-prompt: leave --prompt out"):
        exposure_bias.run(read_settings([*argv, *bias]))


def test_prompt_init_continues_a_saved_prompt(prompt, tmp_path):
    short = ["--batch-size", "2", "--total-iters", "1", "--max-length", "104", "--prompt-len", "5"]
    argv = tiny_argv("promptkd", tmp_path / "run", *short, "--prompt-init", str(prompt), "--teacher-lr", "0.5")
    trainer = build_trainer(resolve(argv))
    saved = load_prompt(prompt, trainer.method.initial_prompt.size(1))
    assert torch.equal(trainer.method.prompt(), saved)
    trainer.fit()
    assert metrics_of(tmp_path / "run")[0]["prompt_drift"] > 1
    inputs = json.loads((tmp_path / "run/config.json").read_text())["inputs"]
    assert inputs["prompt_init"]["path"] == str(prompt)
    again = load_prompt(tmp_path / "run/prompt", saved.size(1))
    drift = float((again - saved).norm())
    assert metrics_of(tmp_path / "run")[0]["prompt_drift"] == pytest.approx(drift, rel=1e-5)
    with pytest.raises(UserError, match="--prompt-len is 7: give --prompt-len 5"):
        train_here(tiny_argv("promptkd", tmp_path / "other", *short[:-2], "--prompt-init", str(prompt)))
