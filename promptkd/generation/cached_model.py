"""A model that reads prompts and then one token of each sequence at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from promptkd.generation.kv_cache import GrowingCache, RowMoves
from promptkd.models.wrapper import LMHead

Head = Callable[[Tensor], Tensor]


def aligned(positions: int) -> int:
    """Round up to a multiple of 16, for which CUDA's attention kernels do not pad the mask themselves."""
    return -(-positions // 16) * 16


class CachedModel:
    """A model with its output head, and the key-value cache and attention mask of one batch.

    Args:
        model: The model, in eval mode.
        head: From `decoding_head`.
        padding: 0 for padding, 1 for all positions of prompts and responses, int64 `(batch, length)`.
        width: Positions of the prompts.
    """

    def __init__(self, model: PreTrainedModel, head: Head, padding: Tensor, width: int) -> None:
        self.model, self.head = model, head
        batch, length = padding.shape
        self.cache = GrowingCache(model.config, length)
        self.padding = padding
        self.mask: Tensor | None = None  # 0 for positions that hold a token, -inf for others
        if takes_explicit_mask(model, self.cache):
            self.mask = padding.new_full((batch, 1, 1, aligned(length)), -torch.inf, dtype=model.dtype)
            self.mask[:, 0, 0, :width].masked_fill_(padding[:, :width].bool(), 0)

    def read_prompts(self, inputs: dict[str, Tensor], position_ids: Tensor) -> Tensor:
        """Read the prompts. Return the hidden states of their last positions, `(batch, hidden)`."""
        return self._forward(inputs, self.padding[:, : position_ids.size(1)], position_ids)

    def read_tokens(self, tokens: Tensor, position_ids: Tensor, position: Tensor, read: int) -> Tensor:
        """Read the next token of each sequence. Return the hidden states, `(batch, hidden)`.

        Args:
            tokens: Token ids, `(batch, 1)`.
            position_ids: The tokens' positions in their sequences, `(batch, 1)`.
            position: The tokens' position in the cache, int64 `(1,)`.
            read: The same position, as the host knows it.
        """
        if self.mask is None:
            return self._forward({"input_ids": tokens}, self.padding[:, : read + 1], position_ids)
        self.mask.index_fill_(-1, position, 0)
        width, _ = self.cache.get_mask_sizes(1, 0)
        return self._forward({"input_ids": tokens}, self.mask[..., :width], position_ids)

    def keep(self, moves: RowMoves) -> None:
        """Keep only some sequences of the batch."""
        self.cache.keep(moves)
        self.padding = moves(self.padding)
        self.mask = None if self.mask is None else moves(self.mask)

    def _forward(self, inputs: dict[str, Tensor], mask: Tensor, position_ids: Tensor) -> Tensor:
        return self.model.base_model(
            **inputs, attention_mask=mask, position_ids=position_ids, past_key_values=self.cache, use_cache=True
        ).last_hidden_state[:, -1]


def decoding_head(model: PreTrainedModel) -> Head:
    """Return the function from hidden states `(batch, hidden)` to logits.

    On a CPU it multiplies by a transposed copy of the weight. For the few sequences of a decoding step, that is twice
    as fast as the weight itself. On a GPU it may need a padded copy, see `LMHead.aligned`.
    """
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear:  # such as a quantized one
        return head
    if model.device.type != "cpu":
        return LMHead(head.weight, head.bias).aligned().logits
    transposed = head.weight.t().contiguous()
    if head.bias is None:
        return lambda hidden: hidden @ transposed
    return lambda hidden: torch.addmm(head.bias, hidden, transposed)


def takes_explicit_mask(model: PreTrainedModel, cache: GrowingCache) -> bool:
    """Whether the model takes a float mask `(batch, 1, 1, positions)` for a token that attends to all before it.

    transformers passes such a mask on unchanged. From a mask of padding, it would make one at each token, and read it
    on the host. Families that compute ALiBi from the mask of padding cannot do without it.
    """
    config = model.config.get_text_config()
    alibi = config.model_type == "bloom" or getattr(config, "alibi", False)
    kernels = config._attn_implementation in ("sdpa", "eager")
    compiles = bool(model._can_compile_fullgraph)  # transformers declares that a mask of this kind is enough
    return cache.is_plain and compiles and kernels and not alibi and not getattr(model, "is_quantized", False)
