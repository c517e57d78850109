"""Between the caller's [batch, heads, streams * seq, head_dim], of any strides, and tiles.

Both packed forms have the canonical axes [kv_heads, tiles, streams, group, tile, head_dim]; rows are stored
in that order (a run of tiles is one run of rows), keys with the stream outermost (so that the clean keys of
a run of tiles are too).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bdtrain_kernels.block_attention.tiling import Strip, Tiling


def pack(
    x: Tensor, tiling: Tiling, *, kv_heads: int, streams: int, dtype: torch.dtype, stream_first: bool
) -> Tensor:
    """Copy tokens into tiles; slots without a token are zero.

    Args:
        x: [batch, heads, streams * seq, head_dim], any strides.
        tiling: the cut of the batch.
        kv_heads: key heads; heads = kv_heads * group.
        streams: streams of ``x``.
        dtype: dtype of the tiles.
        stream_first: store [streams, kv_heads, tiles, group, tile, head_dim] instead of the canonical order.

    Returns:
        Contiguous in the order asked for.
    """
    group, head_dim = x.shape[1] // kv_heads, x.shape[3]
    size = (kv_heads, tiling.num_tiles, streams, group, tiling.tile, head_dim)
    packed = x.new_empty(_stored(size) if stream_first else size, dtype=dtype)
    tiles = packed.permute(1, 2, 0, 3, 4, 5) if stream_first else packed
    tokens = _tokens(x, tiling, kv_heads, streams)
    for target, source in _matching(tiles, tokens, tiling):
        target.copy_(source)
    for strip in tiling.strips:
        rest = strip.length % tiling.tile
        if rest:
            # Finite, since hidden keys are multiplied by 0; and 0, since these rows of a gradient must add
            # nothing.
            _strip(tiles, strip)[:, :, -1, :, :, rest:].zero_()
    return packed


def unpack(
    packed: Tensor, tiling: Tiling, *, order: tuple[int, ...], dtype: torch.dtype, stream_first: bool
) -> Tensor:
    """Copy tiles back into tokens.

    Args:
        packed: from ``pack``, or results in its form.
        tiling: the cut of the batch.
        order: axes of the result from the slowest to the fastest in memory (``memory_order``).
        dtype: dtype of the result.
        stream_first: as in ``pack``.

    Returns:
        [batch, heads, streams * seq, head_dim].
    """
    tiles = packed.permute(1, 2, 0, 3, 4, 5) if stream_first else packed
    kv_heads, _, streams, group, _, head_dim = tiles.shape
    size = (tiling.batch, kv_heads * group, streams * tiling.seq, head_dim)
    inverse = [order.index(axis) for axis in range(4)]
    x = packed.new_empty([size[axis] for axis in order], dtype=dtype).permute(inverse)
    tokens = _tokens(x, tiling, kv_heads, streams)
    for source, target in _matching(tiles, tokens, tiling):
        target.copy_(source)
    return x


def memory_order(x: Tensor) -> tuple[int, ...]:
    """Axes of ``x`` from the slowest to the fastest in memory, so that a result can be laid out alike.

    ``empty_like`` would not do: it forgets the order of a view that has holes.
    """
    return tuple(sorted(range(x.dim()), key=lambda axis: -x.stride()[axis]))


def _stored(size: tuple[int, ...]) -> tuple[int, ...]:
    return (size[2], size[0], size[1], *size[3:])


def _tokens(x: Tensor, tiling: Tiling, kv_heads: int, streams: int) -> Tensor:
    """A view of ``x`` as [batch, seq, kv_heads, streams, group, head_dim]."""
    return x.unflatten(2, (streams, tiling.seq)).unflatten(1, (kv_heads, -1)).permute(0, 4, 1, 3, 2, 5)


def _strip(tiles: Tensor, strip: Strip) -> Tensor:
    """The tiles of a strip, [kv_heads, rows, tiles of a row, streams, group, tile, head_dim]."""
    end = strip.first_tile + strip.rows * strip.count
    return tiles[:, strip.first_tile : end].unflatten(1, (strip.rows, strip.count))


def _matching(tiles: Tensor, tokens: Tensor, tiling: Tiling) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of tiles and of the tokens that belong there: each strip's full tiles, then its short last one.

    Plain strided copies: gathering by an index took a third of the whole attention at seq 256.
    """
    for strip in tiling.strips:
        full, rest = divmod(strip.length, tiling.tile)
        own = tokens[strip.row : strip.row + strip.rows, strip.start : strip.start + strip.length]
        by_row = _strip(tiles, strip)
        if full:
            whole = own[:, : full * tiling.tile].unflatten(1, (full, tiling.tile))
            yield by_row[:, :, :full], whole.permute(3, 0, 1, 4, 5, 2, 6)
        if rest:
            yield by_row[:, :, full, :, :, :rest], own[:, full * tiling.tile :].permute(2, 0, 3, 4, 1, 5)
