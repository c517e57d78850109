"""How the tree backend cuts a batch: every document into tiles, tiles into a binary tree.

A document starts at a tile boundary and a tile holds whole blocks, so no block straddles two tiles and no
tile holds two documents, whatever the lengths. Clean keys that a row of tile i sees are then: part of its
own tile, and all of the tiles before it in the document. The second part is a sum of rectangles without any
mask: at level s = 1, 2, 4, .. the rows of each odd run of s tiles against the keys of the even run of s
tiles to its left.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bdtrain_kernels.block_attention.reference import Layout
from bdtrain_kernels.errors import KernelShapeError

HIDDEN = -1.0e30
"""Added to a score that must not be seen. Finite, so that a row whose keys in a piece are all hidden stays
finite there; its weight in the merge with a visible piece is exactly 0 in every float type of the
computation."""

MIN_TILE = 32
"""Tiles of at least this many tokens: below it the calls are too small (kernels/bench/cpu_attention.py)."""


@dataclass(frozen=True)
class Span:
    """Equal runs of tiles, ``count`` of them, each ``length`` tiles long.

    Attributes:
        count: number of runs.
        length: tiles in a run.
        offset: first tile of the first run, when the runs lie ``step`` tiles apart (and can be viewed
            without a copy).
        step: tiles between the starts of runs; 0 when irregular.
        index: tile numbers of all runs in order, int64 [count * length]; None when regular.
    """

    count: int
    length: int
    offset: int
    step: int
    index: Tensor | None

    def take(self, tiles: Tensor) -> Tensor:
        """The runs of [heads, tiles, rows, ..] as [heads * count, length * rows, ..]: a view when regular."""
        heads, _, rows = tiles.shape[:3]
        if self.index is None:
            runs = tiles.view(heads * self.count, self.step, *tiles.shape[2:])
            runs = runs[:, self.offset : self.offset + self.length]
        else:
            runs = tiles.index_select(1, self.index)
        return runs.view(heads * self.count, self.length * rows, *tiles.shape[3:])

    def put(self, tiles: Tensor, values: Tensor) -> None:
        """Write back what ``take`` gave, if it was a copy."""
        if self.index is not None:
            tiles.index_copy_(1, self.index, values.view(tiles.shape[0], -1, *tiles.shape[2:]))

    def add(self, tiles: Tensor, values: Tensor) -> None:
        """Add ``values`` [heads * count, length * rows, ..] to the runs of ``tiles``."""
        if self.index is None:
            self.take(tiles).add_(values)
        else:
            tiles.index_add_(1, self.index, values.view(tiles.shape[0], -1, *tiles.shape[2:]))


@dataclass(frozen=True)
class Strip:
    """One document, or the one document that every row is; its tiles follow each other, row by row.

    Attributes:
        row: first row of the batch.
        rows: number of rows.
        start: first position of the document.
        length: its tokens.
        first_tile: its first tile.
        count: its tiles in each row.
    """

    row: int
    rows: int
    start: int
    length: int
    first_tile: int
    count: int


@dataclass(frozen=True)
class Tiling:
    """The tiles of a batch and the tree over them.

    Attributes:
        batch: rows of the batch.
        seq: tokens of a stream.
        tile: tokens of a tile.
        num_tiles: tiles of all documents of all rows.
        one_block: a tile holds one block: inside a tile all noisy keys of the copy are seen, and no clean
            key.
        noisy_own: added to scores of noisy rows against noisy keys of their tile, float32 [tiles or 1, tile
            or 1, tile]; None when all are seen.
        noisy_clean: the same for noisy rows against clean keys of their tile; None with ``one_block`` (none
            is seen).
        clean_clean: the same for clean rows against clean keys of their tile; None when all are seen.
        strips: documents that lie alike, in the order of their tiles.
        levels: (even runs, odd runs) of every level.
    """

    batch: int
    seq: int
    tile: int
    num_tiles: int
    one_block: bool
    noisy_own: Tensor | None
    noisy_clean: Tensor | None
    clean_clean: Tensor | None
    strips: tuple[Strip, ...]
    levels: tuple[tuple[Span, Span], ...]


def choose_tile(block_size: int, longest: int) -> int:
    """Tokens of a tile: whole blocks, at least ``MIN_TILE`` of them, and none beyond the longest document."""
    tile = block_size if block_size >= MIN_TILE else block_size * -(-MIN_TILE // block_size)
    return min(tile, longest)


def build_tiling(layout: Layout, tile: int | None = None) -> Tiling:
    """Cut a batch into tiles.

    Reads the layout's vectors on the host where rows hold several documents (CPU tensors: no wait).

    Args:
        layout: blocks and documents; blocks start at each document's first token and only its last one is
            short.
        tile: tokens of a tile, a multiple of the block size or at least the longest document; None chooses.

    Returns:
        The tiling, with tensors on the layout's device.

    Raises:
        KernelShapeError: if the blocks are not laid so, or ``tile`` cuts a block.
    """
    batch, seq = layout.block_start.shape
    fragments = [(row, 0, seq) for row in range(batch)] if layout.single_document else _fragments(layout)
    longest = max(length for _, _, length in fragments)
    if tile is None:
        tile = choose_tile(layout.block_size, longest)
    tile = min(tile, longest)
    if tile % layout.block_size and tile < longest:
        raise KernelShapeError(
            f"tile={tile} cuts blocks of block_size={layout.block_size}; give a multiple of it"
        )
    counts = [-(-length // tile) for _, _, length in fragments]
    num_tiles = sum(counts)
    device = layout.block_start.device
    lengths = [
        min(tile, length - i * tile)
        for (_, _, length), n in zip(fragments, counts, strict=True)
        for i in range(n)
    ]
    filled = torch.tensor(lengths, device=device)
    padding = None
    if min(lengths) < tile:
        padding = torch.arange(tile, device=device) >= filled.unsqueeze(1)  # [tiles, tile]
    one_block = tile <= layout.block_size
    noisy_own, noisy_clean, clean_clean = _tile_masks(layout.block_size, tile, padding, one_block, device)
    return Tiling(
        batch=batch,
        seq=seq,
        tile=tile,
        num_tiles=num_tiles,
        one_block=one_block,
        noisy_own=noisy_own,
        noisy_clean=noisy_clean,
        clean_clean=clean_clean,
        strips=_strips(fragments, counts, alike=batch if layout.single_document else 0),
        levels=_levels(counts, num_tiles, device),
    )


def _fragments(layout: Layout) -> list[tuple[int, int, int]]:
    """(row, first position, length) of every document, after checking that blocks lie as the tiling needs."""
    seq = layout.block_start.shape[1]
    position = torch.arange(seq, dtype=torch.int32, device=layout.block_start.device)
    start = layout.doc_start + (position - layout.doc_start) // layout.block_size * layout.block_size
    end = torch.minimum(start + layout.block_size, layout.doc_end)
    if not (torch.equal(start, layout.block_start) and torch.equal(end, layout.block_end)):
        raise KernelShapeError(
            f"blocks are not all block_size={layout.block_size} from their document's start on "
            "(its last one aside); use backend='dense'"
        )
    first = (layout.doc_start == position).nonzero()
    length = (layout.doc_end - layout.doc_start)[first[:, 0], first[:, 1]]
    return [(row, at, n) for (row, at), n in zip(first.tolist(), length.tolist(), strict=True)]


def _strips(fragments: list[tuple[int, int, int]], counts: list[int], *, alike: int) -> tuple[Strip, ...]:
    """A strip per document, or one over ``alike`` rows."""
    if alike:
        return (Strip(row=0, rows=alike, start=0, length=fragments[0][2], first_tile=0, count=counts[0]),)
    strips, first = [], 0
    for (row, start, length), count in zip(fragments, counts, strict=True):
        strips.append(Strip(row=row, rows=1, start=start, length=length, first_tile=first, count=count))
        first += count
    return tuple(strips)


def _tile_masks(
    block_size: int, tile: int, padding: Tensor | None, one_block: bool, device: torch.device
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Additive masks inside a tile; blocks lie the same way in every tile, only the padding differs."""

    def additive(seen: Tensor | None) -> Tensor | None:
        if padding is not None:
            real = ~padding.unsqueeze(1)  # [tiles, 1, tile]
            seen = real if seen is None else seen & real
        if seen is None:
            return None
        zero = torch.zeros(seen.shape, dtype=torch.float32, device=device)
        return zero.masked_fill_(~seen, HIDDEN)

    if one_block:
        everything = additive(None)
        return everything, None, everything
    block = torch.arange(tile, device=device) // block_size
    query, key = block.unsqueeze(1), block.unsqueeze(0)
    return (
        additive((query == key).unsqueeze(0)),
        additive((query > key).unsqueeze(0)),
        additive((query >= key).unsqueeze(0)),
    )


