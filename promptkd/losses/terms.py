"""The losses of a micro-batch: data that say what is compared, with their values and gradients in closed form.

The loss of a micro-batch is a weighted sum of terms. Each compares the trained distribution q with something fixed:
another model's distribution t, or a token. With z the logits of q, the gradients that `fused_loss` uses are

    reverse   KL(q || t)     d/dz = q (log q - log t - KL)
    forward   -sum t log q   d/dz = q - t        (the cross-entropy form of KL(t || q), as published)
    hard      -log q[token]  d/dz = q - onehot(token)
    policy    max(-A r, -A clip(r)) with r = w q[token] / q_old[token]
                             d/dz = A r (q - onehot(token)) where the clipped side is not the larger, else 0
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from promptkd.models.wrapper import LMHead


class HeadSource(Protocol):
    """A model that lends its output head, gathered from all ranks where ZeRO-3 has partitioned it."""

    def lm_head(self) -> AbstractContextManager[LMHead]: ...


class FrozenLogits(NamedTuple):
    """The distribution of a model that a loss does not train.

    Attributes:
        hidden: Hidden states that predict the response tokens, `(tokens, hidden)`.
        head: The output head, or the model that lends it while the loss is computed.
    """

    hidden: Tensor
    head: LMHead | HeadSource

    def with_head(self, open_head: Callable[[HeadSource], LMHead]) -> FrozenLogits:
        """Return the same distribution with its head at hand."""
        return self if isinstance(self.head, LMHead) else self._replace(head=open_head(self.head))

    def logits(self, rows: slice) -> Tensor:
        """Compute the logits of the token ids that are compared, `(rows, vocab)`."""
        assert isinstance(self.head, LMHead)
        return self.head.restrict(F.linear(self.hidden[rows], self.head.weight, self.head.bias))


class _Divergence:
    """A loss with a target distribution."""

    target: FrozenLogits

    def with_head(self, open_head: Callable[[HeadSource], LMHead]):
        """Return the same loss with its target's head at hand."""
        return replace(self, target=self.target.with_head(open_head))


class _TokenLoss:
    """A loss of the trained model's own tokens."""

    def with_head(self, open_head: Callable[[HeadSource], LMHead]):
        """Return the loss itself: it has no target distribution."""
        return self


@dataclass(frozen=True)
class ReverseKL(_Divergence):
    """coefficient * KL(trained || target)."""

    target: FrozenLogits
    coefficient: float = 1.0

    def plain(self, logits: Tensor) -> Tensor:
        log_q = logits.float().log_softmax(-1)
        log_t = self.target.logits(slice(None)).float().log_softmax(-1)
        return (log_q.exp() * (log_q - log_t)).sum(-1)

    def reference(self, rows: slice) -> Tensor:
        return self.target.logits(rows)

    def block(self, target_logits: Tensor, log_q: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        difference = torch.sub(log_q, target_logits.float().log_softmax(-1))
        kl = row_dot(q, difference)
        return kl, difference.sub_(kl[:, None]).mul_(q)


@dataclass(frozen=True)
class ForwardKL(_Divergence):
    """coefficient * -sum target log trained: KL(target || trained) but for the target's own entropy."""

    target: FrozenLogits
    coefficient: float = 1.0

    def plain(self, logits: Tensor) -> Tensor:
        t = self.target.logits(slice(None)).float().softmax(-1)
        return -(t * logits.float().log_softmax(-1)).sum(-1)

    def reference(self, rows: slice) -> Tensor:
        return self.target.logits(rows)

    def block(self, target_logits: Tensor, log_q: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        t = target_logits.float().softmax(-1)
        loss = -row_dot(t, log_q)
        return loss, torch.sub(q, t, out=t)


@dataclass(frozen=True)
class CrossEntropy(_TokenLoss):
    """coefficient * -log trained[token], tokens int64 [tokens], over all of the trained model's vocabulary."""

    tokens: Tensor
    coefficient: float = 1.0

    def plain(self, logits: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), self.tokens, reduction="none")

    def reference(self, rows: slice) -> Tensor:
        return self.tokens[rows, None]

    def block(self, tokens: Tensor, log_q: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        loss = -log_q.gather(1, tokens).squeeze(1)
        return loss, q.scatter_add(1, tokens, torch.full_like(loss, -1.0)[:, None])


@dataclass(frozen=True)
class ClippedPolicy(_TokenLoss):
    """coefficient * PPO's clipped loss of tokens that an earlier policy drew; all fields but the last two [tokens].

    tokens int64; advantages float32; old: float32 log-probability under the earlier policy; importance:
    float32 weight w of a token that came from yet another distribution. clip: the ratio's range is 1 +- clip.
    """

    tokens: Tensor
    advantages: Tensor
    old: Tensor
    importance: Tensor
    clip: float
    coefficient: float = 1.0

    def plain(self, logits: Tensor) -> Tensor:
        log_q = logits.float().log_softmax(-1).gather(1, self.tokens[:, None]).squeeze(1)
        ratio = (log_q - self.old).exp() * self.importance
        clipped = ratio.clamp(1 - self.clip, 1 + self.clip)
        return torch.maximum(-self.advantages * ratio, -self.advantages * clipped)

    def __getitem__(self, rows: slice) -> ClippedPolicy:
        parts = (part[rows] for part in (self.tokens, self.advantages, self.old, self.importance))
        return ClippedPolicy(*parts, self.clip)

    def reference(self, rows: slice) -> ClippedPolicy:
        return self[rows]

    def block(self, of: ClippedPolicy, log_q: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        tokens = of.tokens[:, None]
        ratio = (log_q.gather(1, tokens).squeeze(1) - of.old).exp() * of.importance
        free, clipped = -of.advantages * ratio, -of.advantages * ratio.clamp(1 - self.clip, 1 + self.clip)
        slope = torch.where(free >= clipped, -free, 0)[:, None]
        return torch.maximum(free, clipped), (q * slope).scatter_add_(1, tokens, -slope)


Term = ReverseKL | ForwardKL | CrossEntropy | ClippedPolicy


def kl_loss(kind: str, target: FrozenLogits, coefficient: float = 1.0) -> Term:
    """Return the loss that an option's value `reverse` or `forward` names."""
    return {"reverse": ReverseKL, "forward": ForwardKL}[kind](target, coefficient)


def row_dot(a: Tensor, b: Tensor) -> Tensor:
    """Dot products of rows: [rows]. One pass each on a CPU, where torch's batched form makes the product first."""
    if a.device.type == "cpu":
        return torch.stack([torch.dot(x, y) for x, y in zip(a, b)])
    return torch.linalg.vecdot(a, b)
