"""Memory on the host and the device: glibc's allocator, and the sizes of decoding and of the losses.

The core and tools/plan.py share these sizes. Nothing here needs torch.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

# glibc reads these when a process starts. `keep_freed_memory` sets the same in a running process.
KEEP = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    "MALLOC_TOP_PAD_": str(1 << 28),
    "MALLOC_ARENA_MAX": "1",  # memory that one thread freed serves another: saves a tenth of a step's memory
}
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8  # malloc.h

# Logits of one matrix product: 128 positions of GPT-2's vocabulary, 1024 on a GPU.
CHUNK = {"cpu": 128 * 50257, "cuda": 1024 * 50257}
# Positions of one pass over the vocabulary; on a CPU few enough to stay in its cache.
BLOCK = {"cpu": 16, "cuda": 1024}

CACHE_ROOM = 64  # positions that a key-value cache grows by
# Extra layers of cache while a layer drops finished rows: its old buffer and its new one exist beside the copied rows.
MOVING_LAYERS = 2
# Bytes for the keys and values of one decoding batch on a CPU. Decoding reads all weights for each token, so larger
# batches are faster until the cache is as large as a small model.
CPU_CACHE = 1 << 29
# Share of a GPU's free memory for one decoding batch, or for the logits of a loss. The rest is for what is not counted
# here: attention's temporary tensors, the backward pass, and fragmentation.
GPU_SHARE = 0.5
# Smaller chunks of a GPU's logits would save little memory and take long.
LARGEST_TO_SMALLEST_CHUNK = 16
# Float32 copies of a block's logits that exist at once while a loss is computed.
LOSS_COPIES = 5
# Largest number of bytes for each row and vocabulary entry while the next token is drawn: logits, and with top-p also
# float32 copies, int64 orders and masks.
SAMPLING_BYTES = 48


def positions_per_chunk(
    vocabulary: int, device: str, free: float | None = None, itemsize: int = 4, references: int = 0
) -> int:
    """Return how many positions' logits the losses compute at a time; at least 1.

    On a GPU it is halved up to four times until the logits fit into GPU_SHARE of the free memory. The steps are that
    large so that a resumed run, which rarely finds the same free memory to the byte, computes in the same chunks.

    Args:
        vocabulary: Entries of the vocabulary.
        device: Type of the device.
        free: Free bytes of a GPU. None if memory is not the limit.
        itemsize: Bytes of a logit.
        references: Models whose logits are computed beside those of the trained one.
    """
    positions = max(CHUNK[device] // vocabulary, 1)
    least = max(positions // LARGEST_TO_SMALLEST_CHUNK, 1)
    if free is not None:
        while positions > least and loss_bytes(positions, vocabulary, device, itemsize, references) > free * GPU_SHARE:
            positions //= 2
    return positions


def loss_bytes(positions: int, vocabulary: int, device: str, itemsize: int, references: int) -> int:
    """Return the bytes of a chunk's logits of all models, and of the float32 copies of a block."""
    block = min(BLOCK[device], positions)
    return vocabulary * (itemsize * (1 + references) * positions + 4 * LOSS_COPIES * block)


def cache_capacity(prompt: int, new_tokens: int) -> int:
    """Return the final capacity of a cache in positions. It grows by CACHE_ROOM whenever it is full.

    Args:
        prompt: Tokens of the longest prompt, a prefix included.
        new_tokens: Tokens that are decoded. The last one is predicted but never read.
    """
    held = prompt + max(new_tokens - 1, 0)
    moves = -(-max(held - prompt - CACHE_ROOM, 0) // (CACHE_ROOM + 1))
    return prompt + CACHE_ROOM + moves * (CACHE_ROOM + 1)


def rows_on_gpu(free: float, length: int, cache: float, work: float, layers: int, vocabulary: int) -> int:
    """Return how many sequences of `length` tokens decode within a GPU's free memory; at least 1.

    Args:
        free: Free bytes.
        length: Tokens of prompt and answer together.
        cache: Bytes of a token's keys and values in all layers of all models that decode together.
        work: Bytes of a prompt's token inside a layer during the prompts' forward pass.
        layers: Layers of the model.
        vocabulary: Entries of the vocabulary.
    """
    keys_and_values = cache * (length + CACHE_ROOM) * (1 + MOVING_LAYERS / layers)
    sequence = keys_and_values + work * length + SAMPLING_BYTES * vocabulary
    return max(int(free * GPU_SHARE // sequence), 1)


def decoding_tokens(
    device: str, free: float | None, length: int, cache: float, work: float, layers: int, vocabulary: int
) -> int:
    """Return the tokens of one decoding batch, sequences x length; at least 1. See `rows_on_gpu`."""
    if device == "cpu" or free is None:
        return max(int(CPU_CACHE // cache), 1)
    return length * rows_on_gpu(free, length, cache, work, layers, vocabulary)


def layer_work(width: int, inner: int, queries: int, gated: bool) -> int:
    """Return how many numbers one token holds at once inside a layer, in a forward pass without gradients."""
    return max(3 * width + (3 if gated else 2) * inner, 3 * width + 3 * queries)


def keep_freed_memory() -> None:
    """Let glibc keep freed memory; otherwise page faults take a fifth of a step on a CPU.

    PROMPTKD_MALLOC=system in the environment turns this off. With other C libraries, nothing changes.
    """
    if os.environ.get("PROMPTKD_MALLOC") == "system":
        return
    mallopt = _glibc("mallopt")
    if mallopt is not None:
        mallopt(_ARENA_MAX, 1)
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)  # the largest int
        mallopt(_TOP_PAD, 1 << 28)


def give_back_freed_memory() -> None:
    """Let glibc return all memory that is free now, in spite of `keep_freed_memory`."""
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _glibc(name: str) -> Any:
    """Return a function of the C library, or None if that is not glibc."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
