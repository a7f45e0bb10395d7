"""Which examples make up optimizer step k."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from promptkd.errors import UserError


@dataclass(frozen=True)
class StepSampler:
    """The examples of each optimizer step: a pure function of the step, so that resuming needs no state.

    The order is that of `DistributedSampler(shuffle=True, seed, drop_last=True)` with `set_epoch`. A step has
    batch_size x accumulation x ranks examples, and depends on their product only. The rest of an epoch is dropped.

    Attributes:
        examples: The number of examples.
        batch_size: The number of examples of a micro-batch.
        accumulation: The number of micro-batches of a step.
        ranks: The number of ranks.
        rank: This rank.
        seed: Seeds the order.
        published: Follow the published code, where each rank's micro-batches continue across the end of an epoch
            (train_promptkd.py lets DeepSpeed count them).
    """

    examples: int
    batch_size: int
    accumulation: int
    ranks: int = 1
    rank: int = 0
    seed: int = 0
    published: bool = False
    _orders: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.steps_per_epoch == 0:
            raise UserError(
                f"{self.examples} training examples do not fill one step of {self.batch_size} x {self.accumulation} "
                f"x {self.ranks} (batch x accumulation x ranks): lower --batch-size or the accumulation"
            )

    @property
    def steps_per_epoch(self) -> int:
        """The number of complete steps of an epoch."""
        return self.examples // (self.batch_size * self.accumulation * self.ranks)

    def order(self, epoch: int) -> Tensor:
        """Return this rank's examples of an epoch, in order, int64, `(examples // ranks,)`.

        The last order is kept. A permutation of the published corpus takes 80 MB, and every step of an epoch asks
        for the same one.
        """
        if epoch not in self._orders:
            generator = torch.Generator().manual_seed((self.seed + epoch) % (1 << 64))
            order = torch.randperm(self.examples, generator=generator)
            self._orders.clear()
            self._orders[epoch] = order[: self.examples // self.ranks * self.ranks][self.rank :: self.ranks].clone()
        return self._orders[epoch]

    def indices(self, step: int) -> list[int]:
        """Return this rank's batch_size x accumulation examples of optimizer step `step` (from 1)."""
        size, count, per_epoch = self.batch_size * self.accumulation, 1, self.steps_per_epoch
        if self.published:
            size, count, per_epoch = self.batch_size, self.accumulation, self.examples // self.ranks // self.batch_size
        indices: list[int] = []
        for batch in range((step - 1) * count, step * count):
            epoch, place = divmod(batch, per_epoch)
            indices += self.order(epoch)[place * size : (place + 1) * size].tolist()
        return indices

    def epoch_of(self, step: int) -> int:
        """Return the epoch (from 1) in which optimizer step `step` ends."""
        return (step - 1) // self.steps_per_epoch + 1
