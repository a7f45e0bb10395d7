"""Which ranges of the source shards make up a shard of another tensor-parallel size."""

from __future__ import annotations

import math


def pieces(length: int, blocks: int, source: int, target: int, rank: int) -> list[tuple[int, int, int]]:
    """List which ranges of the source shards make up a target shard.

    The sizes need not divide each other. Each block is divided into as many chunks as the least common multiple of
    the sizes, so that no chunk is split between two shards.

    Args:
        length: Length of the complete axis.
        blocks: Number of equal blocks along the axis, each of which is cut separately.
        source: Tensor-parallel size of the source.
        target: Tensor-parallel size of the target.
        rank: Rank of the target shard.

    Returns:
        (source rank, start, stop) within that shard, in the order of the target.
    """
    chunks = math.lcm(source, target)  # per block
    chunk = length // blocks // chunks
    result = []
    for block in range(blocks):
        for index in range(rank * chunks // target, (rank + 1) * chunks // target):
            shard, position = divmod(index, chunks // source)
            start = (block * (chunks // source) + position) * chunk
            result.append((shard, start, start + chunk))
    return result
