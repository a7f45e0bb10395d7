"""ROUGE-L and exact match as the published rouge_metric.py defines them; nothing here needs a model or torch."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import string
import threading
from concurrent.futures import Future, ProcessPoolExecutor
from typing import NamedTuple

from rouge_score.rouge_scorer import RougeScorer

from promptkd.machine import usable_cores

_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Score(NamedTuple):
    """Both from 0 to 100."""

    rouge_l: float
    exact_match: float


def rouge_l(answer: str, references: list[str]) -> float:
    """F-measure of the longest common subsequence of stemmed words, best over the references, x 100."""
    return 100 * max(_scorer().score(reference, answer)["rougeL"].fmeasure for reference in references)


def exact_match(answer: str, references: list[str]) -> float:
    """100 when the answer is one of the references but for case, punctuation and spaces, else 0."""
    return 100.0 * any(_plain(answer) == _plain(reference) for reference in references)


def score_all(pairs: list[tuple[str, list[str]]]) -> list[Score]:
    """A score for each (answer, references)."""
    return [Score(rouge_l(*pair), exact_match(*pair)) for pair in pairs]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


class ScoringPool:
    """Scores batches of answers in processes of their own while the model decodes the next ones.

    The processes are started anew rather than forked, because a copy of a process with torch's threads can
    hang. Scores come back in the order of the answers, whichever process was faster.
    """

    def __init__(self, workers: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)

    def submit(self, pairs: list[tuple[str, list[str]]]) -> Future[list[Score]]:
        return self._pool.submit(score_all, pairs)

    def __enter__(self) -> ScoringPool:
        return self

    def __exit__(self, *_) -> None:
        self._pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Decoding goes first where both want the same cores; Ctrl-C and the end are the parent's to decide."""
    os.nice(10)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A launcher may kill the parent at once; its workers would wait for tasks forever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def default_workers(ranks: int) -> int:
    """Scoring processes of one rank: all cores but one, shared by the ranks of this machine, at most eight."""
    return max(1, min(8, usable_cores() // ranks - 1))


def _plain(text: str) -> str:
    return " ".join(text.lower().translate(_PUNCTUATION).split())


@functools.cache
def _scorer() -> RougeScorer:
    return RougeScorer(["rougeL"], use_stemmer=True)
