"""Metrics beyond ROUGE-L: formulas on small cases, and evaluate.py --metrics and --answers against plain code."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from helpers.evaluating import MODEL, evaluated, options, write_set
from helpers.training import GOLDEN
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from transformers import AutoModelForCausalLM, AutoTokenizer

from promptkd.cli.evaluate import main
from promptkd.distributed.ranks import Ranks
from promptkd.errors import UserError, exit_with
from promptkd.evaluation.metrics import answer_sums, self_bleu, with_intervals
from promptkd.evaluation.options import ANSWER_METRICS, REFERENCE_METRICS
from promptkd.evaluation.rouge_tokenizers import split_words
from promptkd.evaluation.session import claim
from promptkd.evaluation.tables import Row
from promptkd.reporting.report import Contents, write_report
from promptkd.reporting.results import read_result

TEACHER = GOLDEN / "models" / "gpt2_teacher"


def rows_of(*texts: str, lengths: tuple[int, ...]) -> list[Row]:
    return [Row(seed, 0, text, length, 50.0, 0.0) for seed, (text, length) in enumerate(zip(texts, lengths))]


def test_answer_sums_by_hand():
    rows = rows_of("A b a b a b.", "a c", lengths=(8, 3))
    names = ["rougeL", "length", "cut", "repetition", "distinct"]
    sums = dict(zip(["rougeL", "length", "cut", "repetition", "one", "two"], answer_sums(rows, names, limit=8)))
    assert sums["rougeL"] == (100.0, 2) and sums["length"] == (11, 2) and sums["cut"] == (100.0, 2)
    # abab, baba, abab and bab. of the first answer; the second has no 4-grams.
    assert sums["repetition"] == (pytest.approx(25.0), 1)
    assert sums["one"] == (pytest.approx(100 * 4 / 9), 1)  # a b c . of 7 + 2 words
    assert sums["two"] == (pytest.approx(100 * 4 / 7), 1)  # ab ba b. ac of 6 + 1 pairs
    assert answer_sums(rows_of("", lengths=(0,)), ["repetition", "distinct"], 8) == [(0, 0)] * 3


def test_self_bleu_is_bleu_against_the_other_answers():
    texts = [split_words(text) for text in ("the cat sat on the mat", "the cat sat on a mat", "dogs ran")]
    method = SmoothingFunction().method1
    assert self_bleu(texts)[1] == pytest.approx(100 * sentence_bleu([texts[0], texts[2]], texts[1], [0.25] * 4, method))
    assert self_bleu([["yes"], ["yes"], []]) == pytest.approx([100.0, 100.0])
    assert self_bleu([["yes"], ["no"]]) == [0.0, 0.0]


@pytest.mark.parametrize("text", ["Don't stop, 3.5 times!\n(ok)", "naïve café — 2½ + 日本語です"])
def test_split_words_loses_no_visible_character(text):
    words = split_words(text)
    assert "".join(words) == "".join(text.lower().split())
    assert all(word.isalnum() or len(word) == 1 for word in words)


def test_intervals_are_those_of_means_and_of_ratios():
    generator = np.random.default_rng(3)
    values, tokens = generator.normal(5, 2, 400), generator.integers(1, 30, 400)
    bins = np.zeros((400, 45))
    bins[:, [14, 29, 44]] = [1.0, 0.97, 1.0]
    bins[:100, [14, 29, 44]] = [1.0, 0.97, 0.0]  # a quarter is wrong: 0.97 - 0.75
    columns = {
        "length": np.stack([values, np.ones(400)], axis=1),
        "perplexity": np.stack([2.0 * tokens, tokens], axis=1),
        "ece": bins,
        "repetition": np.zeros((400, 2)),
    }
    measured = with_intervals(columns)
    assert measured == with_intervals(columns)
    length = measured["length"]
    half = 1.96 * values.std() / 20
    assert length["value"] == pytest.approx(values.mean())
    assert [length["low"], length["high"]] == pytest.approx(
        [values.mean() - half, values.mean() + half], abs=0.15 * half
    )
    assert measured["perplexity"] == pytest.approx(dict.fromkeys(("value", "low", "high"), math.exp(2)))
    ece = measured["ece"]
    assert ece["value"] == pytest.approx(22.0) and 17 < ece["low"] < 19 and 25 < ece["high"] < 27
    assert measured["repetition"] == {"value": None, "low": None, "high": None}


def plain_sums(rows: int) -> dict[str, float]:
    """Measure the references one by one with all logits in float64."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval() for path in (MODEL, TEACHER)]
    loss, kl, sure, right = [], [], [], []
    for index in range(rows):
        prompt = tokenizer.encode(
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
            f"\n\n### Instruction:\nList {index + 1} words.\n\n### Response:\n"
        )[:32]
        response = [*tokenizer.encode(f"word {index}"), tokenizer.eos_token_id]
        ids = torch.tensor([[*prompt, *response]])
        with torch.no_grad():
            q, p = (model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for model in models)
        loss += (-q[range(len(response)), response]).tolist()
        kl += torch.stack([(p.exp() * (p - q)).sum(-1), (q.exp() * (q - p)).sum(-1)]).T.tolist()
        sure += q.exp().amax(-1).tolist()
        right += (q.argmax(-1) == torch.tensor(response)).tolist()
    places = (np.array(sure) * 15).astype(int)
    gaps = np.array(sure) - np.array(right)
    forward, reverse = np.mean(kl, axis=0)
    ece = 100 * sum(abs(gaps[places == place].sum()) for place in range(15)) / len(gaps)
    return {"perplexity": math.exp(np.mean(loss)), "ece": ece, "forward_kl": forward, "reverse_kl": reverse}


