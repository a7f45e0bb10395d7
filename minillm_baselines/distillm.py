"""DistiLLM (Ko et al., ICML 2024): skewed divergences, on responses that adaptively become the student's own.

The threshold phi starts at 0. It grows by 0.1 when an evaluation's dev loss exceeds the reference, which then becomes
that loss. With r drawn for each example, r < phi trains on the student's responses: on fresh ones, or on those in a
replay buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from minillm_baselines.kd import KD, KDSettings
from minillm_baselines.replay_buffer import ReplayBuffer
from promptkd.config.values import at_least, fraction, option
from promptkd.data.batching import TokenIds
from promptkd.generation.sampling import uniform_draws
from promptkd.methods.base import COIN, REPLAY
from promptkd.methods.context import DatasetBundle, MethodContext, StepBatch
from promptkd.methods.corpus import CorpusSettings, with_corpus
from promptkd.methods.divergence_options import divergence_option

if TYPE_CHECKING:
    from promptkd.config.resolve import RunConfig

INCREMENT = 0.1  # of phi


@dataclass
class DistiLLMSettings(CorpusSettings, KDSettings):
    divergence: str = divergence_option("skew_forward_kl")
    kd_ratio: float = option(1.0, "weight of the distillation loss. Cross-entropy is weighted by 1 - kd_ratio")
    init_threshold: float = option(0.0, "initial value of phi, the probability of training on the student's responses")
    loss_eps: float = option(0.1, "phi grows by 0.1 when the dev loss is this much above its reference")
    capacity: int = option(1000, "number of responses in the replay buffer")
    replay_ratio: Literal["decreasing", "constant", "increasing"] = option(
        "decreasing", "how the share of fresh responses, as opposed to replayed ones, changes during training"
    )

    def __post_init__(self) -> None:
        CorpusSettings.__post_init__(self)
        KDSettings.__post_init__(self)
        fraction(init_threshold=self.init_threshold)
        at_least(0, loss_eps=self.loss_eps)
        at_least(1, capacity=self.capacity)


class DistiLLM(KD):
    """Distillation with an adaptive off-policy schedule."""

    Settings = DistiLLMSettings

    def __init__(self, context: MethodContext, settings: DistiLLMSettings) -> None:
        super().__init__(context, settings)
        self.phi, self.reference = settings.init_threshold, float("nan")
        self.buffer = ReplayBuffer(settings.capacity)

    @classmethod
    def open_data(cls, config: RunConfig, tokenizer: Any) -> DatasetBundle:
        """Open the training examples, the dev examples and the corpus."""
        return with_corpus(super().open_data(config, tokenizer), config, tokenizer)

    def after_evaluation(self, dev_loss: float) -> None:
        """Raise phi if the dev loss has grown. The first dev loss is the reference, which never falls."""
        if np.isnan(self.reference):
            self.reference = dev_loss
        elif dev_loss >= self.reference + self.settings.loss_eps:
            self.phi, self.reference = min(self.phi + INCREMENT, 1.0), dev_loss

    def examples(self, step_batch: StepBatch) -> tuple[StepBatch, Sequence[TokenIds]]:
        """Choose for each example a fresh response of the student, a replayed one, or that of the data."""
        seed, step = self.context.seed, step_batch.step
        progress = step / step_batch.total
        share = {"decreasing": 1 - progress, "constant": 0.5, "increasing": progress}[self.settings.replay_ratio]
        examples, responses = list(step_batch.examples), [example.response for example in step_batch.examples]
        fresh = []
        for i, example in enumerate(step_batch.examples):
            draw = float(uniform_draws(seed, step, example.index, COIN, count=1)[0])
            if draw < self.phi * share or (draw < self.phi and not self.buffer.is_full):
                fresh.append(i)
            elif draw < self.phi:
                place = uniform_draws(seed, step, example.index, REPLAY, count=1)[0]
                prompt, responses[i] = self.buffer.draw(float(place))
                examples[i] = replace(example, prompt=prompt)
        if self.phi > 0:
            with step_batch.timer("rollout"):
                answers = self.generate(step_batch, fresh).responses
            for i, answer in zip(fresh, answers):
                responses[i] = answer.numpy()
            self.buffer.add([(step_batch.examples[i], responses[i]) for i in fresh], self.context.ranks)
        return replace(step_batch, examples=examples), responses

    def step(self, step_batch: StepBatch) -> dict[str, float]:
        """Update the student on the chosen responses, and on texts of the corpus."""
        phi = self.phi
        return {**super().step(step_batch), "phi": phi}

    def state(self) -> dict[str, Tensor]:
        """Return phi, the reference and the replay buffer, which are the same on all ranks."""
        numbers = torch.tensor([self.phi, self.reference], dtype=torch.float64)
        return {"numbers": numbers, **self.buffer.state()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned."""
        self.phi, self.reference = state["numbers"].tolist()
        self.buffer.load_state(state)
