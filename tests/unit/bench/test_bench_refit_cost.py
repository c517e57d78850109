"""The cost of a re-fit: both procedures estimate one quantity, and budgets and times are read off rightly."""

import math
import os
import signal
import subprocess
import time
from pathlib import Path
from statistics import NormalDist
from types import SimpleNamespace

import numpy as np
import pytest

from bdtrain.diffusion.variance import BlockRecords, build_cells, moments
from tools.bench.refit_budget import (
    Found,
    OnePass,
    PassPerRange,
    has_finite_variance,
    judge_choices,
    needed_rows,
    needed_rows_at_large,
    noise_of_grid,
    only_full_blocks,
    reference_plans,
    resampled_rows,
    sweep,
)
from tools.bench.refit_cost import Measured, cost_of, passes_of
from tools.bench.refit_step_cost import Call, Foreign, Watch, call_times, quantile, steps_of, window_ratios

SIZE, ROWS, BLOCKS = 4, 600, 16
NAMES = ["clip 0.5-1", "clip 0.25-0.75", "clip 0.1-0.9"]


def draw_losses(masked, generator):
    """A toy network: a masked token costs 1 nat more or less, and more where more is masked."""
    noise = generator.normal(size=masked.shape)
    return np.where(masked > 0, masked * (2.0 + 0.5 * masked + noise), 0.0)


def make_records(masked, losses):
    """Records of [rows, blocks]; blocks without a mask have none, as ``read_blocks`` has it."""
    rows = np.repeat(np.arange(len(masked)) * 7, masked.shape[1])
    there = masked.ravel() > 0
    return BlockRecords(
        sequence=rows[there],
        maskable=np.full(int(there.sum()), SIZE),
        masked=masked.ravel()[there],
        nll=losses.ravel()[there],
    )


@pytest.fixture(scope="module")
def case():
    """Our pass with k uniform; passes with t from each range, and their weighted losses [rows, blocks]."""
    generator = np.random.default_rng(5)
    masked = generator.integers(1, SIZE + 1, (ROWS, BLOCKS))
    pool = make_records(masked, draw_losses(masked, generator))
    passes, weighted = {}, {}
    for name in NAMES:
        low, high = reference_plans(SIZE)[name].interval
        t = generator.uniform(low, high, (ROWS, BLOCKS))
        masked = generator.binomial(SIZE, t)
        weighted[name] = draw_losses(masked, generator) / t
        # What a pass reports without the weight n / k of uniform counts.
        with np.errstate(divide="ignore"):
            passes[name] = make_records(masked, weighted[name] * masked / SIZE)
    measured = Measured(SIZE, pool, passes, [0.01], [0.3], [[0.1] * 4] * 2, 1.0, 1)
    return measured, weighted


def test_the_grid_is_the_reference_s():
    plans = reference_plans(SIZE)
    assert len(plans) == 36
    assert sum(has_finite_variance(plan) for plan in plans.values()) == 30
    assert {plan.weighting for plan in plans.values()} == {"reference"}
    assert {plan.kind for plan in plans.values()} == {"bernoulli"}


def test_resampled_moments_are_those_of_the_re_fit(case):
    pool = case[0].pool
    one_pass = OnePass.of(pool, [])
    weights = resampled_rows(ROWS, ROWS, 5, np.random.default_rng(1))
    ours, theirs = one_pass.moments(weights), moments(pool, build_cells(pool), weights)
    for name in ("count", "first", "second", "variance", "blocks"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-10, err_msg=name)


def test_a_resample_that_the_re_fit_would_refuse_finds_nothing(case):
    one_pass = OnePass.of(case[0].pool, [reference_plans(SIZE)[name] for name in NAMES])
    weights = np.zeros((2, ROWS))
    weights[0, 0], weights[1, :] = 1.0, 1.0
    estimates = one_pass.estimates(weights)
    assert np.isnan(estimates[0]).all() and np.isfinite(estimates[1]).all()
    truth = np.array([1.0, 2.0, 3.0])
    found = judge_choices(1, truth, np.array([[np.nan] * 3, [1.0, 2.0, 3.0], [3.0, 1.0, 2.0]]))
    assert (found.best, found.close) == (1 / 3, 1 / 3)
    assert found.regret == pytest.approx(0.5)