def test_evaluate_measures_references_and_scores_stored_answers(tmp_path, monkeypatch, capsys):
    write_set(tmp_path / "data/own")
    save = tmp_path / "out"
    argv = options(
        tmp_path / "data", save, "--data-names", "own", "--seeds", "1", "2", "--teacher-model-path", str(TEACHER)
    )
    results = evaluated([*argv, "--metrics", *ANSWER_METRICS, *REFERENCE_METRICS])
    entry, plain = results["sets"]["own"], plain_sums(6)
    measured = entry["metrics"]
    for name, value in plain.items():
        assert measured[name]["value"] == pytest.approx(value, rel=1e-4), name
        assert measured[name]["low"] <= measured[name]["high"]
    for name, key in (("rougeL", "rougeL"), ("exact_match", "exact_match"), ("length", "mean_length")):
        assert measured[name]["value"] == pytest.approx(entry[key]["mean"])
    assert 0 < measured["cut"]["value"] <= 100 and 0 <= measured["self_bleu"]["value"] <= 100
    assert results["teacher"]["path"] == str(TEACHER) and results["teacher"]["fingerprint"]
    assert sum(entry["reliability"]["tokens"]) > 12 and (save / "own/reliability.png").stat().st_size > 5000

    def rescore(*extra: str) -> dict:
        monkeypatch.setattr("sys.argv", ["evaluate.py", "--answers", str(save), *extra])
        main()
        return json.loads((save / "results.json").read_text())["sets"]["own"]

    of_answers = {name: metric for name, metric in measured.items() if name not in plain}
    del entry["metrics"]  # as in results of earlier versions
    (save / "results.json").write_text(json.dumps(results))
    assert "self_bleu" not in rescore()["metrics"]
    again = rescore("--metrics", "self_bleu")
    assert set(again["metrics"]) == set(of_answers) and again["rougeL"] == entry["rougeL"]
    for name, metric in of_answers.items():
        assert again["metrics"][name] == pytest.approx(metric, abs=1e-4), name  # the file has ROUGE-L in four digits

    write_report(Contents("All", [read_result(f"now={save}")], [], None, 0), tmp_path / "report")
    report = (tmp_path / "report/report.md").read_text()
    assert "## Metrics" in report and f"| self-BLEU | {measured['self_bleu']['value']:.2f} (" in report
    with open(tmp_path / "data/own/valid.jsonl", "a") as file:
        file.write("\n")
    rescore("--metrics", "repetition")
    with pytest.raises(SystemExit):
        exit_with(rescore)
    assert "has changed since the evaluation" in capsys.readouterr().err
    results["seeds"] = results["seeds"][:1]
    (save / "results.json").write_text(json.dumps(results))
    with pytest.raises(UserError, match=r"self_bleu needs the answers of several seeds, and .* has one"):
        rescore("--metrics", "self_bleu")
    answers = next((save / "own").glob("seed*/answers.jsonl"))
    lines = answers.read_text().splitlines(keepends=True)
    for damaged in (lines[:-1], lines[::-1]):
        answers.write_text("".join(damaged))
        with pytest.raises(UserError, match=r"not the answers of evaluate.py to all 6 examples in order"):
            rescore("--metrics", "repetition")
    claim(save, Ranks(0, 1, torch.device("cpu")))
    assert not (save / "own/reliability.png").exists()


def test_stored_answers_to_a_data_set_are_scored_again(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    rows = datasets.Dataset.from_list([{"prompt": f"Ask {i}.", "output": "gold"} for i in range(2)])
    datasets.DatasetDict({"test": rows}).save_to_disk(tmp_path / "own")
    evaluated(options(tmp_path, tmp_path / "out", "--data-names", "own", "--metrics", "cut"))
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--answers", str(tmp_path / "out"), "--metrics", "exact_match"])
    main()
    (tmp_path / "own/dataset_dict.json").unlink()
    with pytest.raises(UserError, match="is missing or has changed"):
        main()


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (["--metrics", "bleu"], "choose from"),
        (["--metrics", "self_bleu", "--seed", "1"], "give two or more --seeds"),
        (["--metrics", "kl"], "--metrics kl needs --teacher-model-path"),
        (["--teacher-model-path", "t"], "--teacher-model-path is for --type exposure_bias or --metrics kl"),
        (["--metrics", "kl", "--sample-times", "2"], "--sample-times is for --type exposure_bias: "),
        (["--type", "exposure_bias", "--metrics", "ece"], "leave --metrics"),
        (["--answers", "/nowhere"], "leave --model-path and --save out"),
    ],
)
def test_bad_metrics_are_one_line(tmp_path, monkeypatch, capsys, extra, says):
    monkeypatch.setattr("sys.argv", ["evaluate.py", *options(tmp_path, tmp_path / "out", "--data-names", "x", *extra)])
    with pytest.raises(SystemExit) as ended:
        exit_with(main)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and says in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (["--metrics", "ece"], "--metrics ece needs the model"),
        (["--max-length", "600"], "--max-length has no effect"),
        ([], "nowhere/results.json: no such file"),
    ],
)
def test_bad_answers_are_one_line(tmp_path, monkeypatch, capsys, extra, says):
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--answers", str(tmp_path / "nowhere"), *extra])
    with pytest.raises(SystemExit):
        exit_with(main)
    assert says in capsys.readouterr().err
