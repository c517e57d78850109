"""Which stretch of a saved shard holds which element of a live one: arithmetic on row-major positions.

Tensor parallelism of size n cuts a parameter along one dimension. A parameter of stride s is s matrices
stacked along it (gate and up of a SwiGLU), each cut by itself: rank r holds [gate_r; up_r]. ``outer`` is the
product of the dimensions before that one, and ``width`` take in those after it. Then

    serial tensor      [outer, stride, size, width]
    shard of rank r    [outer, stride, width] = serial[:, :, r, :]

so a shard's row (one outer index) is ``stride`` runs, each contiguous in the serial row as well. Everything
here follows from that view; ``bdtrain.model.init.take_shard`` is the same rule on tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bdtrain.errors import ShapeError


@dataclass(frozen=True)
class Cut:
    """How a parameter is cut.

    Attributes:
        outer: product of the dimensions before the one that is cut.
        stride: matrices stacked along it.
        size: ranks that share it.
        width: elements of one contiguous run.
    """

    outer: int
    stride: int
    size: int
    width: int

    @property
    def row(self) -> int:
        """Elements of one row of a shard."""
        return self.stride * self.width

    @property
    def shard(self) -> int:
        """Elements of a shard."""
        return self.outer * self.row


@dataclass(frozen=True)
class Rectangle:
    """Elements that lie as a rectangle both in one saved shard and in the live one.

    Attributes:
        rank: whose saved shard.
        rows: first row and the one after the last; the same in both.
        saved: first column in the saved shard's row and the one after the last.
        live: the same in the live shard's row.
    """

    rank: int
    rows: tuple[int, int]
    saved: tuple[int, int]
    live: tuple[int, int]


def make_cut(full_shape: Sequence[int], dim: int | None, stride: int, size: int) -> Cut:
    """The cut of a parameter.

    Args:
        full_shape: of the serial tensor.
        dim: dimension that is cut, None for a replicated parameter.
        stride: matrices stacked along ``dim``.
        size: ranks.

    Raises:
        ShapeError: if the dimension is not there or cannot be divided.
    """
    if dim is None or size == 1:
        return Cut(1, 1, 1, math.prod(full_shape))
    if not 0 <= dim < len(full_shape) or stride < 1 or size < 1 or full_shape[dim] % (stride * size):
        raise ShapeError(
            f"a tensor of shape {tuple(full_shape)} cannot be cut into {size} parts of {stride} matrices "
            f"along dimension {dim}"
        )
    inner = math.prod(full_shape[dim + 1 :])
    return Cut(math.prod(full_shape[:dim]), stride, size, full_shape[dim] // (stride * size) * inner)


def rectangles(
    live: Cut, live_rank: int, start: int, count: int, saved: Cut
) -> tuple[Cut, Cut, list[Rectangle]]:
    """Where the elements ``start`` to ``start + count`` of a live shard lie in the saved shards.

    Args:
        live: how the live parameter is cut.
        live_rank: whose shard is to be filled.
        start: first element wanted, in the flattened live shard.
        count: elements wanted.
        saved: how the saved parameter is cut; of the same serial shape.

    Returns:
        Both cuts in the view that the rectangles use, and the rectangles; each wanted element is in one.

    Raises:
        ShapeError: if the two are cut along different dimensions.
    """
    if live == saved:
        # The same slices: no arithmetic, one stretch.
        flat = Cut(1, 1, live.size, live.shard)
        stretch = (start, start + count)
        return flat, flat, [Rectangle(live_rank, (0, 1), stretch, stretch)]
    outer = saved.outer if live.size == 1 else live.outer
    live, saved = _as_rows(live, outer), _as_rows(saved, outer)
    found = [
        piece
        for rows, columns in _row_spans(start, count, live.row)
        for piece in _row_rectangles(live, live_rank, saved, rows, columns)
    ]
    return live, saved, found


def _as_rows(cut: Cut, outer: int) -> Cut:
    if cut.outer == outer:
        return cut
    if cut.size == 1:
        return Cut(outer, 1, 1, cut.shard // outer)
    raise ShapeError("the checkpoint and the run cut this parameter along different dimensions")


def _row_spans(start: int, count: int, row: int) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """A stretch as rows and columns: the rest of its first row, whole rows, the beginning of its last."""
    end = start + count
    while start < end:
        first, column = divmod(start, row)
        if column or end - start < row:
            stop = min(row, column + end - start)
            yield (first, first + 1), (column, stop)
            start += stop - column
        else:
            last = end // row
            yield (first, last), (0, row)
            start = last * row


def _row_rectangles(
    live: Cut, live_rank: int, saved: Cut, rows: tuple[int, int], columns: tuple[int, int]
) -> Iterator[Rectangle]:
    """The columns of some live rows, by the saved shard that holds them."""
    begin, end = columns
    while begin < end:
        matrix, inside = divmod(begin, live.width)
        serial = (matrix * live.size + live_rank) * live.width + inside
        unit, offset = divmod(serial, saved.width)
        saved_matrix, rank = divmod(unit, saved.size)
        length = min(end - begin, live.width - inside, saved.width - offset)
        column = saved_matrix * saved.width + offset
        yield Rectangle(rank, rows, (column, column + length), (begin, begin + length))
        begin += length