def _levels(counts: list[int], num_tiles: int, device: torch.device) -> tuple[tuple[Span, Span], ...]:
    """Pairs of runs at every level, in as few and as regular groups as the documents allow."""
    first = [0]
    for count in counts:
        first.append(first[-1] + count)
    alike = len(set(counts)) == 1
    levels = []
    size = 1
    while size < max(counts):
        groups: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for begin, count in zip(first, counts, strict=False):
            for even in range(0, count - size, 2 * size):
                length = min(size, count - even - size)
                # Documents of one shape: a group per place in the document is regular even where all
                # together are not.
                place = even if alike and count % (2 * size) else 0
                groups.setdefault((length, place), []).append((begin + even, begin + even + size))
        for (length, _), pairs in groups.items():
            evens, odds = zip(*pairs, strict=True)
            levels.append((_span(evens, size, num_tiles, device), _span(odds, length, num_tiles, device)))
        size *= 2
    return tuple(levels)


def _span(starts: tuple[int, ...], length: int, num_tiles: int, device: torch.device) -> Span:
    """A view of regular runs if they fill the tiles evenly, else their index."""
    count = len(starts)
    step, offset = num_tiles // count, starts[0]
    regular = num_tiles % count == 0 and offset + length <= step
    if regular and all(start == offset + i * step for i, start in enumerate(starts)):
        return Span(count=count, length=length, offset=offset, step=step, index=None)
    begin = torch.tensor(starts, device=device).unsqueeze(1)
    index = (begin + torch.arange(length, device=device)).flatten()
    return Span(count=count, length=length, offset=0, step=0, index=index)
