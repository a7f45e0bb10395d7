"""Losses: identities, and chunks with the gradient by hand against autograd."""

import pytest
import torch

from promptkd import losses
from promptkd.losses import CrossEntropy, ForwardKL, FrozenLogits, ReverseKL, fused_loss, reference_loss
from promptkd.models.wrapper import LMHead


def head(vocabulary: int, width: int, bias: bool = False) -> LMHead:
    return LMHead(0.3 * torch.randn(vocabulary, width), torch.randn(vocabulary) if bias else None)


def make(kinds: str, tokens: int = 50, vocabulary: int = 37, bias: bool = False):
    torch.manual_seed(0)
    hidden = torch.randn(tokens, 8, requires_grad=True)
    trained = head(vocabulary, 8, bias)
    parameters = [t.requires_grad_() for t in trained[:2] if t is not None]
    terms = []
    for i, kind in enumerate(kinds):
        fixed = FrozenLogits(torch.randn(tokens, 5), head(vocabulary, 5))
        coefficient = 1.0 + i
        terms.append(
            {
                "r": lambda f=fixed, c=coefficient: ReverseKL(f, c),
                "f": lambda f=fixed, c=coefficient: ForwardKL(f, c),
                "h": lambda c=coefficient: CrossEntropy(torch.randint(vocabulary, (tokens,)), c),
            }[kind]()
        )
    return hidden, trained, parameters, terms, torch.rand(tokens) / tokens


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kinds", ["r", "f", "h", "rr", "rf", "fr", "ff", "hf", "hrf"])
def test_chunked_equals_plain(kinds, bias, monkeypatch):
    monkeypatch.setitem(losses.CHUNK, "cpu", 7 * 37)  # 50 tokens: several chunks and a shorter last one
    hidden, trained, parameters, terms, weights = make(kinds, bias=bias)
    results = []
    for function in (fused_loss, reference_loss):
        loss, parts = function(hidden, trained, terms, weights)
        gradients = torch.autograd.grad(3.0 * loss, [hidden, *parameters])
        results.append((loss, parts, *gradients))
    for chunked, plain in zip(*results):
        torch.testing.assert_close(chunked, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kinds, bias", [("r", False), ("hf", True)])
def test_fused_loss_with_a_padded_head_equals_the_plain_one(kinds, bias, monkeypatch):
    """As on a GPU in half precision, where products with an odd vocabulary are slow."""
    monkeypatch.setitem(losses.CHUNK, "cpu", 7 * 37)
    results = []
    for padding in (0, 3):
        monkeypatch.setattr(LMHead, "aligned", lambda head, padding=padding: head.padded(padding))
        hidden, trained, parameters, terms, weights = make(kinds, bias=bias)
        terms = [term.with_head(lambda source: source) for term in terms]
        loss, parts = fused_loss(hidden, trained, terms, weights)
        results.append((loss, parts, *torch.autograd.grad(3.0 * loss, [hidden, *parameters])))
    for padded, plain in zip(*results):
        torch.testing.assert_close(padded, plain, rtol=1e-5, atol=1e-6)


def test_equal_distributions_have_no_divergence_and_no_gradient():
    hidden, trained, parameters, _, weights = make("")
    terms = [ReverseKL(FrozenLogits(hidden.detach(), LMHead(trained.weight.detach(), None)))]
    loss, _ = fused_loss(hidden, trained, terms, weights)
    assert abs(loss.item()) < 1e-5
    for gradient in torch.autograd.grad(loss, [hidden, *parameters]):
        assert gradient.abs().max() < 1e-5


def test_reverse_kl_is_not_negative_and_forward_is_its_own_entropy_at_least():
    hidden, trained, _, terms, _ = make("rf")
    logits = hidden @ trained.weight.T
    assert (terms[0].plain(logits) >= 0).all()
    t = terms[1].target.logits(slice(None)).softmax(-1)
    assert (terms[1].plain(logits) >= -(t * t.log()).sum(-1)).all()


def test_hard_is_torchs_cross_entropy():
    hidden, trained, _, terms, weights = make("h")
    loss, _ = fused_loss(hidden, trained, terms, torch.full_like(weights, 1 / len(weights)))
    expected = torch.nn.functional.cross_entropy(hidden @ trained.weight.T, terms[0].tokens)
    torch.testing.assert_close(loss, expected)


def test_no_tokens_give_zero_and_zero_gradients():
    hidden, trained, parameters, _, _ = make("")
    empty = hidden[:0]
    term = CrossEntropy(torch.empty(0, dtype=torch.long))
    loss, parts = fused_loss(empty, trained, [term], torch.empty(0))
    assert float(loss) == 0 and parts.tolist() == [0]
    assert torch.autograd.grad(loss, parameters)[0].abs().max() == 0


def test_bfloat16_is_near_float32():
    hidden, trained, _, terms, weights = make("r", tokens=300)
    low = hidden.detach().bfloat16().requires_grad_()
    low_terms = [
        ReverseKL(FrozenLogits(t.target.hidden.bfloat16(), LMHead(t.target.head.weight.bfloat16(), None)))
        for t in terms
    ]
    weight = trained.weight.detach().bfloat16().requires_grad_()
    loss, _ = fused_loss(low, LMHead(weight, None), low_terms, weights)
    reference, _ = reference_loss(hidden, trained, terms, weights)
    assert abs(float(loss - reference)) / float(reference) < 0.02
    ours = torch.autograd.grad(loss, [low, weight])
    theirs = torch.autograd.grad(reference, [hidden, trained.weight])
    for a, b in zip(ours, theirs):
        assert (a.float() - b).norm() / b.norm() < 0.03
