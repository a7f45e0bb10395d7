"""DistiLLM: its adaptive threshold, replay buffer and checkpoints; DistiLLM-2: its loss on pairs of responses."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers.runs import assert_same_run, crash_at
from helpers.training import GOLDEN, golden_argv, metrics_of, train_here

from minillm_baselines.replay_buffer import ReplayBuffer
from promptkd.data.dataset import Example
from promptkd.distributed.ranks import Ranks
from promptkd.errors import UserError
from promptkd.losses import divergence

ALWAYS = ("--loss-eps", "0", "--init-threshold", "1")
ONE_RANK = Ranks(0, 1, torch.device("cpu"))


def options(save, *extra: str, method: str = "distillm") -> list[str]:
    return golden_argv(method, save, "--batch-size", "4", "--total-iters", "6", "--no-do-sample", *extra)


def test_distillm_with_threshold_zero_is_kd_with_its_divergence(tmp_path):
    train_here(options(tmp_path / "distillm"))
    train_here(options(tmp_path / "kd", "--kd-ratio", "1", "--divergence", "skew_forward_kl", method="kd"))
    rows = [metrics_of(tmp_path / name) for name in ("distillm", "kd")]
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]
    assert {row["phi"] for row in rows[0]} == {0.0}


def test_distillm_raises_its_threshold_when_the_dev_loss_grows(tmp_path):
    method = train_here(options(tmp_path / "run", "--total-iters", "1")).method
    seen = []
    for dev_loss in (2.0, 2.05, 2.1, 2.15, 2.2, 1.0, 2.4):
        method.after_evaluation(dev_loss)
        seen.append((round(method.phi, 3), method.reference))
    assert seen == [(0.0, 2.0), (0.0, 2.0), (0.1, 2.1), (0.1, 2.1), (0.2, 2.2), (0.2, 2.2), (0.3, 2.4)]


@pytest.mark.parametrize(("ratio", "fresh"), [("decreasing", 0.4), ("constant", 0.5), ("increasing", 0.6)])
def test_distillm_draws_fresh_and_replayed_responses(ratio, fresh, tmp_path):
    trainer = train_here(options(tmp_path / "run", *ALWAYS, "--capacity", "4", "--replay-ratio", ratio))
    method, batch = trainer.method, trainer.local_batch(1)
    batch.step, batch.total = 6, 10
    batch.examples = [trainer.examples[i] for i in range(len(trainer.examples))]
    assert method.buffer.is_full
    stored = [(prompt.tolist(), response.tolist()) for prompt, response in method.buffer.items]
    chosen, responses = method.examples(batch)
    replayed = [(e.prompt.tolist(), list(r)) in stored for e, r in zip(chosen.examples, responses)]
    assert abs(sum(replayed) / len(replayed) - (1 - fresh)) < 0.35 and 0 < sum(replayed) < len(replayed)


def test_replay_buffer_keeps_the_latest_and_its_state(tmp_path):
    buffer, restored = ReplayBuffer(3), ReplayBuffer(3)
    assert not buffer.is_full and buffer.state()["prompts"].numel() == 0
    ids = lambda *tokens: torch.tensor(tokens).numpy()  # noqa: E731
    buffer.add([(Example(i, ids(i), ids()), ids(*range(i))) for i in (4, 1, 3, 2)], ONE_RANK)
    assert [int(prompt[0]) for prompt, _ in buffer.items] == [2, 3, 4] and buffer.is_full
    restored.load_state(buffer.state())
    assert [r.tolist() for _, r in restored.items] == [[0, 1], [0, 1, 2], [0, 1, 2, 3]]
    assert [int(buffer.draw(u)[0][0]) for u in (0.0, 0.34, 0.999)] == [2, 3, 4]


def test_distillm_resumes_bit_for_bit(tmp_path):
    often = ["--checkpoint-every", "1", "--eval-interval", "2", "--dev-num", "4", "--no-eval-gen", "--loss-eps", "0"]
    extra = [*often, "--init-threshold", "0.6", "--capacity", "3", "--lr", "0.01", "--do-sample"]
    train_here(options(tmp_path / "through", *extra))
    crash_at(5, options(tmp_path / "killed", *extra))
    train_here(options(tmp_path / "killed", *extra, "--resume"))
    assert_same_run(tmp_path / "through", tmp_path / "killed")


def test_distillm_does_not_depend_on_accumulation(tmp_path):
    train_here(options(tmp_path / "a", *ALWAYS, "--capacity", "6"))
    train_here(options(tmp_path / "b", *ALWAYS, "--capacity", "6", "--batch-size", "2", *ACCUMULATE))
    a, b = ([row["loss"] for row in metrics_of(tmp_path / name)] for name in "ab")
    assert a == pytest.approx(b, rel=1e-6)


ACCUMULATE = ("--gradient-accumulation-steps", "2")


def test_distillm_adds_the_corpus_term(tmp_path):
    corpus = ("--lm-data-dir", str(GOLDEN / "processed/corpus/gpt2"), "--lm-coef", "0.5")
    train_here(options(tmp_path / "run", *corpus))
    row = metrics_of(tmp_path / "run")[0]
    assert row["corpus_loss"] > 0 and row["loss"] == pytest.approx(row["ds_loss"] + 0.5 * row["corpus_loss"])


def answered(folder, change) -> str:
    """Write the golden training rows with other responses."""
    folder.mkdir()
    source = GOLDEN / "processed/dolly/full/gpt2"
    shutil.copytree(source, folder, dirs_exist_ok=True)
    for name in ("train_0.bin", "train_0.idx"):
        (folder / name).unlink(missing_ok=True)
    rows = [json.loads(line) for line in (source / "train.jsonl").read_text().splitlines()]
    (folder / "train.jsonl").write_text("".join(json.dumps(change(i, row)) + "\n" for i, row in enumerate(rows)))
    return str(folder)


def pairs(tmp_path) -> list[str]:
    teacher = answered(tmp_path / "teacher", lambda i, row: row)
    student = answered(tmp_path / "student", lambda i, row: {**row, "output": "a b c d e"[: 1 + 2 * (i % 5)]})
    return ["--data-dir", teacher, "--student-data-dir", student]


def test_distillm2_is_a_mean_over_responses_of_means_over_tokens(tmp_path):
    trainer = train_here(
        options(tmp_path / "run", *pairs(tmp_path), "--total-iters", "1", "--lr", "0", method="distillm2")
    )
    method, rows, batch = trainer.method, metrics_of(tmp_path / "run"), trainer.local_batch(1)
    expected = {}
    for key, name, examples in (
        ("teacher_response_loss", "skew_forward_kl", batch.examples),
        (
            "student_response_loss",
            "skew_reverse_kl_detached",
            [method.context.data.paired[e.index] for e in batch.examples],
        ),
    ):
        means = []
        for example in examples:
            ids = torch.tensor([[*example.prompt, *example.response]])
            with torch.no_grad():
                p, q = (
                    m.model(ids).logits[0, len(example.prompt) - 1 : -1]
                    for m in (method.teacher.module, method.student.module)
                )
            means.append(divergence(name, q, p, skew=0.1).mean())
        expected[key] = float(torch.stack(means).mean())
    assert {key: rows[0][key] for key in expected} == pytest.approx(expected, rel=1e-5)
    assert rows[0]["loss"] == pytest.approx(sum(expected.values()), rel=1e-5)


def test_distillm2_refuses_responses_to_other_prompts(tmp_path):
    extra = pairs(tmp_path)
    (tmp_path / "student/train.jsonl").write_text((tmp_path / "student/train.jsonl").read_text().partition("\n")[2])
    with pytest.raises(UserError, match="its prompts are not those of --data-dir"):
        train_here(options(tmp_path / "run", *extra, method="distillm2"))
    with pytest.raises(UserError, match="--student-data-dir is missing"):
        train_here(options(tmp_path / "run", method="distillm2"))
