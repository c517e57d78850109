"""The last layer's gradient by mask count, and whether NELBO variance ranks plans as gradient variance does.

A re-fit chooses plans by the variance of the loss, which costs a forward pass, and means the variance of the
gradient. One more forward pass over held-out rows, under the same noise as ``measure_blocks``, gives the last
layer's gradient of each block from the hidden states and the logits that are there anyway; all plans of a
search are then judged twice from the same blocks.

The correlation is over clip ranges of one kind of masks, where it tests the proxy. Between kinds the proxy
does not hold: times drawn block by block (``bernoulli``) raise the variance of the loss several times over
counts of the same range, and that of the gradient by some percent, because the number of masked tokens moves
the loss by its mean, and the gradient by its mean, which is nearly 0.

Blocks count as independent. What blocks of one row have in common makes the variance between batches larger
(more than twice, on books), the same for every plan; ``full_gradients.py`` measures it.

Source: NELBO variance as a proxy of the gradient's is arXiv 2503.09573's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bdtrain.config import DataConfig, DiffusionConfig
from bdtrain.data.loader import Batch, ValidationSet
from bdtrain.data.source import Source
from bdtrain.diffusion.build import build_objective
from bdtrain.diffusion.gradient_variance import (
    WIDTH,
    GradientMoments,
    GradientRecords,
    GradientSketch,
    gradient_moments,
    gradient_statistics,
    sum_gradients,
)
from bdtrain.diffusion.keyed import NoiseKey, Purpose
from bdtrain.diffusion.micro_batch import MicroBatch, corrupt_rows
from bdtrain.diffusion.objectives.base import Objective
from bdtrain.diffusion.plan import NoisePlan, evaluation_plan
from bdtrain.diffusion.plan_variance import compile_operator
from bdtrain.diffusion.variance import Cells, bin_starts, build_cells, moments
from bdtrain.errors import BdtrainError, DataError, RefitError
from bdtrain.model.head import ParallelVocabView
from bdtrain.model.transformer import TwoStreamTransformer, assemble_streams
from bdtrain.refit.candidates import clip_candidates
from bdtrain.refit.measure import read_blocks, token_channels
from bdtrain.refit.request import MIN_SEQUENCES
from bdtrain.refit.search import TIE, SearchResult, bootstrap_weights, plain_values, spread
from bdtrain.validation.likelihood import HeldOutRows

MAX_LOGITS = 1 << 23
"""Logits that exist at a time, unless one block alone needs more."""

BLOCKS = 8192
"""Blocks that a re-fit's report on gradients is made of, in at least ``MIN_SEQUENCES`` rows."""

MIN_PLANS = 3
"""Fewer plans than this have no correlation."""


def report_gradients(
    model: TwoStreamTransformer,
    settings: DiffusionConfig,
    section: DataConfig,
    source: Source,
    results: Mapping[int, SearchResult],
    *,
    batch_size: int,
    seed: int,
    device: torch.device,
) -> dict[str, Any]:
    """What a re-fit's report says of gradients; nothing depends on it, so what goes wrong is told there.

    Args:
        model: the whole model.
        settings: section ``diffusion`` of the run.
        section: its data.
        source: held-out rows.
        results: the searches, by block size.
        batch_size: rows per forward pass.
        seed: of the re-fit.
        device: where the model is.

    Returns:
        By block size ``GradientReport.to_dict()``, or what was wrong as ``error``; plain values.
    """
    reports: dict[str, Any] = {}
    for size, result in results.items():
        sized = settings.model_copy(update={"block_size": size})
        rows = max(MIN_SEQUENCES, math.ceil(BLOCKS * size / source.seq_len))
        try:
            records = measure_gradients(
                model,
                build_objective(sized, section, source.tokenizer_info, evaluation_plan(size)),
                ValidationSet(source, max_sequences=rows),
                batch_size=batch_size,
                seed=seed,
                device=device,
            )
            reports[str(size)] = compare_variances(records, result).to_dict()
        except BdtrainError as error:
            reports[str(size)] = {"error": str(error)}
    return reports


