"""GKD: which responses are the student's, and its identities with other methods."""

from __future__ import annotations

import pytest
from helpers.training import golden_argv, metrics_of, train_here

from promptkd.errors import UserError
from train import resolve

SHORT = ("--batch-size", "4", "--total-iters", "3")


def losses_of(method: str, save, *extra: str, name: str = "loss") -> list[float]:
    train_here(golden_argv(method, save, *SHORT, *extra))
    return [row[name] for row in metrics_of(save)]


@pytest.mark.parametrize("sampling", [["--no-do-sample"], ["--do-sample"]])
def test_gkd_on_policy_with_reverse_kl_is_promptkd_without_prompt(sampling, tmp_path):
    on_policy = ["--student-data-fraction", "1", "--divergence", "reverse_kl"]
    gkd = losses_of("gkd", tmp_path / "gkd", *on_policy, *sampling)
    promptkd = losses_of("promptkd", tmp_path / "promptkd", "--prompt-len", "0", *sampling, name="student_loss")
    assert gkd == promptkd and len(set(gkd)) == 3


def test_gkd_on_the_data_with_forward_kl_is_kd(tmp_path):
    gkd = losses_of("gkd", tmp_path / "gkd", "--student-data-fraction", "0", "--divergence", "forward_kl")
    assert gkd == losses_of("kd", tmp_path / "kd", "--kd-ratio", "1")


def test_gkd_mixes_responses_by_step_and_example(tmp_path):
    trainer = train_here(golden_argv("gkd", tmp_path / "run", *SHORT))
    batch = trainer.local_batch(1)
    mixed, _ = trainer.method.mixed_responses(batch, 0.5)
    own, _ = trainer.method.mixed_responses(batch, 1.0)
    given = [example.response for example in batch.examples]
    from_student = [list(a) == list(b) for a, b in zip(mixed, own)]
    assert all(s or list(m) == list(g) for s, m, g in zip(from_student, mixed, given))
    batch.examples.reverse()
    assert [list(response) for response in trainer.method.mixed_responses(batch, 0.5)[0]] == [
        list(response) for response in reversed(mixed)
    ]


def test_gkd_lets_the_teacher_answer_the_other_prompts(tmp_path):
    teacher = losses_of("gkd", tmp_path / "a", "--student-data-fraction", "0", "--seq-kd", "--no-do-sample")
    data = losses_of("gkd", tmp_path / "b", "--student-data-fraction", "0", "--no-do-sample")
    assert teacher[0] != data[0]


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--student-data-fraction", "1.5"], "--student-data-fraction 1.5 is not between 0 and 1"),
        (["--jsd-beta", "2"], "--jsd-beta"),
        (["--divergence", "jds"], "jds"),
        (["--kd-temperature", "0"], "--kd-temperature"),
    ],
)
def test_gkd_refuses_options(extra, words, tmp_path):
    with pytest.raises(UserError, match=words):
        resolve(golden_argv("gkd", tmp_path, *extra))
