"""A key-value cache that does not copy itself for each token and frees the memory of finished sequences."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

from promptkd.utils.memory import CACHE_ROOM


class _GrowingLayer(DynamicLayer):
    """A layer whose keys and values, `(batch, heads, seq, head_dim)`, are views of a larger buffer."""

    _buffer: Tensor | None = None  # (2, batch, heads, capacity, head_dim): keys, then values

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append keys and values of new positions. Return those of all positions."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.size(-2)
        buffer = self._buffer
        if buffer is None or end > buffer.size(-2):
            buffer = self._reallocate(key_states, start, end + CACHE_ROOM)
        buffer[0, :, :, start:end], buffer[1, :, :, start:end] = key_states, value_states
        self.keys, self.values = buffer[0, :, :, :end], buffer[1, :, :, :end]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these sequences of the batch, in a buffer of their size."""
        if self._buffer is None:  # nothing was cached, as in layers that use another layer's keys
            return
        length = self.get_seq_length()
        keys, values = (cast(Tensor, each).index_select(0, indices) for each in (self.keys, self.values))
        buffer = self._reallocate(keys, 0, self._buffer.size(-2))
        buffer[0, :, :, :length], buffer[1, :, :, :length] = keys, values
        self.keys, self.values = buffer[0, :, :, :length], buffer[1, :, :, :length]

    def _reallocate(self, like: Tensor, length: int, capacity: int) -> Tensor:
        """Replace the buffer by one for sequences `like` these. Copy the first `length` positions."""
        batch, heads, _, head_dim = like.shape
        buffer = like.new_empty(2, batch, heads, capacity, head_dim)
        if length:
            buffer[0, :, :, :length], buffer[1, :, :, :length] = cast(Tensor, self.keys), cast(Tensor, self.values)
        self._buffer = buffer
        return buffer


class GrowingCache(DynamicCache):
    """A `DynamicCache` whose full-attention layers grow in place. Other layers are those of transformers."""

    def __init__(self, config: PretrainedConfig | None = None) -> None:
        super().__init__(config=config)
        self.layers = [_GrowingLayer() if type(layer) is DynamicLayer else layer for layer in self.layers]
        if self.layer_class_to_replicate is DynamicLayer:
            self.layer_class_to_replicate = _GrowingLayer

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these sequences of the batch in every layer."""
        for layer in self.layers:
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                layer.reorder_cache(cast(torch.LongTensor, indices))  # these layers have no other selection
            else:
                cast(DynamicLayer, layer).batch_select_indices(indices)


def takes_padding(model: PreTrainedModel) -> bool:
    """Whether the sequences of a batch may be padded on the left.

    Attention masks padding out. Convolutions and recurrent states read it, and families differ in how they handle
    that. Such models decode only sequences of equal length together.
    """
    return not any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in GrowingCache(model.config).layers)
