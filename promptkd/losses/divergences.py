"""Divergences between a teacher's and a student's next-token distributions, with their gradients in closed form.

With p the teacher's probabilities, z the student's logits and q = softmax(z), for each token:

| name                     | loss                                    | gradient with respect to z                     |
|--------------------------|-----------------------------------------|------------------------------------------------|
| forward_kl               | -sum p log q                            | q - p                                          |
| reverse_kl               | KL(q, p)                                | q (log q/p - KL(q, p))                         |
| jsd                      | beta KL(p, m) + (1 - beta) KL(q, m)     | (1 - beta) q (log q/m - KL(q, m))              |
| skew_forward_kl          | -sum p log m, m = a p + (1 - a) q       | -(1 - a) q (p/m - sum q p/m)                   |
| skew_reverse_kl          | KL(q, m), m = (1 - a) p + a q           | q (g - sum q g), g = log q/m - a q/m           |
| skew_reverse_kl_detached | the same, m detached                    | q (log q/m - KL(q, m))                         |
| alpha_beta               | see `alpha_beta`                        | u - q sum u, u = (q^(a+b) - p^a q^b) / a       |
| total_variation          | 1/2 sum abs(p - q)                      | q (s - sum q s) / 2, s = sign(q - p)           |
| adaptive_kl              | w_head KL(p, q) + w_tail KL(q, p)       | w_head (q - p) + w_tail q (log q/p - KL(q, p)) |

For jsd, m = beta p + (1 - beta) q. Each function takes log p, log q and q, all `(tokens, vocab)`, and returns the
losses `(tokens,)` and the gradient `(tokens, vocab)`. It overwrites log p, so that the gradient needs no memory of its
own, and leaves log q and q as they are. An id whose probability is 0 contributes the limit of its term. A loss
is infinite only where that limit is infinite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from promptkd.errors import UserError
from promptkd.losses.alpha_beta import alpha_beta
from promptkd.losses.rows import ROWS, LossAndGradient, log_ratio, row_dot
from promptkd.utils.running_sums import running_sums


def _log_mixture(log_a: Tensor, log_b: Tensor, weight: float) -> Tensor:
    """Return log(weight a + (1 - weight) b) for a weight between 0 and 1."""
    mixture = log_a + math.log(weight)
    return torch.logaddexp(mixture, log_b + math.log1p(-weight), out=mixture)


def _center(q: Tensor, slope: Tensor) -> Tensor:
    """Return the gradient with respect to logits of a loss with the derivative `slope` by q. Overwrites `slope`."""
    return slope.sub_(row_dot(q, slope)[:, None]).mul_(q)


def forward_kl(log_p: Tensor, log_q: Tensor, q: Tensor) -> LossAndGradient:
    """Return the soft cross-entropy: KL(p, q) without the teacher's entropy, as DistiLLM and MiniLLM compute it."""
    p = log_p.exp_()
    loss = -row_dot(p, log_q.masked_fill(p == 0, 0.0))
    return loss, torch.sub(q, p, out=p)


def reverse_kl(log_p: Tensor, log_q: Tensor, q: Tensor) -> LossAndGradient:
    """Return KL(q, p)."""
    difference = log_ratio(log_q, log_p, q, out=log_p)
    loss = row_dot(q, difference)
    return loss, difference.sub_(loss[:, None]).mul_(q)


def _kl_of_teacher(log_p: Tensor, log_q: Tensor, q: Tensor) -> LossAndGradient:
    """Return KL(p, q), the teacher's entropy included."""
    p = log_p.exp()
    loss = row_dot(p, log_ratio(log_p, log_q, p, out=log_p))
    return loss, torch.sub(q, p, out=p)


def jsd(log_p: Tensor, log_q: Tensor, q: Tensor, *, beta: float) -> LossAndGradient:
    """Return the generalized Jensen-Shannon divergence. beta weights the teacher, as in TRL.

    Its own limits at beta 0 and 1 are 0. As in TRL, these values mean KL(p, q) and KL(q, p) instead.
    """
    if beta == 0:
        return _kl_of_teacher(log_p, log_q, q)
    if beta == 1:
        return reverse_kl(log_p, log_q, q)
    log_m = _log_mixture(log_p, log_q, beta)
    p = log_p.exp()
    of_p = row_dot(p, log_ratio(log_p, log_m, p, out=log_p))
    difference = log_ratio(log_q, log_m, q, out=log_p)
    of_q = row_dot(q, difference)
    return beta * of_p + (1 - beta) * of_q, difference.sub_(of_q[:, None]).mul_(q).mul_(1 - beta)


