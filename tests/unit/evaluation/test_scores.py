"""ROUGE-L, exact match and their spread; scoring in processes."""

from __future__ import annotations

import subprocess
import sys

import pytest
from rouge_score import rouge_scorer

from promptkd.evaluation.rouge import Score, ScoringPool, exact_match, rouge_l, score_all
from promptkd.evaluation.tables import over_seeds


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence_of_stems():
    # cats -> cat, running -> run: 2 words in common, in order, of 3 and 4: F = 2 * 2 / (3 + 4)
    assert rouge_l("cats were running", ["cat run very fast"]) == pytest.approx(100 * 4 / 7)
    reference = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True).score("a cat runs", "the cats run off")
    assert rouge_l("the cats run off", ["a cat runs"]) == pytest.approx(100 * reference["rougeL"].fmeasure)


def test_rouge_l_takes_the_best_reference():
    assert rouge_l("alpha beta", ["gamma", "alpha beta", "alpha"]) == 100
    assert rouge_l("", ["gamma"]) == 0


def test_exact_match_ignores_case_punctuation_and_spaces():
    assert exact_match("  The  answer.", ["no", "the answer"]) == 100
    assert exact_match("the answers", ["the answer"]) == 0


def test_scoring_pool_keeps_order_and_scores():
    pairs = [(f"word {i} of many", [f"word {i % 3} of few", "many words"]) for i in range(12)]
    with ScoringPool(2) as pool:
        pending = [pool.submit(pairs[:5], "unicode"), pool.submit(pairs[5:], "unicode")]
        scores = [score for batch in pending for score in batch.result()]
    assert scores == score_all(pairs)
    assert isinstance(scores[0], Score)


def test_scoring_pool_does_not_run_the_callers_script_again(tmp_path):
    script = tmp_path / "script.py"  # as a program that calls promptkd.evaluate, without `if __name__ == "__main__"`
    script.write_text(
        "from promptkd.evaluation.rouge import ScoringPool\nprint('once')\n"
        "with ScoringPool(1) as pool:\n    print(pool.submit([('a', ['a'])], 'unicode').result()[0].rouge_l)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("once\n100.0\n", 0), done.stderr


def test_over_seeds_returns_the_sample_deviation():
    assert over_seeds([1.0, 3.0]) == {"per_seed": [1.0, 3.0], "mean": 2.0, "std": pytest.approx(2**0.5)}
    assert over_seeds([1.0])["std"] is None