def measure_gradients(
    model: TwoStreamTransformer,
    objective: Objective,
    rows: HeldOutRows,
    *,
    batch_size: int,
    seed: int,
    device: torch.device,
    width: int = WIDTH,
    max_logits: int = MAX_LOGITS,
) -> GradientRecords:
    """Measure the blocks of some rows with their last-layer gradients, in this process alone.

    No rank waits for another: data-parallel ranks that call it all do the whole work.

    Args:
        model: the whole two-stream transformer; in evaluation mode for the time of the call.
        objective: the reported one (``bdtrain.diffusion.build.reported_plan``) of the block size.
        rows: held-out rows.
        batch_size: rows per forward pass.
        seed: keys the noise, as in ``measure_blocks``, and the sketch.
        device: where the model is.
        width: numbers of a block's sketch.
        max_logits: that exist at a time, except for a block that alone has more.

    Returns:
        Records in the order of the rows; losses and masks are those of ``measure_blocks``.

    Raises:
        RefitError: if the model is split over ranks, or the objective has no noise.
        DataError: if no block has a token to mask, or a value is not finite.
    """
    groups = model.pg_collection
    if groups.tp.size() > 1 or groups.pp.size() > 1:
        raise RefitError(
            f"last-layer gradients need the whole model in one process, and tp={groups.tp.size()}, "
            f"pp={groups.pp.size()} split it; measure a snapshot in a process of its own "
            "(refit.placement=process or ray), or set refit.gradient_variance=false"
        )
    if not objective.noisy:
        raise RefitError(f"algo={objective.name} draws no noise; there is no variance of plans to measure")
    key = NoiseKey(seed=seed, purpose=Purpose.REFIT)
    sketch = GradientSketch.make(
        int(model.config.padded_vocab_size),
        int(model.config.hidden_size),
        seed=seed,
        device=device,
        width=width,
    )
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            found = [
                _measure_batch(model, objective, batch, micro_batch, sketch, max_logits)
                for batch in rows.batches(batch_size)
                for micro_batch in [
                    corrupt_rows(
                        objective, batch, key=key, global_batch_size=batch_size, copies=1, device=device
                    )
                ]
                if bool(micro_batch.corrupted.rows.any())
            ]
    finally:
        model.train(was_training)
    if not found:
        raise DataError("the held-out rows have no token to mask; give a longer text")
    return GradientRecords.concatenate(found)


def _measure_batch(
    model: TwoStreamTransformer,
    objective: Objective,
    batch: Batch,
    micro_batch: MicroBatch,
    sketch: GradientSketch,
    max_logits: int,
) -> GradientRecords:
    corrupted = micro_batch.corrupted
    masked = corrupted.rows
    view = model(
        assemble_streams(corrupted.noisy, corrupted.clean),
        micro_batch.layout,
        noisy_copies=1,
        clean=corrupted.clean is not None,
        rows=masked,
    )
    targets = corrupted.targets[masked]
    losses = torch.zeros(masked.shape, dtype=torch.float64, device=masked.device)
    losses[masked] = objective.loss(view, targets, corrupted.weight[masked]).double()
    blocks = read_blocks(batch, torch.cat((losses, token_channels([micro_batch])), dim=1).cpu().numpy())
    row, position = masked[:, 0].nonzero(as_tuple=True)
    start = micro_batch.layout.block_start.long()[row, position]
    # Masked tokens of a block are neighbours, so this numbers the blocks as ``read_blocks`` has them.
    _, block = torch.unique_consecutive(row * masked.shape[-1] + start, return_inverse=True)
    limit = max(1, max_logits // int(model.config.padded_vocab_size))
    parts = []
    for first, last in _chunks(torch.bincount(block).tolist(), limit):
        part = ParallelVocabView(view.hidden[first:last], model.output_layer)
        delta = _nll_gradients(part, targets[first:last])
        parts.append(
            sum_gradients(delta, part.hidden.to(delta.dtype), block[first:last] - block[first], sketch)
        )
    square, sketches = (torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True))
    return GradientRecords(blocks, square, sketches)


def _nll_gradients(view: ParallelVocabView, targets: Tensor) -> Tensor:
    """Of each row's nll with respect to its logits, [rows, vocabulary]; 0 where excluded."""
    delta = view.logits().softmax(dim=-1)
    delta[torch.arange(len(targets), device=targets.device), targets] -= 1.0
    return delta


