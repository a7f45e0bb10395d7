"""A cache of the teacher's final hidden states for given responses, so that training runs no layer of the teacher.

A folder holds `states.bin`, the states that predict the response tokens of all examples in order, `(tokens, hidden)` in
the teacher's precision, and `manifest.json`, which says what they depend on. The manifest is written last.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from promptkd.data.batching import MicroBatch, make_micro_batches
from promptkd.data.dataset import ExampleSet
from promptkd.distributed.ranks import Ranks
from promptkd.engine.engine import FrozenModel
from promptkd.errors import RunError, UserError
from promptkd.models.wrapper import LanguageModel, drop_layers
from promptkd.utils.files import lock_folder, remove, sync_file, write_json
from promptkd.utils.progress import Progress
from promptkd.utils.strict_json import read_object
from promptkd.utils.transfer import to_device

OPTION = "--teacher-cache"
TEMPORARY = ".states.bin.new"
CHUNK = 256  # examples whose states are computed before they are written


@dataclass
class TeacherCache:
    """The states of one teacher on one data set, complete or to be computed by the run.

    Attributes:
        folder: The folder of the cache.
        identity: What the states depend on, by the name that errors use.
        examples: The data set.
        offsets: The first state of each example, and the number of states at the end.
        dtype: The teacher's precision.
        token_budget: Padded tokens in one forward pass of the teacher, at most.
        width: The size of a state. 0 if the cache is not complete.
    """

    folder: Path
    identity: dict[str, Any]
    examples: ExampleSet
    offsets: np.ndarray[Any, Any]
    dtype: torch.dtype
    token_budget: int
    width: int = 0

    @classmethod
    def open(
        cls, folder: str, teacher: dict[str, Any], examples: ExampleSet, dtype: torch.dtype, token_budget: int
    ) -> TeacherCache:
        """Open a cache, or prepare to make it if the folder has no manifest.

        Args:
            folder: The folder of the cache.
            teacher: What identifies the teacher's weights and their precision.
            examples: The data set.
            dtype: The teacher's precision.
            token_budget: Padded tokens in one forward pass of the teacher, at most.

        Raises:
            UserError: The cache belongs to another teacher or to other examples, or is damaged.
        """
        path, digest = Path(folder), hashlib.sha256()
        lengths = np.zeros(len(examples) + 1, np.int64)
        for index in range(len(examples)):
            example = examples[index]
            lengths[index + 1] = len(example.response)
            digest.update(np.array([len(example.prompt), len(example.response)]).tobytes())
            digest.update(np.concatenate([example.prompt, example.response]).astype(np.int64).tobytes())
        identity = {"teacher": teacher, "examples": digest.hexdigest()}
        cache = cls(path, identity, examples, lengths.cumsum(), dtype, token_budget)
        if (path / "manifest.json").exists():
            cache._check(read_object(path / "manifest.json", f"{OPTION} {path}: make the cache again"))
        return cache

    def _check(self, manifest: dict[str, Any]) -> None:
        """Take the width from the manifest of a complete cache. Raise UserError if it does not fit this run."""
        if other := [name for name, value in self.identity.items() if manifest.get(name) != value]:
            made = {"teacher": "another teacher or precision", "examples": "other data, prompts or lengths"}
            raise UserError(
                f"{OPTION} {self.folder} was made with {made[other[0]]}: name another folder, in which the run makes "
                "a new cache"
            )
        width, path = manifest.get("width"), self.folder / "states.bin"
        size = path.stat().st_size if path.is_file() else 0
        if not isinstance(width, int) or width < 1 or size != self.offsets[-1] * width * self.dtype.itemsize:
            raise UserError(f"{OPTION} {self.folder} is damaged: remove it, and the run makes it again")
        self.width = width

    def apply(self, teacher: FrozenModel, ranks: Ranks) -> CachedModel:
        """Return the teacher with the cached states, which are computed first if needed. All ranks call it."""
        if not self.width:
            width = teacher.module.lm_head().weight.size(1)
            lock = lock_folder(self.folder, OPTION) if ranks.is_main else None
            try:
                self._make(teacher, width, ranks)
            except OSError as error:
                remove(self.folder / TEMPORARY)
                raise RunError(f"{OPTION} {self.folder}: {error.strerror}: make room, or name another folder") from None
            finally:
                if lock is not None:
                    lock.release()
            self.width = width
        drop_layers(teacher.module.model)
        return CachedModel(teacher.module, ranks.device, self)

    def _make(self, teacher: FrozenModel, width: int, ranks: Ranks) -> None:
        """Compute all states, each data-parallel rank its share, and write them."""
        temporary = self.folder / TEMPORARY
        if ranks.is_main:
            with open(temporary, "wb") as file:
                file.truncate(int(self.offsets[-1]) * width * self.dtype.itemsize)
        ranks.barrier()
        own = range(ranks.dp_rank, len(self.examples), ranks.dp_size) if ranks.tp_rank == 0 else range(0)
        bar = Progress("teacher cache", len(own), ranks.is_main, unit="example")
        with open(temporary, "r+b") as file:
            for first in range(0, len(own), CHUNK):
                indices = own[first : first + CHUNK]
                for index, states in self._states(teacher, indices, ranks.device):
                    file.seek(int(self.offsets[index]) * width * self.dtype.itemsize)
                    file.write(states.contiguous().view(torch.uint8).numpy().tobytes())
                bar.update(len(indices))
        bar.close()
        sync_file(temporary)
        ranks.barrier()
        if ranks.is_main:
            os.replace(temporary, self.folder / "states.bin")
            write_json(self.folder / "manifest.json", {**self.identity, "width": width})
        ranks.barrier()

    def _states(self, teacher: FrozenModel, indices: Sequence[int], device: torch.device) -> list[tuple[int, Tensor]]:
        """Compute the states of some examples: pairs of index and `(response tokens, hidden)`, on the host."""
        chosen = [self.examples[index] for index in indices]
        pairs = [example.prompt for example in chosen], [example.response for example in chosen]
        result: list[tuple[int, Tensor]] = []
        for batch in make_micro_batches(*pairs, [0.0] * len(chosen), self.token_budget, device):
            lengths = [len(chosen[member].response) for member in batch.members]
            parts = torch.split(teacher.hidden_states(batch).cpu(), lengths)
            result += zip([indices[member] for member in batch.members], parts)
        return result


class CachedModel(FrozenModel):
    """A teacher whose states on the data's responses are read from a file. Only its output head is used."""

    def __init__(self, model: LanguageModel, device: torch.device, cache: TeacherCache) -> None:
        super().__init__(model, device)
        count, self.offsets, self.device = int(cache.offsets[-1]), cache.offsets, device
        path, size = str(cache.folder / "states.bin"), count * cache.width
        self.states = torch.from_file(path, shared=False, size=size, dtype=cache.dtype).view(count, cache.width)

    def hidden_states(self, batch: MicroBatch) -> Tensor:
        """Read the hidden states that predict the response tokens, `(tokens, hidden)`."""
        parts = [self.states[self.offsets[i] : self.offsets[i + 1]] for i in batch.examples]
        return to_device(torch.cat(parts), self.device)
