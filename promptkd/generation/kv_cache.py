"""A key-value cache that does not copy itself for each token and frees the memory of finished sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin

from promptkd.utils.memory import CACHE_ROOM


@dataclass(frozen=True)
class RowMoves:
    """The rows of a batch that stay. They become its first rows, and as few of them move as possible.

    Attributes:
        order: For each row that stays, its index before. int64, `(count,)`.
        targets: Rows that another row takes, int64.
        sources: The rows that take them, int64.
        frees: Whether smaller buffers replace those that rows have left.
    """

    order: Tensor
    targets: Tensor
    sources: Tensor
    frees: bool

    @classmethod
    def of(cls, order: list[int], frees: bool, device: torch.device) -> RowMoves:
        """Create the moves on a device, without waiting for it."""
        moved = [(new, old) for new, old in enumerate(order) if new != old]
        indices = torch.tensor([*order, *(new for new, _ in moved), *(old for _, old in moved)])
        if device.type == "cuda":
            indices = indices.pin_memory().to(device, non_blocking=True)
        stay, targets, sources = indices.split([len(order), len(moved), len(moved)])
        return cls(stay, targets, sources, frees)

    def move(self, rows: Tensor) -> None:
        """Move rows in place."""
        if len(self.targets):
            rows.index_copy_(0, self.targets, rows.index_select(0, self.sources))

    def __call__(self, rows: Tensor) -> Tensor:
        """Move rows in place, and return those that stay: a view, or a copy that lets the buffer go."""
        self.move(rows)
        rows = rows[: len(self.order)]
        return rows.clone() if self.frees else rows


class _GrowingLayer(DynamicLayer):
    """A layer whose keys and values, `(batch, heads, seq, head_dim)`, are views of a larger buffer."""

    _buffer: Tensor | None = None  # (2, batch, heads, capacity, head_dim): keys, then values
    _position: Tensor | None = None  # int64, (1,): where to write, once the cache is fixed

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append keys and values of new positions. Return those of all positions."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self._position is not None:
            keys, values = cast(Tensor, self.keys), cast(Tensor, self.values)
            return keys.index_copy_(2, self._position, key_states), values.index_copy_(2, self._position, value_states)
        start = self.get_seq_length()
        end = start + key_states.size(-2)
        buffer = self._buffer
        if buffer is None or end > buffer.size(-2):
            buffer = self._reallocate(key_states, start, end + CACHE_ROOM)
        rows = len(key_states)
        buffer[0, :rows, :, start:end], buffer[1, :rows, :, start:end] = key_states, value_states
        self.keys, self.values = buffer[0, :rows, :, :end], buffer[1, :rows, :, :end]
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of positions that attention sees, and the first of them."""
        return super().get_mask_sizes(0 if self._position is not None else query_length)

    def keep(self, moves: RowMoves) -> None:
        """Keep only some sequences of the batch."""
        if self._buffer is None:  # nothing was cached, as in layers that use another layer's keys
            return
        count, length = len(moves.order), cast(Tensor, self.keys).size(-2)
        moves.move(cast(Tensor, self.keys))
        moves.move(cast(Tensor, self.values))
        self.keys, self.values = self._buffer[0, :count, :, :length], self._buffer[1, :count, :, :length]
        if moves.frees:
            buffer = self._reallocate(self.keys, length, self._buffer.size(-2))
            self.keys, self.values = buffer[0, :, :, :length], buffer[1, :, :, :length]

    def fix(self, position: Tensor, length: int, capacity: int) -> None:
        """Keep `length` positions in a buffer of fixed capacity, and write the next ones where `position` says."""
        if self._buffer is not None:
            buffer = self._reallocate(cast(Tensor, self.keys), length, capacity)
            buffer[:, :, :, length:].zero_()  # A NaN would pass through the mask.
            self.keys, self.values = buffer.unbind()
            self._position = position

    def _reallocate(self, like: Tensor, length: int, capacity: int) -> Tensor:
        """Replace the buffer by one for sequences `like` these. Copy the first `length` positions."""
        batch, heads, _, head_dim = like.shape
        buffer = like.new_empty(2, batch, heads, capacity, head_dim)
        if length:
            for part, old in zip(buffer, (cast(Tensor, self.keys), cast(Tensor, self.values))):
                part[:, :, :length] = old[:batch, :, :length]
        self._buffer = buffer
        return buffer


class GrowingCache(DynamicCache):
    """A `DynamicCache` whose full-attention layers grow in place. Other layers are those of transformers.

    Args:
        config: The model's configuration.
        length: The largest number of positions. A layer whose sliding window holds them attends to all of them.
    """

    def __init__(self, config: PretrainedConfig | None = None, length: float = float("inf")) -> None:
        super().__init__(config=config)
        for i, layer in enumerate(self.layers):
            slides = type(layer) is DynamicSlidingWindowLayer and layer.sliding_window < length
            if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) and not slides:
                self.layers[i] = _GrowingLayer()
        if self.layer_class_to_replicate is DynamicLayer:
            self.layer_class_to_replicate = _GrowingLayer

    @property
    def is_plain(self) -> bool:
        """Whether every layer attends to all positions: none has a sliding window or a recurrent state."""
        return bool(self.layers) and all(type(layer) is _GrowingLayer for layer in self.layers)

    def keep(self, moves: RowMoves) -> None:
        """Keep only some sequences of the batch in every layer."""
        for layer in self.layers:
            if isinstance(layer, _GrowingLayer):
                layer.keep(moves)
            elif isinstance(layer, LinearAttentionCacheLayerMixin):
                layer.reorder_cache(cast(torch.LongTensor, moves.order))  # these layers have no other selection
            else:
                cast(DynamicLayer, layer).batch_select_indices(moves.order)

    def fix(self, position: Tensor, length: int, capacity: int) -> None:
        """Give every layer a buffer of fixed capacity. Only for a plain cache.

        Args:
            position: Where the next keys and values are written, int64 `(1,)`. The caller advances it.
            length: Positions that hold tokens now.
            capacity: Positions of the buffer. Attention sees all of them, so the mask has to exclude empty ones.
        """
        for layer in self.layers:
            cast(_GrowingLayer, layer).fix(position, length, capacity)


def takes_padding(model: PreTrainedModel) -> bool:
    """Whether the sequences of a batch may be padded on the left.

    Attention masks padding out. Convolutions and recurrent states read it, and families differ in how they handle
    that. Such models decode only sequences of equal length together.
    """
    return not any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in GrowingCache(model.config).layers)
