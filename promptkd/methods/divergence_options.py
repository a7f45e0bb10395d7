"""The options that choose a divergence between teacher and student."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from promptkd.config.values import option
from promptkd.errors import UserError
from promptkd.losses import DIVERGENCES, Divergence, FrozenLogits, resolve_parameters

# Option -> the divergences that it is a parameter of, and the parameter's name there.
PARAMETERS = {
    "jsd_beta": (("jsd",), "beta"),
    "skew": (("skew_forward_kl", "skew_reverse_kl", "skew_reverse_kl_detached"), "skew"),
    "ab_alpha": (("alpha_beta",), "alpha"),
    "ab_beta": (("alpha_beta",), "beta"),
    "akl_mu": (("adaptive_kl",), "mu"),
}
# Names of the published code for `--teacher-kld-type` and its like.
PUBLISHED_NAMES = {"reverse": "reverse_kl", "forward": "forward_kl"}


def divergence_option(default: str) -> Any:
    """Return the field of `--divergence` with a method's default."""
    return option(default, "divergence between teacher and student (docs/fidelity.md)", choices=[*DIVERGENCES])


@dataclass
class DivergenceParameters:
    """Parameters of the divergences. Those of other divergences than the chosen one have no effect."""

    jsd_beta: float = option(0.5, "jsd: weight of the teacher in the mixture, from 0 to 1")
    skew: float = option(
        0.1, "skew_forward_kl: weight of the teacher in the mixture. skew_reverse_kl: of the student. From 0 to 1"
    )
    ab_alpha: float = option(0.2, "alpha_beta: exponent of the teacher's probabilities")
    ab_beta: float = option(0.7, "alpha_beta: exponent of the student's probabilities")
    akl_mu: float = option(
        0.5, "adaptive_kl: cumulative probability of the teacher's most likely tokens, its head, from 0 to 1"
    )
    kd_temperature: float = option(1.0, "temperature of teacher and student in the divergence")

    def __post_init__(self) -> None:
        for field, (names, parameter) in PARAMETERS.items():
            try:
                resolve_parameters(names[0], {parameter: getattr(self, field)}, self.kd_temperature)
            except UserError as error:
                raise UserError(f"--{field.replace('_', '-')} or --kd-temperature: {error}") from None

    def term(self, name: str, target: FrozenLogits, coefficient: float = 1.0) -> Divergence:
        """Return the loss term of a divergence with these parameters.

        Args:
            name: A divergence, or a published name of one.
            target: The distribution to compare the trained one with.
            coefficient: Factor of the term in the loss.
        """
        name = PUBLISHED_NAMES.get(name, name)
        parameters = {
            parameter: getattr(self, field) for field, (names, parameter) in PARAMETERS.items() if name in names
        }
        return Divergence(target, name, coefficient, self.kd_temperature, parameters)


@dataclass
class DivergenceSettings(DivergenceParameters):
    """A divergence and its parameters."""

    divergence: str = divergence_option("forward_kl")
