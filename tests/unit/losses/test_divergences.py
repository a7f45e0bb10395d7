"""Divergences: recorded values, autograd of plain formulas in float64, limits, zero probabilities and chunks."""

from __future__ import annotations

import json
import math

import pytest
import torch
from helpers.divergence_formulas import (
    CASES,
    NEAR,
    assert_near,
    closed_form,
    computed,
    entropies,
    identifier,
    plain_with_gradient,
    random_logits,
)
from helpers.training import GOLDEN

from promptkd.errors import UserError
from promptkd.losses import DIVERGENCES, Divergence, FrozenLogits, divergence, kl_divergences
from promptkd.models.wrapper import LMHead

RECORDED = json.loads((GOLDEN / "divergences" / "given.json").read_text())
LOGITS = {row["case"]: row for row in RECORDED["rows"] if "student_logits" in row}
ROWS = [row for row in RECORDED["rows"] if "divergence" in row]

# All divergences, each also at the values of its parameters that have code of their own.


@pytest.mark.parametrize("row", ROWS, ids=lambda r: f"{r['case']}-{r['divergence']}-{identifier(r['parameters'])}")
def test_divergence_matches_recorded_values_and_gradients(row):
    """The recordings are means over the tokens of values and gradients of the originals' code."""
    student = torch.tensor(LOGITS[row["case"]]["student_logits"], requires_grad=True)
    loss = divergence(
        row["divergence"], student, torch.tensor(LOGITS[row["case"]]["teacher_logits"]), **row["parameters"]
    )
    assert loss.dtype == torch.float32 and loss.shape == student.shape[:1]
    loss.mean().backward()
    assert_near([loss.mean(), student.grad], [torch.tensor(row["value"]), torch.tensor(row["gradient"])], 1e-6)


def test_cases_cover_all_divergences():
    assert {name for name, _ in CASES} == set(DIVERGENCES)


@pytest.mark.parametrize("name, parameters", CASES, ids=identifier)
def test_closed_form_is_autograd_of_plain_formula_in_float64(name, parameters):
    z, t = random_logits()
    loss, gradient = closed_form(name, z, t, **parameters)
    assert_near([loss, gradient], plain_with_gradient(name, z, t, **parameters), 1e-13)


@pytest.mark.parametrize("name, parameters", CASES, ids=identifier)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_in_float32_with_temperature(name, parameters, temperature):
    z, t = random_logits(dtype=torch.float32)
    expected = plain_with_gradient(name, z, t, temperature, **parameters)
    assert_near(computed(name, z, t, temperature, **parameters), expected, 2e-6)


@pytest.mark.parametrize("alpha, beta", NEAR)
def test_alpha_beta_near_its_limits_keeps_float32_precision(alpha, beta):
    z, t = random_logits(dtype=torch.float32)
    expected = plain_with_gradient("alpha_beta", z, t, alpha=alpha, beta=beta)
    assert_near(computed("alpha_beta", z, t, alpha=alpha, beta=beta), expected, 2e-6)


@pytest.mark.parametrize("limit", [(0, 0.7), (0.7, 0), (0.5, -0.5), (0, 0)])
@pytest.mark.parametrize("distance", [1e-4, 1e-6, 1e-8, 1e-12])
def test_alpha_beta_tends_to_its_limits(limit, distance):
    """A term of distance times a constant separates the two, and rounding where the distance is small."""
    z, t = random_logits(dtype=torch.float32)
    expected = plain_with_gradient("alpha_beta", z, t, alpha=limit[0], beta=limit[1])
    actual = computed("alpha_beta", z, t, alpha=limit[0] + distance, beta=limit[1] + distance)
    assert_near(actual, expected, 2e-6 + 20 * distance)


@pytest.mark.parametrize("alpha, beta", [(0.2, 0.7), (1, 0), (0, 1), (1.3, -0.3), (1e-3, 1e-3), (0.5, -0.5)])
def test_alpha_beta_of_extreme_logits_is_finite(alpha, beta):
    """Neither exp nor expm1 overflows as long as the loss itself does not."""
    z, t = random_logits(deviation=15.0, dtype=torch.float32)
    expected = plain_with_gradient("alpha_beta", z, t, alpha=alpha, beta=beta)
    assert_near(computed("alpha_beta", z, t, alpha=alpha, beta=beta), expected, 1e-5)


