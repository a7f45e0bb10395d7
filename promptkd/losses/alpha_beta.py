"""The alpha-beta divergence and its gradient, without cancellation where a parameter is near a limit."""

from __future__ import annotations

import torch
from torch import Tensor

from promptkd.losses.rows import ROWS, LossAndGradient

# Below this size of its parameters, alpha_beta loses too many digits in float32 and computes in float64.
SMALL_PARAMETER = 0.1
# Below this size, the parameters of alpha_beta count as 0. The difference is smaller than the rounding error.
ZERO_PARAMETER = 1e-7


def alpha_beta(log_p: Tensor, log_q: Tensor, q: Tensor, *, alpha: float, beta: float) -> LossAndGradient:
    """Return the alpha-beta divergence of ABKD (Cichocki et al., 2011), with a = alpha, b = beta.

    -1/(a b) sum [p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)], and its limits where a, b or a + b is 0.
    """
    size = max(abs(alpha), abs(beta))
    if size < ZERO_PARAMETER:
        alpha = beta = 0.0
    dtype = torch.float64 if ZERO_PARAMETER <= size < SMALL_PARAMETER else log_p.dtype
    losses = [q.new_empty(0)]
    for start in range(0, len(q), ROWS):
        rows = slice(start, start + ROWS)
        terms, slope = _alpha_beta_terms(log_p[rows].to(dtype), log_q[rows].to(dtype), alpha, beta)
        losses.append(terms.sum(-1).to(q.dtype))
        log_p[rows] = torch.addcmul(slope, q[rows], slope.sum(-1, keepdim=True), value=-1)
    return torch.cat(losses), log_p


def _alpha_beta_terms(log_p: Tensor, log_q: Tensor, a: float, b: float) -> LossAndGradient:
    """Return each id's term of the alpha-beta divergence and its derivative by log q.

    With m = max(log p, log q), r = -abs(log p - log q) and phi_c(r) = (exp(c r) - 1) / c, which tends to r as c does
    to 0, everything is a product of exp((a + b) m) and functions of r. For p <= q:

        term = exp((a+b) m) (exp(a r) phi_b(r) - phi_a(r)) / (a + b) = exp((a+b) m) (phi_(a+b)(r) - phi_a(r)) / b
        derivative = -exp((a+b) m) phi_a(r)

    For p > q, a and b trade places in the term, and the derivative is exp((a+b) m) exp(b r) phi_a(r). These forms have
    no division by a parameter that is near 0 unless all are, and exponents of 0 or less for positive parameters.
    """
    largest = torch.maximum(log_p, log_q)
    below = log_p <= log_q
    r = -(log_p - log_q).abs()
    phi_a, phi_b = _phi(a, r), _phi(b, r)
    exp_b_phi_a = _exp_phi(b, a, r)
    scale = _exp(a + b, largest)
    slope = torch.where(below, -phi_a, exp_b_phi_a) * scale
    if a == b == 0:
        terms = r.square() / 2
    elif abs(a + b) >= max(abs(a), abs(b)) / 2:
        terms = torch.where(below, _exp_phi(a, b, r) - phi_a, exp_b_phi_a - phi_b) * (scale / (a + b))
    else:
        phi_sum = _phi(a + b, r)
        terms = torch.where(below, (phi_sum - phi_a) / b, (phi_sum - phi_b) / a) * scale
    # Only one distribution has the id: terms with finite limits are exact, others may be a difference of infinities.
    terms.masked_fill_((r == -torch.inf) & terms.isnan(), torch.inf)
    absent = largest == -torch.inf  # neither distribution has the id
    return terms.masked_fill_(absent, 0.0), slope.masked_fill_(absent, 0.0)


def _exp(c: float, r: Tensor) -> Tensor:
    """Return exp(c r), which is 1 for c = 0 even where r is infinite."""
    return torch.ones_like(r) if c == 0 else (c * r).exp_()


def _phi(c: float, r: Tensor) -> Tensor:
    return r if c == 0 else (c * r).expm1_().div_(c)


def _exp_phi(c: float, h: float, r: Tensor) -> Tensor:
    """Return exp(c r) phi_h(r) without a product of 0 and infinity."""
    if h < 0:
        c, h = c + h, -h  # the same value: phi_h(r) = exp(h r) phi_-h(r)
    if h == 0 and c != 0:
        r = r.clamp(min=torch.finfo(r.dtype).min)
    return _exp(c, r) * _phi(h, r)
