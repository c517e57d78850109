"""The last layer's gradient variance under every plan, against enumeration of all masks and the real sampler.

The toy gives each text and subset of masked tokens an arbitrary gradient, kept whole in place of a sketch, so
that nothing but the definitions can make the numbers agree.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch

from bdtrain.diffusion.gradient_variance import (
    GradientRecords,
    GradientSketch,
    gradient_moments,
    gradient_statistics,
    sum_gradients,
)
from bdtrain.diffusion.keyed import NoiseKey, Purpose
from bdtrain.diffusion.levels import draw_noise
from bdtrain.diffusion.plan import NoisePlan, full_masking_plan
from bdtrain.diffusion.plan_variance import compile_operator
from bdtrain.diffusion.tables import compile_tables
from bdtrain.diffusion.variance import BlockRecords, build_cells, moments
from bdtrain.diffusion.visibility import build_layout
from bdtrain.errors import DataError, ShapeError

BLOCK = 4
TEXTS = 3
SIZE = 5
"""Entries of a toy gradient."""


@functools.cache
def toy_gradients(n: int) -> np.ndarray:
    """[texts, 2**n, SIZE], by the subset's bits: a part that grows with the count, and chance."""
    rng = np.random.default_rng(n)
    masked = np.array([[subset >> i & 1 for i in range(n)] for subset in range(2**n)])
    shared = rng.normal(size=(n, SIZE))
    own = rng.normal(size=(TEXTS, n, SIZE))
    return masked @ (shared + own) + 0.3 * masked.sum(1)[:, None] * masked.any(1)[:, None] * np.ones(SIZE)


@functools.cache
def sizes_of(n: int) -> np.ndarray:
    return np.array([bin(subset).count("1") for subset in range(2**n)])