@pytest.mark.parametrize("name", ["jsd", "skew_forward_kl", "skew_reverse_kl", "skew_reverse_kl_detached"])
@pytest.mark.parametrize("limit", [0, 1])
def test_parameters_near_their_ends_tend_to_the_ends(name, limit):
    """jsd itself tends to 0 at both ends. Divided by the vanishing weight, it tends to the KL that the end means."""
    key, distance = next(iter(DIVERGENCES[name].parameters)), 1e-7
    z, t = random_logits()
    loss, gradient = closed_form(name, z, t, **{key: abs(limit - distance)})
    scale = 1 / distance if name == "jsd" else 1
    assert_near([scale * loss, scale * gradient], closed_form(name, z, t, **{key: limit}), 1e-4)


def test_alpha_beta_contains_the_kl_divergences():
    z, t = random_logits()
    entropy = -(t.softmax(-1) * t.log_softmax(-1)).sum(-1)
    loss, gradient = closed_form("forward_kl", z, t)
    assert_near(closed_form("alpha_beta", z, t, alpha=1, beta=0), [loss - entropy, gradient], 1e-13)
    assert_near(closed_form("alpha_beta", z, t, alpha=0, beta=1), closed_form("reverse_kl", z, t), 1e-13)


def test_adaptive_kl_head_is_cumulative_probability_up_to_mu():
    """By hand: 0.4 + 0.3 is more than 0.6, so that the head is one id. Its share of the differences is 0.3 / 0.6."""
    p, q = torch.tensor([[0.4, 0.3, 0.2, 0.1]]), torch.tensor([[0.1, 0.3, 0.4, 0.2]])
    forward, reverse = entropies(p, q), entropies(q, p)
    torch.testing.assert_close(divergence("adaptive_kl", q.log(), p.log(), mu=0.6), (forward + reverse) / 2)
    torch.testing.assert_close(divergence("adaptive_kl", q.log(), p.log(), mu=0.75), (forward + reverse) / 2)
    two_thirds = divergence("adaptive_kl", q.log(), p.log(), mu=0.95)
    torch.testing.assert_close(two_thirds, (5 * forward + reverse) / 6)


@pytest.mark.parametrize("name, parameters", CASES, ids=identifier)
def test_equal_distributions_have_no_gradient(name, parameters):
    z, _ = random_logits(dtype=torch.float32)
    loss, gradient = computed(name, z, z.clone(), **parameters)
    expected = plain_with_gradient(name, z, z + 1e-9 * torch.arange(50), **parameters)[0]
    assert_near([loss], [expected], 1e-5)
    assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("name, parameters", CASES, ids=identifier)
def test_ids_that_no_model_predicts_change_nothing(name, parameters):
    """Vocabularies padded with logits of minus infinity."""
    z, t = random_logits()
    loss, gradient = closed_form(name, z, t, **parameters)
    padded = [torch.nn.functional.pad(logits, (0, 9), value=-torch.inf) for logits in (z, t)]
    padded_loss, padded_gradient = closed_form(name, *padded, **parameters)
    assert_near([padded_loss, padded_gradient[:, :50]], [loss, gradient], 1e-14)
    assert not padded_gradient[:, 50:].any()


def is_infinite(name: str, parameters: dict[str, float], absent: str) -> bool:
    """Whether the loss is infinite where only one model has probability 0 for an id, by the definitions."""
    x = next(iter(parameters.values()), None)
    if name == "alpha_beta":
        a, b = parameters["alpha"], parameters["beta"]
        return a + b <= 0 or (a if absent == "teacher" else b) <= 0
    if name == "adaptive_kl":
        return absent == "student" or x < 1
    if absent == "teacher":
        return name == "reverse_kl" or (name, x) == ("jsd", 1) or (name.startswith("skew_reverse") and x == 0)
    return name == "forward_kl" or (name in ("jsd", "skew_forward_kl") and x == 0)


@pytest.mark.parametrize("absent", ["teacher", "student"])
@pytest.mark.parametrize("name, parameters", CASES, ids=identifier)
def test_ids_that_one_model_never_predicts_have_the_limit(name, parameters, absent):
    """The expected values have a tiny probability instead of 0."""
    z, t = random_logits()
    limits = []
    for value in (-torch.inf, -600.0):
        (t if absent == "teacher" else z)[:, [3, 7]] = value
        limits.append(closed_form(name, z, t, **parameters))
    (loss, gradient), expected = limits
    if is_infinite(name, parameters, absent):
        assert (loss == torch.inf).all()
    else:
        assert_near([loss, gradient], expected, 1e-13)


