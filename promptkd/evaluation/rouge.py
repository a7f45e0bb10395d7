"""ROUGE-L and exact match, for English as the published rouge_metric.py defines them. No model or torch is needed.

rouge_score finds the longest common subsequence of tokens. The tokenizer "published" is its own, which drops all
letters but a-z. "unicode" supports all scripts and gives ASCII text the same tokens.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import string
import sys
from concurrent.futures import Future, ProcessPoolExecutor
from types import ModuleType
from typing import NamedTuple

import regex
from rouge_score.rouge_scorer import RougeScorer

from promptkd.config.options import RougeTokenizer
from promptkd.evaluation.rouge_tokenizers import (
    fold,
    has_word,
    join_spaceless,
    strip_invisible,
    tokenizer_for,
)
from promptkd.utils.machine import exit_with_parent, usable_cores

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_UNICODE_PUNCTUATION = regex.compile(r"\p{P}+")


class Score(NamedTuple):
    """Both from 0 to 100."""

    rouge_l: float
    exact_match: float


def rouge_l(answer: str, references: list[str], tokenizer: RougeTokenizer = "unicode") -> float:
    """Return the F-measure of the longest common subsequence of tokens, best over the references, x 100.

    Args:
        answer: Text of the model.
        references: Gold texts, at least one.
        tokenizer: "unicode" or "published". A reference without any word, such as "+-*/", is compared by its symbols
            under "unicode"; under "published" it scores 0.
    """
    scores = (_scorer(tokenizer, has_word(text)).score(text, answer)["rougeL"].fmeasure for text in references)
    return 100 * max(scores)


def exact_match(answer: str, references: list[str], tokenizer: RougeTokenizer = "unicode") -> float:
    """Return 100 if the answer equals a reference up to case, punctuation and spaces, else 0.

    Under "unicode" a reference of punctuation only is compared with it. Under "published" only ASCII punctuation is
    removed, and any two texts of punctuation are equal.
    """
    same = _is_same_published if tokenizer == "published" else _is_same
    return 100.0 * any(same(answer, reference) for reference in references)


def score_all(pairs: list[tuple[str, list[str]]], tokenizer: RougeTokenizer = "unicode") -> list[Score]:
    """Return a score for each (answer, references)."""
    return [Score(rouge_l(*pair, tokenizer), exact_match(*pair, tokenizer)) for pair in pairs]


def mean(values: list[float]) -> float:
    """Return the arithmetic mean, summed in order."""
    return sum(values) / len(values)


class ScoringPool:
    """Score batches of answers in worker processes while the model decodes the next ones.

    Workers are spawned, because a fork of a process with torch's threads can hang. Scores keep the order of the
    answers.
    """

    def __init__(self, workers: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)

    def submit(self, pairs: list[tuple[str, list[str]]], tokenizer: RougeTokenizer) -> Future[list[Score]]:
        """Score (answer, references) pairs in a worker, which this may start.

        A worker imports the main module. That may be a script that calls `promptkd.evaluate` and has no
        `if __name__ == "__main__"`, so an empty module stands in for it.
        """
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            return self._pool.submit(score_all, pairs, tokenizer)
        finally:
            sys.modules["__main__"] = main

    def __enter__(self) -> ScoringPool:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Yield the cores to decoding, and leave Ctrl-C to the parent."""
    os.nice(10)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    exit_with_parent()


def default_workers(ranks: int) -> int:
    """Return the number of scoring processes of a rank: its share of the cores minus one, between 1 and 8."""
    return max(1, min(8, usable_cores() // ranks - 1))


def _is_same_published(answer: str, reference: str) -> bool:
    return _plain(answer) == _plain(reference)


def _is_same(answer: str, reference: str) -> bool:
    plain = _plain_unicode(reference)
    if not plain:  # nothing is left to compare, and an empty answer does not equal "+-*/"
        return fold(answer).split() == fold(reference).split()
    return _plain_unicode(answer) == plain


def _plain(text: str) -> str:
    return " ".join(text.lower().translate(_PUNCTUATION).split())


def _plain_unicode(text: str) -> str:
    if text.isascii():
        return _plain(text)
    return join_spaceless(_plain(_UNICODE_PUNCTUATION.sub("", strip_invisible(fold(text)))))


@functools.cache
def _scorer(tokenizer: RougeTokenizer, words: bool) -> RougeScorer:
    """Return the scorer for references with or without words."""
    return RougeScorer(["rougeL"], tokenizer=tokenizer_for(tokenizer, words))