def every_subset(sizes=(3, BLOCK), repeats=400) -> GradientRecords:
    """Each text and subset equally often, so that moments are the population's up to 1 / repeats."""
    rows = [
        (n, int(sizes_of(n)[subset]), tuple(toy_gradients(n)[text, subset]))
        for n in sizes
        for text in range(TEXTS)
        for subset in range(1, 2**n)
    ]
    n, k = (np.repeat([row[i] for row in rows], repeats) for i in range(2))
    gradient = np.repeat(np.array([row[2] for row in rows]), repeats, axis=0)
    return records_of(n, k, gradient, np.arange(len(n)) // 50)


def records_of(n, k, gradient, sequence) -> GradientRecords:
    blocks = BlockRecords(sequence, n, k, np.zeros(len(k)))
    return GradientRecords(blocks, (gradient**2).sum(1), gradient)


def enumerated(plan: NoisePlan, n: int) -> tuple[float, float, float]:
    """|E X|^2, E|X|^2 and E|E[X | noise level]|^2 of a block; the level is t, or k of a count plan."""
    gradients, size = toy_gradients(n), sizes_of(n)
    first = np.array([gradients[:, size == k].mean((0, 1)) for k in range(n + 1)])
    second = np.array([(gradients[:, size == k] ** 2).sum(-1).mean() for k in range(n + 1)])
    if plan.full_masking:
        return float(first[n] @ first[n]), float(second[n]), float(first[n] @ first[n])
    low, high = plan.clip_range or (0.0, 1.0)
    t = low + (high - low) * (np.arange(20_000) + 0.5) / 20_000
    w = {"elbo": (high - low) / t, "reference": 1 / t, "flat": np.ones_like(t)}[plan.weighting]
    k = np.arange(n + 1)
    choose = np.array([math.comb(n, int(count)) for count in k])
    pmf = choose * t[:, None] ** k * (1 - t[:, None]) ** (n - k)
    coefficient, drawn = (w[:, None] * pmf).mean(0), pmf.mean(0)
    mean = coefficient[1:] @ first[1:]
    if plan.kind == "bernoulli":
        at_t = (w[:, None] * pmf) @ first
        return (
            float(mean @ mean),
            float(((w**2)[:, None] * pmf).mean(0) @ second),
            float((at_t**2).sum(1).mean()),
        )
    q = drawn[1:] / drawn[1:].sum()
    if plan.density is not None:
        heights = np.repeat(plan.density, 1000 * n)
        q = heights.reshape(n, -1).sum(1) / heights.sum()
    x = coefficient[1:] / q
    return float(mean @ mean), float(q @ (x**2 * second[1:])), float(q @ (x**2 * (first[1:] ** 2).sum(1)))


PLANS = [
    NoisePlan(BLOCK),
    NoisePlan(BLOCK, clip_range=(0.3, 0.8)),
    NoisePlan(BLOCK, clip_range=(0.45, 0.95), weighting="reference", density=(1.0, 3.0, 2.0, 5.0, 0.5)),
    NoisePlan(BLOCK, weighting="flat"),
    full_masking_plan(BLOCK),
    NoisePlan(BLOCK, kind="bernoulli", clip_range=(0.3, 0.8)),
    NoisePlan(BLOCK, kind="bernoulli", weighting="flat"),
]


def statistics_of(plan: NoisePlan, records: GradientRecords):
    cells = build_cells(records.blocks)
    return gradient_statistics(compile_operator(plan, cells), gradient_moments(records, cells))


@pytest.mark.parametrize("plan", PLANS, ids=range(len(PLANS)))
def test_variances_are_those_of_the_enumeration(plan):
    found = statistics_of(plan, every_subset())
    parts = [enumerated(plan, n) for n in (3, BLOCK)]
    # The toy has 21 subsets of 3 tokens and 45 of 4.
    shares = np.array([TEXTS * 7, TEXTS * 15]) / (TEXTS * 22)
    mean, second, level = (shares @ np.array(column) for column in zip(*parts, strict=True))
    # The factor N / (N - 1), N at least 1,200 a cell.
    assert found.mean_square[0] == pytest.approx(mean, rel=2e-3)
    assert found.independent[0] == pytest.approx(second - mean, rel=2e-3)
    assert found.stratified[0] == pytest.approx(second - level, rel=2e-3)
    assert found.tokens[0] == pytest.approx(shares @ (3, BLOCK))


def drawn_gradients(plan: NoisePlan, rows: int, slots: int = 2) -> np.ndarray:
    """Weighted gradients of blocks drawn by the real sampler, [rows, slots, SIZE]; 64 rows share strata."""
    seq = slots * BLOCK
    index = torch.arange(rows)
    noise = draw_noise(
        torch.zeros(rows, seq, dtype=torch.int64),
        build_layout(torch.zeros(rows, seq, dtype=torch.int32), BLOCK, isolate=False),
        torch.ones(rows, seq, dtype=torch.bool),
        plan,
        compile_tables(plan),
        mask_id=9,
        key=NoiseKey(7, Purpose.REFIT),
        sample_index=index,
        batch_index=index,
        global_batch=rows,
        copies=1,
    )
    masked = noise.masked.reshape(rows, slots, BLOCK).long()
    subset = (masked << torch.arange(BLOCK)).sum(-1).numpy()
    weight = noise.weight.double().reshape(rows, slots, BLOCK).amax(-1).numpy()
    text = np.random.default_rng(1).integers(0, TEXTS, size=subset.shape)
    return weight[..., None] * toy_gradients(BLOCK)[text, subset]


@pytest.mark.parametrize("plan", PLANS, ids=range(len(PLANS)))
def test_the_sampler_without_strata_has_the_independent_variance(plan):
    plan = NoisePlan.from_dict({**plan.to_dict(), "strata": "independent"})
    drawn = drawn_gradients(plan, rows=20_000).reshape(-1, SIZE)
    squares = ((drawn - drawn.mean(0)) ** 2).sum(1)
    error = squares.std() / len(squares) ** 0.5
    expected = statistics_of(plan, every_subset(sizes=(BLOCK,))).independent[0]
    assert abs(squares.mean() - expected) < 4 * error + 2e-3 * expected
    assert error < 0.02 * expected


@pytest.mark.parametrize("plan", PLANS, ids=range(len(PLANS)))
def test_the_sampler_with_strata_has_the_stratified_variance(plan):
    batches, slots = 1000, 2
    sums = drawn_gradients(plan, rows=batches * 64).reshape(batches, 64 * slots, SIZE).sum(1)
    squares = ((sums - sums.mean(0)) ** 2).sum(1) / (64 * slots) * batches / (batches - 1)
    found = statistics_of(plan, every_subset(sizes=(BLOCK,)))
    error = squares.std() / batches**0.5
    left = 0.01 * (found.independent[0] - found.stratified[0])  # strata leave about one part in 128 of it
    assert abs(squares.mean() - found.stratified[0]) < 4 * error + left + 2e-3 * found.stratified[0]
    assert error < 0.05 * found.stratified[0]


def test_few_records_give_unbiased_means_and_variances():
    rng = np.random.default_rng(3)
    gradients, size = toy_gradients(BLOCK), sizes_of(BLOCK)
    plans = (PLANS[1], PLANS[5])
    k = np.tile(np.arange(1, BLOCK + 1), 5)
    choices = [np.flatnonzero(size == count) for count in k]
    cells, operators, found = None, [], [[] for _ in plans]
    for _ in range(2000):
        subset = np.array([one[rng.integers(len(one))] for one in choices])
        records = records_of(
            np.full(len(k), BLOCK), k, gradients[rng.integers(0, TEXTS, len(k)), subset], np.arange(len(k))
        )
        if cells is None:
            cells = build_cells(records.blocks)
            operators = [compile_operator(plan, cells) for plan in plans]
        measured = gradient_moments(records, cells)
        for estimates, operator in zip(found, operators, strict=True):
            one = gradient_statistics(operator, measured)
            estimates.append((one.mean_square[0], one.independent[0], one.stratified[0]))
    for estimates, plan in zip(found, plans, strict=True):
        mean, second, level = enumerated(plan, BLOCK)
        error = np.std(estimates, axis=0) / len(estimates) ** 0.5
        assert (np.abs(np.mean(estimates, axis=0) - (mean, second - mean, second - level)) < 4 * error).all()


def test_in_one_dimension_they_are_the_variances_of_the_loss():
    rng = np.random.default_rng(5)
    k = np.tile(np.arange(1, BLOCK + 1), 100)
    g = rng.gamma(2.0, 1.0, len(k)) * k
    blocks = BlockRecords(np.arange(len(k)) // 8, np.full(len(k), BLOCK), k, g)
    records = GradientRecords(blocks, g**2, g[:, None])
    cells = build_cells(blocks)
    weights = rng.multinomial(50, np.full(50, 0.02), size=70).astype(float)
    for plan in PLANS:
        operator = compile_operator(plan, cells)
        for draws in (None, weights):
            loss = operator.statistics(moments(blocks, cells, draws))
            gradient = gradient_statistics(operator, gradient_moments(records, cells, draws))
            for name in ("stratified", "independent", "variance_per_token", "independent_per_token"):
                np.testing.assert_allclose(getattr(gradient, name), getattr(loss, name), rtol=1e-9)


def test_a_cell_that_a_resample_misses_keeps_its_own_moments():
    k = np.array([1, 2] * 4)
    gradient = np.arange(16.0).reshape(8, 2)
    records = records_of(np.full(8, 2), k, gradient, np.repeat(np.arange(4), 2))
    cells = build_cells(records.blocks)
    drawn = gradient_moments(records, cells, np.array([[1.0, 0.0, 0.0, 0.0]]))
    whole = gradient_moments(records, cells)
    np.testing.assert_allclose(drawn.second, whole.second)
    np.testing.assert_allclose(drawn.products[0], whole.products[0])
    assert drawn.blocks.tolist() == [[2.0]]


def outer_case(seed=0, rows=7, vocab=11, hidden=6):
    rng = np.random.default_rng(seed)
    delta, state = (torch.from_numpy(rng.normal(size=(rows, size))) for size in (vocab, hidden))
    block = torch.tensor([0, 0, 0, 1, 2, 2, 2])[:rows]
    matrices = torch.stack([delta[block == b].T @ state[block == b] for b in range(3)])
    return delta, state, block, matrices


def test_squared_norms_are_those_of_the_matrices():
    delta, state, block, matrices = outer_case()
    sketch = GradientSketch.make(11, 6, seed=0, device=torch.device("cpu"), width=8)
    square, _ = sum_gradients(delta, state, block, sketch)
    torch.testing.assert_close(square, matrices.square().sum((1, 2)), rtol=1e-12, atol=0)


@pytest.mark.parametrize("width", [4, 16, 33])
def test_inner_products_of_sketches_are_unbiased_with_the_stated_spread(width):
    delta, state, block, matrices = outer_case()
    exact = torch.einsum("avh,bvh->ab", matrices, matrices)
    found = []
    for seed in range(1500):
        sketch = GradientSketch.make(11, 6, seed=seed, device=torch.device("cpu"), width=width)
        _, rows = sum_gradients(delta, state, block, sketch)
        found.append(rows @ rows.T)
    found = torch.stack(found)
    error = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - exact).abs() < 4 * error).all()
    norms = exact.diagonal().sqrt()
    assert (found.std(0) < 1.15 * (8 / width) ** 0.5 * torch.outer(norms, norms)).all()