def test_a_pass_per_range_gives_the_variance_over_all_blocks(case):
    measured, weighted = case
    passes = passes_of(measured)
    expected = [weighted[name].var(ddof=1) for name in NAMES]
    np.testing.assert_allclose(passes.estimates(None)[0], expected, rtol=1e-10)
    relative = [weighted[name].var(ddof=1) / weighted[name].mean() ** 2 for name in NAMES]
    np.testing.assert_allclose(passes.estimates(None, "relative")[0], relative, rtol=1e-10)
    weights = np.zeros((1, ROWS))
    weights[0, :3] = (2.0, 0.0, 1.0)
    twice = np.concatenate([weighted[NAMES[0]][row] for row in (0, 0, 2)])
    assert passes.estimates(weights)[0, 0] == pytest.approx(twice.var(ddof=1), rel=1e-10)


@pytest.mark.parametrize("criterion", ["independent", "relative"])
def test_both_procedures_estimate_the_same(case, criterion):
    measured, _ = case
    ours = OnePass.of(measured.pool, [reference_plans(SIZE)[name] for name in NAMES])
    theirs, generator = passes_of(measured), np.random.default_rng(2)
    weights = resampled_rows(ROWS, ROWS, 200, generator)
    error = np.hypot(
        ours.estimates(weights, criterion).std(axis=0), theirs.estimates(weights, criterion).std(axis=0)
    )
    difference = ours.estimates(None, criterion)[0] - theirs.estimates(None, criterion)[0]
    assert (np.abs(difference) < 4.0 * error).all()


def test_only_blocks_that_can_be_masked_whole_are_kept():
    records = BlockRecords(
        sequence=np.array([0, 0, 1]),
        maskable=np.array([4, 3, 4]),
        masked=np.array([1, 2, 4]),
        nll=np.array([1.0, 2.0, 3.0]),
    )
    assert only_full_blocks(records, 4).nll.tolist() == [1.0, 3.0]


def test_an_even_grid_of_times_is_no_noisier(case):
    plan = reference_plans(SIZE)["clip 0.1-0.9"]
    generator = np.random.default_rng(3)
    free, even = noise_of_grid(case[0].pool, plan, draws=200, generator=generator)
    assert 0.0 < even < 1.1 * free


def test_needed_rows_lie_between_two_budgets():
    steps = [Found(4, 0.96, 0, 0), Found(8, 0.9, 0, 0), Found(16, 1.0, 0, 0), Found(32, 0.97, 0, 0)]
    assert needed_rows(steps, lambda one: one.best) == pytest.approx(math.sqrt(8 * 16))
    assert needed_rows(steps[2:], lambda one: one.best) == 16
    assert needed_rows(steps[:2], lambda one: one.best) is None


def test_a_sweep_ends_when_the_best_is_known():
    steps = sweep(lambda rows: Found(rows, float(rows >= 20), 0.0, 0.0))
    assert [one.rows for one in steps][-3:] == [23, 32, 45]


def test_budgets_of_large_noise_follow_the_normal_law():
    truth, at, sd = np.array([1.0, 1.1]), 1000, 0.5
    noise = np.random.default_rng(4).normal(size=(200_000, 2)) * sd
    # P(noise difference < log 1.1) = 0.95, the difference with sd * sqrt(2 * at / rows).
    expected = at * (NormalDist().inv_cdf(0.95) * sd * math.sqrt(2.0) / math.log(1.1)) ** 2
    assert needed_rows_at_large(truth, noise, at) == pytest.approx(expected, rel=0.02)


def test_few_rows_cost_what_their_passes_cost():
    result = {
        "seconds_per_row": {"ours": 0.01, "reference": 0.3},
        "small_seconds": {"ours": [0.05, 0.07, 0.11, 0.19], "reference": [1.0, 2.0, 4.0, 6.0]},
    }
    assert cost_of(result, "ours, relative", 2) == pytest.approx(0.05)
    assert cost_of(result, "ours, relative", 3) == pytest.approx(0.06)
    assert cost_of(result, "reference, relative", 100) == pytest.approx(30.0)


