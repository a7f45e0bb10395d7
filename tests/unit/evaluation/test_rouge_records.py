"""The tokenizer of ROUGE-L where scores are recorded, and which of two models with equal scores is the best."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
from helpers.evaluating import evaluated, options, refused, write_set
from helpers.made_results import make_result
from helpers.training import GOLDEN, golden_argv, metrics_of, train_here

from promptkd.checkpointing.integrity import STATE
from promptkd.errors import UserError
from promptkd.evaluation.exposure_bias import check_settings
from promptkd.reporting.results import check_comparable, read_result
from promptkd.training.trainer import Trainer


def test_evaluate_records_the_tokenizer_in_results_and_table(tmp_path):
    write_set(tmp_path / "data/own", rows=2)
    for name, extra in (("unicode", []), ("published", ["--rouge-tokenizer", "published"])):
        save = tmp_path / name
        results = evaluated(options(tmp_path / "data", save, "--data-names", "own", "--seed", "1", *extra))
        assert results["protocol"]["rouge_tokenizer"] == name
        assert f"--rouge-tokenizer {name})" in (save / "results.md").read_text(encoding="utf-8")


def test_evaluate_scores_with_the_named_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setattr("promptkd.evaluation.evaluate.answer_text", lambda *_: ("首都是巴黎", False))
    write_set(tmp_path / "data/own", rows=2, output="巴黎是首都")
    argv = options(tmp_path / "data", tmp_path / "out", "--data-names", "own", "--seed", "1", "--overwrite")
    # 2 of 5 characters are common and in order: 首都, or 巴黎.
    assert evaluated(argv)["sets"]["own"]["rougeL"]["mean"] == pytest.approx(40)
    assert evaluated([*argv, "--rouge-tokenizer", "published"])["sets"]["own"]["rougeL"]["mean"] == 0


def test_exposure_bias_refuses_a_rouge_tokenizer(tmp_path, capsys):
    settings = SimpleNamespace(
        evaluation=SimpleNamespace(prompt=None, rouge_tokenizer="published", seeds=[1]),
        exposure_bias=SimpleNamespace(teacher_model_path="t", sample_times=None, published=False),
        decoding=SimpleNamespace(do_sample=True),
    )
    with pytest.raises(UserError, match="--rouge-tokenizer"):
        check_settings(settings)
    write_set(tmp_path / "data/own")
    assert "--rouge-tokenizer" in refused(options(tmp_path / "data", tmp_path / "o", "--rouge-tokenizer", "x"), capsys)


def test_report_refuses_scores_of_different_tokenizers(tmp_path):
    old, theirs, ours = (
        read_result(make_result(tmp_path, name, protocol={"top_k": 0, **protocol}))
        for name, protocol in (
            ("sft", {}), ("kd", {"rouge_tokenizer": "published"}), ("promptkd", {"rouge_tokenizer": "unicode"}),
        )
    )  # fmt: skip
    check_comparable([old, theirs])  # earlier versions had rouge_score's only
    for other in (old, theirs):
        with pytest.raises(UserError, match=r"protocol \(rouge_tokenizer published and unicode\)"):
            check_comparable([other, ours])


def test_training_scores_the_dev_set_with_the_named_tokenizer_and_records_it(tmp_path, monkeypatch):
    monkeypatch.setattr("promptkd.training.validation.gather_texts", lambda *args, **named: [["巴黎"] * 2])
    source = GOLDEN / "processed/dolly/full/gpt2"
    (tmp_path / "data").mkdir()
    for path in (source / name for name in ("train_0.bin", "train_0.idx", "train.jsonl")):
        (tmp_path / "data" / path.name).write_bytes(path.read_bytes())
    lines = (source / "valid.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.dumps({**json.loads(line), "output": "巴黎"}) for line in lines]
    (tmp_path / "data/valid.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    for name, score in (("unicode", 100), ("published", 0)):
        save = tmp_path / name
        argv = golden_argv("sft", save, "--dev-num", "2", "--total-iters", "1", "--batch-size", "1")
        train_here([*argv, "--data-dir", str(tmp_path / "data"), "--rouge-tokenizer", name])
        assert [row["rougeL"] for row in metrics_of(save, "eval")] == [score, score]
        assert json.loads((save / "config.json").read_text(encoding="utf-8"))["settings"]["rouge_tokenizer"] == name


def kept(rows: list[tuple[float | None, float]], best: dict[str, float] | None = None):
    """What is best after evaluations of (ROUGE-L, dev loss), and what was saved at each of them."""
    saved: list[list[str]] = []
    trainer = SimpleNamespace(best={} if best is None else best, save=lambda name: saved[-1].append(name))
    for score, loss in rows:
        saved.append([])
        Trainer.keep_best(trainer, {"dev_loss": loss} | ({} if score is None else {"rougeL": score}))
    return trainer.best, saved


def test_keep_best_breaks_ties_in_rouge_by_the_lower_dev_loss():
    best, saved = kept([(0, 3.0), (0, 2.0), (0, 2.5), (1, 9.0), (1, 9.0), (0.5, 1.0), (1, 8.0)])
    rouge = ["best_rougeL"]
    assert saved == [[*rouge, "best_loss"], [*rouge, "best_loss"], [], rouge, [], ["best_loss"], rouge]
    assert best == {"best_rougeL": 1, "best_rougeL_dev_loss": 8.0, "best_loss": 1.0}


def test_keep_best_without_generation_has_the_lowest_dev_loss_only():
    assert kept([(None, 2.0), (None, 3.0)]) == ({"best_loss": 2.0}, [["best_loss"], []])


def test_keep_best_resumes_from_a_checkpoint_without_dev_loss():
    best, saved = kept([(0, 4.0), (0, 5.0)], {"best_rougeL": 0, "best_loss": 3.0})
    assert saved == [["best_rougeL"], []]
    assert best == {"best_rougeL": 0, "best_rougeL_dev_loss": 4.0, "best_loss": 3.0}
    assert STATE["best"] == {...: float}  # what state.json may hold


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_keep_best_keeps_no_number_that_json_does_not_have(loss):
    best, saved = kept([(1, loss), (1, 2.0)])
    assert saved == [["best_rougeL"], ["best_rougeL", "best_loss"]]
    assert best == {"best_rougeL": 1, "best_rougeL_dev_loss": 2.0, "best_loss": 2.0}
