"""The losses of a micro-batch: data that say what is compared, with their values and gradients in closed form.

The loss of a micro-batch is a weighted sum of terms. Each compares the trained distribution q with something fixed:
another model's distribution or a token. A `Divergence` has one of the definitions in `promptkd.losses.divergences`.
With z the logits of q, the other gradients that `fused_loss` uses are

    CrossEntropy   -log q[token]            d/dz = q - onehot(token)
    ClippedPolicy  max(-A r, -A clip(r))    with r = w q[token] / q_old[token]
                                            d/dz = A r (q - onehot(token)) where the clipped side is not the larger,
                                            else 0
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from promptkd.losses.divergences import divergence, loss_and_gradient, resolve_parameters
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
        head = self.head if isinstance(self.head, LMHead) else open_head(self.head)
        return self._replace(head=head.aligned())

    @property
    def open_head(self) -> LMHead:
        """The output head, after `with_head`."""
        assert isinstance(self.head, LMHead)
        return self.head

    def logits(self, rows: slice) -> Tensor:
        """Compute the logits of the token ids that are compared, `(rows, vocab)`."""
        head = self.open_head
        return head.restrict(head.logits(self.hidden[rows]))


# Of a block of a chunk's rows, given log q and q there `(rows, vocab)`: the losses `(rows,)` and the gradient with
# respect to the trained model's logits `(rows, vocab)`, which the caller may overwrite.
BlockLoss = Callable[[slice, Tensor, Tensor], tuple[Tensor, Tensor]]


_TokenTerm = TypeVar("_TokenTerm", bound="_TokenLoss")


class _TokenLoss:
    """A loss of the trained model's own tokens."""

    def with_head(self: _TokenTerm, open_head: Callable[[HeadSource], LMHead]) -> _TokenTerm:
        """Return the loss itself: it has no target distribution."""
        return self


@dataclass(frozen=True)
class Divergence:
    """coefficient * a divergence of the trained distribution from the target's.

    Attributes:
        target: The distribution to compare with.
        name: A key of `promptkd.losses.DIVERGENCES`.
        coefficient: Factor of this term in the sum of terms.
        temperature: Divides the logits of both models. The loss is not multiplied by its square.
        parameters: Parameters of the divergence by name. Missing ones have their defaults.
    """

    target: FrozenLogits
    name: str
    coefficient: float = 1.0
    temperature: float = 1.0
    parameters: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", resolve_parameters(self.name, self.parameters, self.temperature))

    def with_head(self, open_head: Callable[[HeadSource], LMHead]) -> Divergence:
        """Return the same loss with its target's head at hand."""
        return replace(self, target=self.target.with_head(open_head))

    def plain(self, logits: Tensor) -> Tensor:
        """Compute the loss of all tokens from the trained model's logits."""
        return divergence(self.name, logits, self.target.logits(slice(None)), self.temperature, **self.parameters)

    def of_chunk(self, rows: slice) -> BlockLoss:
        """Compute the target's logits of a chunk, and return the loss of its blocks."""
        logits = self.target.logits(rows)
        return lambda block, log_q, q: loss_and_gradient(
            self.name, self.parameters, self.temperature, logits[block], log_q, q
        )


def ReverseKL(target: FrozenLogits, coefficient: float = 1.0) -> Divergence:
    """Return coefficient * KL(trained, target)."""
    return Divergence(target, "reverse_kl", coefficient)


def ForwardKL(target: FrozenLogits, coefficient: float = 1.0) -> Divergence:
    """Return coefficient * -sum target log trained: KL(target, trained) without the target's entropy."""
    return Divergence(target, "forward_kl", coefficient)


@dataclass(frozen=True)
class CrossEntropy(_TokenLoss):
    """coefficient * -log trained[token], over all of the trained model's vocabulary. tokens is int64 `(tokens,)`."""

    tokens: Tensor
    coefficient: float = 1.0

    def plain(self, logits: Tensor) -> Tensor:
        """Compute the loss of all tokens from the trained model's logits."""
        return F.cross_entropy(logits.float(), self.tokens, reduction="none")

    def of_chunk(self, rows: slice) -> BlockLoss:
        """Return the loss of a chunk's blocks."""

        def block_loss(block: slice, log_q: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
            tokens = self.tokens[rows][block, None]
            loss = -log_q.gather(1, tokens).squeeze(1)
            return loss, q.scatter_add(1, tokens, torch.full_like(loss, -1.0)[:, None])

        return block_loss


@dataclass(frozen=True)
class ClippedPolicy(_TokenLoss):
    """coefficient * PPO's clipped loss of tokens that an earlier policy drew.

    Attributes:
        tokens: The tokens, int64 `(tokens,)`.
        advantages: Their advantages, float32 `(tokens,)`.
        old: Their log-probabilities under the earlier policy, float32 `(tokens,)`.
        importance: The weights w of tokens that came from yet another distribution, float32 `(tokens,)`.
        clip: The ratio's range is 1 +- clip.
        coefficient: Factor of this term in the sum of terms.
    """

    tokens: Tensor
    advantages: Tensor
    old: Tensor
    importance: Tensor
    clip: float
    coefficient: float = 1.0

    def plain(self, logits: Tensor) -> Tensor:
        """Compute the loss of all tokens from the trained model's logits."""
        log_q = logits.float().log_softmax(-1).gather(1, self.tokens[:, None]).squeeze(1)
        ratio = (log_q - self.old).exp() * self.importance
        clipped = ratio.clamp(1 - self.clip, 1 + self.clip)
        return torch.maximum(-self.advantages * ratio, -self.advantages * clipped)

    def of_chunk(self, rows: slice) -> BlockLoss:
        """Return the loss of a chunk's blocks."""

        def block_loss(block: slice, log_q: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
            tokens, advantages = self.tokens[rows][block, None], self.advantages[rows][block]
            ratio = (log_q.gather(1, tokens).squeeze(1) - self.old[rows][block]).exp() * self.importance[rows][block]
            free, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - self.clip, 1 + self.clip)
            slope = torch.where(free >= clipped, -free, 0)[:, None]
            return torch.maximum(free, clipped), (q * slope).scatter_add_(1, tokens, -slope)

        return block_loss


Term = Divergence | CrossEntropy | ClippedPolicy
