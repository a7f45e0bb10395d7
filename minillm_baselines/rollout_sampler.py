"""Which prompts each collection of rollouts answers, and which of its rollouts make up each optimizer step."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch.utils.data import DataLoader

from promptkd.data.sampler import StepSampler
from promptkd.errors import UserError


@dataclass
class RolloutSampler:
    """The published order, as a function of the step alone; all sizes are of all ranks together.

    Prompts come `chunk` at a time, in the order of `DistributedSampler(seed=seed_order, drop_last=True)`; the
    last chunk of an epoch may be short. A collection takes whole chunks until it has `rollouts` prompts, and
    drops what is over. Each of its `passes` runs through its rollouts in a new order (that of a `DataLoader`
    whose generator starts at `seed`), `batch` at a time without the rest; an optimizer step takes
    `accumulation` of these micro-batches, wherever a pass or a collection ends.
    """

    examples: int
    rollouts: int
    chunk: int
    passes: int
    batch: int
    accumulation: int
    ranks: int = 1
    rank: int = 0
    seed: int = 42
    seed_order: int = 0
    corpus: StepSampler | None = None  # which rows of the corpus go with each step
    _collections: list[list[int]] = field(default_factory=list, repr=False)
    _orders: list[list[list[int]]] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        if self.rollouts < self.batch:
            raise UserError(
                f"--num-rollouts {self.rollouts} do not fill one batch of {self.batch} on all ranks: raise it, or "
                "lower --batch-size"
            )
        if self.rollouts % self.ranks:
            raise UserError(f"--num-rollouts {self.rollouts} cannot be shared out evenly to {self.ranks} ranks")
        if self.examples < self.ranks:
            raise UserError(f"{self.examples} prompts cannot be shared out to {self.ranks} ranks: start fewer ranks")
        self._next_collections = self._deal()
        generator = torch.Generator().manual_seed(self.seed)
        self._loader = DataLoader(
            range(self.rollouts), self.batch, shuffle=True, drop_last=True, generator=generator, collate_fn=list
        )

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps for one pass over the prompts."""
        per_collection = self.passes * (self.rollouts // self.batch) / self.accumulation
        return max(int(self.examples / self.rollouts * per_collection), 1)

    def epoch_of(self, step: int) -> int:
        """The pass over the prompts (from 1) that optimizer step `step` belongs to."""
        return (step - 1) // self.steps_per_epoch + 1

    def collection(self, number: int) -> list[int]:
        """The prompts' rows of collection `number` (from 0), of all ranks."""
        while len(self._collections) <= number:
            self._collections.append(next(self._next_collections))
        return self._collections[number]

    def batches(self, step: int) -> list[tuple[int, list[int]]]:
        """The micro-batches of optimizer step `step` (from 1): (collection, this rank's places in it)."""
        return [self._batch(i) for i in range((step - 1) * self.accumulation, step * self.accumulation)]

    def indices(self, step: int) -> list[int]:
        """The prompts' rows of this rank's rollouts in optimizer step `step`, in order."""
        return [self.collection(number)[place] for number, places in self.batches(step) for place in places]

    def mine(self) -> range:
        """The places in a collection that this rank answers."""
        return range(self.rank, self.rollouts, self.ranks)

    def _batch(self, index: int) -> tuple[int, list[int]]:
        turn, place = divmod(index, self.rollouts // self.batch)
        while len(self._orders) <= turn:
            self._orders.append(list(self._loader))
        return turn // self.passes, self._orders[turn][place][self.rank :: self.ranks]

    def _deal(self) -> Iterator[list[int]]:
        chunks = self._chunks()
        while True:
            rows: list[int] = []
            while len(rows) < self.rollouts:
                rows += next(chunks)
            yield rows[: self.rollouts]

    def _chunks(self) -> Iterator[list[int]]:
        order = StepSampler(self.examples, 1, 1, seed=self.seed_order)
        for epoch in itertools.count():
            rows = order.order(epoch)[: self.examples // self.ranks * self.ranks]
            yield from (rows[i : i + self.chunk].tolist() for i in range(0, len(rows), self.chunk))
