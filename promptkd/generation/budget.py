"""How many tokens one decoding batch may have, from what the device has free."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from promptkd.distributed.ranks import Ranks
from promptkd.utils.memory import decoding_tokens, layer_work


def decoding_budget(models: Sequence[PreTrainedModel], length: int, ranks: Ranks, given: int | None = None) -> int:
    """Return the tokens, rows x (longest prompt + new tokens), of one decoding batch; the same on all ranks.

    All ranks call it, where the models' weights are complete and before the batch is there. What is decoded does not
    depend on it, but for rounding.

    Args:
        models: The models that decode together, each with a cache of its own.
        length: Tokens of the longest prompt and its answer together.
        ranks: The ranks that have to agree; the smallest budget of them counts.
        given: The user's option. It is returned as it is.
    """
    if given is not None:
        return given
    device, cache, work = models[0].device, 0.0, 0.0
    for model in models:
        config = model.config.get_text_config()
        group = getattr(model, "tensor_parallel_group", None)
        size = model.dtype.itemsize / (1 if group is None else group.size)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        cache += 2 * config.num_hidden_layers * heads * width * size
        inner = next(filter(None, (getattr(config, name, None) for name in _INNER)), 4 * config.hidden_size)
        queries = config.num_attention_heads * width
        work = max(work, model.dtype.itemsize * layer_work(config.hidden_size, inner, queries, gated=True))
    config = models[0].config.get_text_config()
    free = _free_memory(device) if device.type == "cuda" else None
    own = decoding_tokens(device.type, free, length, cache, work, config.num_hidden_layers, config.vocab_size)
    return -ranks.all_reduce_max(-own)


_INNER = ("intermediate_size", "ffn_dim", "n_inner")  # what configurations call the feed-forward width


def _free_memory(device: torch.device) -> int:
    """Return the bytes of a GPU that nothing holds, those included that torch's allocator keeps for later use."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
