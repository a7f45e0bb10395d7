"""How many tokens one decoding batch may hold, from the memory that the device has free."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from promptkd.distributed.device import free_memory
from promptkd.distributed.ranks import Ranks
from promptkd.models.tensor_parallel import group_of
from promptkd.utils.memory import decoding_tokens, layer_work
from promptkd.weights.families import field_names


def decoding_budget(models: Sequence[PreTrainedModel], length: int, ranks: Ranks, given: int | None = None) -> int:
    """Return the token budget of a decoding batch: sequences x (longest prompt + new tokens).

    All ranks call this and get the same budget. It changes speed and memory but no response, except for rounding.

    Args:
        models: The models that decode together, each with a cache of its own. Their weights are complete.
        length: Tokens of the longest prompt and its response together.
        ranks: The ranks that have to agree. The smallest budget of any of them counts.
        given: The user's option. It is returned unchanged.
    """
    if given is not None:
        return given
    cache_bytes, work_bytes = 0.0, 0.0
    for model in models:
        config = model.config.get_text_config()
        group = group_of(model)
        itemsize = model.dtype.itemsize
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        cache_bytes += 2 * config.num_hidden_layers * kv_heads * head_dim * itemsize / (group.size if group else 1)
        widths = (getattr(config, name, None) for name in field_names("ffn"))
        ffn = next(filter(None, widths), 4 * config.hidden_size)
        work_bytes = max(work_bytes, itemsize * layer_work(config.hidden_size, ffn, heads * head_dim, gated=True))
    device, config = models[0].device, models[0].config.get_text_config()
    free = free_memory(device)
    layers, vocab_size = config.num_hidden_layers, config.vocab_size
    own = decoding_tokens(device.type, free, length, cache_bytes, work_bytes, layers, vocab_size)
    return -ranks.all_reduce_max(-own)
