"""Milliseconds of the divergence with its gradients: in chunks, with all logits at once, and TRL's Triton kernel.

    python benchmarks/gpu_losses.py --rows FILE [--tokens 8192]

The reverse KL of GPT-2 base from GPT-2 XL: hidden states of 768 and 1,600, 50,257 words, forward and backward pass.
TRL is measured where it can be imported.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from gpu_common import DEVICE, Rows, seconds_of
from torch import Tensor

from promptkd.losses import FrozenLogits, ReverseKL, fused_loss, reference_loss
from promptkd.models.wrapper import LMHead

STUDENT, TEACHER, VOCABULARY = 768, 1600, 50257


def trl_loss(hidden: Tensor, head: LMHead, terms: list[ReverseKL], weights: Tensor) -> tuple[Tensor, None]:
    """Compute the same loss with TRL."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    target = terms[0].target
    options = (1.0, 1.0, 1.0, None, 1.0, None)  # beta 1: reverse KL; temperature, scale and cap of logits
    each, _ = ChunkedDivergenceFunction.apply(
        hidden, head.weight, None, target.hidden, target.open_head.weight, None, *options
    )
    return torch.dot(each.float(), weights), None


def measure(loss_function: Callable, case: tuple) -> tuple[float, float, float]:
    """Return milliseconds, peak GB beyond the inputs, and the loss."""
    hidden, head, terms, weights = case
    value = 0.0

    def step() -> None:
        nonlocal value
        hidden.grad = head.weight.grad = None
        loss, _ = loss_function(hidden, head, terms, weights)
        loss.backward()
        value = loss.item()

    before = 0
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    _, seconds = seconds_of(step)
    peak = torch.cuda.max_memory_allocated() - before if DEVICE == "cuda" else 0
    return 1e3 * seconds, peak / 1e9, value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True, help="file that the table's rows are appended to")
    parser.add_argument("--tokens", type=int, default=8192)
    args = parser.parse_args()
    rows = Rows(args.rows)
    sides = {"ours": fused_loss, "all logits at once": reference_loss}
    if DEVICE == "cuda" and importlib.util.find_spec("trl"):
        sides["TRL"] = trl_loss
    for name, dtype in {"bf16": torch.bfloat16, "fp16": torch.float16}.items():
        torch.manual_seed(0)
        with torch.device(DEVICE):
            hidden = torch.randn(args.tokens, STUDENT, dtype=dtype, requires_grad=True)
            head = LMHead((torch.randn(VOCABULARY, STUDENT) / STUDENT**0.5).to(dtype).requires_grad_(), None)
            fixed = (torch.randn(VOCABULARY, TEACHER) / TEACHER**0.5).to(dtype)
            target = FrozenLogits(torch.randn(args.tokens, TEACHER, dtype=dtype), LMHead(fixed, None))
            weights = torch.full((args.tokens,), 1 / args.tokens)
        # train.py hands the loss an aligned target, too.
        aligned = [ReverseKL(target).with_head(lambda source: source)]
        found = {
            side: measure(function, (hidden, head, aligned if side == "ours" else [ReverseKL(target)], weights))
            for side, function in sides.items()
        }
        values = [value for _, _, value in found.values()]
        if max(values) - min(values) > 0.02 * max(values):
            raise SystemExit(f"the sides compute different losses: {dict(zip(found, values))}")
        what = f"reverse KL, {name}, {args.tokens:,} tokens"
        for column, unit in enumerate(("ms", "GB peak")):
            others = {side: numbers[column] for side, numbers in found.items() if side != "ours"}
            rows.add(f"{what}: {unit}", found["ours"][column], unit, **others)


if __name__ == "__main__":
    main()
