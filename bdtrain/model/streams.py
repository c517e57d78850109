"""The order of the rows when ranks split the sequence between them.

Streams lie one after the other: noisy_1 .. noisy_C, clean. Ranks of sequence parallelism split the sequence
in equal runs of rows, and a rank should own noisy and clean rows of the same positions: so that in the last
layer each drops its clean rows by itself. Hence the chunk-major order: for each of S chunks of the positions
the streams' parts in their order. One chunk is the plain order.
"""

from __future__ import annotations

from torch import Tensor


def to_chunks(x: Tensor, *, chunks: int, seq: int, dim: int = 0) -> Tensor:
    """From stream after stream to chunk after chunk.

    Args:
        x: rows along ``dim``, streams * seq of them.
        chunks: number S of chunks; it divides ``seq``.
        seq: tokens of a stream.
        dim: the axis of the rows.
    """
    if chunks == 1:
        return x
    parts = x.unflatten(dim, (-1, chunks, seq // chunks))
    return parts.transpose(dim, dim + 1).flatten(dim, dim + 2)


def to_streams(x: Tensor, *, chunks: int, seq: int, dim: int = 0) -> Tensor:
    """From chunk after chunk to stream after stream, the inverse of ``to_chunks``."""
    if chunks == 1:
        return x
    parts = x.unflatten(dim, (chunks, -1, seq // chunks))
    return parts.transpose(dim, dim + 1).flatten(dim, dim + 2)
