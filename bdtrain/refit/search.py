"""From measured blocks to the plan that training should use: search, bootstrap, decision.

Every candidate is judged on the same records and the same resamples of their sequences, so differences
between plans are known far better than the plans themselves. Nothing here depends on the clock, the machine
or who measured: the same records give the same bytes.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bdtrain.diffusion.plan import NoisePlan, evaluation_plan
from bdtrain.diffusion.plan_variance import PlanStatistics, compile_operator, count_shares, fit_density
from bdtrain.diffusion.variance import BlockRecords, Cells, Moments, bin_starts, build_cells, moments
from bdtrain.errors import DataError
from bdtrain.refit.candidates import (
    Candidate,
    CandidateSet,
    SearchSettings,
    clip_candidates,
    count_candidates,
)

TIE = 1e-9
"""Relative difference below which two plans are the same; at block size 1 many are."""

DIGITS = 10
"""Significant digits of a report: those that do not depend on a machine's order of summation."""


@dataclass(frozen=True)
class CandidateResult:
    """What the search found out about one plan.

    Losses are nats per maskable token and variances nats^2, those of a block's loss per token, at the
    comparison scale of ``bdtrain.diffusion.plan_variance.comparison_scale``.

    Attributes:
        name: of the candidate.
        clip_range: of its plan, None for the full range.
        density: of its plan.
        drawn: mode ``counts``: how often a full block has each cell of mask counts, the cells of ``losses``;
            else None.
        is_current: whether it is the plan in use.
        edges: at which edges of the grid it lies.
        mean: expected loss; that of the objective, not a bound unless the range is the full one.
        variance: under stratified draws.
        variance_error: its bootstrap standard error.
        independent_variance: under independent draws.
        relative: ``variance`` over the mean squared; of the independent one where the plan takes no strata.
        block_variance: of a block's loss as training weighs it, nats^2: no scale, not per token.
        finite: False where the plan's variance is infinite and draws below t = 1e-3 are left out of it; such
            a plan cannot win.
        criterion: what the search minimises.
        p_best: share of bootstrap draws in which no plan was better.
        difference: the current plan's criterion minus this one's, above 0 where this one is better.
        difference_low: lower end of the bootstrap interval of ``difference``.
        difference_high: upper end.
    """

    name: str
    clip_range: tuple[float, float] | None
    density: tuple[float, ...] | None
    drawn: tuple[float, ...] | None
    is_current: bool
    edges: tuple[str, ...]
    mean: float
    variance: float
    variance_error: float
    independent_variance: float
    relative: float
    block_variance: float
    finite: bool
    criterion: float
    p_best: float
    difference: float
    difference_low: float
    difference_high: float


@dataclass(frozen=True)
class CountLoss:
    """Loss of full blocks by mask count.

    Attributes:
        masked_low: smallest count k of the cell.
        masked_high: largest; above 64 tokens a cell holds several.
        blocks: measured blocks.
        nll: mean per masked token, nats.
        nll_error: its bootstrap standard error.
        nll_sd: standard deviation between blocks of the mean per masked token, nats.
        block_sd: standard deviation of the summed loss g of a block (of the middle count of the cell), nats.
        block_variance: its square, nats^2.
        block_variance_error: bootstrap standard error of ``block_variance``.
    """

    masked_low: int
    masked_high: int
    blocks: int
    nll: float
    nll_error: float
    nll_sd: float
    block_sd: float
    block_variance: float
    block_variance_error: float


