"""Mean and variance of the training estimator under any noise plan, from the moments of one pass.

With X the weighted loss of one block in nats, conditional on its n maskable tokens, and f_n the share of
blocks with that n:

    mean          sum_n f_n sum_k c_n(k) E[g_k]
    independent   sum_n f_n (E[X^2 | n] - E[X | n]^2): every block draws its noise on its own
    stratified    the same without the part between noise levels, which strata over a large batch remove:
                  count      sum_n f_n sum_k c_n(k)^2 Var(g_k) / q_n(k)
                  bernoulli  sum_n f_n (E[X^2 | n] - E_t[E[X | t, n]^2])

Training is stratified, so the last is what a plan is judged by. Both hold the spread of the text as well as
that of the masks. Differences between n belong to the text and are left out. That leaves out, too, what
strata over blocks of several n cannot remove, because E[X | t, n] depends on both; it is nothing where blocks
are full. Squares of estimated means are corrected for the error of the means: every number is unbiased.

A ``bernoulli`` plan that weighs by 1 / t down to t = 0 has no finite variance: E[X^2 | t] grows as 1 / t.
What is given then leaves out draws below t = 1e-3, a lower bound, and ``finite`` is False.

Source: the variance of the estimator as what clip ranges are chosen by is arXiv 2503.09573's; the density of
least variance is Neyman's allocation of samples to strata.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from bdtrain.diffusion.levels import draw_times
from bdtrain.diffusion.plan import NoisePlan
from bdtrain.diffusion.schedule import REFERENCE_EPSILON
from bdtrain.diffusion.tables import PlanTables, binomial_chances, compile_tables
from bdtrain.diffusion.variance import BINS, Cells, Moments, bin_starts
from bdtrain.errors import ConfigError, DataError, ShapeError

SMALL_TIME = 0.02
"""Below this lower end, quadratures over t take panels that grow by factors of ten: weights rise as 1 / t."""


@dataclass(frozen=True, eq=False)
class PlanStatistics:
    """What a plan's estimator does, per draw of the bootstrap (or one draw: as measured).

    Attributes:
        mean: expected weighted loss of a block, nats, float64 [draws].
        stratified: variance of a block's weighted loss under strata over a large batch, nats^2, float64
            [draws]; the criterion.
        independent: the same without strata, float64 [draws].
        tokens: maskable tokens per block, float64 [draws].
        scale: factor to the scale on which plans are compared, see ``comparison_scale``.
        finite: False where the two variances are lower bounds of infinite ones.

    Per token means: the loss of a batch is sum(X) / sum(n), so that over B blocks its variance is
    ``variance_per_token`` / B, with sum(n) taken as B times its mean.
    """

    mean: np.ndarray
    stratified: np.ndarray
    independent: np.ndarray
    tokens: np.ndarray
    scale: float
    finite: bool

    @property
    def mean_per_token(self) -> np.ndarray:
        """Mean over maskable tokens, at the comparison scale, nats, [draws]."""
        return np.asarray(self.mean * self.scale / self.tokens)

    @property
    def variance_per_token(self) -> np.ndarray:
        """Stratified variance of a block's loss per token, at the comparison scale, nats^2, [draws]."""
        return np.asarray(self.stratified * (self.scale / self.tokens) ** 2)

    @property
    def independent_per_token(self) -> np.ndarray:
        """Variance without strata of a block's loss per token, at the comparison scale, nats^2, [draws]."""
        return np.asarray(self.independent * (self.scale / self.tokens) ** 2)


def comparison_scale(plan: NoisePlan) -> float:
    """Factor from a plan's loss to the scale on which plans of several ranges are compared.

    It is that of weighting ``reference``, the loss averaged over the range: ``elbo`` weights carry a factor
    omega - beta more, which only rescales the gradient and would make any narrow range look good. ``flat``
    and full masking stay as they are.
    """
    if plan.weighting != "elbo" or plan.full_masking:
        return 1.0
    beta, omega = plan.interval
    return 1.0 / (omega - beta)


