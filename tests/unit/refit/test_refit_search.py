"""The search: candidates, bootstrap, the rule of adoption, and the same bytes for the same records."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from bdtrain.diffusion.plan import NoisePlan
from bdtrain.diffusion.plan_variance import count_shares
from bdtrain.diffusion.variance import BlockRecords
from bdtrain.errors import ConfigError, DataError
from bdtrain.refit.candidates import SearchSettings, clip_candidates, count_candidates
from bdtrain.refit.search import SearchResult, bootstrap_weights, search

BLOCK = 4


def measured(
    rng: np.random.Generator,
    *,
    block_size: int = BLOCK,
    sequences: int = 64,
    blocks: int = 32,
    spread=lambda k: 1.0 / k**0.5,
    between: float = 0.0,
) -> BlockRecords:
    """Blocks whose loss per masked token has mean 3 and the given standard deviation at k masks.

    ``between`` is the standard deviation of the sequences' own means.
    """
    sequence = np.repeat(np.arange(sequences), blocks)
    total = sequences * blocks
    # Stratified: each count equally often, in random order.
    k = rng.permutation(np.arange(total) % block_size) + 1
    h = 3.0 + between * rng.standard_normal(sequences)[sequence] + spread(k) * rng.standard_normal(total)
    return BlockRecords(sequence, np.full(total, block_size), k, h * k)


def row(result: SearchResult, name: str):
    return next(one for one in result.candidates if one.name == name)


def test_the_grid_of_clip_ranges_has_clean_numbers_and_stays_inside_the_unit_interval():
    found = clip_candidates(NoisePlan(BLOCK), SearchSettings())
    ranges = [one.plan.clip_range for one in found.candidates]
    expected = [(s / 20, (s + w) / 20) for w in (10, 12, 14, 16, 18) for s in range(21 - w)]
    assert ranges == [None, *expected]
    assert len(ranges) == 36
    assert not found.left_out
    assert [one.is_current for one in found.candidates] == [True] + [False] * 35
    assert found.candidates[0].edges == ("widest",)
    edges = {one.plan.clip_range: set(one.edges) for one in found.candidates}
    assert edges[(0.0, 0.5)] == {"narrowest", "lowest start"}
    assert edges[(0.25, 0.75)] == {"narrowest"}
    assert edges[(0.4, 1.0)] == {"highest start"}
    assert edges[(0.1, 0.7)] == set()


def test_full_masking_is_a_candidate_at_block_size_1_only():
    for block_size in (1, 2):
        plans = [one.plan for one in clip_candidates(NoisePlan(block_size), SearchSettings()).candidates]
        assert (NoisePlan(block_size, clip_range=(1.0, 1.0)) in plans) == (block_size == 1)


def test_candidates_keep_all_of_the_current_plan_but_range_and_density():
    current = NoisePlan(
        BLOCK, clip_range=(0.3, 0.8), weighting="reference", density=(1.0, 2.0), strata="independent"
    )
    found = clip_candidates(current, SearchSettings()).candidates
    assert found[0].plan == current and found[0].is_current
    for one in found[1:]:
        plain = {**one.plan.to_dict(), "clip_range": [0.3, 0.8], "density": [1.0, 2.0]}
        assert plain == current.to_dict()
        assert one.plan.density is None
    # The same range without the density is another plan.
    assert NoisePlan(BLOCK, clip_range=(0.3, 0.8), weighting="reference", strata="independent") in [
        one.plan for one in found
    ]
    counts = count_candidates(current, (1.0, 1.5)).candidates
    assert [one.plan.density for one in counts] == [(1.0, 2.0), (1.0, 1.5), None]
    assert {one.plan.clip_range for one in counts} == {(0.3, 0.8)}


def test_plans_that_cannot_be_drawn_are_left_out_with_the_reason():
    resampled = NoisePlan(2, clip_range=(0.3, 0.8), resample=True)
    found = clip_candidates(resampled, SearchSettings(widths=(0.5, 0.15), start_step=0.15))
    names = dict(found.left_out)
    assert "resample" in names["full range"]
    # Shares of two tokens are 0, 1/2 and 1.
    assert "no k has k/2" in names["clip 0.15-0.3"]
    assert (0.45, 0.6) in [one.plan.clip_range for one in found.candidates]
    bernoulli = count_candidates(NoisePlan(2, kind="bernoulli"), (1.0, 1.0))
    assert len(bernoulli.candidates) == 1
    assert "needs kind='count'" in dict(bernoulli.left_out)["fitted counts"]
    result = search(
        measured(np.random.default_rng(0), block_size=2),
        NoisePlan(2, kind="bernoulli"),
        SearchSettings(mode="counts"),
    )
    assert not result.adopt and "No other plan" in result.reason


def test_a_large_and_certain_gain_is_adopted_and_an_edge_is_told():
    current = NoisePlan(BLOCK, kind="bernoulli", clip_range=(0.1, 0.7), strata="permuted")
    result = search(measured(np.random.default_rng(0)), current, SearchSettings())
    winner = row(result, result.winner)
    assert result.adopt
    # Losses that are the same at all counts: the more is masked, the less varies, so the last range wins.
    assert result.plan == NoisePlan(BLOCK, kind="bernoulli", clip_range=(0.5, 1.0))
    assert result.at_edge == ("narrowest", "highest start")
    assert winner.p_best > 0.99
    assert result.gain == pytest.approx(result.candidates[0].criterion / winner.criterion - 1)
    assert result.gain > 0.5
    assert winner.difference_low > 0
    assert winner.difference_low < winner.difference < winner.difference_high
    assert "is adopted" in result.reason and "clip 0.5-1" in result.reason


def test_a_gain_that_is_only_to_be_reported_keeps_the_current_plan():
    current = NoisePlan(BLOCK, kind="bernoulli", clip_range=(0.1, 0.7), strata="permuted")
    records = measured(np.random.default_rng(0))
    taken, reported = (search(records, current, SearchSettings(adopt=adopt)) for adopt in (True, False))
    assert taken.adopt and not reported.adopt
    assert reported.plan == current and reported.gain == taken.gain
    assert reported.candidates == taken.candidates and reported.winner == taken.winner
    assert "excludes 0; with refit.adopt=false it is kept" in reported.reason


def test_a_winner_inside_the_grid_has_no_edge():
    # Only counts 3 and 4 of 8 have a steady loss.
    def spread(k):
        return np.where((k >= 3) & (k <= 5), 0.05, 3.0)

    records = measured(np.random.default_rng(1), block_size=8, spread=spread)
    result = search(records, NoisePlan(8), SearchSettings(widths=(0.1, 0.2, 0.3)))
    assert result.adopt
    assert result.plan.clip_range is not None
    assert 0.2 < result.plan.clip_range[0] and result.plan.clip_range[1] < 0.8
    assert set(result.at_edge) <= {"narrowest"}


def test_a_gain_below_the_threshold_keeps_the_current_plan():
    # With k sd(h) c_k alike for all counts, the plain counts are the best density already.
    records = measured(np.random.default_rng(2), spread=lambda k: 1.0)
    result = search(records, NoisePlan(BLOCK), SearchSettings(mode="counts"))
    assert not result.adopt
    assert result.plan == NoisePlan(BLOCK)
    assert result.gain is not None and 0 <= result.gain < 0.02
    assert "less than the 2.0%" in result.reason or "least raw variance" in result.reason
    assert result.strata == "stratified"


def test_a_gain_that_may_be_chance_keeps_the_current_plan():
    # The current range looks worse because of one block of one sequence.
    rng = np.random.default_rng(3)
    records = measured(rng, sequences=24, spread=lambda k: 1.0)
    nll = records.nll.copy()
    at = int(np.flatnonzero(records.masked == 1)[0])
    nll[at] = 60.0
    records = BlockRecords(records.sequence, records.maskable, records.masked, nll)
    result = search(records, NoisePlan(BLOCK), SearchSettings(widths=(0.5,), start_step=0.5))
    winner = row(result, result.winner)
    assert winner.clip_range == (0.5, 1.0)
    assert result.gain is not None and result.gain > 0.02
    assert winner.difference_low < 0 < winner.difference
    assert not result.adopt
    assert result.plan == NoisePlan(BLOCK)
    assert "holds 0" in result.reason


def test_the_best_plan_in_use_is_kept():
    current = NoisePlan(BLOCK, kind="bernoulli", clip_range=(0.5, 1.0))
    result = search(measured(np.random.default_rng(0)), current, SearchSettings())
    assert not result.adopt and result.plan == current
    assert result.gain == 0.0
    assert "least raw variance" in result.reason
    assert result.at_edge == ("narrowest", "highest start")


def test_plans_without_a_variance_cannot_win():
    # One masked token of four costs nothing, so that low ranges look best.
    records = measured(np.random.default_rng(0), spread=lambda k: np.where(k == 1, 1e-3, 1.0))
    nll = np.where(records.masked == 1, 1e-3, records.nll)
    records = BlockRecords(records.sequence, records.maskable, records.masked, nll)
    result = search(records, NoisePlan(BLOCK, kind="bernoulli"), SearchSettings())
    low = [one for one in result.candidates if one.clip_range is None or one.clip_range[0] == 0.0]
    assert low and all(not one.finite and one.p_best == 0.0 for one in low)
    assert row(result, result.winner).finite


def test_alike_plans_are_ties_and_the_current_one_wins_them():
    # At block size 1 a count plan masks its only token, whatever the range.
    records = measured(np.random.default_rng(0), block_size=1)
    current = NoisePlan(1, clip_range=(0.4, 0.9))
    result = search(records, current, SearchSettings())
    assert result.winner.startswith("current") and not result.adopt
    assert all(one.p_best == 1.0 for one in result.candidates)
    variances = {round(one.variance, 9) for one in result.candidates}
    assert len(variances) == 1
    assert variances.pop() == pytest.approx(records.nll.var(ddof=1), rel=1e-6)
    # Drawing t instead, full masking is the exact likelihood and by far the best.
    drawn = search(records, NoisePlan(1, kind="bernoulli", clip_range=(0.3, 0.8)), SearchSettings())
    assert drawn.adopt and drawn.plan.full_masking


def test_fitted_counts_are_adopted_where_they_help():
    records = measured(np.random.default_rng(4), block_size=8, spread=lambda k: np.where(k > 4, 2.0, 0.1))
    result = search(records, NoisePlan(8), SearchSettings(mode="counts"))
    assert result.adopt and result.plan.density is not None and len(result.plan.density) == 8
    # c_k sd(g_k) = sd(h_k): Neyman's share of counts above 4 is 2 / 2.1, mixed with a twentieth of uniform.
    upper = sum(result.plan.density[4:]) / sum(result.plan.density)
    assert upper == pytest.approx(0.95 * 2 / 2.1 + 0.05 / 2, rel=0.01)
    # The objective stays where it was; the variance is that of Neyman's allocation, (mean sd)^2, over k
    # uniform, mean of sd^2, up to the uniform share.
    assert row(result, "fitted counts").mean == pytest.approx(result.candidates[0].mean)
    ratio = row(result, "fitted counts").variance / result.candidates[0].variance
    assert 1.05**2 / 2.005 <= ratio * 1.001 < 1.05**2 / 2.005 / 0.95
    assert result.candidates[0].drawn == pytest.approx([1 / 8] * 8)
    heights = result.plan.density
    assert row(result, "fitted counts").drawn == pytest.approx([height / sum(heights) for height in heights])
    # From the fitted plan on, nothing is left to gain.
    again = search(records, result.plan, SearchSettings(mode="counts"))
    assert not again.adopt


def test_how_often_a_count_is_drawn_follows_from_the_clip_range():
    clipped = NoisePlan(8, clip_range=(0.3, 0.8))
    records = measured(np.random.default_rng(4), block_size=8)
    drawn = search(records, clipped, SearchSettings(mode="counts")).candidates[0].drawn
    # The mean of the binomial law over levels in the range, of blocks with a masked token.
    levels = (np.arange(20_000) + 0.5) / 20_000 * 0.5 + 0.3
    law = np.array([(math.comb(8, k) * levels**k * (1 - levels) ** (8 - k)).mean() for k in range(1, 9)])
    assert drawn == pytest.approx(law / law.sum(), rel=1e-6)
    ranges = search(records, clipped, SearchSettings())
    assert all(one.drawn is None for one in ranges.candidates)


def test_a_large_block_has_64_cells_of_counts_that_are_all_drawn():
    shares = count_shares(NoisePlan(1024))
    assert shares == pytest.approx(np.full(64, 1 / 64))


def test_the_variance_of_a_count_is_that_of_the_blocks_with_it():
    records = measured(np.random.default_rng(2))
    for one in search(records, NoisePlan(BLOCK), SearchSettings()).losses:
        assert one.masked_low == one.masked_high
        nll = records.nll[records.masked == one.masked_low]
        assert one.block_variance == pytest.approx(nll.var(ddof=1))
        # The blocks are independent and near to normal here, so the error is about sqrt(2 / n) of it.
        expected = one.block_variance * math.sqrt(2 / len(nll))
        assert one.block_variance_error == pytest.approx(expected, rel=0.5)


def test_plans_that_draw_without_strata_are_judged_by_the_independent_variance():
    records = measured(np.random.default_rng(5))
    plan = NoisePlan(BLOCK, strata="independent", clip_range=(0.2, 0.9))
    result = search(records, plan, SearchSettings())
    assert result.strata == "independent"
    for one in result.candidates:
        assert one.criterion == one.independent_variance
        # Strata gain nothing on the full range here: its weights make up for the counts.
        assert one.clip_range is None or one.independent_variance > one.variance


def test_the_relative_criterion_is_the_variance_over_the_mean_squared():
    records = measured(np.random.default_rng(5))
    result = search(records, NoisePlan(BLOCK), SearchSettings(criterion="relative"))
    for one in result.candidates:
        assert one.criterion == pytest.approx(one.variance / one.mean**2)
    assert result.candidates[0].criterion == result.candidates[0].relative


def test_losses_by_count_and_the_bound_are_those_of_the_records():
    records = measured(np.random.default_rng(6), between=0.5)
    result = search(records, NoisePlan(BLOCK, clip_range=(0.3, 0.8)), SearchSettings())
    h = records.nll / records.masked
    assert [(one.masked_low, one.masked_high) for one in result.losses] == [(k, k) for k in range(1, 5)]
    for k, one in enumerate(result.losses, start=1):
        own = h[records.masked == k]
        assert one.blocks == len(own)
        assert one.nll == pytest.approx(own.mean())
        assert one.nll_sd == pytest.approx(own.std(ddof=1))
        assert one.block_sd == pytest.approx(k * own.std(ddof=1))
    # The full bound over four tokens is the plain mean over counts of h, whatever the plan in use.
    assert result.nelbo == pytest.approx(np.mean([h[records.masked == k].mean() for k in range(1, 5)]))
    assert (result.blocks, result.sequences) == (64 * 32, 64)
    assert result.covered_blocks == result.covered_tokens == 1.0


def test_bootstrap_errors_are_the_spread_over_repeated_measurements():
    # The sequences' own means make blocks alike inside a sequence: resampling blocks would say too little.
    settings = SearchSettings(bootstrap_draws=100, widths=(0.5,), start_step=0.25)
    results = [
        search(
            measured(np.random.default_rng([7, repeat]), sequences=160, blocks=8, between=0.7),
            NoisePlan(BLOCK),
            settings,
        )
        for repeat in range(200)
    ]

    def agree(values, errors):
        spread = np.std(values, ddof=1)
        # Known to 1 / sqrt(2 * 199) = 5%, four times that.
        assert np.mean(errors) == pytest.approx(spread, rel=0.21)

    agree([one.nelbo for one in results], [one.nelbo_error for one in results])
    for name in ("current (full range)", "clip 0.25-0.75"):
        rows = [row(one, name) for one in results]
        agree([one.variance for one in rows], [one.variance_error for one in rows])
    agree([one.losses[0].nll for one in results], [one.losses[0].nll_error for one in results])
    # Paired: the interval of a difference holds the mean difference about 95 times in 100.
    rows = [row(one, "clip 0.25-0.75") for one in results]
    true = np.mean([one.difference for one in rows])
    held = np.mean([one.difference_low <= true <= one.difference_high for one in rows])
    assert 0.85 < held <= 1.0


def test_resamples_draw_whole_sequences_with_the_settings_seed():
    weights = bootstrap_weights(50, SearchSettings(seed=3))
    assert weights.shape == (500, 50)
    assert (weights.sum(1) == 50).all()
    assert weights.var() == pytest.approx(1 - 1 / 50, rel=0.1)
    assert (weights == bootstrap_weights(50, SearchSettings(seed=3))).all()
    assert (weights != bootstrap_weights(50, SearchSettings(seed=4))).any()


def test_the_report_has_the_same_bytes_for_any_sharding_and_order_of_shards():
    whole = measured(np.random.default_rng(8), between=0.3)
    columns = whole.to_arrays()
    reports = set()
    for shards, order in ((1, [0]), (4, [2, 0, 3, 1]), (3, [1, 2, 0])):
        parts = [
            BlockRecords.from_arrays(
                {name: column[whole.sequence % shards == shard] for name, column in columns.items()}
            )
            for shard in order
        ]
        result = search(BlockRecords.concatenate(parts), NoisePlan(BLOCK), SearchSettings())
        reports.add(json.dumps(result.to_dict(), sort_keys=True, allow_nan=False))
    assert len(reports) == 1


def test_the_report_is_json_without_infinities_and_names_what_was_left_out():
    records = BlockRecords.concatenate(
        [measured(np.random.default_rng(9)), BlockRecords([999], [3], [2], [5.0])]
    )
    plan = NoisePlan(BLOCK, kind="bernoulli")
    result = search(records, plan, SearchSettings())
    report = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert NoisePlan.from_dict(report["plan"]) == result.plan
    assert NoisePlan.from_dict(report["current"]) == plan
    assert report["left_out_sizes"] == [[3, 1]]
    assert report["covered_blocks"] == pytest.approx(2048 / 2049)
    assert report["settings"]["widths"] == [0.5, 0.6, 0.7, 0.8, 0.9]
    assert len(report["candidates"]) == 36
    assert report["candidates"][0]["finite"] is False
    # Losses of exactly 0 have no relative variance: said as null, and nothing is adopted.
    zero = BlockRecords(records.sequence, records.maskable, records.masked, np.zeros(records.blocks))
    nothing = search(zero, NoisePlan(BLOCK), SearchSettings(criterion="relative"))
    report = json.loads(json.dumps(nothing.to_dict(), allow_nan=False))
    assert report["candidates"][1]["relative"] is None
    assert not nothing.adopt


def test_too_little_to_search_with_is_refused():
    one = measured(np.random.default_rng(0), sequences=1, blocks=64)
    with pytest.raises(DataError, match="1 sequence"):
        search(one, NoisePlan(BLOCK), SearchSettings())
    with pytest.raises(DataError, match="too few"):
        search(BlockRecords([0, 1], [4, 4], [1, 2], [1.0, 1.0]), NoisePlan(BLOCK), SearchSettings())
    with pytest.raises(ConfigError, match="block_size=2"):
        search(measured(np.random.default_rng(0)), NoisePlan(2), SearchSettings())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"mode": "both"}, "choose one of clip, counts"),
        ({"criterion": "log"}, "choose one of raw, relative"),
        ({"widths": (0.5, 1.0)}, "widths"),
        ({"start_step": 0.0}, "start_step"),
        ({"min_gain": -0.1}, "min_gain"),
        ({"min_gain": math.nan}, "min_gain"),
        ({"confidence": 1.0}, "confidence"),
        ({"bootstrap_draws": 5}, "at least 20"),
        ({"uniform_share": 0.0}, "uniform_share"),
        ({"seed": -1}, "seed"),
    ],
)
def test_settings_out_of_range_are_refused(wrong, said):
    with pytest.raises(ConfigError, match=said):
        SearchSettings(**wrong)