@dataclass(frozen=True)
class SearchResult:
    """Outcome of a search for one block size.

    Attributes:
        plan: to publish: the winner if it is adopted, else the current one.
        adopt: whether ``plan`` is a new one.
        reason: why, in one sentence.
        current: the plan in use.
        winner: name of the candidate with the smallest criterion.
        at_edge: at which edges of the grid the winner lies; empty inside.
        gain: by which share the current criterion is larger than the winner's; None where that has no value.
        strata: ``stratified`` or ``independent``: the variance that the criterion is made of, as the plan
            draws.
        candidates: the current plan first, then in the order of the grid.
        left_out: (name, reason) of plans that cannot be drawn.
        losses: by mask count, full blocks; empty where too few blocks are full.
        nelbo: the full bound, nats per maskable token.
        nelbo_error: its bootstrap standard error (text and noise together).
        blocks: measured.
        sequences: measured.
        covered_blocks: share of blocks whose number of maskable tokens is common enough to be used.
        covered_tokens: share of their maskable tokens.
        left_out_sizes: (maskable tokens, blocks) of those that are not.
        settings: of the search.
    """

    plan: NoisePlan
    adopt: bool
    reason: str
    current: NoisePlan
    winner: str
    at_edge: tuple[str, ...]
    gain: float | None
    strata: str
    candidates: tuple[CandidateResult, ...]
    left_out: tuple[tuple[str, str], ...]
    losses: tuple[CountLoss, ...]
    nelbo: float
    nelbo_error: float
    blocks: int
    sequences: int
    covered_blocks: float
    covered_tokens: float
    left_out_sizes: tuple[tuple[int, int], ...]
    settings: SearchSettings

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, numbers to ten digits, None in place of what is not finite."""
        record = asdict(self)
        record.update(plan=None, current=None, settings=None)
        record = plain_values(record)
        record.update(
            plan=self.plan.to_dict(), current=self.current.to_dict(), settings=self.settings.to_dict()
        )
        return record


def search(records: BlockRecords, current: NoisePlan, settings: SearchSettings) -> SearchResult:
    """Find the plan of least variance for one block size and decide whether to take it.

    Args:
        records: blocks measured with the block size of ``current``, mask counts uniform and stratified.
        current: the plan in use.
        settings: candidates, criterion, bootstrap and the rule of adoption.

    Returns:
        The outcome; a pure function of the arguments.

    Raises:
        DataError: if there are fewer than two sequences, or too few blocks for any cell.
        ConfigError: if the records hold blocks larger than the plan's.
    """
    cells = build_cells(records)
    if cells.sequences < 2:
        raise DataError(
            f"records of {cells.sequences} sequence; the bootstrap needs at least 2: measure more sequences "
            "(refit.blocks)"
        )
    measured = moments(records, cells)
    resampled = moments(records, cells, bootstrap_weights(cells.sequences, settings))
    independent = current.strata == "independent"
    grid = _candidate_set(current, settings, cells, measured, independent)
    rows = _judge(grid, cells, measured, resampled, settings, independent)
    best = _winner(rows)
    adopt, gain, reason = _decide(rows, rows[best], settings)
    bound = compile_operator(evaluation_plan(current.block_size), cells)
    return SearchResult(
        plan=grid.candidates[best].plan if adopt else current,
        adopt=adopt,
        reason=reason,
        current=current,
        winner=rows[best].name,
        at_edge=rows[best].edges,
        gain=gain,
        strata="independent" if independent else "stratified",
        candidates=rows,
        left_out=grid.left_out,
        losses=_losses_by_count(current.block_size, cells, measured, resampled),
        nelbo=float(bound.statistics(measured).mean_per_token[0]),
        nelbo_error=spread(bound.statistics(resampled).mean_per_token),
        blocks=records.blocks,
        sequences=cells.sequences,
        covered_blocks=cells.blocks_share,
        covered_tokens=cells.tokens_share,
        left_out_sizes=cells.left_out,
        settings=settings,
    )


def bootstrap_weights(sequences: int, settings: SearchSettings) -> np.ndarray:
    """How often each sequence counts in each resample, float64 [draws, sequences].

    Whole sequences are drawn, because blocks of one sequence are alike.
    """
    generator = np.random.Generator(np.random.PCG64(settings.seed))
    shares = np.full(sequences, 1.0 / sequences)
    return generator.multinomial(sequences, shares, size=settings.bootstrap_draws).astype(np.float64)


def _candidate_set(
    current: NoisePlan, settings: SearchSettings, cells: Cells, measured: Moments, independent: bool
) -> CandidateSet:
    if settings.mode == "clip":
        return clip_candidates(current, settings)
    density = fit_density(
        current, cells, measured, uniform_share=settings.uniform_share, independent=independent
    )
    return count_candidates(current, density)


def _judge(
    grid: CandidateSet,
    cells: Cells,
    measured: Moments,
    resampled: Moments,
    settings: SearchSettings,
    independent: bool,
) -> tuple[CandidateResult, ...]:
    """All candidates on the same records and resamples."""
    operators = [compile_operator(candidate.plan, cells) for candidate in grid.candidates]
    found = [operator.statistics(measured) for operator in operators]
    again = [operator.statistics(resampled) for operator in operators]
    estimate = np.array([_criterion(one, settings, independent)[0] for one in found])
    draws = np.stack([_criterion(one, settings, independent) for one in again])
    # An infinite variance cannot be the least one.
    rivals = np.where(np.array([one.finite for one in found])[:, None], draws, np.inf)
    best = (rivals <= rivals.min(axis=0) * (1.0 + TIE)) & np.isfinite(rivals)
    tail = (1.0 - settings.confidence) / 2.0
    rows = []
    for index, candidate in enumerate(grid.candidates):
        # A mean of 0 makes relative variances infinite and their differences undefined; both are told.
        with np.errstate(invalid="ignore"):
            low, high = np.quantile(draws[0] - draws[index], [tail, 1.0 - tail])
            difference = float(estimate[0] - estimate[index])
        rows.append(
            _candidate_result(
                candidate,
                found[index],
                again[index],
                independent,
                drawn=tuple(count_shares(candidate.plan).tolist()) if settings.mode == "counts" else None,
                criterion=float(estimate[index]),
                p_best=float(best[index].mean()),
                difference=difference,
                difference_low=float(low),
                difference_high=float(high),
            )
        )
    return tuple(rows)


def _candidate_result(
    candidate: Candidate,
    found: PlanStatistics,
    resampled: PlanStatistics,
    independent: bool,
    *,
    drawn: tuple[float, ...] | None,
    **judged: float,
) -> CandidateResult:
    return CandidateResult(
        name=candidate.name,
        clip_range=candidate.plan.clip_range,
        density=candidate.plan.density,
        drawn=drawn,
        is_current=candidate.is_current,
        edges=candidate.edges,
        mean=float(found.mean_per_token[0]),
        variance=float(found.variance_per_token[0]),
        variance_error=spread(resampled.variance_per_token),
        independent_variance=float(found.independent_per_token[0]),
        relative=float(_relative(found, independent)[0]),
        block_variance=float(found.stratified[0]),
        finite=found.finite,
        **judged,
    )


def _criterion(statistics: PlanStatistics, settings: SearchSettings, independent: bool) -> np.ndarray:
    """What is minimised, [draws]."""
    if settings.criterion == "relative":
        return _relative(statistics, independent)
    return statistics.independent_per_token if independent else statistics.variance_per_token


def _relative(statistics: PlanStatistics, independent: bool) -> np.ndarray:
    """Variance over the mean squared, infinite where the mean is 0, [draws]."""
    variance = statistics.independent if independent else statistics.stratified
    square = statistics.mean**2
    return np.divide(variance, square, out=np.full_like(square, np.inf), where=square > 0.0)


def _winner(rows: tuple[CandidateResult, ...]) -> int:
    """Index of the least criterion; ties go to the current plan, then to the first."""
    values = [row.criterion if row.finite else math.inf for row in rows]
    least = min(values)
    return next(index for index, value in enumerate(values) if value <= least + TIE * abs(least))


def _decide(
    rows: tuple[CandidateResult, ...], winner: CandidateResult, settings: SearchSettings
) -> tuple[bool, float | None, str]:
    """Whether to adopt the winner, its gain, and why."""
    current = rows[0]
    if len(rows) == 1:
        return False, 0.0, "No other plan of the search can be drawn; the current plan is kept."
    if winner.is_current:
        return False, 0.0, f"The current plan has the least {settings.criterion} variance of all and is kept."
    if not (winner.criterion > 0.0 and math.isfinite(current.criterion)):
        return (
            False,
            None,
            f"The variances cannot be compared ({current.criterion:.4g} for the current plan, "
            f"{winner.criterion:.4g} for {winner.name}); the current plan is kept.",
        )
    gain = current.criterion / winner.criterion - 1.0
    least = "" if current.finite else "at least "
    found = (
        f"The {settings.criterion} variance of the current plan is {least}{gain:.1%} above that of "
        f"{winner.name}"
    )
    interval = (
        f"the {settings.confidence:.0%} interval of the difference, [{winner.difference_low:.4g}, "
        f"{winner.difference_high:.4g}],"
    )
    if gain < settings.min_gain:
        return False, gain, f"{found}, less than the {settings.min_gain:.1%} that a change takes; it is kept."
    if not winner.difference_low > 0.0:
        return False, gain, f"{found}, but {interval} holds 0; it is kept."
    certain = f"{found}, and {interval} excludes 0"
    if not settings.adopt:
        return False, gain, f"{certain}; with refit.adopt=false it is kept."
    return True, gain, f"{certain}; {winner.name} is adopted."


def _losses_by_count(
    block_size: int, cells: Cells, measured: Moments, resampled: Moments
) -> tuple[CountLoss, ...]:
    where = cells.of_size(block_size)
    if where is None:
        return ()
    low = bin_starts(block_size) + 1
    high = np.append(low[1:] - 1, block_size)
    middle = (low + high) / 2
    sd = np.sqrt(measured.variance[0, where])
    variance = [one.variance[:, where] * middle**2 for one in (measured, resampled)]
    return tuple(
        CountLoss(
            masked_low=int(low[index]),
            masked_high=int(high[index]),
            blocks=round(float(measured.count[0, where][index])),
            nll=float(measured.first[0, where][index]),
            nll_error=spread(resampled.first[:, where][:, index]),
            nll_sd=float(sd[index]),
            block_sd=float(sd[index] * middle[index]),
            block_variance=float(variance[0][0, index]),
            block_variance_error=spread(variance[1][:, index]),
        )
        for index in range(len(low))
    )


def spread(draws: np.ndarray) -> float:
    """Standard error from the draws of the bootstrap."""
    return float(draws.std(ddof=1))


def plain_values(value: Any) -> Any:
    """Lists for tuples, ten digits, None for what is not finite."""
    if isinstance(value, dict):
        return {name: plain_values(one) for name, one in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain_values(one) for one in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value