@dataclass(frozen=True, eq=False)
class PlanOperator:
    """A plan compiled against cells: three vectors, or two and a quadratic form for each n.

    Attributes:
        plan: the plan.
        cells: what it was compiled for.
        mean_of: coefficient of E[h] in the mean, float64 [cells].
        square_of: coefficient of E[h^2] in E[X^2], float64 [cells].
        within_of: count plans: coefficient of Var(h) in the stratified variance, float64 [cells].
        between_of: bernoulli plans: for each n the matrix of E_t[E[X | t]^2] as a quadratic form of E[h],
            float64 [cells of n, cells of n].
        finite: whether the variance is.
    """

    plan: NoisePlan
    cells: Cells
    mean_of: np.ndarray
    square_of: np.ndarray
    within_of: np.ndarray | None
    between_of: tuple[np.ndarray, ...] | None
    finite: bool

    def statistics(self, moments: Moments) -> PlanStatistics:
        """Mean and variances for every draw of ``moments``.

        Raises:
            ShapeError: if the moments are those of other cells.
        """
        if moments.first.shape[1] != self.cells.count:
            raise ShapeError(f"moments of {moments.first.shape[1]} cells for {self.cells.count} cells")
        starts = self.cells.offsets[:-1]
        mean = np.add.reduceat(moments.first * self.mean_of, starts, axis=1)
        second = np.add.reduceat(moments.second * self.square_of, starts, axis=1)
        # Variance of each E[h], by which the square of the estimate is too large on average.
        error = moments.variance / moments.count
        mean_error = np.add.reduceat(error * self.mean_of**2, starts, axis=1)
        if self.within_of is not None:
            stratified = np.add.reduceat(moments.variance * self.within_of, starts, axis=1)
        else:
            stratified = second - self._between(moments.first, error)
        shares = moments.blocks / moments.blocks.sum(axis=1, keepdims=True)
        return PlanStatistics(
            mean=(shares * mean).sum(axis=1),
            stratified=(shares * stratified).sum(axis=1),
            independent=(shares * (second - mean**2 + mean_error)).sum(axis=1),
            tokens=(shares * self.cells.sizes).sum(axis=1),
            scale=comparison_scale(self.plan),
            finite=self.finite,
        )

    def _between(self, first: np.ndarray, error: np.ndarray) -> np.ndarray:
        """E_t[E[X | t]^2] for each n, unbiased, [draws, sizes]."""
        offsets, columns = self.cells.offsets, []
        for form, start, end in zip(self.between_of or (), offsets[:-1], offsets[1:], strict=True):
            part = first[:, start:end]
            columns.append(((part @ form) * part).sum(axis=1) - error[:, start:end] @ np.diagonal(form))
        return np.stack(columns, axis=1)


def compile_operator(plan: NoisePlan, cells: Cells) -> PlanOperator:
    """Everything of a plan that turns moments into numbers.

    Args:
        plan: any plan for blocks that hold the cells' n.
        cells: of the measured records.

    Raises:
        ConfigError: if a block of the cells is larger than the plan's.
    """
    if cells.sizes[-1] > plan.block_size:
        raise ConfigError(
            f"records hold blocks of {cells.sizes[-1]} maskable tokens, the plan has "
            f"block_size={plan.block_size}; measure with the plan's block size"
        )
    tables = compile_tables(plan)
    # E[X | n] needs no nodes: the coefficients are the same for both kinds.
    mean_of = [_in_cells(tables.coefficient(n).numpy() * np.arange(1, n + 1), n) for n in _sizes(cells)]
    if plan.kind == "count" or plan.full_masking:
        square_of = within_of = np.concatenate([_count_row(tables, n) for n in _sizes(cells)])
        return PlanOperator(plan, cells, np.concatenate(mean_of), square_of, within_of, None, True)
    finite = _has_finite_variance(plan)
    levels = _Levels.of(plan, lowest=plan.interval[0] if finite else REFERENCE_EPSILON)
    rows = [levels.row(plan, n) for n in _sizes(cells)]
    return PlanOperator(
        plan=plan,
        cells=cells,
        mean_of=np.concatenate(mean_of),
        square_of=np.concatenate([row[0] for row in rows]),
        within_of=None,
        between_of=tuple(row[1] for row in rows),
        finite=finite,
    )


def fit_density(
    plan: NoisePlan, cells: Cells, moments: Moments, *, uniform_share: float = 0.05, independent: bool = False
) -> tuple[float, ...]:
    """How often each mask count should be drawn for the least variance of the plan's own objective.

    Under strata that is q_k proportional to c_k sd(g_k), for independent draws to c_k sqrt(E[g_k^2]), fitted
    to full blocks (n = block_size) and mixed with the uniform density, which keeps every count possible.

    Args:
        plan: its schedule, clip range and weighting give c_k; its own density does not matter.
        cells: of the measured records.
        moments: without weights (the first draw is taken).
        uniform_share: share of the uniform density, in (0, 1].
        independent: whether the blocks of a batch are drawn without strata.

    Returns:
        Heights over min(block_size, 64) equal bins of (0, 1] with mean 1, for ``NoisePlan.density``.

    Raises:
        ConfigError: if ``uniform_share`` is out of range.
        DataError: if full blocks are not among the cells.
    """
    if not 0.0 < uniform_share <= 1.0:
        raise ConfigError(f"uniform_share={uniform_share}; allowed is 0 < uniform_share <= 1")
    size = plan.block_size
    where = cells.of_size(size)
    if where is None:
        raise DataError(
            f"no density can be fitted: too few measured blocks have all {size} tokens maskable; measure "
            "more sequences (refit.blocks)"
        )
    tables = compile_tables(replace(plan, density=None))
    spread = np.sqrt((moments.second if independent else moments.variance)[0, where])
    mass = _in_cells(tables.coefficient(size).numpy() * np.arange(1, size + 1), size) * spread
    bins = min(size, BINS)
    fitted = mass / mass.sum() if mass.sum() > 0.0 else np.full(bins, 1.0 / bins)
    heights = (1.0 - uniform_share) * fitted * bins + uniform_share
    # Six digits: finer ones are noise, and the plan is read by people.
    return tuple(float(f"{height:.6g}") for height in heights)