def test_not_a_number_is_not_hidden():
    z, t = random_logits(dtype=torch.float32)
    t[2, 5] = math.nan
    for name in DIVERGENCES:
        loss, gradient = computed(name, z, t)
        assert loss[2].isnan() and gradient[2].isnan().any(), name
        assert loss[[0, 1, 3, 4, 5]].isfinite().all(), name


def test_kl_divergences_of_ids_that_no_model_predicts():
    head = LMHead(torch.randn(20, 4), torch.randn(20))
    masked = [LMHead(torch.randn(20, 4), bias) for bias in (head.bias.clone(), torch.randn(20))]
    for model in masked:
        model.bias[15:] = -torch.inf
    p, q = (FrozenLogits(torch.randn(5, 4), model) for model in masked)
    rows = slice(None)
    expected = entropies(p.logits(rows)[:, :15].softmax(-1), q.logits(rows)[:, :15].softmax(-1))
    torch.testing.assert_close(kl_divergences(p, q), expected)


def test_each_token_has_its_own_weight_in_backward():
    z, t = random_logits(dtype=torch.float32)
    weights = torch.arange(6.0)
    gradient = computed("jsd", z, t)[1]
    leaf = z.requires_grad_()
    (divergence("jsd", leaf, t.requires_grad_()) * weights).sum().backward()
    torch.testing.assert_close(leaf.grad, gradient * weights[:, None])
    assert t.grad is None, "the teacher is not trained"


def test_divergence_of_bfloat16_logits_is_computed_in_float32():
    z, t = (logits.bfloat16() for logits in random_logits(dtype=torch.float32))
    loss, gradient = computed("skew_reverse_kl", z, t)
    exact_loss, exact_gradient = computed("skew_reverse_kl", z.float(), t.float())
    assert torch.equal(loss, exact_loss) and torch.equal(gradient, exact_gradient.bfloat16())


def test_no_tokens_have_no_losses():
    for name in DIVERGENCES:
        loss, gradient = computed(name, torch.empty(0, 5), torch.empty(0, 5))
        assert loss.shape == (0,) and gradient.shape == (0, 5), name


@pytest.mark.parametrize(
    "name, parameters, message",
    [
        ("kl", {}, "unknown divergence 'kl': choose one of forward_kl, reverse_kl, jsd"),
        ("jsd", {"skew": 0.1}, "jsd has no parameter 'skew': its parameters are beta"),
        ("reverse_kl", {"beta": 0.1}, "reverse_kl has no parameter 'beta': it takes none"),
        ("jsd", {"beta": 1.1}, "beta 1.1 of divergence jsd is out of range: give a number from 0 to 1"),
        ("skew_forward_kl", {"skew": -0.1}, "skew -0.1 .* from 0 to 1"),
        ("adaptive_kl", {"mu": math.nan}, "mu nan .* from 0 to 1"),
        ("alpha_beta", {"alpha": math.inf}, "alpha inf .* give a finite number"),
        ("alpha_beta", {"beta": "0.5"}, "beta '0.5' .* give a finite number"),
        ("jsd", {"temperature": 0.0}, "temperature 0.0 .* give a number above 0"),
    ],
)
def test_unknown_names_and_illegal_values_are_named(name, parameters, message):
    with pytest.raises(UserError, match=message):
        divergence(name, torch.zeros(1, 3), torch.zeros(1, 3), **parameters)
    target = FrozenLogits(torch.zeros(1, 2), LMHead(torch.zeros(3, 2), None))
    temperature = parameters.pop("temperature", 1.0)
    with pytest.raises(UserError, match=message):
        Divergence(target, name, temperature=temperature, parameters=parameters)


def test_logits_of_different_shapes_are_refused():
    with pytest.raises(UserError, match=r"logits of shapes \(2, 3\) and \(2, 4\) cannot be compared"):
        divergence("jsd", torch.zeros(2, 3), torch.zeros(2, 4))


def test_defaults_are_the_published_ones():
    z, t = random_logits(dtype=torch.float32)
    for name, parameters in (
        ("jsd", {"beta": 0.5}), ("skew_forward_kl", {"skew": 0.1}), ("skew_reverse_kl", {"skew": 0.1}),
        ("alpha_beta", {"alpha": 0.2, "beta": 0.7}), ("adaptive_kl", {"mu": 0.5}),
    ):  # fmt: skip
        assert torch.equal(divergence(name, z, t), divergence(name, z, t, **parameters)), name
