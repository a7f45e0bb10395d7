"""Which ranges of a complete axis each tensor-parallel shard holds, and how to assemble one shard from others."""

from __future__ import annotations


def spans(length: int, blocks: int, size: int, rank: int) -> list[tuple[int, int]]:
    """List the ranges [start, stop) of a complete axis that shard `rank` of `size` holds, in order."""
    block = length // blocks
    part = block // size
    return [(index * block + rank * part, index * block + (rank + 1) * part) for index in range(blocks)]


def pieces(length: int, blocks: int, source: int, target: int, rank: int) -> list[tuple[int, int, int]]:
    """List which ranges of the source shards make up a target shard.

    The sizes need not divide each other: a range may begin in one source shard and end in the next.

    Args:
        length: Length of the complete axis.
        blocks: Number of blocks along the axis.
        source: Tensor-parallel size of the source.
        target: Tensor-parallel size of the target.
        rank: Rank of the target shard.

    Returns:
        (source rank, start, stop) within that shard, in the order of the target.
    """
    result = []
    for start, stop in spans(length, blocks, target, rank):
        overlaps = []
        for shard in range(source):
            offset = 0  # where the current span begins within the source shard
            for low, high in spans(length, blocks, source, shard):
                left, right = max(start, low), min(stop, high)
                if left < right:
                    overlaps.append((left, (shard, offset + left - low, offset + right - low)))
                offset += high - low
        result += [piece for _, piece in sorted(overlaps)]
    return result
