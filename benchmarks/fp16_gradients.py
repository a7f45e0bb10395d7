"""How far the losses' gradients in half precision are from float32: a table of terms, tokens and loss scales.

PYTHONPATH=tests python benchmarks/fp16_gradients.py --tokens 256,4096,25600,262144

The models are random (tests/helpers/half_precision.py). The error is a share of the gradient's norm, for hidden
states, head weight and head bias. In parentheses: the error of the float32 gradient rounded once. No result can be
better. The exit status is 1 when an error is above --allowed percent where the rounded gradient is finite.
"""

from __future__ import annotations

import itertools
import math
import sys
from dataclasses import dataclass
from typing import Literal

from helpers.half_precision import PARTS, measure

from promptkd.config.deepspeed import DTYPES
from promptkd.config.parser import parse
from promptkd.config.values import at_least, option
from promptkd.errors import exit_with


@dataclass
class GradientSettings:
    kinds: str = option(
        "r,f,h,p,rr,rf,hf,pr", "losses, each by its terms' letters: r(everse), f(orward), h(ard), p(olicy)"
    )
    tokens: str = option("256,4096,25600,262144", "response tokens of a step, separated by commas")
    powers: str = option("8,11,14,17,20", "loss scales, as powers of two, separated by commas")
    rows: int | None = option(None, "tokens of the micro-batch; default: all of the step's")
    vocabulary: int = option(5000, "tokens of the vocabulary")
    width: int = option(64, "width of the hidden states")
    deviation: float = option(0.8, "standard deviation of the logits")
    dtype: Literal["fp16", "bf16"] = option("fp16", "precision of the models")
    allowed: float = option(0.3, "largest error, in percent; infinite gradients excepted")

    def __post_init__(self) -> None:
        at_least(1, vocabulary=self.vocabulary, width=self.width)


def main() -> None:
    how = parse({"gradients": GradientSettings}, sys.argv[1:], prog="fp16_gradients.py").gradients
    sizes = {"vocabulary": how.vocabulary, "width": how.width, "deviation": how.deviation, "dtype": DTYPES[how.dtype]}
    print(f"| terms | tokens | loss scale | {' | '.join(PARTS)} |\n|---|--:|--:|{'--:|' * len(PARTS)}", flush=True)
    worst = 0.0
    for kinds, tokens in itertools.product(how.kinds.split(","), map(int, how.tokens.split(","))):
        powers = list(map(int, how.powers.split(",")))
        measured = measure(kinds, tokens, [2.0**power for power in powers], how.rows, **sizes)
        for power, (_, errors) in zip(powers, measured):
            cells = [f"{100 * error:.3f} ({100 * rounding:.3f})" for error, rounding in errors.values()]
            worst = max([worst, *(error for error, rounding in errors.values() if rounding < math.inf)])
            print(f"| {kinds} | {tokens} | 2^{power} | {' | '.join(cells)} |", flush=True)
    print(f"\nlargest error: {100 * worst:.3f} %")
    sys.exit(100 * worst > how.allowed)


if __name__ == "__main__":
    exit_with(main)