def count_shares(plan: NoisePlan) -> np.ndarray:
    """How often a full block (n = block_size) has a mask count of each cell, float64 [cells]; sums to 1.

    Cells are those of ``bdtrain.diffusion.variance.bin_starts``. A ``bernoulli`` plan's counts are those it
    leads to where a token is masked.
    """
    return _in_cells(compile_tables(plan).probability(plan.block_size).numpy(), plan.block_size)


def _sizes(cells: Cells) -> list[int]:
    return [int(n) for n in cells.sizes]


def _in_cells(row: np.ndarray, n: int) -> np.ndarray:
    """Sums over the counts k = 1..n of each cell, last axis."""
    sums: np.ndarray = np.add.reduceat(row, bin_starts(n), axis=-1)
    return sums


def _count_row(tables: PlanTables, n: int) -> np.ndarray:
    """By cell q w^2 k^2, which is c^2 k^2 / q as well: it serves E[X^2] and the stratified variance."""
    weight, k = tables.weight(n).numpy(), np.arange(1, n + 1)
    return _in_cells(tables.probability(n).numpy() * weight**2 * k**2, n)


def _has_finite_variance(plan: NoisePlan) -> bool:
    """Whether E[X^2 | t], which behaves as weight^2 * chance at small t, can be integrated down to t = 0."""
    low, high = plan.interval
    if low > 0.0 or plan.weighting == "flat":
        return True
    t = torch.tensor([1e-12, 1e-10], dtype=torch.float64)
    _, chance, weight = draw_times(plan, t / high)
    square = (weight**2 * chance).tolist()
    exponent = math.log(square[1] / square[0]) / math.log(100.0)
    return exponent > -1.0 + 1e-6


@dataclass(frozen=True, eq=False)
class _Levels:
    """Nodes over the times that a ``bernoulli`` plan draws.

    Attributes:
        measure: share of the drawn times that a node stands for, [nodes].
        weight: of a masked token, [nodes].
        chance: of a mask, [nodes].
    """

    measure: np.ndarray
    weight: np.ndarray
    chance: np.ndarray

    @classmethod
    def of(cls, plan: NoisePlan, lowest: float) -> _Levels:
        """Gauss-Legendre nodes in sqrt(t) on panels between ``lowest``, the schedule's kinks and the end."""
        low, high = plan.interval
        cuts = {lowest, high, *(kink for kink in plan.noise_schedule.kinks if lowest < kink < high)}
        step = 10.0 * lowest
        while 0.0 < lowest < SMALL_TIME and step < 0.3 * high:
            cuts.add(step)
            step *= 10.0
        edges = np.sqrt(sorted(cuts))
        # As many as the tables take: the binomial peak has a width of about 1 / sqrt(n).
        nodes, weights = np.polynomial.legendre.leggauss(64 + 16 * math.ceil(math.sqrt(plan.block_size)))
        half, middle = np.diff(edges)[:, None] / 2, (edges[1:] + edges[:-1])[:, None] / 2
        root = (middle + half * nodes).ravel()
        measure = (weights * half).ravel() * 2.0 * root / (high - low)
        u = torch.from_numpy((root**2 - low) / (high - low))
        _, chance, weight = draw_times(plan, u)
        return cls(measure, weight.numpy(), chance.numpy())

    def row(self, plan: NoisePlan, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Coefficients of E[h^2] in E[X^2], [cells of n], and the form of E_t[E[X | t]^2]."""
        chances = binomial_chances(n, self.chance)
        if plan.resample and plan.can_resample(n):
            counts = plan.feasible_counts(n)
            chances[:, : counts.start] = 0.0
            chances[:, counts.stop :] = 0.0
            chances /= chances.sum(axis=1, keepdims=True)
        k = np.arange(1, n + 1)
        weighted = self.measure * self.weight**2
        square_of = _in_cells(weighted @ (chances[:, 1:] * k**2), n)
        mean_at = _in_cells(chances[:, 1:] * k, n)
        return square_of, mean_at.T @ (weighted[:, None] * mean_at)
