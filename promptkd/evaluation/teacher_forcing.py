"""Measure a model on a test set's references: loss, calibration, and KL divergence to a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from promptkd.config.options import TOKEN_BUDGET
from promptkd.data.batching import MicroBatch, make_micro_batches
from promptkd.distributed.ranks import Ranks
from promptkd.errors import RunError
from promptkd.evaluation.metrics import BINS, Columns
from promptkd.evaluation.test_sets import TestSet
from promptkd.generation.answers import share
from promptkd.losses import FrozenLogits, kl_divergences, positions_at_a_time
from promptkd.models.wrapper import LanguageModel
from promptkd.utils.plotting import COLORS, GRAY, new_figure, shown


@torch.no_grad()
def reference_columns(model: LanguageModel, teacher: LanguageModel | None, test_set: TestSet, ranks: Ranks) -> Columns:
    """Return the sums of each example's reference over its tokens. The ranks share the examples.

    Nothing depends on the ranks, except for rounding.

    Args:
        model: The evaluated model, in eval mode.
        teacher: The model to compare with, or None. Its vocabulary is that of `model` (`check_pair`).
        test_set: The set, with its responses.
        ranks: The ranks.
    """
    rows = [row for _, row in share(test_set.prompts, 1, ranks)]
    prompts, responses = ([tokens[row] for row in rows] for tokens in (test_set.prompts, test_set.responses))
    budget = TOKEN_BUDGET[ranks.device.type]
    sums = []
    for batch in make_micro_batches(prompts, responses, [1.0] * len(rows), budget, ranks.device):
        lengths = [len(responses[i]) for i in batch.members]
        parts = _token_columns(model, teacher, batch).split(lengths)
        sums += [[rows[i], part.sum(0).tolist()] for i, part in zip(batch.members, parts)]
    table = np.array([row for _, row in sorted(ranks.all_gather_objects(sums))])
    tokens = table[:, 0]
    columns = {"perplexity": table[:, [1, 0]], "ece": table[:, 2 : 2 + 3 * BINS]}
    for place, name in enumerate(["forward_kl", "reverse_kl"] if teacher else [], start=2 + 3 * BINS):
        columns[name] = np.stack([table[:, place], tokens], axis=1)
    return columns


def _token_columns(model: LanguageModel, teacher: LanguageModel | None, batch: MicroBatch) -> Tensor:
    """Return what is summed of each response token: 1, its loss, the calibration's bins, and both KL divergences."""
    hidden, head = model.hidden_states(batch), model.lm_head()
    complete = FrozenLogits(hidden, head._replace(shared=None))
    step = positions_at_a_time(head)
    scores = [_scores(complete, batch.targets, slice(i, i + step)) for i in range(0, len(hidden), step)]
    loss, confidence, hit = torch.cat(scores).double().unbind(-1)
    if not torch.isfinite(loss).all():
        raise RunError("the loss on the references is not finite: leave perplexity, ece and kl out of --metrics")
    bins = F.one_hot((confidence * BINS).long().clamp(max=BINS - 1), BINS)
    one = torch.ones_like(loss)
    columns = [one[:, None], loss[:, None], *(bins * each[:, None] for each in (one, confidence, hit))]
    if teacher is not None:
        q, p = FrozenLogits(hidden, head), FrozenLogits(teacher.hidden_states(batch), teacher.lm_head())
        columns += [kl_divergences(*pair).double()[:, None] for pair in ((p, q), (q, p))]
    return torch.cat(columns, dim=-1)


def _scores(logits: FrozenLogits, targets: Tensor, rows: slice) -> Tensor:
    """Return loss, confidence, and whether the likeliest token is the target, float32 `(rows, 3)`."""
    log_q = logits.logits(rows).float().log_softmax(-1)
    largest, likeliest = log_q.max(-1)
    loss = -log_q.gather(1, targets[rows, None]).squeeze(1)
    return torch.stack([loss, largest.exp(), (likeliest == targets[rows]).float()], dim=-1)


def reliability(columns: Columns) -> dict[str, list[Any]]:
    """Return the tokens of each bin, their mean confidence and the share that was right (None for an empty bin)."""
    tokens, *sums = np.split(columns["ece"].sum(0), 3)
    confidence, accuracy = ([s / n if n else None for s, n in zip(each, tokens)] for each in sums)
    return {"tokens": [int(n) for n in tokens], "confidence": confidence, "accuracy": accuracy}


def draw_reliability(bins: dict[str, list[Any]], picture: Path, title: str) -> None:
    """Draw accuracy against confidence, and below it the share of the tokens in each bin."""
    edges = np.arange(BINS) / BINS
    accuracy = [np.nan if each is None else each for each in bins["accuracy"]]
    confidence = [np.nan if each is None else each for each in bins["confidence"]]
    style = {"width": 1 / BINS, "align": "edge", "edgecolor": "white"}
    with new_figure((4.2, 5), rows=2) as (figure, axes):
        (top,), (bottom,) = axes
        top.bar(edges, accuracy, color=COLORS[0], label="accuracy of the likeliest token", **style)
        top.plot(confidence, confidence, "o", color=COLORS[1], label="mean confidence")
        top.plot([0, 1], [0, 1], color=GRAY, lw=0.8)
        top.set(xlim=(0, 1), ylim=(0, 1), title=shown(title))
        top.legend(loc="upper left")
        bottom.bar(edges, np.array(bins["tokens"]) / max(sum(bins["tokens"]), 1), color=COLORS[0], **style)
        bottom.set(xlim=(0, 1), xlabel="confidence", ylabel="share of tokens")
        figure.savefig(picture)