def _chunks(sizes: list[int], limit: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows that hold whole blocks, at most ``limit`` rows where a block lets them."""
    first = last = 0
    for size in sizes:
        if last > first and last + size - first > limit:
            yield first, last
            first = last
        last += size
    yield first, last


@dataclass(frozen=True)
class CountGradient:
    """Last-layer gradient of full blocks by mask count: of the summed nll of a block, as in ``CountLoss``.

    Where a cell holds several counts, numbers are those of its middle count.

    Attributes:
        masked_low: smallest count k of the cell.
        masked_high: largest.
        blocks: measured blocks.
        square: mean squared norm E|Gamma_k|^2.
        square_error: its bootstrap standard error.
        mean_square: squared norm of the mean |E Gamma_k|^2; a little below 0 where it is nothing.
        variance: the first minus the second.
        variance_error: its bootstrap standard error.
        nll_variance: variance of the summed nll g_k, nats^2.
    """

    masked_low: int
    masked_high: int
    blocks: int
    square: float
    square_error: float
    mean_square: float
    variance: float
    variance_error: float
    nll_variance: float


@dataclass(frozen=True)
class PlanVariances:
    """Both variances of one candidate, of a block's loss per token at the comparison scale.

    Attributes:
        name: of the candidate.
        nelbo: variance of the loss, nats^2.
        gradient: variance of the last layer's gradient.
        gradient_error: its bootstrap standard error.
        mean_square: squared norm of the mean gradient, at the same scale.
        finite: False where both are lower bounds of infinite ones; left out of the correlation.
    """

    name: str
    nelbo: float
    gradient: float
    gradient_error: float
    mean_square: float
    finite: bool


@dataclass(frozen=True)
class GradientReport:
    """Whether NELBO variance stands for the gradient's, over clip ranges and the candidates of a search.

    Attributes:
        strata: ``stratified`` or ``independent``: the variances that are compared.
        counts: by mask count, full blocks; empty where too few are full.
        plans: in the order of the search; those of mode ``counts`` are followed by the clip ranges.
        pearson: correlation of the two variances over the plans; None for fewer than 3 plans, or where they
            do not differ.
        pearson_error: its bootstrap standard error, over sequences.
        spearman: correlation of the ranks.
        spearman_error: its bootstrap standard error.
        least_nelbo: candidate with the least variance of the loss.
        least_gradient: candidate with the least variance of the gradient.
        excess: by which share the gradient's variance under ``least_nelbo`` is above the least.
        blocks: measured.
        sequences: measured.
    """

    strata: str
    counts: tuple[CountGradient, ...]
    plans: tuple[PlanVariances, ...]
    pearson: float | None
    pearson_error: float | None
    spearman: float | None
    spearman_error: float | None
    least_nelbo: str
    least_gradient: str
    excess: float
    blocks: int
    sequences: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, numbers to ten digits, None in place of what is not finite."""
        record: dict[str, Any] = plain_values(asdict(self))
        return record

    def describe(self) -> str:
        """One line."""
        if self.pearson is None or self.spearman is None:
            relation = "no correlation can be told"
        else:
            relation = (
                f"correlation {self.pearson:.3f} +- {self.pearson_error:.3f} (of ranks {self.spearman:.3f} "
                f"+- {self.spearman_error:.3f})"
            )
        return (
            f"loss variance and last-layer gradient variance over {len(self.plans)} plans: {relation}; least "
            f"of the loss: {self.least_nelbo}, of the gradient: {self.least_gradient} (excess "
            f"{self.excess:.1%}) [{self.blocks} blocks]"
        )


def compare_variances(records: GradientRecords, result: SearchResult) -> GradientReport:
    """Judge the candidates of a search by both variances on the same blocks and the same resamples.

    Args:
        records: measured with the block size of the search; other rows than the search's will do.
        result: of the search.

    Raises:
        DataError: if there are too few blocks or sequences.
    """
    cells = build_cells(records.blocks)
    if cells.sequences < 2:
        raise DataError(f"records of {cells.sequences} sequence; the bootstrap needs at least 2")
    independent = result.strata == "independent"
    weights = bootstrap_weights(cells.sequences, result.settings)
    losses = [moments(records.blocks, cells), moments(records.blocks, cells, weights)]
    gradients = [gradient_moments(records, cells), gradient_moments(records, cells, weights)]
    plans, nelbo, gradient = [], [], []
    for name, plan in _plans_of(result):
        operator = compile_operator(plan, cells)
        by_loss = [operator.statistics(one) for one in losses]
        by_gradient = [gradient_statistics(operator, one) for one in gradients]
        of_loss, of_gradient = (
            [one.independent_per_token if independent else one.variance_per_token for one in column]
            for column in (by_loss, by_gradient)
        )
        measured = by_gradient[0]
        plans.append(
            PlanVariances(
                name=name,
                nelbo=float(of_loss[0][0]),
                gradient=float(of_gradient[0][0]),
                gradient_error=spread(of_gradient[1]),
                mean_square=float(measured.mean_square[0] * (measured.scale / measured.tokens[0]) ** 2),
                finite=operator.finite,
            )
        )
        if operator.finite:
            nelbo.append(of_loss)
            gradient.append(of_gradient)
    finite = [plan for plan in plans[: len(result.candidates)] if plan.finite]
    if not finite:
        raise DataError("no plan of the search has a finite variance; there is nothing to compare")
    least_nelbo = min(finite, key=lambda plan: plan.nelbo)
    least_gradient = min(finite, key=lambda plan: plan.gradient)
    pearson: tuple[float | None, float | None] = (None, None)
    spearman = pearson
    if len(nelbo) >= MIN_PLANS:
        pair = _stack(nelbo), _stack(gradient)
        pearson, spearman = _with_error(_pearson, *pair), _with_error(_spearman, *pair)
    return GradientReport(
        strata=result.strata,
        counts=_by_count(result.current.block_size, records, cells, gradients),
        plans=tuple(plans),
        pearson=pearson[0],
        pearson_error=pearson[1],
        spearman=spearman[0],
        spearman_error=spearman[1],
        least_nelbo=least_nelbo.name,
        least_gradient=least_gradient.name,
        excess=least_nelbo.gradient / least_gradient.gradient - 1.0,
        blocks=records.blocks.blocks,
        sequences=cells.sequences,
    )


def _plans_of(result: SearchResult) -> list[tuple[str, NoisePlan]]:
    """The candidates of a search; with fitted counts the clip ranges as well, or there were too few."""
    plans = [
        (one.name, replace(result.current, clip_range=one.clip_range, density=one.density))
        for one in result.candidates
    ]
    if result.settings.mode == "counts":
        plain = replace(result.current, density=None)
        ranges = clip_candidates(plain, result.settings).candidates[1:]
        plans += [(one.name, one.plan) for one in ranges if one.plan not in [plan for _, plan in plans]]
    return plans


def _stack(columns: list[list[np.ndarray]]) -> np.ndarray:
    """As measured and then each resample, [1 + draws, plans]."""
    return np.stack([np.concatenate(column) for column in columns], axis=1)


def _with_error(correlate: Any, x: np.ndarray, y: np.ndarray) -> tuple[float | None, float | None]:
    """A correlation as measured and its bootstrap standard error; None where plans do not differ."""
    if np.ptp(x[0]) <= TIE * np.abs(x[0]).max() or np.ptp(y[0]) <= TIE * np.abs(y[0]).max():
        return None, None
    values = correlate(x, y)
    return float(values[0]), spread(values[1:])


def _pearson(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Over the last axis, [draws]."""
    x, y = x - x.mean(axis=1, keepdims=True), y - y.mean(axis=1, keepdims=True)
    return np.asarray((x * y).sum(axis=1) / np.sqrt((x**2).sum(axis=1) * (y**2).sum(axis=1)))


def _spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Over the last axis, [draws]; ties have the mean of their ranks."""
    return _pearson(_ranks(x), _ranks(y))


def _ranks(x: np.ndarray) -> np.ndarray:
    # Plans that differ by rounding only are the same: at block size 1 many are.
    difference = x[:, :, None] - x[:, None, :]
    tie = TIE * np.abs(x).max(axis=1)[:, None, None]
    return np.asarray((difference > tie).sum(axis=2) + 0.5 * (np.abs(difference) <= tie).sum(axis=2))


def _by_count(
    block_size: int, records: GradientRecords, cells: Cells, gradients: list[GradientMoments]
) -> tuple[CountGradient, ...]:
    where = cells.of_size(block_size)
    if where is None:
        return ()
    low = bin_starts(block_size) + 1
    high = np.append(low[1:] - 1, block_size)
    middle = ((low + high) / 2) ** 2
    measured, resampled = gradients
    losses = moments(records.blocks, cells).variance[0, where]
    mean_square = measured.mean_square[0, where]
    return tuple(
        CountGradient(
            masked_low=int(low[index]),
            masked_high=int(high[index]),
            blocks=round(float(measured.count[0, where][index])),
            square=float(measured.second[0, where][index] * middle[index]),
            square_error=spread(resampled.second[:, where][:, index] * middle[index]),
            mean_square=float(mean_square[index] * middle[index]),
            variance=float(measured.variance[0, where][index] * middle[index]),
            variance_error=spread(resampled.variance[:, where][:, index] * middle[index]),
            nll_variance=float(losses[index] * middle[index]),
        )
        for index in range(len(low))
    )
