"""The loss term `Divergence`: chunks, several terms in one pass, and half precision."""

from __future__ import annotations

import pytest
import torch
from helpers.divergence_formulas import CASES, assert_near, computed, identifier, plain
from helpers.half_precision import PARTS, random_head, relative_error
from torch import Tensor

from promptkd import losses
from promptkd.losses import DIVERGENCES, CrossEntropy, Divergence, FrozenLogits, fused_loss
from promptkd.models.wrapper import LMHead


def models(tokens: int = 90, vocabulary: int = 37, width: int = 8):
    torch.manual_seed(0)
    sizes = (tokens, width), (vocabulary, width), (vocabulary,)
    leaves = [(0.6 * torch.randn(*size)).requires_grad_() for size in sizes]
    target = FrozenLogits(torch.randn(tokens, 5), LMHead(0.5 * torch.randn(vocabulary, 5), torch.randn(vocabulary)))
    return leaves, target, torch.rand(tokens) / tokens


def in_double(leaves: list[Tensor], target: FrozenLogits) -> tuple[list[Tensor], Tensor, Tensor]:
    """Leaves in float64, and the logits of both models."""
    leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    teacher = target.hidden.double() @ target.head.weight.double().T + target.head.bias.double()
    return leaves, leaves[0] @ leaves[1].T + leaves[2], teacher


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name, parameters", CASES, ids=identifier)
def test_chunked_loss_equals_plain_one(name, parameters, temperature, monkeypatch):
    """Values, and gradients of hidden states, weight and bias. 90 tokens are a chunk of 70 and a shorter one."""
    monkeypatch.setitem(losses.CHUNK, "cpu", 70 * 37)
    leaves, target, weights = models()
    term = Divergence(target, name, 0.5, temperature, parameters)
    loss, sums = fused_loss(leaves[0], LMHead(*leaves[1:]), [term], weights)
    exact_leaves, z, t = in_double(leaves, target)
    expected = (plain(name, z, t, temperature, **parameters) * weights).sum()
    limit = 1e-6 if sum(parameters.values()) >= 0 else 3e-6  # negative exponents amplify the rounding of the logits
    assert_near([sums[0], loss], [expected, expected / 2], limit)
    assert_near(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected / 2, exact_leaves), limit)


def test_terms_that_share_a_pass_do_not_disturb_each_other(monkeypatch):
    """No divergence changes the student's distribution, which the next one uses."""
    monkeypatch.setitem(losses.CHUNK, "cpu", 70 * 37)
    leaves, target, weights = models()
    labels = torch.randint(37, (90,))
    terms = [Divergence(target, name, parameters=parameters) for name, parameters in CASES]
    loss, sums = fused_loss(leaves[0], LMHead(*leaves[1:]), [*terms, CrossEntropy(labels)], weights)
    exact_leaves, z, t = in_double(leaves, target)
    each = [plain(name, z, t, **parameters) for name, parameters in CASES]
    each.append(torch.nn.functional.cross_entropy(z, labels, reduction="none"))
    expected = torch.stack([(values * weights).sum() for values in each])
    torch.testing.assert_close(sums.double(), expected, rtol=1e-6, atol=1e-6)
    gradients = torch.autograd.grad(expected.sum(), exact_leaves)
    assert_near(torch.autograd.grad(loss, leaves), gradients, 1e-6)


@pytest.mark.parametrize("dtype, limit", [(torch.float16, 0.003), (torch.bfloat16, 0.006)])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_half_precision_gradient_is_that_of_the_rounded_logits(name, dtype, limit):
    """The gradient's norm has the error that rounding causes, though each entry is below what float16 can hold.

    The exact gradient is that of the logits in half precision: the sign in total_variation changes with rounding.
    """
    torch.manual_seed(0)
    hidden, head = torch.randn(64, 64).to(dtype), random_head(5000, 64, 0.8, dtype)
    target = FrozenLogits(torch.randn(64, 64).to(dtype), random_head(5000, 64, 0.8, dtype))
    weights, scale = torch.full((64,), 1 / 25600), 2.0**14
    leaves = [part.clone().requires_grad_() for part in (hidden, head.weight, head.bias)]
    loss, _ = fused_loss(leaves[0], LMHead(*leaves[1:]), [Divergence(target, name)], weights)
    z = torch.nn.functional.linear(hidden, head.weight, head.bias).float()
    gradient = computed(name, z, target.logits(slice(None)))[1] * weights[:, None]
    exact = [gradient @ head.weight.float(), gradient.T @ hidden.float(), gradient.sum(0)]
    for part, value, expected in zip(PARTS, torch.autograd.grad(loss * scale, leaves), exact):
        assert relative_error(value.float() / scale, expected) <= limit, part
