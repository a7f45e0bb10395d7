"""Plain formulas of the divergences, for tests, and the parameters that they are tested with."""

from __future__ import annotations

import torch
from torch import Tensor

from promptkd.losses import DIVERGENCES, divergence

CASES = [
    ("forward_kl", {}),
    ("reverse_kl", {}),
    *[("jsd", {"beta": beta}) for beta in (0, 1e-3, 0.1, 0.5, 1 - 1e-3, 1)],
    *[("skew_forward_kl", {"skew": skew}) for skew in (0, 1e-3, 0.1, 1 - 1e-3, 1)],
    *[("skew_reverse_kl", {"skew": skew}) for skew in (0, 1e-3, 0.1, 1 - 1e-3, 1)],
    *[("skew_reverse_kl_detached", {"skew": skew}) for skew in (0, 1e-3, 0.1, 1 - 1e-3, 1)],
    *[
        ("alpha_beta", {"alpha": alpha, "beta": beta})
        for alpha, beta in (
            *[(0.2, 0.7), (0.5, 0.5), (1, 1), (-0.3, 0.8), (1.3, -0.3), (-0.4, -0.2)],
            *[(0, 0.7), (0, 1), (0, -0.5), (0.7, 0), (1, 0), (-0.5, 0), (0.5, -0.5), (-0.5, 0.5), (0, 0)],
        )
    ],
    ("total_variation", {}),
    *[("adaptive_kl", {"mu": mu}) for mu in (0, 0.5, 0.9, 1)],
]
# Parameters near the limits, where the plain formula loses digits even in float64.
NEAR = [(1e-3, 0.7), (0.7, 1e-3), (1e-3, 1e-3), (0.05, 0.02), (0.5, -0.499), (1e-3, -2e-3), (0.0, 1e-3)]


def identifier(value: object) -> str | None:
    return "-".join(f"{key}{number:g}" for key, number in value.items()) if isinstance(value, dict) else None


def entropies(a: Tensor, b: Tensor) -> Tensor:
    """sum a log(a / b), for a > 0."""
    return (a * (a.log() - b.log())).sum(-1)


def plain_alpha_beta(p: Tensor, q: Tensor, a: float, b: float) -> Tensor:
    d, s = q.log() - p.log(), a + b
    if a == b == 0:
        return d.square().sum(-1) / 2
    if a == 0:
        return (q**b * b * d - q**b + p**b).sum(-1) / b**2
    if b == 0:
        return (-(p**a) * a * d - p**a + q**a).sum(-1) / a**2
    if s == 0:
        return (a * d + (-a * d).exp() - 1).sum(-1) / a**2
    return -(p**a * q**b - a / s * p**s - b / s * q**s).sum(-1) / (a * b)


def plain_adaptive_kl(p: Tensor, q: Tensor, mu: float) -> Tensor:
    """The definition, token by token and id by id."""
    total = []
    for token_p, token_q in zip(p, q):
        gaps = {True: 0.0, False: 0.0}
        cumulative, ids = 0.0, sorted(range(len(token_p)), key=lambda i: -float(token_p[i]))
        for rank, i in enumerate(ids):
            cumulative += float(token_p[i])
            gaps[rank == 0 or mu == 1 or cumulative <= mu] += abs(float(token_p[i] - token_q[i]))
        head = gaps[True] / sum(gaps.values())
        total.append(head * entropies(token_p, token_q) + (1 - head) * entropies(token_q, token_p))
    return torch.stack(total)


def plain(name: str, z: Tensor, t: Tensor, temperature: float = 1.0, **parameters: float) -> Tensor:
    """The table's definitions with autograd, and none of the project's code."""
    p, q = (t.double() / temperature).softmax(-1), (z.double() / temperature).softmax(-1)
    x = next(iter(parameters.values()), 0.0)
    if name == "forward_kl" or (name == "skew_forward_kl" and x == 0):
        return -(p * q.log()).sum(-1)
    if name == "reverse_kl" or (name.startswith("skew_reverse_kl") and x == 0):
        return entropies(q, p)
    if name == "jsd":
        m = x * p + (1 - x) * q
        return {0: entropies(p, q), 1: entropies(q, p)}.get(x, x * entropies(p, m) + (1 - x) * entropies(q, m))
    if name == "skew_forward_kl":
        return -(p * (x * p + (1 - x) * q).log()).sum(-1)
    if name == "skew_reverse_kl":
        return entropies(q, (1 - x) * p + x * q)
    if name == "skew_reverse_kl_detached":
        return entropies(q, ((1 - x) * p + x * q).detach())
    if name == "alpha_beta":
        return plain_alpha_beta(p, q, parameters["alpha"], parameters["beta"])
    if name == "total_variation":
        return (p - q).abs().sum(-1) / 2
    return plain_adaptive_kl(p, q, parameters["mu"])


def plain_with_gradient(name: str, z: Tensor, t: Tensor, *arguments: float, **parameters: float):
    z = z.detach().double().requires_grad_()
    loss = plain(name, z, t, *arguments, **parameters)
    return loss.detach(), torch.autograd.grad(loss.sum(), z)[0]


def computed(name: str, z: Tensor, t: Tensor, *arguments: float, **parameters: float):
    z = z.detach().requires_grad_()
    loss = divergence(name, z, t, *arguments, **parameters)
    return loss.detach(), torch.autograd.grad(loss.sum(), z)[0]


def closed_form(name: str, z: Tensor, t: Tensor, **parameters: float):
    """The closed form in the logits' precision."""
    log_q = z.log_softmax(-1)
    return DIVERGENCES[name].compute(t.log_softmax(-1), log_q, log_q.exp(), **parameters)


def random_logits(tokens: int = 6, vocabulary: int = 50, deviation: float = 2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return (deviation * torch.randn(2, tokens, vocabulary, generator=generator, dtype=dtype)).unbind()


def assert_near(actual, expected, limit: float) -> None:
    """Losses and gradients differ by at most `limit`, relative to the largest entry where that is above 1."""
    for value, reference in zip(actual, expected):
        largest = max(1.0, float(reference.abs().max()))
        assert float((value.double() - reference.double()).abs().max()) <= limit * largest
