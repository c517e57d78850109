"""Records, cells and the variance of every plan, against the enumeration of all masks and the real sampler.

The toy has texts, each with an arbitrary loss for every subset of its masked tokens, so that nothing but the
definitions can make the numbers agree.
"""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import pytest
import torch

from bdtrain.diffusion.keyed import NoiseKey, Purpose
from bdtrain.diffusion.levels import draw_noise
from bdtrain.diffusion.plan import NoisePlan, full_masking_plan
from bdtrain.diffusion.plan_variance import comparison_scale, compile_operator, fit_density
from bdtrain.diffusion.tables import compile_tables
from bdtrain.diffusion.variance import BlockRecords, bin_starts, build_cells, moments
from bdtrain.diffusion.visibility import build_layout
from bdtrain.errors import ConfigError, DataError, ShapeError

BLOCK = 4
TEXTS = 3
POINTS = 20_000


@functools.cache
def toy_losses(n: int) -> np.ndarray:
    """Summed nll of the masked tokens, [texts, 2**n], by the subset's bits; steep in the count."""
    rng = np.random.default_rng(n)
    losses = np.zeros((TEXTS, 2**n))
    for text in range(TEXTS):
        for subset in range(1, 2**n):
            masked = [i for i in range(n) if subset >> i & 1]
            losses[text, subset] = sum(0.3 + 0.5 * len(masked) + 0.4 * i + rng.random() for i in masked)
    return losses * np.array([0.7, 1.0, 1.5])[:, None]


@functools.cache
def sizes_of(n: int) -> np.ndarray:
    return np.array([bin(subset).count("1") for subset in range(2**n)])


