"""Plan tables against exact rational arithmetic and plain numerical integration; refusals."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

import bdtrain.diffusion.tables as module
from bdtrain.diffusion.plan import NoisePlan, evaluation_plan, full_masking_plan
from bdtrain.diffusion.tables import compile_tables, loss_scale
from bdtrain.errors import ConfigError

RANGES = [None, (0.0, 0.5), (0.3, 0.8), (0.45, 0.95), (0.5, 1.0), (0.001, 1.0)]


def exact_cdf(k: int, n: int, p: Fraction) -> Fraction:
    return sum((Fraction(math.comb(n, j)) * p**j * (1 - p) ** (n - j) for j in range(k + 1)), Fraction(0))


def exact_rows(n: int, clip_range) -> tuple[list[Fraction], list[Fraction], Fraction]:
    """P_n(k) and c_n(k) (elbo) for k = 0..n by the binomial CDFs, in rational numbers."""
    beta, omega = (Fraction(str(b)) for b in (clip_range or (0, 1)))
    width = omega - beta
    chances = [
        (exact_cdf(k, n + 1, beta) - exact_cdf(k, n + 1, omega)) / ((n + 1) * width) for k in range(n + 1)
    ]
    elbo = [Fraction(0)] + [
        (exact_cdf(k - 1, n, beta) - exact_cdf(k - 1, n, omega)) / k for k in range(1, n + 1)
    ]
    return chances, elbo, width


@pytest.mark.parametrize("clip_range", RANGES)
@pytest.mark.parametrize("block_size", [1, 4, 16, 40])
def test_tables_of_every_block_length_are_the_exact_rational_ones(clip_range, block_size):
    plans = {
        w: NoisePlan(block_size, clip_range=clip_range, weighting=w) for w in ("elbo", "reference", "flat")
    }
    tables = {w: compile_tables(plan) for w, plan in plans.items()}
    for n in {1, 2, block_size // 2, block_size - 1, block_size} - {0}:
        if n > block_size:
            continue
        chances, elbo, width = exact_rows(n, clip_range)
        drawn = [p / (1 - chances[0]) for p in chances[1:]]
        coefficients = {"elbo": elbo[1:], "reference": [c / width for c in elbo[1:]], "flat": chances[1:]}
        for weighting, expected in coefficients.items():
            table = tables[weighting]
            np.testing.assert_allclose(table.coefficient(n), [float(c) for c in expected], rtol=1e-11)
            ratio = [float(c / q) for c, q in zip(expected, drawn, strict=True)]
            np.testing.assert_allclose(table.weight(n), ratio, rtol=1e-11)
            np.testing.assert_allclose(table.cdf(n), np.cumsum([float(q) for q in drawn]), rtol=1e-12)
            assert table.cdf(n)[-1] == 1.0


def test_far_tails_keep_their_relative_precision():
    # P(256 of 256 at a chance below 0.8) is about 1e-25: a difference of two CDFs near 1 would be noise.
    n = 256
    beta, omega = Fraction(3, 10), Fraction(4, 5)
    chance = (omega ** (n + 1) - beta ** (n + 1)) / ((n + 1) * (omega - beta))
    coefficient = (omega**n - beta**n) / n
    table = compile_tables(NoisePlan(n, clip_range=(0.3, 0.8), weighting="flat"))
    assert table.coefficient(n)[-1].item() == pytest.approx(float(chance), rel=1e-9)
    weight = compile_tables(NoisePlan(n, clip_range=(0.3, 0.8))).weight(n)[-1].item()
    assert weight == pytest.approx(float(coefficient / chance), rel=1e-9)


def test_the_full_range_draws_counts_uniformly_with_weight_n_over_k():
    tables = compile_tables(evaluation_plan(12))
    for n in range(1, 13):
        k = np.arange(1, n + 1)
        np.testing.assert_allclose(tables.probability(n), np.full(n, 1 / n), rtol=1e-11)
        np.testing.assert_allclose(tables.weight(n), n / k, rtol=1e-11)


def midpoints(low: float, high: float, points: int = 200_000) -> tuple[np.ndarray, float]:
    step = (high - low) / points
    return low + step * (np.arange(points) + 0.5), step


CHANCES = {
    "cosine": lambda t: 1 - np.cos(np.pi * t / 2),
    "square": lambda t: t**2,
    "square_root": np.sqrt,
    "logarithmic": lambda t: np.log2(1 + t),
}


@pytest.mark.parametrize("schedule", CHANCES)
def test_other_schedules_change_how_counts_are_drawn_but_not_the_objective(schedule):
    tables = compile_tables(NoisePlan(7, schedule=schedule))
    t, step = midpoints(0.0, 1.0)
    p = CHANCES[schedule](t)
    for n in (1, 3, 7):
        k = np.arange(1, n + 1)
        chances = np.array([(math.comb(n, j) * p**j * (1 - p) ** (n - j)).sum() * step for j in k])
        none = ((1 - p) ** n).sum() * step
        np.testing.assert_allclose(tables.probability(n), chances / (1 - none), rtol=1e-5)
        np.testing.assert_allclose(tables.coefficient(n), 1 / k, rtol=1e-12)
        np.testing.assert_allclose(tables.weight(n) * tables.probability(n), 1 / k, rtol=1e-9)


@pytest.mark.parametrize(
    ("schedule", "chance", "weight"),
    [
        ("reference_linear", lambda t: t, lambda t, p: 1 / t),
        ("reference_square", lambda t: np.maximum(t**2, 1e-3), lambda t, p: 2 * t / p),
        ("reference_square_root", lambda t: np.maximum(t**0.5, 1e-3), lambda t, p: 0.5 * t**-0.5 / p),
        ("reference_logarithmic", lambda t: np.log2(1 + t), lambda t, p: 1 / (p * np.log(2) * (1 + t))),
        (
            "reference_cosine",
            lambda t: 1 - 0.999 * np.cos(np.pi * t / 2),
            lambda t, p: 0.999 * np.sin(np.pi * t / 2) * np.pi / 2 / (p + 1e-3),
        ),
        ("reference_mdlm", lambda t: 0.999 * t, lambda t, p: 1 / t),
    ],
)
@pytest.mark.parametrize("clip_range", [(0.001, 1.0), (0.2, 0.7)])
def test_reference_schedules_integrate_their_own_weight_over_an_interval_of_t(
    schedule, chance, weight, clip_range
):
    low, high = clip_range
    tables = compile_tables(NoisePlan(5, schedule=schedule, clip_range=clip_range, weighting="reference"))
    t, step = midpoints(low, high)
    p, step = chance(t), step / (high - low)
    w = weight(t, p)
    for n in (2, 5):
        k = np.arange(1, n + 1)
        pmf = np.array([math.comb(n, j) * p**j * (1 - p) ** (n - j) for j in k])
        none = ((1 - p) ** n).sum() * step
        np.testing.assert_allclose(tables.coefficient(n), (pmf * w).sum(1) * step, rtol=1e-5)
        np.testing.assert_allclose(tables.probability(n), pmf.sum(1) * step / (1 - none), rtol=1e-5)


@pytest.mark.parametrize("clip_range", [(0.3, 0.8), (0.45, 0.95), (0.0, 0.5), (0.5, 1.0)])
@pytest.mark.parametrize("weighting", ["elbo", "reference", "flat"])
def test_resampling_conditions_each_time_on_feasible_counts(clip_range, weighting):
    low, high = clip_range
    plan = NoisePlan(9, clip_range=clip_range, weighting=weighting, resample=True)
    tables = compile_tables(plan)
    t, _ = midpoints(low, high, 50_000)
    for n in (2, 5, 9):
        counts = np.arange(n + 1)
        allowed = [low - 1e-12 <= k / n <= high + 1e-12 for k in counts]
        pmf = np.array(
            [math.comb(n, k) * t**k * (1 - t) ** (n - k) * ok for k, ok in zip(counts, allowed, strict=True)]
        )
        pmf /= pmf.sum(0)
        average = pmf.mean(1)
        w = {"elbo": (high - low) / t, "reference": 1 / t, "flat": np.ones_like(t)}[weighting]
        assert bool(tables.resampled[n]) == any(allowed[1:])
        np.testing.assert_allclose(
            tables.probability(n), average[1:] / average[1:].sum(), rtol=1e-6, atol=1e-12
        )
        np.testing.assert_allclose(tables.coefficient(n), (pmf * w).mean(1)[1:], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("clip_range", [(0.3, 0.8), (0.0, 0.5)])
def test_resampled_rows_of_long_blocks_keep_their_precision_to_the_last_count(clip_range):
    low, high = clip_range
    plan = NoisePlan(300, clip_range=clip_range, resample=True)
    tables = compile_tables(plan)
    # 400 panels of 6 nodes, against one rule over the whole range; binomials from whole numbers.
    edges = np.linspace(low, high, 401)
    nodes, weights = np.polynomial.legendre.leggauss(6)
    t = ((edges[:-1] + edges[1:])[:, None] / 2 + (high - low) / 800 * nodes).ravel()
    share = np.tile(weights, 400) / 800
    for n in (97, 300):
        counts = np.arange(math.ceil(low * n), math.floor(high * n + 1e-9) + 1)
        pmf = np.array([math.comb(n, k) * t**k * (1 - t) ** (n - k) for k in counts])
        pmf /= pmf.sum(0)
        drawn, coefficient = pmf @ share, pmf @ (share * (high - low) / t)
        drawn, coefficient, counts = drawn[counts > 0], coefficient[counts > 0], counts[counts > 0]
        found = tables.coefficient(n)[counts - 1]
        np.testing.assert_allclose(found, coefficient, rtol=1e-11, atol=0)
        np.testing.assert_allclose(
            tables.weight(n)[counts - 1], coefficient / drawn * drawn.sum(), rtol=1e-11
        )
        np.testing.assert_allclose(tables.probability(n)[counts - 1], drawn / drawn.sum(), atol=1e-13)


def test_a_resampled_plan_of_a_long_block_needs_no_binomial_of_its_own_for_each_length(monkeypatch):
    """Each costs 256 exponentials a count: at 1,024 tokens they were 99% of 7 s."""
    asked = []
    binomial = module.binomial_chances
    monkeypatch.setattr(module, "binomial_chances", lambda n, p: asked.append(n) or binomial(n, p))
    compile_tables(NoisePlan(64, clip_range=(0.3, 0.8)))
    plain = list(asked)
    compile_tables(NoisePlan(64, clip_range=(0.3, 0.8), resample=True))
    assert asked[len(plain) :] == plain


def test_a_short_block_without_a_feasible_count_takes_the_plain_plan():
    clip_range = (0.3, 0.8)
    resampled = compile_tables(NoisePlan(4, clip_range=clip_range, resample=True))
    plain = compile_tables(NoisePlan(4, clip_range=clip_range))
    assert resampled.resampled.tolist() == [False, False, True, True, True]
    assert torch.equal(resampled.weight(1), plain.weight(1))
    assert torch.equal(resampled.cdf(1), plain.cdf(1))


@pytest.mark.parametrize("clip_range", RANGES)
@pytest.mark.parametrize("block_size", [1, 4, 40])
def test_the_scale_of_the_loss_is_that_of_tokens_which_all_cost_the_same(clip_range, block_size):
    """Weight times masked share, averaged over the range: t / t * width, t / t, and t."""
    low, high = clip_range or (0.0, 1.0)
    expected = {"elbo": high - low, "reference": 1.0, "flat": (low + high) / 2}
    for weighting, value in expected.items():
        plan = NoisePlan(block_size, clip_range=clip_range, weighting=weighting)
        assert loss_scale(plan) == pytest.approx(value, rel=1e-12)
    assert loss_scale(full_masking_plan(block_size)) == 1.0


def test_full_masking_masks_all_with_weight_1_under_every_weighting():
    for weighting in ("elbo", "reference", "flat"):
        tables = compile_tables(NoisePlan(5, clip_range=(1.0, 1.0), weighting=weighting))
        for n in range(1, 6):
            assert tables.probability(n).tolist() == [0.0] * (n - 1) + [1.0]
            assert tables.weight(n)[-1] == 1.0
    assert full_masking_plan(5).full_masking


def test_a_density_over_counts_is_drawn_and_divided_out():
    density = (4.0, 1.0, 1.0, 2.0)
    fitted = compile_tables(NoisePlan(4, clip_range=(0.3, 0.8), density=density))
    plain = compile_tables(NoisePlan(4, clip_range=(0.3, 0.8)))
    np.testing.assert_allclose(fitted.probability(4), np.array(density) / 8.0, rtol=1e-13)
    # Half as many tokens: the bins pair up.
    np.testing.assert_allclose(fitted.probability(2), [5 / 8, 3 / 8], rtol=1e-13)
    for n in range(1, 5):
        np.testing.assert_allclose(fitted.weight(n) * fitted.probability(n), plain.coefficient(n), rtol=1e-12)


def test_counts_are_the_inverse_of_the_cdf_by_linear_search():
    tables = compile_tables(NoisePlan(6, clip_range=(0.2, 0.9)))
    u = torch.linspace(0, 1 - 2**-53, 301, dtype=torch.float64)
    for n in range(7):
        k, weight = tables.draw(u, torch.tensor(n))
        for value, count, w in zip(u.tolist(), k.tolist(), weight.tolist(), strict=True):
            if n == 0:
                assert (count, w) == (0, 0.0)
                continue
            expected = next(j for j in range(1, n + 1) if tables.cdf(n)[j - 1].item() > value)
            assert count == expected
            assert w == tables.weight(n)[expected - 1].item()


def test_evaluation_at_block_size_1_is_full_masking_with_weight_1():
    tables = compile_tables(evaluation_plan(1))
    assert tables.cdf(1).tolist() == [1.0]
    assert tables.weight(1).item() == pytest.approx(1.0, rel=1e-15)


def test_a_plan_survives_json():
    plans = [
        NoisePlan(4),
        NoisePlan(16, kind="bernoulli", schedule="cosine", strata="reference_grid"),
        NoisePlan(8, clip_range=(0.3, 0.8), weighting="flat", resample=True),
        NoisePlan(4, density=(1.0, 2.0, 3.0, 4.0)),
    ]
    for plan in plans:
        record = json.loads(json.dumps(plan.to_dict()))
        assert record["algo"] == "philox/1"
        assert record["version"] == 1
        assert NoisePlan.from_dict(record) == plan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version"),
        ({"algo": "philox/2"}, "philox/1"),
        ({"omega": 1.0}, "omega"),
    ],
)
def test_records_of_another_kind_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        NoisePlan.from_dict({**NoisePlan(4).to_dict(), **change})
    with pytest.raises(ConfigError, match="algo"):
        NoisePlan.from_dict({"block_size": 4, "version": 1})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(block_size=0), "at least 1"),
        (dict(block_size=4, kind="poisson"), "count, bernoulli"),
        (dict(block_size=4, weighting="one"), "elbo, reference, flat"),
        (dict(block_size=4, strata="grid"), "permuted"),
        (dict(block_size=4, schedule="sine"), "cosine"),
        (dict(block_size=4, clip_range=(0.8, 0.3)), "beta < omega"),
        (dict(block_size=4, clip_range=(0.5, 0.5)), "beta < omega"),
        (dict(block_size=4, clip_range=(-0.1, 0.5)), "beta < omega"),
        (dict(block_size=4, clip_range=(0.3, 1.2)), "beta < omega"),
        (dict(block_size=4, clip_range=(0.3, float("nan"))), "beta < omega"),
        (dict(block_size=4, clip_range=(0.3, 0.8), schedule="cosine"), "schedule='linear'"),
        (dict(block_size=4, resample=True), "no effect"),
        (dict(block_size=1, clip_range=(0.3, 0.8), resample=True), "no k has k/1"),
        (dict(block_size=2, clip_range=(0.55, 0.95), resample=True), "widen the range"),
        (dict(block_size=2, clip_range=(1.0, 1.0), resample=True), "resample=false"),
        (
            dict(block_size=2, clip_range=(0.2, 0.9), resample=True, schedule="reference_cosine"),
            "masked shares",
        ),
        (dict(block_size=4, density=(1.0, 0.0)), "positive"),
        (dict(block_size=4, density=(1.0, 1.0), kind="bernoulli"), "kind='count'"),
    ],
)
def test_a_plan_that_cannot_be_drawn_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        NoisePlan(**arguments)


def test_all_problems_are_listed_at_once():
    with pytest.raises(ConfigError) as caught:
        NoisePlan(0, kind="x", weighting="y", clip_range=(2.0, 3.0))
    assert len(str(caught.value).splitlines()) == 4


def test_a_reference_schedule_may_be_clipped():
    assert NoisePlan(4, schedule="reference_cosine", clip_range=(0.3, 0.8)).interval == (0.3, 0.8)
