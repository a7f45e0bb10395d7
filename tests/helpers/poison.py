"""Losses that are not finite, on purpose."""

from __future__ import annotations

from promptkd.training.setup import build_trainer
from train import resolve


def poison(step: int, argv: list[str]):
    """A run in which the loss of one step is not finite."""
    trainer = build_trainer(resolve(argv))
    batches = trainer.method.micro_batches

    def micro_batches(window, responses):
        made, tokens = batches(window, responses)
        if window.step == step:
            made[0].token_weights[0] = float("nan")
        return made, tokens

    trainer.method.micro_batches = micro_batches
    return trainer