def every_subset(sizes=(3, BLOCK), repeats=1000) -> BlockRecords:
    """Each text and subset equally often, so that moments are the population's up to 1 / repeats."""
    rows = [
        (n, sizes_of(n)[subset], toy_losses(n)[text, subset])
        for n in sizes
        for text in range(TEXTS)
        for subset in range(1, 2**n)
    ]
    n, k, g = (np.repeat(column, repeats) for column in zip(*rows, strict=True))
    return BlockRecords(np.arange(len(n)) // 50, n, k, g)


def statistics_of(plan: NoisePlan, records: BlockRecords):
    cells = build_cells(records)
    return compile_operator(plan, cells).statistics(moments(records, cells))


FORMULAS = {
    "linear": (lambda t: t, lambda t: 1 / t),
    "reference_linear": (lambda t: t, lambda t: 1 / t),
    "cosine": (lambda t: 1 - np.cos(np.pi * t / 2), lambda t: np.pi / 2 / np.tan(np.pi * t / 4)),
    "square": (lambda t: t**2, lambda t: 2 / t),
    "reference_square": (lambda t: np.maximum(t**2, 1e-3), lambda t: 2 * t / np.maximum(t**2, 1e-3)),
    "reference_mdlm": (lambda t: 0.999 * t, lambda t: 1 / t),
}


def enumerated(plan: NoisePlan, n: int, lowest: float | None = None) -> tuple[float, float, float]:
    """Mean, E[X^2], E[E[X | noise level]^2] of a block by enumeration; the level is t, or k of a count plan.

    Second moments leave out times below ``lowest``.
    """
    losses, size = toy_losses(n), sizes_of(n)
    subsets = np.array([math.comb(n, k) for k in range(n + 1)])
    first = np.array([losses[:, size == k].mean() for k in range(n + 1)])
    second = np.array([(losses[:, size == k] ** 2).mean() for k in range(n + 1)])
    if plan.full_masking:
        return first[n], second[n], first[n] ** 2
    low, high = plan.clip_range or (0.0, 1.0)
    # Midpoints in log t where times reach down to 1e-3, so that few of them resolve 1 / t^2.
    edges = np.linspace(low, high, POINTS + 1)
    if lowest is not None:
        edges = np.concatenate(
            (np.linspace(low, lowest, POINTS // 10), np.geomspace(lowest, high, POINTS)[1:])
        )
    t, share = (edges[1:] + edges[:-1]) / 2, np.diff(edges) / (high - low)
    chance, weight = (formula(t) for formula in FORMULAS[plan.schedule])
    w = {"elbo": (high - low) * weight, "reference": weight, "flat": np.ones_like(t)}[plan.weighting]
    k = np.arange(n + 1)
    pmf = subsets * chance[:, None] ** k * (1 - chance[:, None]) ** (n - k)
    inside = (k >= (low - 1e-12) * n) & (k <= (high + 1e-12) * n)
    if plan.resample and inside[1:].any():
        pmf = np.where(inside, pmf, 0.0)
        pmf /= pmf.sum(1, keepdims=True)
    coefficient, drawn = (share * w) @ pmf, share @ pmf
    mean = float(coefficient[1:] @ first[1:])
    if plan.kind == "bernoulli":
        counted = share * w**2 * (t > (lowest or 0.0))
        return mean, float(counted @ (pmf @ second)), float(counted @ (pmf @ first) ** 2)
    q = drawn[1:] / drawn[1:].sum()
    if plan.density is not None:
        cumulative = np.interp(
            np.arange(n + 1) / n,
            np.arange(len(plan.density) + 1) / len(plan.density),
            np.cumsum((0.0, *plan.density)) / sum(plan.density),
        )
        q = np.diff(cumulative)
    x = np.divide(coefficient[1:], q, out=np.zeros(n), where=q > 0)
    return mean, float(q @ (x**2 * second[1:])), float(q @ (x * first[1:]) ** 2)


COUNT_PLANS = [
    NoisePlan(BLOCK),
    NoisePlan(BLOCK, weighting="flat"),
    NoisePlan(BLOCK, schedule="cosine", weighting="flat"),
    NoisePlan(BLOCK, schedule="reference_square", weighting="reference"),
    NoisePlan(BLOCK, clip_range=(0.3, 0.8)),
    NoisePlan(BLOCK, clip_range=(0.3, 0.8), weighting="reference", density=(1.0, 3.0, 2.0, 5.0, 0.5)),
    NoisePlan(BLOCK, clip_range=(0.3, 0.8), weighting="flat", resample=True),
    full_masking_plan(BLOCK),
]
BERNOULLI_PLANS = [
    NoisePlan(BLOCK, kind="bernoulli", weighting="flat"),
    NoisePlan(BLOCK, kind="bernoulli", schedule="cosine"),
    NoisePlan(BLOCK, kind="bernoulli", schedule="square"),
    NoisePlan(BLOCK, kind="bernoulli", schedule="reference_square", clip_range=(0.1, 0.9)),
    NoisePlan(BLOCK, kind="bernoulli", clip_range=(0.3, 0.8)),
    NoisePlan(BLOCK, kind="bernoulli", clip_range=(0.45, 0.95), weighting="reference"),
    NoisePlan(BLOCK, kind="bernoulli", clip_range=(0.3, 0.8), resample=True),
    NoisePlan(BLOCK, kind="bernoulli", clip_range=(0.4, 0.6), resample=True, weighting="reference"),
]
PLANS = COUNT_PLANS + BERNOULLI_PLANS


@pytest.mark.parametrize("plan", PLANS, ids=range(len(PLANS)))
def test_mean_and_both_variances_are_those_of_all_masks_enumerated(plan):
    records = every_subset()
    shares = {n: (records.maskable == n).mean() for n in (3, BLOCK)}
    exact = {n: enumerated(plan, n) for n in shares}
    found = statistics_of(plan, records)
    assert found.finite
    assert found.mean == pytest.approx(sum(f * exact[n][0] for n, f in shares.items()), rel=1e-6)
    independent = sum(f * (exact[n][1] - exact[n][0] ** 2) for n, f in shares.items())
    stratified = sum(f * (exact[n][1] - exact[n][2]) for n, f in shares.items())
    # N / (N - 1) of at least 3,000 records in a cell, and nothing else, parts the two.
    assert found.independent == pytest.approx(independent, rel=6e-4)
    assert found.stratified == pytest.approx(stratified, rel=6e-4)
    tokens = 3 * shares[3] + 4 * shares[4]
    assert found.tokens == pytest.approx(tokens)
    scale = 2.0 if plan.clip_range == (0.3, 0.8) and plan.weighting == "elbo" else comparison_scale(plan)
    assert found.mean_per_token == pytest.approx(found.mean * scale / tokens)
    assert found.variance_per_token == pytest.approx(found.stratified * scale**2 / tokens**2)
    assert found.independent_per_token == pytest.approx(found.independent * scale**2 / tokens**2)


@pytest.mark.parametrize("schedule", ["linear", "reference_linear", "reference_mdlm"])
def test_weights_of_1_over_t_down_to_0_have_no_variance_and_the_lower_bound_says_so(schedule):
    plan = NoisePlan(BLOCK, kind="bernoulli", schedule=schedule)
    found = statistics_of(plan, every_subset(sizes=(BLOCK,)))
    mean, second, level = enumerated(plan, BLOCK, lowest=1e-3)
    assert not found.finite
    assert found.mean == pytest.approx(mean, rel=1e-3)
    assert found.independent == pytest.approx(second - mean**2, rel=2e-3)
    assert found.stratified == pytest.approx(second - level, rel=2e-3)
    # The same range as a plan that says so is finite.
    clipped = NoisePlan(BLOCK, kind="bernoulli", schedule="linear", clip_range=(1e-3, 1.0))
    assert statistics_of(clipped, every_subset(sizes=(BLOCK,))).finite


@pytest.mark.parametrize("schedule", ["square_root", "logarithmic", "reference_square_root"])
def test_other_schedules_without_a_variance_are_known(schedule):
    plan = NoisePlan(BLOCK, kind="bernoulli", schedule=schedule)
    assert not statistics_of(plan, every_subset(repeats=2)).finite


@pytest.mark.parametrize("low", [1e-6, 1e-3, 0.05, 0.5])
def test_quadratures_over_t_are_exact_for_every_lower_end(low):
    n, high = 16, 1.0
    plan = NoisePlan(n, kind="bernoulli", clip_range=(low, high), weighting="reference")
    k = np.tile(np.arange(1, n + 1), 4)
    records = BlockRecords(np.arange(len(k)), np.full(len(k), n), k, np.ones(len(k)))
    operator = compile_operator(plan, build_cells(records))

    def at_most(count, tokens, p):
        return sum(math.comb(tokens, j) * p**j * (1 - p) ** (tokens - j) for j in range(count + 1))

    # Integral of Binom(k; n, t) / t^2: for k >= 2 one of a shorter binomial, for k = 1 by the recursion
    # I_m = I_{m-1} - integral of (1 - t)^(m-1) for I_m = integral of (1 - t)^m / t.
    expected = [0.0] * n
    integral = math.log(high / low)
    for m in range(1, n):
        integral -= ((1 - low) ** m - (1 - high) ** m) / m
    expected[0] = n * integral
    for count in range(2, n + 1):
        difference = at_most(count - 2, n - 1, low) - at_most(count - 2, n - 1, high)
        expected[count - 1] = n / (count * (count - 1)) * difference
    expected = np.array(expected) / (high - low) * np.arange(1, n + 1) ** 2
    np.testing.assert_allclose(operator.square_of, expected, rtol=1e-9)


def drawn_losses(plan: NoisePlan, n: int, rows: int, slots: int = 2) -> np.ndarray:
    """Weighted losses of blocks of n maskable tokens drawn by the real sampler, [rows, slots].

    Under re-fit keys 64 consecutive rows share strata, so this is rows / 64 batches. Texts are drawn anew for
    each block.
    """
    seq = slots * BLOCK
    index = torch.arange(rows)
    noise = draw_noise(
        torch.zeros(rows, seq, dtype=torch.int64),
        build_layout(torch.zeros(rows, seq, dtype=torch.int32), BLOCK, isolate=False),
        (torch.arange(seq) % BLOCK < n).expand(rows, seq),
        plan,
        compile_tables(plan),
        mask_id=9,
        key=NoiseKey(7, Purpose.REFIT),
        sample_index=index,
        batch_index=index,
        global_batch=rows,
        copies=1,
    )
    masked = noise.masked.reshape(rows, slots, BLOCK)[..., :n].long()
    subset = (masked << torch.arange(n)).sum(-1).numpy()
    weight = noise.weight.double().reshape(rows, slots, BLOCK).amax(-1).numpy()
    text = np.random.default_rng(1).integers(0, TEXTS, size=subset.shape)
    return weight * toy_losses(n)[text, subset]


SAMPLED = [PLANS[i] for i in (0, 1, 4, 5, 6, 8, 9, 12, 14)]


def with_strata(plan: NoisePlan, strata: str) -> NoisePlan:
    return NoisePlan.from_dict({**plan.to_dict(), "strata": strata})


@pytest.mark.parametrize("plan", SAMPLED, ids=range(len(SAMPLED)))
def test_the_sampler_without_strata_has_the_independent_variance(plan):
    losses = drawn_losses(with_strata(plan, "independent"), 3, rows=40_000).ravel()
    found = statistics_of(plan, every_subset(sizes=(3,)))
    assert abs(losses.mean() - found.mean) < 4 * losses.std() / len(losses) ** 0.5
    squares = (losses - losses.mean()) ** 2
    error = squares.std() / len(losses) ** 0.5
    assert abs(squares.mean() - found.independent) < 4 * error + 1e-3 * found.independent
    assert error < 0.02 * found.independent


@pytest.mark.parametrize("plan", SAMPLED, ids=range(len(SAMPLED)))
def test_the_sampler_with_permuted_strata_has_the_stratified_variance(plan):
    batches, slots = 1000, 2
    losses = drawn_losses(plan, BLOCK, rows=batches * 64, slots=slots)
    sums = losses.reshape(batches, 64 * slots).sum(1)
    found = statistics_of(plan, every_subset(sizes=(BLOCK,)))
    variance = sums.var(ddof=1) / (64 * slots)
    # A sum of 128 blocks is nearly normal; strata leave about one part in 128 of the rest.
    error = variance * (2 / batches) ** 0.5
    assert abs(variance - found.stratified) < 4 * error + 0.01 * (found.independent - found.stratified)
    if plan.weighting == "flat" and not plan.resample:
        assert found.stratified < 0.6 * found.independent


def test_few_records_give_unbiased_mean_and_variances():
    rng = np.random.default_rng(3)
    losses, size = toy_losses(BLOCK), sizes_of(BLOCK)
    plans = (COUNT_PLANS[1], COUNT_PLANS[4], BERNOULLI_PLANS[0], BERNOULLI_PLANS[4])
    k = np.tile(np.arange(1, BLOCK + 1), 5)
    subsets = [np.flatnonzero(size == count) for count in k]
    found = {index: [] for index in range(len(plans))}
    cells, operators = None, []
    for _ in range(2000):
        subset = np.array([choices[rng.integers(len(choices))] for choices in subsets])
        g = losses[rng.integers(0, TEXTS, len(k)), subset]
        records = BlockRecords(np.arange(len(k)), np.full(len(k), BLOCK), k, g)
        if cells is None:
            cells = build_cells(records)
            operators = [compile_operator(plan, cells) for plan in plans]
        measured = moments(records, cells)
        for index, operator in enumerate(operators):
            one = operator.statistics(measured)
            found[index].append((one.mean[0], one.independent[0], one.stratified[0]))
    for index, plan in enumerate(plans):
        mean, second, level = enumerated(plan, BLOCK)
        estimates = np.array(found[index])
        error = estimates.std(0) / len(estimates) ** 0.5
        assert (np.abs(estimates.mean(0) - (mean, second - mean**2, second - level)) < 4 * error).all()


def test_weights_count_a_sequence_as_often_as_its_copies_would():
    rng = np.random.default_rng(0)
    sequence = np.sort(rng.integers(0, 12, 400))
    k = rng.integers(1, BLOCK + 1, 400)
    g = rng.gamma(2.0, 1.0, 400) * k
    records = BlockRecords(sequence, np.full(400, BLOCK), k, g)
    cells = build_cells(records)
    weights = rng.multinomial(12, np.full(12, 1 / 12), size=3).astype(float)
    drawn = moments(records, cells, weights)
    for draw in range(3):
        times = weights[draw].astype(int)[sequence]
        copied = BlockRecords(*(np.repeat(column, times) for column in records.to_arrays().values()))
        alone = moments(copied, build_cells(copied))
        for name in ("count", "first", "second", "variance", "blocks"):
            np.testing.assert_allclose(getattr(drawn, name)[draw], getattr(alone, name)[0], rtol=1e-12)


def test_a_cell_that_a_resample_misses_keeps_its_own_moments():
    k = np.array([1, 2] * 4)
    g = np.arange(8.0) + 1
    records = BlockRecords(np.repeat(np.arange(4), 2), np.full(8, 2), k, g)
    cells = build_cells(records)
    drawn = moments(records, cells, np.array([[1.0, 0.0, 0.0, 0.0]]))
    whole = moments(records, cells)
    np.testing.assert_array_equal(drawn.first, whole.first)
    np.testing.assert_array_equal(drawn.variance, whole.variance)
    assert drawn.blocks.tolist() == [[2.0]]
    assert whole.first.tolist() == [[4.0, 2.5]]
    assert whole.variance[0] == pytest.approx([np.var([1, 3, 5, 7], ddof=1), np.var([1, 2, 3, 4], ddof=1)])


def test_cells_of_long_blocks_partition_the_counts_into_64_bins():
    for n in (1, 7, 64, 65, 100, 128, 200):
        starts = bin_starts(n)
        assert len(starts) == min(n, 64) and starts[0] == 0 and (np.diff(starts) >= 1).all()
        k = np.repeat(np.arange(1, n + 1), 4)
        cells = build_cells(BlockRecords(np.arange(len(k)), np.full(len(k), n), k, np.ones(len(k))))
        by_start = np.searchsorted(starts, np.arange(n), side="right") - 1
        assert cells.cell.tolist() == np.repeat(by_start, 4).tolist()
        expected = [next(j for j in itertools.count() if k_ * 64 <= (j + 1) * n) for k_ in range(1, n + 1)]
        if n > 64:
            assert by_start.tolist() == expected


@pytest.mark.parametrize("kind", ["count", "bernoulli"])
def test_long_blocks_are_exact_where_the_loss_per_masked_token_is_constant_in_a_bin(kind):
    n, repeats = 100, 6
    rng = np.random.default_rng(2)
    k = np.repeat(np.arange(1, n + 1), repeats)
    bins = -(-64 * k // n) - 1
    # Two values per bin, the same for all its counts.
    centre, spread = rng.uniform(1, 3, 64), rng.uniform(0.2, 1, 64)
    h = centre[bins] + spread[bins] * np.where(np.arange(len(k)) % 2, 1, -1)
    records = BlockRecords(np.arange(len(k)), np.full(len(k), n), k, h * k)
    found = statistics_of(NoisePlan(n, kind=kind, clip_range=(0.3, 0.8)), records)
    counts = np.arange(1, n + 1)
    bins = -(-64 * counts // n) - 1
    t = 0.3 + 0.5 * (np.arange(2000) + 0.5) / 2000
    log_choose = np.array([math.log(math.comb(n, int(c))) for c in counts])
    pmf = np.exp(log_choose + np.outer(np.log(t), counts) + np.outer(np.log1p(-t), n - counts))
    weight = (0.5 / t)[:, None]
    first, second = centre[bins] * counts, (centre**2 + spread**2)[bins] * counts**2
    mean = (weight * pmf * first).sum(1).mean()
    assert found.mean == pytest.approx(mean, rel=1e-6)
    if kind == "bernoulli":
        moment = (weight**2 * pmf * second).sum(1).mean()
        assert found.independent == pytest.approx(moment - mean**2, rel=0.02)
    else:
        q, c = pmf.mean(0) / pmf.mean(0).sum(), (weight * pmf).mean(0)
        # Bins of 6 and 12 records have the factor N / (N - 1) of 6 / 5 and 12 / 11.
        factor = np.where(np.bincount(bins)[bins] == 1, 6 / 5, 12 / 11)
        exact = (factor * c**2 / q * (spread[bins] * counts) ** 2).sum()
        assert found.stratified == pytest.approx(exact, rel=1e-6)


def test_a_rare_number_of_maskable_tokens_is_left_out_and_said():
    common = every_subset(sizes=(BLOCK,), repeats=4)
    rare = BlockRecords([10_000] * 5, [3, 3, 3, 2, 2], [1, 2, 3, 1, 2], [1.0, 2.0, 3.0, 1.0, 2.0])
    cells = build_cells(BlockRecords.concatenate([common, rare]))
    assert cells.sizes.tolist() == [BLOCK]
    assert cells.left_out == ((2, 2), (3, 3))
    blocks = common.blocks
    assert cells.blocks_share == pytest.approx(blocks / (blocks + 5))
    assert cells.tokens_share == pytest.approx(4 * blocks / (4 * blocks + 13))
    assert cells.of_size(3) is None
    assert build_cells(BlockRecords.concatenate([common, rare]), min_samples=1).sizes.tolist() == [2, 3, 4]
    with pytest.raises(DataError, match="too few"):
        build_cells(rare)


def test_records_are_the_same_bits_for_any_split_and_order():
    whole = every_subset(repeats=3)
    columns = whole.to_arrays()
    parts = [
        BlockRecords.from_arrays(
            {name: column[whole.sequence % 3 == part] for name, column in columns.items()}
        )
        for part in (2, 0, 1)
    ]
    joined = BlockRecords.concatenate(parts)
    for name, column in columns.items():
        assert getattr(joined, name).tobytes() == column.tobytes()
        assert getattr(joined, name).dtype == column.dtype
    assert joined.sequences == sum(part.sequences for part in parts) == whole.sequences


def test_records_refuse_what_cannot_have_been_measured():
    with pytest.raises(ShapeError, match=r"\[blocks\]"):
        BlockRecords([0, 1], [2, 2], [1], [1.0, 1.0])
    with pytest.raises(DataError, match="ascending"):
        BlockRecords([1, 0], [2, 2], [1, 1], [1.0, 1.0])
    with pytest.raises(DataError, match="1 of 2 block records have a masked count"):
        BlockRecords([0, 1], [2, 2], [1, 3], [1.0, 1.0])
    with pytest.raises(DataError, match="1 of 2 measured blocks is not finite"):
        BlockRecords([0, 1], [2, 2], [1, 1], [1.0, float("nan")])
    one = BlockRecords([5], [2], [1], [1.0])
    with pytest.raises(DataError, match="same sequence"):
        BlockRecords.concatenate([one, one])
    with pytest.raises(DataError, match="no block records"):
        BlockRecords.concatenate([])
    with pytest.raises(DataError, match="without nll"):
        BlockRecords.from_arrays({"sequence": one.sequence, "maskable": one.maskable, "masked": one.masked})
    with pytest.raises(ValueError, match="read-only"):
        one.nll[0] = 2.0


def test_sizes_that_do_not_fit_are_refused():
    records = every_subset(sizes=(BLOCK,), repeats=4)
    cells = build_cells(records)
    with pytest.raises(ConfigError, match="block_size=3"):
        compile_operator(NoisePlan(3), cells)
    with pytest.raises(ShapeError, match="sequences"):
        moments(records, cells, np.ones((2, 1)))
    other = every_subset(sizes=(3,), repeats=4)
    with pytest.raises(ShapeError, match="cells"):
        compile_operator(NoisePlan(BLOCK), cells).statistics(moments(other, build_cells(other)))
    with pytest.raises(DataError, match="no density"):
        fit_density(NoisePlan(8), cells, moments(records, cells))
    with pytest.raises(ConfigError, match="uniform_share"):
        fit_density(NoisePlan(BLOCK), cells, moments(records, cells), uniform_share=0.0)


@pytest.mark.parametrize("independent", [False, True])
@pytest.mark.parametrize("clip_range", [None, (0.3, 0.8)])
def test_the_fitted_density_has_the_least_variance_of_its_neighbours(clip_range, independent):
    records = every_subset(sizes=(BLOCK,))
    cells = build_cells(records)
    measured = moments(records, cells)
    plain = NoisePlan(BLOCK, clip_range=clip_range)
    heights = fit_density(plain, cells, measured, uniform_share=1e-6, independent=independent)
    assert sum(heights) == pytest.approx(BLOCK, rel=1e-5)

    def variance(density):
        plan = NoisePlan(BLOCK, clip_range=clip_range, density=tuple(density))
        found = compile_operator(plan, cells).statistics(measured)
        return float((found.independent if independent else found.stratified)[0])

    least = variance(heights)
    rng = np.random.default_rng(0)
    for _ in range(20):
        assert variance(np.array(heights) * rng.uniform(0.8, 1.25, BLOCK)) > least
    assert variance(np.ones(BLOCK)) > least
    floor = fit_density(plain, cells, measured, uniform_share=0.05, independent=independent)
    np.testing.assert_allclose(floor, 0.95 * np.array(heights) + 0.05, rtol=1e-4)


def test_a_density_of_losses_without_spread_is_uniform():
    records = BlockRecords(np.arange(8), np.full(8, 2), [1, 2] * 4, [1.0, 2.0] * 4)
    cells = build_cells(records)
    assert fit_density(NoisePlan(2), cells, moments(records, cells)) == (1.0, 1.0)