def test_measured_blocks_are_read_back(case, tmp_path):
    measured, path = case[0], tmp_path / "measured.npz"
    measured.save(path)
    again = Measured.load(path)
    assert list(again.passes) == NAMES
    assert (again.block_size, again.covered, again.small_seconds) == (SIZE, 1.0, [[0.1] * 4] * 2)
    for name in NAMES:
        np.testing.assert_array_equal(again.passes[name].nll, measured.passes[name].nll)
    assert isinstance(passes_of(again), PassPerRange)


def make_call(step, *, refit="no", step_cpu=1.0, event="", wall=0.001):
    return Call(step=step, wall=wall, cpu=wall, event=event, step_cpu=step_cpu, refit=refit)


def test_neighbouring_stretches_are_compared():
    calls = []
    for number, (refit, seconds) in enumerate([("no", 1.0), ("yes", 1.2), ("no", 1.4), ("yes", 9.0)]):
        for place in range(10):
            calls.append(make_call(20 + 10 * number + place, refit=refit, step_cpu=seconds))
    calls.insert(10, make_call(29, refit="partly", step_cpu=50.0))
    assert window_ratios(calls) == [pytest.approx(1.0)]
    assert steps_of(calls, "yes") == [1.2] * 10 + [9.0] * 10


def test_calls_that_begin_or_settle_stand_apart():
    calls = [make_call(step, wall=0.001 * step) for step in range(1, 101)]
    calls[49] = make_call(50, wall=1.0, event="begun")
    found = call_times(calls, "wall")
    assert found["begun"] == [1.0] and found["settled"] == []
    assert found["max"] == 1.0 and found["plain_max"] == pytest.approx(0.1)
    assert quantile([3.0, 1.0, 2.0, 4.0], 0.5) == 2.0
    assert quantile(range(1, 101), 0.99) == 99


class FakeChild:
    """A re-fit's process that only sleeps."""

    def __init__(self):
        self._process = subprocess.Popen(["sleep", "60"], start_new_session=True)

    @property
    def running(self):
        return self._process.poll() is None

    @property
    def state(self):
        return Path(f"/proc/{self._process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]

    def wait_for(self, stopped):
        end = time.monotonic() + 5
        while (self.state == "T") != stopped and time.monotonic() < end:
            time.sleep(0.01)
        return (self.state == "T") == stopped


def test_the_watch_stops_and_continues_the_re_fit_and_notes_what_happened():
    watch, child = Watch(core=None, toggle=2), FakeChild()
    refit = SimpleNamespace(_state=SimpleNamespace(pending=None))

    def begin():
        refit._state.pending, watch._child = {"snapshot_step": 0}, child
        return True

    def settle():
        refit._state.pending = None
        return True

    try:
        watch._call(begin, refit, 0)
        watch._call(lambda: True, refit, 1)
        watch._call(lambda: True, refit, 2)
        assert child.wait_for(stopped=True)
        watch._call(settle, refit, 3)
        watch._call(lambda: True, refit, 4)
        assert child.wait_for(stopped=False)
    finally:
        child._process.kill()
        child._process.wait()
    calls = watch.calls()
    assert [call.event for call in calls] == ["begun", "", "", "settled", ""]
    # A step belongs to the call before it: the re-fit worked in steps 1 and 2, and stood in 3 and 4.
    assert [call.refit for call in calls[:4]] == ["yes", "yes", "no", "no"]
    assert all(call.step_cpu >= 0.0 for call in calls[:4]) and calls[4].step_cpu is None


def test_a_foreign_process_works_on_its_core_and_ends_while_stopped():
    core = min(os.sched_getaffinity(0))
    foreign = Foreign(core)
    try:
        assert foreign.running
        assert os.sched_getaffinity(foreign._process.pid) == {core}
        os.killpg(foreign._process.pid, signal.SIGSTOP)
    finally:
        foreign.end()
    assert not foreign.running
