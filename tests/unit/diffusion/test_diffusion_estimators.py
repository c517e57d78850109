"""Count and Bernoulli draws against the enumeration of all masks of a block, for every plan, with a toy.

The toy's negative log-likelihood of a token is an arbitrary function of the token and of the set of masked
tokens, so nothing but the definition of the objective can make the numbers agree.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from bdtrain.diffusion.keyed import NoiseKey, Purpose
from bdtrain.diffusion.levels import draw_noise
from bdtrain.diffusion.plan import NoisePlan, evaluation_plan
from bdtrain.diffusion.tables import compile_tables
from bdtrain.diffusion.visibility import build_layout

BLOCK = 4
MASK = 9


def subset_losses(n: int) -> dict[tuple[int, ...], float]:
    """Summed nll of the masked tokens for each subset of n tokens; the more is hidden, the harder."""
    rng = np.random.default_rng(n)
    losses = {}
    for bits in itertools.product((0, 1), repeat=n):
        masked = [i for i in range(n) if bits[i]]
        losses[bits] = float(sum(0.5 + 0.4 * len(masked) + 0.3 * i + rng.random() for i in masked))
    return losses


def enumerated_objective(n, low, high, weighting, chance, weight, resample=False) -> float:
    """E_t sum over all masks of probability * weight(t) * loss, the t integral by midpoints."""
    points = 20_000
    t = low + (high - low) * (np.arange(points) + 0.5) / points
    p = chance(t)
    w = {"elbo": (high - low) * weight(t), "reference": weight(t), "flat": np.ones_like(t)}[weighting]
    losses = subset_losses(n)
    allowed = {k: not resample or low - 1e-12 <= k / n <= high + 1e-12 for k in range(n + 1)}
    if not any(allowed[k] for k in range(1, n + 1)):
        allowed = dict.fromkeys(allowed, True)
    kept = sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1) if allowed[k])
    total = np.zeros_like(t)
    for bits, loss in losses.items():
        k = sum(bits)
        if allowed[k]:
            total += p**k * (1 - p) ** (n - k) / kept * loss
    return float((total * w).mean())


def by_tables(plan, n) -> float:
    """The objective from the compiled tables and the exact mean over k-subsets."""
    tables = compile_tables(plan)
    losses = subset_losses(n)
    q, w = tables.probability(n).tolist(), tables.weight(n).tolist()
    mean = [np.mean([v for bits, v in losses.items() if sum(bits) == k]) for k in range(1, n + 1)]
    return sum(a * b * c for a, b, c in zip(q, w, mean, strict=True))


def by_draws(plan, n, rows=2048) -> tuple[float, float]:
    """Mean and standard error of the weighted loss over many drawn blocks of n maskable tokens."""
    seq = 4 * BLOCK
    # Four blocks a row; the first BLOCK - n tokens of each block cannot be masked.
    maskable = (torch.arange(seq) % BLOCK >= BLOCK - n).expand(rows, seq)
    layout = build_layout(torch.zeros(rows, seq, dtype=torch.int32), BLOCK, isolate=False)
    index = torch.arange(rows)
    noise = draw_noise(
        torch.zeros(rows, seq, dtype=torch.int64),
        layout,
        maskable,
        plan,
        compile_tables(plan),
        mask_id=MASK,
        key=NoiseKey(5, Purpose.TRAIN, 1),
        sample_index=index,
        batch_index=index,
        global_batch=rows,
        copies=1,
    )
    masked = noise.masked.reshape(-1, BLOCK)[:, BLOCK - n :]
    weight = noise.weight.double().reshape(-1, BLOCK).amax(1)
    table = torch.zeros(2**n, dtype=torch.float64)
    for bits, loss in subset_losses(n).items():
        table[sum(bit << i for i, bit in enumerate(bits))] = loss
    values = weight * table[(masked.long() << torch.arange(n)).sum(1)]
    return values.mean().item(), (values.std() / len(values) ** 0.5).item()


def linear(t):
    return t


def inverse(t):
    return 1 / t


CASES = [
    (clip_range, weighting)
    for clip_range in (None, (0.3, 0.8), (0.5, 1.0), (0.0, 0.6))
    for weighting in ("elbo", "reference", "flat")
]


@pytest.mark.parametrize(("clip_range", "weighting"), CASES)
@pytest.mark.parametrize("n", [1, 3, BLOCK])
def test_count_and_bernoulli_draws_agree_with_all_masks_enumerated(clip_range, weighting, n):
    low, high = clip_range or (0.0, 1.0)
    exact = enumerated_objective(n, low, high, weighting, linear, inverse)
    count = NoisePlan(BLOCK, clip_range=clip_range, weighting=weighting)
    assert by_tables(count, n) == pytest.approx(exact, rel=1e-6)
    for plan in (count, NoisePlan(BLOCK, kind="bernoulli", clip_range=clip_range, weighting=weighting)):
        mean, error = by_draws(plan, n)
        assert abs(mean - exact) < 5 * error + 1e-6


@pytest.mark.parametrize("weighting", ["elbo", "reference", "flat"])
@pytest.mark.parametrize("clip_range", [(0.3, 0.8), (0.0, 0.5)])
@pytest.mark.parametrize("n", [1, 3, BLOCK])
def test_resampled_plans_agree_with_all_feasible_masks_enumerated(weighting, clip_range, n):
    exact = enumerated_objective(n, *clip_range, weighting, linear, inverse, resample=True)
    for kind in ("count", "bernoulli"):
        plan = NoisePlan(BLOCK, kind=kind, clip_range=clip_range, weighting=weighting, resample=True)
        if kind == "count":
            assert by_tables(plan, n) == pytest.approx(exact, rel=1e-6)
        mean, error = by_draws(plan, n)
        assert abs(mean - exact) < 5 * error + 1e-6


SCHEDULES = {
    "cosine": (lambda t: 1 - np.cos(np.pi * t / 2), lambda t: np.pi / 2 / np.tan(np.pi * t / 4)),
    "square": (lambda t: t**2, lambda t: 2 / t),
    "logarithmic": (lambda t: np.log2(1 + t), lambda t: 1 / (np.log1p(t) * (1 + t))),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("weighting", ["elbo", "flat"])
def test_other_schedules_agree_with_all_masks_enumerated(schedule, weighting):
    exact = enumerated_objective(BLOCK, 0.0, 1.0, weighting, *SCHEDULES[schedule])
    count = NoisePlan(BLOCK, schedule=schedule, weighting=weighting)
    assert by_tables(count, BLOCK) == pytest.approx(exact, rel=1e-5)
    if weighting == "elbo":
        assert by_tables(NoisePlan(BLOCK), BLOCK) == pytest.approx(exact, rel=1e-5)
    for plan in (count, NoisePlan(BLOCK, kind="bernoulli", schedule=schedule, weighting=weighting)):
        mean, error = by_draws(plan, BLOCK)
        assert abs(mean - exact) < 5 * error


@pytest.mark.parametrize("clip_range", [None, (0.3, 0.8)])
def test_a_fitted_density_leaves_the_objective_where_it_was(clip_range):
    plain = NoisePlan(BLOCK, clip_range=clip_range)
    fitted = NoisePlan(BLOCK, clip_range=clip_range, density=(1.0, 3.0, 2.0, 5.0))
    for n in (1, 3, BLOCK):
        assert by_tables(fitted, n) == pytest.approx(by_tables(plain, n), rel=1e-12)
        mean, error = by_draws(fitted, n)
        assert abs(mean - by_tables(plain, n)) < 5 * error + 1e-6


def test_the_reported_bound_is_the_whole_one_or_states_its_truncation():
    whole = enumerated_objective(BLOCK, 0.0, 1.0, "elbo", linear, inverse)
    assert by_tables(evaluation_plan(BLOCK), BLOCK) == pytest.approx(whole, rel=1e-6)
    truncated = enumerated_objective(BLOCK, 0.001, 1.0, "elbo", linear, inverse)
    plan = evaluation_plan(BLOCK, kind="bernoulli")
    assert by_tables(plan, BLOCK) == pytest.approx(truncated, rel=1e-6)
    assert truncated < whole
    mean, error = by_draws(plan, BLOCK)
    assert abs(mean - truncated) < 5 * error


def test_count_draws_have_less_variance_than_bernoulli_draws():
    for clip_range in (None, (0.3, 0.8)):
        _, count = by_draws(NoisePlan(BLOCK, clip_range=clip_range, strata="independent"), BLOCK)
        _, bernoulli = by_draws(
            NoisePlan(BLOCK, kind="bernoulli", clip_range=clip_range, strata="independent"), BLOCK
        )
        assert count < bernoulli