def test_sketches_are_linear_and_the_same_for_the_same_seed():
    delta, state, block, _ = outer_case()
    one, same, other = (
        GradientSketch.make(11, 6, seed=seed, device=torch.device("cpu"), width=16) for seed in (3, 3, 4)
    )
    _, whole = sum_gradients(delta, state, block, one)
    _, each = sum_gradients(delta, state, torch.arange(7), one)
    summed = torch.stack([each[block == b].sum(0) for b in range(3)])
    torch.testing.assert_close(whole, summed, rtol=1e-12, atol=1e-12)
    assert torch.equal(whole, sum_gradients(delta, state, block, same)[1])
    assert not torch.allclose(whole, sum_gradients(delta, state, block, other)[1])


def test_records_survive_arrays_and_any_split():
    whole = every_subset(repeats=2)
    arrays = whole.to_arrays()
    parts = []
    for part in (2, 0, 1):
        chosen = whole.blocks.sequence % 3 == part
        parts.append(GradientRecords.from_arrays({name: one[chosen] for name, one in arrays.items()}))
    joined = GradientRecords.concatenate(parts)
    for name, column in arrays.items():
        np.testing.assert_array_equal(joined.to_arrays()[name], column)


def test_records_and_shapes_that_cannot_be_are_refused():
    blocks = BlockRecords([0, 1], [2, 2], [1, 2], [1.0, 1.0])
    with pytest.raises(ShapeError, match=r"\[blocks, width\]"):
        GradientRecords(blocks, np.ones(2), np.ones((1, 3)))
    with pytest.raises(DataError, match="1 of 2 measured blocks is not finite"):
        GradientRecords(blocks, np.array([1.0, np.inf]), np.ones((2, 3)))
    with pytest.raises(DataError, match="without square"):
        GradientRecords.from_arrays({**blocks.to_arrays(), "sketch": np.ones((2, 3))})
    delta, state, block, _ = outer_case()
    sketch = GradientSketch.make(11, 6, seed=0, device=torch.device("cpu"), width=8)
    with pytest.raises(ShapeError, match="same rows"):
        sum_gradients(delta[:3], state, block, sketch)
    records = every_subset(sizes=(BLOCK,), repeats=4)
    cells = build_cells(records.blocks)
    other = every_subset(sizes=(3,), repeats=4)
    with pytest.raises(ShapeError, match="cells"):
        gradient_statistics(
            compile_operator(NoisePlan(BLOCK), cells), gradient_moments(other, build_cells(other.blocks))
        )
    with pytest.raises(ShapeError, match="sequences"):
        gradient_moments(records, cells, np.ones((2, 1)))
