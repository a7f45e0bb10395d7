"""A key-value cache that neither copies itself for each token nor holds rows that have ended."""

from __future__ import annotations

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

from promptkd.utils.memory import CACHE_ROOM


class _GrowingLayer(DynamicLayer):
    """Keys and values [rows, heads, length, width] are views of larger buffers that fill up from the left."""

    _room: Tensor | None = None  # [2, rows, heads, capacity, width]

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before = self.get_seq_length()
        after = before + key_states.size(-2)
        if self._room is None or after > self._room.size(-2):
            self._move(key_states, before, after + CACHE_ROOM)
        self._room[0, :, :, before:after] = key_states
        self._room[1, :, :, before:after] = value_states
        self.keys, self.values = self._room[0, :, :, :after], self._room[1, :, :, :after]
        return self.keys, self.values

    def _move(self, like: Tensor, length: int, capacity: int) -> None:
        rows, heads, _, width = like.shape
        room = like.new_empty(2, rows, heads, capacity, width)
        if length:
            room[0, :, :, :length], room[1, :, :, :length] = self.keys, self.values
        self._room = room

    def batch_select_indices(self, indices: Tensor) -> None:
        if self._room is None:  # a layer that has seen nothing, as those that use another layer's keys
            return
        length = self.get_seq_length()
        kept = self.keys.index_select(0, indices), self.values.index_select(0, indices)
        self._move(kept[0], 0, self._room.size(-2))
        self._room[0, :, :, :length], self._room[1, :, :, :length] = kept
        self.keys, self.values = self._room[0, :, :, :length], self._room[1, :, :, :length]


class GrowingCache(DynamicCache):
    """DynamicCache whose full-attention layers grow in place; of other layers transformers' own are kept."""

    def __init__(self, config=None) -> None:
        super().__init__(config=config)
        for place, layer in enumerate(self.layers):
            if type(layer) is DynamicLayer:
                self.layers[place] = _GrowingLayer()
        if self.layer_class_to_replicate is DynamicLayer:
            self.layer_class_to_replicate = _GrowingLayer

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the batch rows `indices`, in all that a layer remembers."""
        for layer in self.layers:
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                layer.reorder_cache(indices)  # transformers has no selection of these, but this is one
            else:
                layer.batch_select_indices(indices)


def takes_padding(model: PreTrainedModel) -> bool:
    """Whether rows of a batch may be padded on the left.

    Attention masks padding out. A convolution or a recurrent state runs over it, and families differ in what they do
    about that, so rows of such models are decoded with others of the same length.
    """
    return not any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in GrowingCache(model.config).layers)
