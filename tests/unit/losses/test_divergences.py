"""Divergences: recorded values, autograd of plain formulas in float64, limits, zero probabilities and chunks."""

from __future__ import annotations

import json
import math

import pytest
import torch
from helpers.half_precision import PARTS, random_head, relative_error
from helpers.training import GOLDEN
from torch import Tensor

from promptkd import losses
from promptkd.errors import UserError
from promptkd.losses import DIVERGENCES, CrossEntropy, Divergence, FrozenLogits, divergence, fused_loss, kl_divergences
from promptkd.models.wrapper import LMHead

RECORDED = json.loads((GOLDEN / "divergences" / "given.json").read_text())
LOGITS = {row["case"]: row for row in RECORDED["rows"] if "student_logits" in row}
ROWS = [row for row in RECORDED["rows"] if "divergence" in row]

# All divergences, each also at the values of its parameters that have code of their own.
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
