"""What one pass with stratified mask counts says about every noise plan: records, cells and their moments.

A pass draws for each block of n maskable tokens a count k, uniformly on 1..n and stratified, masks a uniform
k-subset and keeps g, the summed negative log-likelihood of the masked tokens. A block's loss depends on its
masks only through the subset, so these records hold all that the mean and the variance of a plan's estimator
need; ``plan_variance.py`` turns them into numbers.

A cell is a pair (n, k); above 64 tokens the counts of one n fall into 64 bins of k / n. What is averaged in a
cell is h = g / k, the mean per masked token, and E[g_k] = k E[h], E[g_k^2] = k^2 E[h^2]. With one count per
cell that is exact. In a bin it takes h to be alike for all its counts, which the lowest bins of long blocks
obey least.

Records are kept one by one rather than as sums: 32,768 of them are 0.8 MB, a bootstrap over sequences needs
them, and sums that are formed in one order do not depend on who measured what.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bdtrain.errors import DataError, ShapeError

BINS = 64
"""Cells of one n, at most: above that many tokens, counts share cells."""

MIN_SAMPLES = 4
"""Blocks that each cell of an n must hold, else all blocks with that n are left out."""


@dataclass(frozen=True, eq=False)
class BlockRecords:
    """Measured blocks in canonical order: sequence ascending, then place in the row.

    Attributes:
        sequence: id of the sequence that the block belongs to, int64 [blocks], ascending.
        maskable: n, tokens of the block that can be masked, at least 1, int32 [blocks].
        masked: k, in 1..n, int32 [blocks].
        nll: g, summed negative log-likelihood of the masked tokens in nats, float64 [blocks].

    Raises:
        ShapeError: at construction, if the arrays are not vectors of one length.
        DataError: at construction, if they are out of order or out of range, or a value is not finite.
    """

    sequence: np.ndarray
    maskable: np.ndarray
    masked: np.ndarray
    nll: np.ndarray

    def __post_init__(self) -> None:
        """Copy into the stated types, read only, and refuse what cannot have been measured."""
        for name, dtype in _COLUMNS:
            column = np.array(getattr(self, name), dtype=dtype)
            column.setflags(write=False)
            object.__setattr__(self, name, column)
        shapes = {name: getattr(self, name).shape for name, _ in _COLUMNS}
        if self.sequence.ndim != 1 or len(set(shapes.values())) != 1:
            raise ShapeError(f"block records have columns of shapes {shapes}; all must be [blocks]")
        if (np.diff(self.sequence) < 0).any():
            raise DataError("block records are not in ascending order of sequence; sort them (stably) first")
        wrong = int(((self.masked < 1) | (self.masked > self.maskable)).sum())
        if wrong:
            raise DataError(
                f"{wrong} of {self.blocks} block records have a masked count outside 1 to their maskable "
                "tokens; leave out blocks without maskable tokens"
            )
        bad = int((~np.isfinite(self.nll)).sum())
        if bad:
            raise DataError(f"the loss of {bad} of {self.blocks} measured blocks is not finite")

    @property
    def blocks(self) -> int:
        """Number of records."""
        return len(self.sequence)

    @property
    def sequences(self) -> int:
        """Number of distinct sequences."""
        return len(np.unique(self.sequence))

    @classmethod
    def concatenate(cls, parts: Sequence[BlockRecords]) -> BlockRecords:
        """All records of ``parts`` in canonical order: the same bits for any split by sequences.

        Args:
            parts: at least one; no sequence in two of them.

        Raises:
            DataError: if there is no part, or two parts measured the same sequence.
        """
        if not parts:
            raise DataError("no block records to put together; at least one shard must have been measured")
        columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name, _ in _COLUMNS}
        order = np.argsort(columns["sequence"], kind="stable")
        whole = cls(**{name: column[order] for name, column in columns.items()})
        if whole.sequences != sum(part.sequences for part in parts):
            raise DataError("two parts of block records hold the same sequence; each must be measured once")
        return whole

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The columns by name, for ``numpy.savez`` or another process."""
        return {name: getattr(self, name) for name, _ in _COLUMNS}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> BlockRecords:
        """Read what ``to_arrays`` made.

        Raises:
            DataError: if a column is missing.
        """
        missing = [name for name, _ in _COLUMNS if name not in arrays]
        if missing:
            raise DataError(f"block records without {', '.join(missing)}; write BlockRecords.to_arrays")
        return cls(**{name: arrays[name] for name, _ in _COLUMNS})


_COLUMNS = (
    ("sequence", np.dtype(np.int64)),
    ("maskable", np.dtype(np.int32)),
    ("masked", np.dtype(np.int32)),
    ("nll", np.dtype(np.float64)),
)


@dataclass(frozen=True, eq=False)
class Cells:
    """Where each record belongs, and which records belong nowhere.

    Cells of one n are neighbours, those of ``sizes[i]`` at ``offsets[i]`` to ``offsets[i + 1]``.

    Attributes:
        sizes: the values of n that have enough blocks in each of their cells, ascending, int64 [sizes].
        offsets: int64 [sizes + 1].
        cell: of each record, int64 [blocks]; -1 where its n is left out.
        sequence_index: row of each record's sequence in bootstrap weights, int64 [blocks].
        sequences: number of distinct sequences, left out blocks included.
        left_out: (n, blocks) of every n that is left out.
        blocks_share: covered blocks over all.
        tokens_share: maskable tokens of covered blocks over all.
    """

    sizes: np.ndarray
    offsets: np.ndarray
    cell: np.ndarray
    sequence_index: np.ndarray
    sequences: int
    left_out: tuple[tuple[int, int], ...]
    blocks_share: float
    tokens_share: float

    @property
    def count(self) -> int:
        """Number of cells."""
        return int(self.offsets[-1])

    def of_size(self, n: int) -> slice | None:
        """The cells of blocks with n maskable tokens; None if they are left out."""
        at = np.flatnonzero(self.sizes == n)
        return slice(int(self.offsets[at[0]]), int(self.offsets[at[0] + 1])) if len(at) else None


