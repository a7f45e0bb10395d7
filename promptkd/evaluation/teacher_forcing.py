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
from promptkd.losses import FrozenLogits, kl_divergences, log_probs, positions_at_a_time
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
    sums: dict[int, dict[str, list[float]]] = {row: {} for row in rows}
    budget = TOKEN_BUDGET[ranks.device.type]
    for batch in make_micro_batches(prompts, responses, [1.0] * len(rows), budget, ranks.device):
        lengths = [len(responses[i]) for i in batch.members]
        for name, column in _token_columns(model, teacher, batch).items():
            for i, part in zip(batch.members, column.split(lengths)):
                sums[rows[i]][name] = part.sum(0).tolist()
    by_row = [of_row for _, of_row in sorted(ranks.all_gather_objects(list(sums.items())))]
    return {name: np.array([of_row[name] for of_row in by_row]) for name in by_row[0]}


def _token_columns(model: LanguageModel, teacher: LanguageModel | None, batch: MicroBatch) -> dict[str, Tensor]:
    """Return for each metric what is summed of each response token, float64 `(tokens, sums)`."""
    hidden, head = model.hidden_states(batch), model.lm_head()
    logits = FrozenLogits(hidden, head._replace(shared=None))
    loss = -log_probs(logits, batch.targets)
    if not torch.isfinite(loss).all():
        raise RunError("the loss on the references is not finite: leave perplexity, ece and kl out of --metrics")
    step = positions_at_a_time(head)
    likeliest = [logits.logits(slice(i, i + step)).float().softmax(-1).max(-1) for i in range(0, len(hidden), step)]
    confidence, token = (torch.cat(parts) for parts in zip(*likeliest))
    bins = F.one_hot((confidence * BINS).long().clamp(max=BINS - 1), BINS)
    one, right = torch.ones_like(loss), token == batch.targets
    values = {"perplexity": loss}
    if teacher is not None:
        q, p = FrozenLogits(hidden, head), FrozenLogits(teacher.hidden_states(batch), teacher.lm_head())
        values |= {"forward_kl": kl_divergences(p, q), "reverse_kl": kl_divergences(q, p)}
    columns = {name: torch.stack([each, one], dim=-1).double() for name, each in values.items()}
    return columns | {"ece": torch.cat([bins * each.double()[:, None] for each in (one, confidence, right)], dim=-1)}


def reliability(columns: Columns) -> dict[str, list[Any]]:
    """Return the tokens of each bin, their mean confidence and the share that was right (None for an empty bin)."""
    tokens, *sums = np.split(columns["ece"].sum(0), 3)
    confidence, accuracy = ([s / n if n else None for s, n in zip(each, tokens)] for each in sums)
    return {"tokens": [int(n) for n in tokens], "confidence": confidence, "accuracy": accuracy}


def draw_reliability(bins: dict[str, list[Any]], picture: Path, title: str) -> None:
    """Draw accuracy against confidence. The area of a bin's dot grows with its tokens."""
    tokens, confidence, accuracy = (np.array(bins[name], dtype=np.float64) for name in bins)
    with new_figure((4.2, 4)) as (figure, axes):
        axes[0, 0].plot([0, 1], [0, 1], color=GRAY, lw=0.8)
        axes[0, 0].scatter(confidence, accuracy, 10 + 500 * tokens / max(tokens.sum(), 1), COLORS[0])
        axes[0, 0].set(xlabel="confidence", ylabel="accuracy of the likeliest token", title=shown(title))
        figure.savefig(picture)