def skew_forward_kl(log_p: Tensor, log_q: Tensor, q: Tensor, *, skew: float) -> LossAndGradient:
    """Return -sum p log m with m = skew p + (1 - skew) q: KL(p, m) without the teacher's entropy (DistiLLM)."""
    if skew == 0:
        return forward_kl(log_p, log_q, q)
    p = log_p.exp()
    if skew == 1:
        return -row_dot(p, log_p.masked_fill_(p == 0, 0.0)), torch.zeros_like(q)
    log_m = _log_mixture(log_p, log_q, skew)
    absent = p == 0
    ratio = log_p.sub_(log_m).exp_().masked_fill_(absent, 0.0)
    loss = -row_dot(p, log_m.masked_fill_(absent, 0.0))
    return loss, _center(q, ratio).mul_(skew - 1)


def skew_reverse_kl(log_p: Tensor, log_q: Tensor, q: Tensor, *, skew: float) -> LossAndGradient:
    """Return KL(q, m) with m = (1 - skew) p + skew q (DistiLLM)."""
    return _skew_reverse_kl(log_p, log_q, q, skew, detached=False)


def skew_reverse_kl_detached(log_p: Tensor, log_q: Tensor, q: Tensor, *, skew: float) -> LossAndGradient:
    """Return KL(q, m) as `skew_reverse_kl` does, but with the gradient for a constant m (DistiLLM-2)."""
    return _skew_reverse_kl(log_p, log_q, q, skew, detached=True)


def _skew_reverse_kl(log_p: Tensor, log_q: Tensor, q: Tensor, skew: float, detached: bool) -> LossAndGradient:
    if skew == 0:
        return reverse_kl(log_p, log_q, q)
    if skew == 1:
        return torch.zeros_like(q[:, 0]), torch.zeros_like(q)
    difference = log_ratio(log_q, _log_mixture(log_q, log_p, skew), q, out=log_p)
    loss = row_dot(q, difference)
    if detached:
        return loss, difference.sub_(loss[:, None]).mul_(q)
    return loss, _center(q, difference.sub_(difference.exp(), alpha=skew))


def total_variation(log_p: Tensor, log_q: Tensor, q: Tensor) -> LossAndGradient:
    """Return half the sum of absolute differences."""
    difference = torch.sub(q, log_p.exp_(), out=log_p)
    loss = torch.linalg.vector_norm(difference, ord=1, dim=-1) / 2
    sign = difference.sign_()
    mean = row_dot(q, sign) + 0 * loss  # not a number where the loss is not: the sign of that is 0
    return loss, sign.sub_(mean[:, None]).mul_(q).div_(2)


def adaptive_kl(log_p: Tensor, log_q: Tensor, q: Tensor, *, mu: float) -> LossAndGradient:
    """Return the adaptive KL of Wu et al. (2025): both directions, weighted by where the distributions differ.

    The head is the teacher's likeliest ids up to a cumulative probability of mu, the first id always. The weights are
    the head's and the tail's shares of sum abs(p - q), without gradient.
    """
    if mu == 1:  # rounding could leave ids behind a cumulative probability of 1
        return _kl_of_teacher(log_p, log_q, q)
    head = _head_share(log_p, q, mu)
    p = log_p.exp()
    difference = torch.sub(log_q, log_p, out=log_p)
    forward = -row_dot(p, difference.masked_fill(p == 0, 0.0))
    reverse = row_dot(q, difference.masked_fill_(q == 0, 0.0))
    gradient = difference.sub_(reverse[:, None]).mul_(q).mul_(1 - head[:, None])
    gradient.sub_(p.sub_(q).mul_(head[:, None]))
    return head * forward + (1 - head) * reverse, gradient


def _head_share(log_p: Tensor, q: Tensor, mu: float) -> Tensor:
    """Return the head's share of sum abs(p - q), `(tokens,)`, and 1/2 where the distributions are equal."""
    shares = [q.new_empty(0)]
    for start in range(0, len(q), ROWS):
        rows = slice(start, start + ROWS)
        ranked, order = log_p[rows].exp().sort(dim=-1, descending=True, stable=True)
        gaps = (ranked - q[rows].gather(-1, order)).abs_()
        head = running_sums(ranked) <= mu
        head[:, 0] = True
        total = gaps.sum(-1)
        share = gaps.masked_fill_(~head, 0.0).sum(-1) / total
        shares.append(share.masked_fill_(total == 0, 0.5))
    return torch.cat(shares)


@dataclass(frozen=True)
class Parameter:
    """A parameter's default and its legal range, both ends included."""

    default: float
    low: float = -math.inf
    high: float = math.inf


@dataclass(frozen=True)
class Definition:
    """A divergence: its function, and its parameters by name."""

    compute: Callable[..., LossAndGradient]
    parameters: Mapping[str, Parameter] = field(default_factory=dict)


