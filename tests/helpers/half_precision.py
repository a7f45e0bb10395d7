"""Gradients of the losses in half precision against float32, on random models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from promptkd.losses import (
    ClippedPolicy,
    CrossEntropy,
    Divergence,
    ForwardKL,
    FrozenLogits,
    ReverseKL,
    Term,
    fused_loss,
)
from promptkd.models.wrapper import LMHead

PARTS = ("hidden", "weight", "bias")


def random_head(vocabulary: int, width: int, deviation: float, dtype: torch.dtype) -> LMHead:
    """A head whose logits have standard deviation `deviation` on hidden states of deviation 1."""
    weight = torch.randn(vocabulary, width) * (deviation / width**0.5)
    return LMHead(weight.to(dtype), (0.1 * torch.randn(vocabulary)).to(dtype))


def random_terms(kinds: str, tokens: int, vocabulary: int, width: int, deviation: float, dtype: torch.dtype) -> list:
    """Terms by their first letters: Reverse, Forward, Hard (`h`), Policy. Later terms have smaller coefficients."""
    terms: list[Term] = []
    for i, kind in enumerate(kinds):
        coefficient = 1.0 / (1 + i)
        if kind in "rf":
            target = FrozenLogits(
                torch.randn(tokens, width).to(dtype), random_head(vocabulary, width, deviation, dtype)
            )
            terms.append({"r": ReverseKL, "f": ForwardKL}[kind](target, coefficient))
            continue
        words = torch.randint(vocabulary, (tokens,))
        if kind == "h":
            terms.append(CrossEntropy(words, coefficient))
        else:
            old = -torch.rand(tokens) - torch.tensor(float(vocabulary)).log()
            terms.append(ClippedPolicy(words, torch.randn(tokens), old, 0.5 + torch.rand(tokens), 0.2, coefficient))
    return terms


def in_float32(terms: list[Term]) -> list[Term]:
    """The same terms, computed in float32."""
    changed = []
    for term in terms:
        if isinstance(term, Divergence):
            head = term.target.head._replace(weight=term.target.head.weight.float(), bias=term.target.head.bias.float())
            term = replace(term, target=FrozenLogits(term.target.hidden.float(), head))
        changed.append(term)
    return changed


def gradients(hidden: Tensor, head: LMHead, terms: list[Term], weights: Tensor, scale: float) -> tuple[Tensor, ...]:
    """What `backward` of the scaled loss gives for hidden states, weight and bias, in their own precision."""
    leaves = [tensor.detach().requires_grad_() for tensor in (hidden, head.weight, head.bias)]
    loss, _ = fused_loss(leaves[0], LMHead(*leaves[1:]), terms, weights)
    return torch.autograd.grad(loss * scale, leaves)


def relative_error(value: Tensor, expected: Tensor) -> float:
    return float((value.float() - expected).norm() / expected.norm())


def measure(
    kinds: str,
    tokens: int,
    scales: list[float],
    rows: int | None = None,
    vocabulary: int = 5000,
    width: int = 64,
    deviation: float = 0.8,
    dtype: torch.dtype = torch.float16,
) -> Iterator[tuple[float, dict[str, tuple[float, float]]]]:
    """For each loss scale: part -> (relative error, error of the exact gradient rounded to `dtype`).

    tokens: response tokens of the step, whose mean the loss is. rows: those of this micro-batch; default: all.
    """
    torch.manual_seed(0)
    rows = min(rows or tokens, tokens)
    hidden = torch.randn(rows, width).to(dtype)
    head = random_head(vocabulary, width, deviation, dtype)
    terms = random_terms(kinds, rows, vocabulary, width, deviation, dtype)
    weights = torch.full((rows,), 1 / tokens)
    exact_head = LMHead(head.weight.float(), head.bias.float())
    exact = gradients(hidden.float(), exact_head, in_float32(terms), weights, 1.0)
    for scale in scales:
        low = gradients(hidden, head, terms, weights, scale)
        errors = {}
        for part, value, expected in zip(PARTS, low, exact):
            rounded = (expected * scale).to(dtype).float() / scale
            errors[part] = relative_error(value.float() / scale, expected), relative_error(rounded, expected)
        yield scale, errors
