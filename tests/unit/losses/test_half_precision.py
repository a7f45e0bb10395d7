"""Gradients of the losses in fp16 and bf16 are those of float32, whatever the number of tokens and the loss scale."""

import pytest
import torch
from helpers.half_precision import PARTS, gradients, in_float32, measure, random_head, random_terms, relative_error

from promptkd.losses import ClippedPolicy, CrossEntropy, FrozenLogits, ReverseKL
from promptkd.models.wrapper import LMHead

TOKENS = (256, 4096, 25600, 262144)
SCALES = (2.0**8, 2.0**14, 2.0**20)


def check(limit: float, *case, **sizes) -> None:
    for scale, errors in measure(*case, **sizes):
        for part, (error, rounding) in errors.items():
            # Where the exact gradient is beyond float16, ours has to be infinite, too: the loss scaler sees it.
            assert error <= limit or error == rounding == float("inf"), (part, scale, error)


@pytest.mark.parametrize("tokens, power", [(256, 8), (256, 20), (4096, 14), (25600, 20), (262144, 8)])
@pytest.mark.parametrize("kinds", ["r", "f", "h", "p"])
def test_fp16_gradient_is_within_0_3_percent_of_fp32(kinds, tokens, power):
    """Each term, in a micro-batch of the step's tokens that is large enough for float16 to hold its gradient."""
    check(0.003, kinds, tokens, [2.0**power], rows=max(64, tokens // 512))


@pytest.mark.parametrize("kinds", ["rr", "rf", "hf", "pr"])
def test_fp16_gradient_of_several_terms_is_within_0_3_percent_of_fp32(kinds):
    """PromptKD's prompt tuning, KD and MiniLLM."""
    check(0.003, kinds, 25600, SCALES[1:2], rows=64)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("kinds", ["r", "f", "h", "p"])
def test_fp16_gradient_with_all_tokens_at_once(kinds, tokens):
    check(0.003, kinds, tokens, SCALES)


@pytest.mark.parametrize("kinds", ["r", "f", "h", "p"])
def test_fp16_gradient_of_gpt2s_vocabulary_is_within_1_percent(kinds):
    """Nearly all probabilities are below the smallest normal number of float16."""
    check(0.01, kinds, 18000, [2.0**14], rows=8, vocabulary=50257, deviation=0.7)


@pytest.mark.parametrize("kinds", ["r", "f", "h", "p"])
def test_bf16_gradient_has_no_error_but_rounding(kinds):
    """Rounding to bfloat16 costs 0.17 % each time, and a divergence's logits are rounded on both sides."""
    check(0.006, kinds, 18000, [1.0], rows=64, dtype=torch.bfloat16)


def case(tokens: int = 64, vocabulary: int = 500, width: int = 32):
    torch.manual_seed(0)
    hidden, head = torch.randn(tokens, width).half(), random_head(vocabulary, width, 0.8, torch.float16)
    return hidden, head, torch.full((tokens,), 1 / 18000)


def errors_of(hidden, head, terms, weights, scale: float = 2.0**14) -> list[float]:
    low = gradients(hidden, head, terms, weights, scale)
    exact_head = LMHead(head.weight.float(), head.bias.float())
    exact = gradients(hidden.float(), exact_head, in_float32(terms), weights, 1.0)
    return [relative_error(a.float() / scale, b) for a, b in zip(low, exact)]


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0, 1e3])
def test_fp16_gradient_of_small_and_large_advantages(size):
    hidden, head, weights = case()
    term = random_terms("p", 64, 500, 32, 0.8, torch.float16)[0]
    term = ClippedPolicy(term.tokens, size * term.advantages, term.old, term.importance, term.clip)
    assert max(errors_of(hidden, head, [term], weights, 2.0**14 / size)) < 0.003


@pytest.mark.parametrize("size", [0.01, 1.0, 100.0])
def test_fp16_gradient_of_small_and_large_hidden_states(size):
    """The head's products are scaled, so that large hidden states times many equal targets do not overflow."""
    hidden, head, weights = case(tokens=1024, vocabulary=50)
    term = CrossEntropy(torch.zeros(1024, dtype=torch.long))
    head = LMHead((head.weight.float() / size).half(), head.bias)
    assert max(errors_of((size * hidden.float()).half(), head, [term], weights, 2.0**11)) < 0.003


def test_fp16_gradient_with_unequal_and_zero_weights():
    hidden, head, weights = case()
    weights[::3], weights[1::3] = 0.0, 1e-7
    terms = random_terms("rh", 64, 500, 32, 0.8, torch.float16)
    assert max(errors_of(hidden, head, terms, weights)) < 0.003
    assert all(float(part.abs().max()) == 0 for part in gradients(hidden, head, terms, 0 * weights, 1.0))


def test_fp16_overflow_is_infinite_and_nothing_else_is():
    hidden, head, weights = case()
    terms = random_terms("h", 64, 500, 32, 0.8, torch.float16)
    scale = 2.0**32
    exact = gradients(hidden.float(), LMHead(head.weight.float(), head.bias.float()), in_float32(terms), weights, scale)
    for name, value, expected in zip(PARTS, gradients(hidden, head, terms, weights, scale), exact):
        assert value.isinf().any(), name
        assert value[expected.abs() > 66000].isinf().all() and value[expected.abs() < 65000].isfinite().all(), name


def test_fp16_gradient_is_not_a_number_where_the_target_is_not():
    hidden, head, weights = case()
    target = torch.full_like(hidden, float("nan"))
    for gradient in gradients(hidden, head, [ReverseKL(FrozenLogits(target, head))], weights, 1.0):
        assert gradient.isnan().any()
