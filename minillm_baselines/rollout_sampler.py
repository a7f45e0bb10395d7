"""Select the prompts of each collection of rollouts, and the rollouts of each optimizer step."""

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
    """The published order of prompts and rollouts, as a function of the step's number.

    Prompts come in chunks, in the order of `DistributedSampler(seed=seed_order, drop_last=True)`. The last chunk of an
    epoch may be short. A collection takes chunks until it has enough prompts, and discards the surplus. Each pass goes
    through the collection's rollouts in a new order, which is that of a `DataLoader` whose generator starts at `seed`.
    An incomplete batch at the end of a pass is dropped. An optimizer step takes the next batches in this order, also
    across the end of a pass or a collection.

    Attributes:
        examples: Number of prompts.
        rollouts: Rollouts of a collection. This and the next sizes are those of all ranks together.
        chunk: Prompts of a chunk.
        passes: Passes over a collection.
        batch: Rollouts of an accumulation step.
        accumulation: Accumulation steps of an optimizer step.
        ranks: Number of data-parallel ranks.
        rank: Index of this one.
        seed: Seed of the order of rollouts.
        seed_order: Seed of the order of prompts.
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
    _collections: list[list[int]] = field(default_factory=list, repr=False)
    _orders: list[list[list[int]]] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        if self.rollouts < self.batch:
            raise UserError(
                f"--num-rollouts {self.rollouts} do not fill one batch of {self.batch} on all ranks: raise it, or "
                "lower --batch-size"
            )
        if self.rollouts % self.ranks:
            raise UserError(
                f"--num-rollouts {self.rollouts} cannot be divided evenly among {self.ranks} ranks: change it"
            )
        if self.examples < self.ranks:
            raise UserError(f"{self.examples} prompts cannot be divided among {self.ranks} ranks: start fewer ranks")
        self._next_collections = self._deal()
        generator = torch.Generator().manual_seed(self.seed)
        self._loader: DataLoader[int] = DataLoader(
            list(range(self.rollouts)),  # type: ignore[arg-type]  # torch takes any sequence
            self.batch, shuffle=True, drop_last=True, generator=generator, collate_fn=list,
        )  # fmt: skip

    @property
    def steps_per_epoch(self) -> int:
        """Number of optimizer steps for one pass over the prompts."""
        per_collection = self.passes * (self.rollouts // self.batch) / self.accumulation
        return max(int(self.examples / self.rollouts * per_collection), 1)

    def epoch_of(self, step: int) -> int:
        """Return the pass over the prompts, from 1, that an optimizer step belongs to."""
        return (step - 1) // self.steps_per_epoch + 1

    def collection(self, number: int) -> list[int]:
        """Return the row numbers of a collection's prompts on all ranks. Collections are numbered from 0."""
        while len(self._collections) <= number:
            self._collections.append(next(self._next_collections))
        return self._collections[number]

    def batches(self, step: int) -> list[tuple[int, list[int]]]:
        """Return (collection, this rank's indices in it) for each accumulation step of an optimizer step, from 1."""
        return [self._batch(i) for i in range((step - 1) * self.accumulation, step * self.accumulation)]

    def indices(self, step: int) -> list[int]:
        """Return the row numbers of the prompts of this rank's rollouts in optimizer step `step`."""
        return [self.collection(number)[place] for number, places in self.batches(step) for place in places]

    def local_indices(self) -> range:
        """Return the indices in a collection whose prompts this rank answers."""
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
