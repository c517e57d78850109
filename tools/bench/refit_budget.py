"""How many rows it takes to know the best clip range: our one pass, and a pass for each range.

Both procedures are sums over rows, so each can be repeated on a resample of the rows by one product of
matrices. ``refit_cost.py`` measures the rows and makes the comparison.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bdtrain.diffusion.plan import NoisePlan
from bdtrain.diffusion.plan_variance import PlanOperator, compile_operator
from bdtrain.diffusion.variance import MIN_SAMPLES, BlockRecords, Cells, Moments, build_cells, moments
from bdtrain.refit.candidates import SearchSettings, clip_candidates

CERTAIN = 0.95
"""Chance from which on the best range counts as known."""

CLOSE = 0.02
"""A range within this of the best variance is as good: the re-fit itself changes nothing for less."""

FIRST_ROWS = 2
GRID = 2**0.5
"""Budgets go up by this factor."""

MOST_ROWS = 2_000_000


def reference_plans(block_size: int) -> dict[str, NoisePlan]:
    """The grid of ranges as the reference draws and weighs them: t uniform, weight 1 / t."""
    full = NoisePlan(block_size, kind="bernoulli", weighting="reference", strata="independent")
    grid = clip_candidates(full, SearchSettings()).candidates
    return {candidate.name: candidate.plan for candidate in grid}


def has_finite_variance(plan: NoisePlan) -> bool:
    """Whether the variance under a range is finite: with weight 1 / t only where the range begins above 0."""
    return plan.interval[0] > 0.0


def only_full_blocks(records: BlockRecords, block_size: int) -> BlockRecords:
    """Records of blocks in which every token can be masked: the reference has no others."""
    full = records.maskable == block_size
    return BlockRecords(**{name: column[full] for name, column in records.to_arrays().items()})


@dataclass(frozen=True, eq=False)
class OnePass:
    """Our procedure, ready to be repeated on any resample of the rows.

    Attributes:
        cells: of the records.
        sums: of 1, h and h^2 by row and cell, float64 [3, rows, cells]; see ``Moments``.
        measured: moments of all rows.
        operators: of the ranges.
    """

    cells: Cells
    sums: np.ndarray
    measured: Moments
    operators: tuple[PlanOperator, ...]

    @classmethod
    def of(cls, records: BlockRecords, plans: Sequence[NoisePlan]) -> OnePass:
        """From records of full blocks."""
        cells = build_cells(records)
        h = records.nll / records.masked
        place = cells.sequence_index * cells.count + cells.cell
        size = cells.sequences * cells.count
        sums = np.stack([np.bincount(place, value, size) for value in (np.ones_like(h), h, h * h)])
        return cls(
            cells=cells,
            sums=sums.reshape(3, cells.sequences, cells.count),
            measured=moments(records, cells),
            operators=tuple(compile_operator(plan, cells) for plan in plans),
        )

    def moments(self, weights: np.ndarray) -> Moments:
        """What ``bdtrain.diffusion.variance.moments`` gives, by one product of matrices.

        NaN in draws that the re-fit would refuse, because a cell has fewer than ``MIN_SAMPLES`` blocks.
        """
        count, first, second = (weights @ part for part in self.sums)
        blocks = np.add.reduceat(count, self.cells.offsets[:-1], axis=1)
        count = np.where((count < MIN_SAMPLES).any(axis=1, keepdims=True), np.nan, count)
        first, second = first / count, second / count
        variance = np.maximum(second - first**2, 0.0) * count / (count - 1.0)
        return Moments(count=count, first=first, second=second, variance=variance, blocks=blocks)

    def estimates(self, weights: np.ndarray | None, criterion: str = "independent") -> np.ndarray:
        """What is least at the best range, [draws, ranges]; from all rows once for None.

        Args:
            weights: how often each row counts, [draws, rows].
            criterion: ``independent`` or ``stratified``: variance of a block's loss, nats^2, under such
                draws; ``relative``: the first over the squared mean.
        """
        found = self.measured if weights is None else self.moments(weights)
        results = [operator.statistics(found) for operator in self.operators]
        if criterion == "relative":
            return np.stack([one.independent / one.mean**2 for one in results], axis=1)
        return np.stack([getattr(one, criterion) for one in results], axis=1)


@dataclass(frozen=True, eq=False)
class PassPerRange:
    """The reference's procedure, ready to be repeated on any resample of the rows.

    Attributes:
        sums: of 1, X and X^2 by range and row, float64 [3, ranges, rows]; X is a block's weighted loss, nats.
    """

    sums: np.ndarray

    @classmethod
    def of(cls, passes: Sequence[BlockRecords], blocks: Mapping[int, int]) -> PassPerRange:
        """From one pass for each range.

        Args:
            passes: full blocks under t from the range, in the order of the ranges; a block of which nothing
                was masked has no record, and loss 0.
            blocks: number of full blocks by row id.
        """
        rows = np.array(sorted(blocks), dtype=np.int64)
        count = np.array([blocks[int(row)] for row in rows], dtype=np.float64)
        sums = []
        for records in passes:
            # A record's nll is without weight only for uniform counts: see ``read_blocks``.
            loss = records.nll * records.maskable / records.masked
            row = np.searchsorted(rows, records.sequence)
            parts = [np.bincount(row, value, len(rows)) for value in (loss, loss**2)]
            sums.append(np.stack([count, *parts]))
        return cls(np.stack(sums, axis=1))

    def estimates(self, weights: np.ndarray | None, criterion: str = "independent") -> np.ndarray:
        """What is least at the best range, [draws, ranges]; ``OnePass.estimates`` without ``stratified``."""
        if weights is None:
            weights = np.ones((1, self.sums.shape[2]))
        count, first, second = (weights @ part.T for part in self.sums)
        variance = np.asarray((second - first**2 / count) / np.maximum(count - 1.0, 1.0))
        return np.asarray(variance / (first / count) ** 2) if criterion == "relative" else variance


@dataclass(frozen=True)
class Found:
    """What a budget is worth.

    Attributes:
        rows: of the budget.
        best: chance that the range found is the true best one.
        close: chance that its true value is within ``CLOSE`` of the best.
        regret: mean share by which its true value is above the best, where one is found.
    """

    rows: int
    best: float
    close: float
    regret: float


def judge_choices(rows: int, truth: np.ndarray, estimates: np.ndarray) -> Found:
    """Compare choices with the truth, [ranges] and [draws, ranges]; NaN is a draw without a choice."""
    loss = truth[estimates.argmin(axis=1)] / truth.min() - 1.0
    loss = np.where(np.isnan(estimates).any(axis=1), np.inf, loss)
    chosen = loss[np.isfinite(loss)]
    regret = float(chosen.mean()) if len(chosen) else math.nan
    return Found(rows, float((loss <= 0).mean()), float((loss <= CLOSE).mean()), regret)


def resampled_rows(rows: int, of: int, draws: int, generator: np.random.Generator) -> np.ndarray:
    """How often each of ``of`` rows is in each of ``draws`` samples of ``rows`` rows, float64 [draws, of]."""
    return generator.multinomial(rows, np.full(of, 1.0 / of), size=draws).astype(np.float64)


def sweep(find: Callable[[int], Found]) -> list[Found]:
    """Budgets upwards until the best range is known three times in a row."""
    steps: list[Found] = []
    rows = float(FIRST_ROWS)
    while rows <= MOST_ROWS and not (len(steps) >= 3 and all(one.best >= CERTAIN for one in steps[-3:])):
        steps.append(find(round(rows)))
        rows *= GRID
    return steps


def needed_rows(steps: Sequence[Found], chance: Callable[[Found], float]) -> float | None:
    """Rows from which on the chance stays at ``CERTAIN``, between two budgets by their logarithms."""
    first = len(steps)
    while first and chance(steps[first - 1]) >= CERTAIN:
        first -= 1
    if first == len(steps):
        return None
    if first == 0:
        return float(steps[0].rows)
    low, high = steps[first - 1], steps[first]
    share = (CERTAIN - chance(low)) / (chance(high) - chance(low))
    return math.exp(math.log(low.rows) + share * math.log(high.rows / low.rows))


def needed_rows_at_large(truth: np.ndarray, noise: np.ndarray, at: int) -> float:
    """The same from the noise at one large budget, which falls as one over the root of the rows.

    Args:
        truth: [ranges].
        noise: logarithm of estimate over truth at ``at`` rows, [draws, ranges].
        at: rows of that budget.
    """
    low, high = 1.0, float(MOST_ROWS) * 100
    for _ in range(40):
        middle = math.sqrt(low * high)
        estimates = np.log(truth) + noise * math.sqrt(at / middle)
        if judge_choices(0, truth, estimates).best >= CERTAIN:
            high = middle
        else:
            low = middle
    return high


def spread_of_ratio(
    pool: OnePass,
    passes: PassPerRange,
    criterion: str,
    *,
    times: int,
    draws: int,
    generator: np.random.Generator,
) -> list[float]:
    """Reference's rows of each range over ours at large budgets, for resamples of all that was measured."""
    ratios = []
    rows, reference_rows = pool.sums.shape[1], passes.sums.shape[2]
    for _ in range(times):
        chosen = generator.integers(0, rows, rows)
        others = generator.integers(0, reference_rows, reference_rows)
        again = OnePass(pool.cells, pool.sums[:, chosen], pool.measured, pool.operators)
        passes_again = PassPerRange(passes.sums[:, :, others])
        truth = again.estimates(np.ones((1, rows)), criterion)[0]
        ours = again.estimates(resampled_rows(rows, rows, draws, generator), criterion) / truth
        weights = resampled_rows(reference_rows, reference_rows, draws, generator)
        theirs = passes_again.estimates(weights, criterion) / passes_again.estimates(None, criterion)
        needed = needed_rows_at_large(truth, np.log(theirs), reference_rows)
        ratios.append(needed / needed_rows_at_large(truth, np.log(ours), rows))
    return sorted(ratios)


def noise_of_grid(
    records: BlockRecords, plan: NoisePlan, *, draws: int, generator: np.random.Generator
) -> tuple[float, float]:
    """Relative noise of the reference's statistic of 4,096 blocks: t drawn freely, and on an even grid.

    Simulated from the measured blocks: k from t, and the loss of some measured block with k masked tokens.
    The reference spreads t evenly over a batch, which the forward passes here do not do.
    """
    blocks, size, (low, high) = 4096, plan.block_size, plan.interval
    by_count = [records.nll[records.masked == k] for k in range(1, size + 1)]
    noises = []
    for even in (False, True):
        jitter = generator.random((draws, blocks))
        u = (np.arange(blocks) + jitter) / blocks if even else jitter
        t = low + (high - low) * u
        k = generator.binomial(size, t)
        loss = np.zeros_like(t)
        for count, pool in enumerate(by_count, start=1):
            here = k == count
            loss[here] = generator.choice(pool, int(here.sum())) / t[here]
        found = loss.var(axis=1, ddof=1)
        noises.append(float(found.std(ddof=1) / found.mean()))
    return noises[0], noises[1]