DIVERGENCES: dict[str, Definition] = {
    "forward_kl": Definition(forward_kl),
    "reverse_kl": Definition(reverse_kl),
    "jsd": Definition(jsd, {"beta": Parameter(0.5, 0.0, 1.0)}),
    "skew_forward_kl": Definition(skew_forward_kl, {"skew": Parameter(0.1, 0.0, 1.0)}),
    "skew_reverse_kl": Definition(skew_reverse_kl, {"skew": Parameter(0.1, 0.0, 1.0)}),
    "skew_reverse_kl_detached": Definition(skew_reverse_kl_detached, {"skew": Parameter(0.1, 0.0, 1.0)}),
    "alpha_beta": Definition(alpha_beta, {"alpha": Parameter(0.2), "beta": Parameter(0.7)}),
    "total_variation": Definition(total_variation),
    "adaptive_kl": Definition(adaptive_kl, {"mu": Parameter(0.5, 0.0, 1.0)}),
}


def resolve_parameters(name: str, parameters: Mapping[str, float], temperature: float = 1.0) -> dict[str, float]:
    """Return all parameters of a divergence, defaults included.

    Raises:
        UserError: The divergence or a parameter is unknown, or a value is out of its range.
    """
    if name not in DIVERGENCES:
        raise UserError(f"unknown divergence {name!r}: choose one of {', '.join(DIVERGENCES)}")
    legal = DIVERGENCES[name].parameters
    for key, value in parameters.items():
        if key not in legal:
            takes = f"its parameters are {', '.join(legal)}" if legal else "it takes none"
            raise UserError(f"divergence {name} has no parameter {key!r}: {takes}")
        low, high = legal[key].low, legal[key].high
        if not (_is_finite(value) and low <= value <= high):
            bounds = "a finite number" if math.isinf(low) else f"a number from {low:g} to {high:g}"
            raise UserError(f"{key} {value!r} of divergence {name} is out of range: give {bounds}")
    if not (_is_finite(temperature) and temperature > 0):
        raise UserError(f"temperature {temperature!r} of divergence {name} is out of range: give a number above 0")
    return {key: float(parameters.get(key, parameter.default)) for key, parameter in legal.items()}


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def loss_and_gradient(
    name: str, parameters: Mapping[str, float], temperature: float, teacher_logits: Tensor, log_q: Tensor, q: Tensor
) -> LossAndGradient:
    """Compute a divergence and its gradient with respect to the student's logits, both float32.

    Args:
        name: A key of `DIVERGENCES`.
        parameters: All of its parameters, as `resolve_parameters` returns them.
        temperature: Divides the logits of both models. The loss is not multiplied by its square.
        teacher_logits: Logits in any precision, `(tokens, vocab)`.
        log_q: The student's log-probabilities at temperature 1, float32 `(tokens, vocab)`.
        q: Their exponentials.
    """
    if temperature != 1:
        log_q = (log_q / temperature).log_softmax(-1)
        q = log_q.exp()
        teacher_logits = teacher_logits.float() / temperature
    log_p = teacher_logits.log_softmax(-1, dtype=torch.float32)
    loss, gradient = DIVERGENCES[name].compute(log_p, log_q, q, **parameters)
    return loss, gradient if temperature == 1 else gradient.div_(temperature)


def divergence(
    name: str, student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, **parameters: float
) -> Tensor:
    """Compute a divergence for each token. It is differentiable once, with respect to the student's logits.

    Args:
        name: A key of `DIVERGENCES`.
        student_logits: Logits of the trained model, `(tokens, vocab)`.
        teacher_logits: Logits of the model to compare with, `(tokens, vocab)`. They get no gradient.
        temperature: Divides both logits. The loss is not multiplied by its square.
        **parameters: `beta` for jsd, `skew` for the skewed divergences, `alpha` and `beta` for alpha_beta, `mu` for
            adaptive_kl.

    Returns:
        The divergence of each token, float32 `(tokens,)`.

    Raises:
        UserError: The divergence or a parameter is unknown, a value is out of its range, or the shapes differ.
    """
    resolved = resolve_parameters(name, parameters, temperature)
    if student_logits.dim() != 2 or student_logits.shape != teacher_logits.shape:
        shapes = f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        raise UserError(f"logits of shapes {shapes} cannot be compared: give (tokens, vocab) for both")
    losses: Tensor = _Divergence.apply(  # type: ignore[no-untyped-call]
        student_logits, teacher_logits, name, resolved, temperature
    )
    return losses


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_logits: Tensor,
        teacher_logits: Tensor,
        name: str,
        parameters: dict[str, float],
        temperature: float,
    ) -> Tensor:
        log_q = student_logits.log_softmax(-1, dtype=torch.float32)
        loss, gradient = loss_and_gradient(name, parameters, temperature, teacher_logits, log_q, log_q.exp())
        ctx.save_for_backward(gradient)
        ctx.dtype = student_logits.dtype
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_losses[:, None]).to(ctx.dtype), None, None, None, None