def build_cells(records: BlockRecords, *, min_samples: int = MIN_SAMPLES) -> Cells:
    """Sort records into cells. Every plan is judged on the same cells.

    Args:
        records: what was measured.
        min_samples: records that every cell of an n must hold.

    Raises:
        DataError: if no n has enough records.
    """
    maskable = records.maskable.astype(np.int64)
    bins = np.minimum(maskable, BINS)
    within = (bins * records.masked - 1) // np.maximum(maskable, 1)
    rows = int(maskable.max(initial=0)) + 1
    filled = np.bincount(maskable * BINS + within, minlength=rows * BINS).reshape(rows, BINS)
    present = np.flatnonzero(filled.sum(axis=1))
    sizes = np.array([n for n in present if filled[n, : min(n, BINS)].min() >= min_samples], dtype=np.int64)
    if not len(sizes):
        raise DataError(
            f"{records.blocks} measured blocks are too few: no number of maskable tokens has {min_samples} "
            "blocks for each mask count; measure more sequences (refit.blocks)"
        )
    offsets = np.concatenate(([0], np.cumsum(np.minimum(sizes, BINS))))
    first = np.full(filled.shape[0], -1, dtype=np.int64)
    first[sizes] = offsets[:-1]
    covered = first[maskable] >= 0
    distinct, sequence_index = np.unique(records.sequence, return_inverse=True)
    return Cells(
        sizes=sizes,
        offsets=offsets,
        cell=np.where(covered, first[maskable] + within, -1),
        sequence_index=sequence_index.astype(np.int64),
        sequences=len(distinct),
        left_out=tuple((int(n), int(filled[n].sum())) for n in present if n not in sizes),
        blocks_share=float(covered.mean()),
        tokens_share=float(maskable[covered].sum() / maskable.sum()),
    )


def bin_starts(n: int) -> np.ndarray:
    """Index in k = 1..n (from 0) of the first count of each cell of n, int64 [min(n, 64)]."""
    bins = min(n, BINS)
    return np.arange(bins, dtype=np.int64) * n // bins


@dataclass(frozen=True, eq=False)
class Moments:
    """Moments of h = g / k by cell, under one set of weights of the sequences per draw.

    Attributes:
        count: weighted records, float64 [draws, cells].
        first: E[h], nats, float64 [draws, cells].
        second: E[h^2], float64 [draws, cells].
        variance: Var(h) with the factor count / (count - 1), which makes it unbiased for independent records,
            float64 [draws, cells].
        blocks: weighted blocks by n, float64 [draws, sizes].
    """

    count: np.ndarray
    first: np.ndarray
    second: np.ndarray
    variance: np.ndarray
    blocks: np.ndarray


def moments(records: BlockRecords, cells: Cells, weights: np.ndarray | None = None) -> Moments:
    """Moments by cell, summed in the order of the records.

    A cell to which a draw gives a weight below 2 has no variance of its own; it keeps the moments that it has
    without weights.

    Args:
        records: what was measured.
        cells: its cells.
        weights: how often each sequence counts, float64 [draws, sequences], columns in ascending order of the
            sequences' ids; None: each once, one draw.

    Raises:
        ShapeError: if ``weights`` has another number of sequences.
    """
    if weights is not None and weights.shape[1:] != (cells.sequences,):
        raise ShapeError(f"weights {weights.shape} for {cells.sequences} sequences; give [draws, sequences]")
    covered = cells.cell >= 0
    cell, sequence = cells.cell[covered], cells.sequence_index[covered]
    value = records.nll[covered] / records.masked[covered]
    square = value**2
    every_once = np.ones((1, cells.sequences))
    base = _sums(cell, sequence, value, square, every_once, cells.count)
    sums = base if weights is None else _sums(cell, sequence, value, square, weights, cells.count)
    blocks = np.add.reduceat(sums[0], cells.offsets[:-1], axis=1)
    count, first, second = (
        np.where(sums[0] < 2.0, one, drawn) for one, drawn in zip(base, sums, strict=True)
    )
    first, second = first / count, second / count
    # One record (only when ``min_samples`` allows it) has no spread: 0, not 0 / 0.
    variance = np.maximum(second - first**2, 0.0) * count / np.maximum(count - 1.0, 1.0)
    return Moments(count=count, first=first, second=second, variance=variance, blocks=blocks)


def _sums(
    cell: np.ndarray,
    sequence: np.ndarray,
    value: np.ndarray,
    square: np.ndarray,
    weights: np.ndarray,
    cells: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weighted sums of 1, h and h^2 by cell, [draws, cells] each."""
    sums = np.zeros((3, len(weights), cells))
    # bincount adds one record after the other: no order of its own, no dependence on threads.
    for draw, weight in enumerate(weights):
        each = weight[sequence]
        sums[0, draw] = np.bincount(cell, each, minlength=cells)
        sums[1, draw] = np.bincount(cell, each * value, minlength=cells)
        sums[2, draw] = np.bincount(cell, each * square, minlength=cells)
    return sums[0], sums[1], sums[2]
