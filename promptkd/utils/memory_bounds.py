"""What bounds the memory of decoding and of the losses: constants and arithmetic, for the core and for the plan.

Nothing here needs torch, so that tools/plan.py can use it.
"""

from __future__ import annotations

# Logits that exist at a time, from one matrix product: 128 positions of GPT-2's vocabulary, 1024 on a GPU.
CHUNK = {"cpu": 128 * 50257, "cuda": 1024 * 50257}
# Passes over the vocabulary go block by block within them; on a CPU few enough positions to stay in cache.
BLOCK = {"cpu": 16, "cuda": 1024}

CACHE_ROOM = 64  # positions that a key-value cache grows by
# Layers that a cache takes beside the model's own: a layer that drops rows is there in its old buffer, as the rows
# that stay, and in its new buffer.
MOVING_LAYERS = 2
# Bytes that the keys and values of one decoding batch may take on a CPU: decoding reads all weights for each token,
# so the more rows share that, the better, until the cache is as large as a small model.
CPU_CACHE = 1 << 29
# Share of a GPU's free memory that one decoding batch may plan on. The rest is for what is not counted here: temporary
# tensors of attention, and free memory in pieces that are too small.
GPU_SHARE = 0.5
# Bytes for each row and entry of the vocabulary when the next token is drawn, at most: logits, and with top-p float32
# copies, int64 orders and masks.
SAMPLING_BYTES = 48


def positions_per_chunk(vocabulary: int, device: str) -> int:
    """Return how many positions' logits the losses compute at a time."""
    return max(CHUNK[device] // vocabulary, 1)


def cache_capacity(prompt: int, new_tokens: int) -> int:
    """Return the positions that a cache has room for in the end: it grows by CACHE_ROOM whenever it is full.

    Args:
        prompt: Tokens of the longest prompt, a prefix included.
        new_tokens: Tokens that are decoded. The last one is predicted but never read.
    """
    held = prompt + max(new_tokens - 1, 0)
    moves = -(-max(held - prompt - CACHE_ROOM, 0) // (CACHE_ROOM + 1))
    return prompt + CACHE_ROOM + moves * (CACHE_ROOM + 1)


def rows_on_gpu(free: float, length: int, cache: float, work: float, layers: int, vocabulary: int) -> int:
    """Return how many rows of `length` tokens decode within a GPU's free memory; at least 1.

    Args:
        free: Bytes that nothing else holds.
        length: Tokens of prompt and answer together.
        cache: Bytes of a token's keys and values in all layers, of all models that decode together.
        work: Bytes of a prompt's token inside a layer when the prompts are read.
        layers: Layers of the model.
        vocabulary: Entries of the vocabulary.
    """
    a_row = cache * (length + CACHE_ROOM) * (1 + MOVING_LAYERS / layers) + work * length + SAMPLING_BYTES * vocabulary
    return max(int(free * GPU_SHARE // a_row), 1)


def decoding_tokens(
    device: str, free: float | None, length: int, cache: float, work: float, layers: int, vocabulary: int
) -> int:
    """Return the tokens, rows x length, of one decoding batch; at least 1. Arguments are those of `rows_on_gpu`."""
    if device == "cpu":
        return max(int(CPU_CACHE // cache), 1)
    return length * rows_on_gpu(free, length, cache, work, layers, vocabulary)


def layer_work(width: int, inner: int, queries: int, gated: bool) -> int:
    """Return the numbers that exist at once for a token inside one layer, in a forward pass without gradient."""
    return max(3 * width + (3 if gated else 2) * inner, 3 * width + 3 * queries)
