"""A continued run uses the plans that it used before, at the same steps; ranks do so together."""

import contextlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from bdtrain.checkpoint.communicator import OneProcess
from bdtrain.errors import RefitError
from bdtrain.refit.history import HISTORY_FILE, append_outcome, read_history
from bdtrain.refit.job import only_one
from bdtrain.refit.schedule_file import SCHEDULE_FILE
from bdtrain.refit.snapshot import refit_folder, result_folder
from bdtrain.train import refit as module
from bdtrain.train.refit import RefitHooks, ScheduleRefit
from tests.unit.train.refit_run import BEST, BETTER, EPOCH, PLAN, FakeChild, Run, begun


@pytest.fixture(autouse=True)
def children(monkeypatch):
    FakeChild.made = []
    monkeypatch.setattr(module, "RefitChild", FakeChild)
    monkeypatch.setattr(module, "WAIT_POLL_S", 0.001)
    return FakeChild.made


def trained(tmp_path):
    """A run with an adoption at 8 and a failure at 13, and its state before each step."""
    run, states = Run(tmp_path), {}
    for step in range(0, 15):
        states[step] = json.loads(json.dumps(run.state))
        run.at(step)
        if step == 5:
            run.publish(5)
        if step == 10:
            FakeChild.made[-1].end("it broke")
    return run, states


@pytest.mark.parametrize("step", [0, 3, 5, 6, 8, 9, 10, 11, 13, 14])
def test_a_continued_run_repeats_every_outcome_at_its_step(tmp_path, children, step):
    run, states = trained(tmp_path)
    lines = len(children), (refit_folder(tmp_path) / HISTORY_FILE).read_bytes()
    # What would be decided now is something else.
    (result_folder(tmp_path, 5) / SCHEDULE_FILE).unlink()
    other = run.continued(states[step])
    other.steps(step, 14)
    assert other.state == run.state
    assert (len(children), (refit_folder(tmp_path) / HISTORY_FILE).read_bytes()) == lines
    assert [entry for entry in run.written if entry[0] >= step] == other.written
    assert other.refit.plan == BETTER
    assert all(facts["replayed"] for _, name, facts in other.events if name == "refit")
    expected = [5, 10] if step <= 5 else [10] if step <= 10 else []
    assert other.snapshots == [] and len([s for s in (5, 10) if s >= step]) == len(expected)


def test_a_live_continuation_fits_anew(tmp_path, children):
    run, states = trained(tmp_path)
    other = run.continued(states[3], replay="live")
    other.steps(3, 5)
    assert other.snapshots == [5] and children[-1].step == 5
    other.publish(5, BEST)
    other.steps(6, 8)
    assert other.refit.plan == BEST and not other.events[-1][2]["replayed"]
    assert read_history(refit_folder(tmp_path))[5].plan == BEST


def test_another_lag_makes_the_old_outcomes_void(tmp_path):
    run, states = trained(tmp_path)
    other = run.continued(states[3], lag_steps=4)
    other.steps(3, 8)
    assert other.refit.plan == PLAN and other.snapshots == [5]
    other.at(9)
    # The schedule of the same snapshot is still there.
    assert other.refit.plan == BETTER and other.state["noise_plan_history"][-1][0] == 9


def test_a_pending_re_fit_is_begun_again_by_the_next_attempt(tmp_path, children):
    run = Run(tmp_path)
    run.steps(0, 5)
    saved = json.loads(json.dumps(run.state))
    other = run.continued(saved)
    assert [child.step for child in children] == [5, 5] and children[-1].running
    other.publish(5)
    other.steps(6, 8)
    assert other.refit.plan == BETTER and other.snapshots == []
    # One that is done already is not made again.
    (refit_folder(tmp_path) / HISTORY_FILE).unlink()
    third = run.continued(saved)
    third.steps(6, 8)
    assert len(children) == 2 and third.refit.plan == BETTER


def test_a_run_that_goes_on_without_re_fits_keeps_the_plan_it_has(tmp_path, children):
    run = Run(tmp_path)
    run.steps(0, 5)
    run.publish(5)
    run.steps(6, 10)
    made = len(children)
    other = run.continued(run.state, mode="off")
    other.steps(11, 20)
    assert other.refit.plan == BETTER and other.refit.objective == ("objective", BETTER)
    assert other.pending is None and len(children) == made and other.written == []


def test_a_checkpoint_from_before_there_were_re_fits_goes_on(tmp_path):
    run = Run(tmp_path)
    saved = {"noise_plan": PLAN.to_dict(), "noise_plan_history": [[0, PLAN.to_dict()]]}
    run.refit.restore(saved)
    run.steps(3, 5)
    assert begun(run) == [5] and run.state["noise_plan_history"] == [[0, PLAN.to_dict()]]


def test_a_damaged_history_stops_a_run_that_must_repeat_itself(tmp_path):
    run, states = trained(tmp_path)
    with (refit_folder(tmp_path) / HISTORY_FILE).open("a") as file:
        file.write('{"outcome": "adopted"}\n')
    with pytest.raises(RefitError, match=r"mend the file, or set refit.replay=live"):
        run.continued(states[3])
    run.continued(states[3], replay="live")


def test_a_run_without_noise_has_nothing_to_fit(tmp_path):
    run = Run(tmp_path)
    plain = ScheduleRefit(
        run.config,
        placement="process",
        run_uid="u",
        communicator=OneProcess(),
        plan=None,
        objective="ar",
        epoch_samples=EPOCH,
        hooks=run.refit._hooks,
    )
    plain.restore({"noise_plan": None, "noise_plan_history": []})
    plain.at(SimpleNamespace(step=10, samples=10**6, tokens=10**6))
    assert plain.objective == "ar" and plain.state()["noise_plan"] is None
    assert plain.state()["noise_plan_history"] == []


def test_a_history_with_the_last_word_counts_though_an_earlier_attempt_said_otherwise(tmp_path):
    run, states = trained(tmp_path)
    found = read_history(refit_folder(tmp_path))[5]
    append_outcome(
        refit_folder(tmp_path),
        type(found)(**{**found.__dict__, "outcome": "late", "plan": PLAN, "version": 0}),
    )
    other = run.continued(states[3])
    other.steps(3, 8)
    assert other.refit.plan == PLAN and other.counts == {"late": 1}


def test_a_run_that_is_asked_to_stop_while_it_waits_takes_no_step_and_goes_on_waiting_later(
    tmp_path, children, monkeypatch
):
    for lag in (0, 3):
        run = Run(tmp_path / str(lag), wait=True, lag_steps=lag)
        assert all(run.at(step) for step in range(5 + lag))
        monkeypatch.setattr(module.time, "sleep", lambda seconds, run=run: setattr(run, "stopping", True))
        assert run.at(5 + lag) is False
        assert run.pending["adopt_step"] == 5 + lag and run.written == [] and run.refit.plan == PLAN
        saved = json.loads(json.dumps(run.state))
        run.refit.close()
        other = run.continued(saved, wait=True, lag_steps=lag)
        monkeypatch.setattr(module.time, "sleep", lambda seconds, run=other: run.publish(5))
        assert other.at(5 + lag) is True
        assert other.refit.plan == BETTER and other.state["noise_plan_history"][-1][0] == 5 + lag
        assert begun(other) == []


@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("at_work", [False, True])
def test_gradients_of_a_schedule_that_a_continued_run_finds_are_missed_aloud(
    tmp_path, children, monkeypatch, done, at_work
):
    """No child is started then; that of the attempt before may still be at work, or be gone with it."""
    metrics = {"sched/gain": 0.5, **({"sched/gradient_variance": 3.0} if done else {})}
    monkeypatch.setattr(module, "search_metrics", lambda *_: metrics)
    run = Run(tmp_path, gradient_variance=True)
    run.steps(0, 6)
    run.publish(5)
    other = run.continued(run.state, gradient_variance=True)
    assert len(children) == 1
    with only_one(result_folder(tmp_path, 5)) if at_work else contextlib.nullcontext():
        other.steps(7, 8)
    told = [line for line in other.lines if "its gradients were not done in time" in line]
    assert len(told) == (not done) and other.history() == {5: "adopted"}
    assert done or ("larger refit.lag_steps" in told[0]) is at_work


class Together:
    """Ranks that are threads of this process; what one tells travels as JSON."""

    def __init__(self, world):
        self.world_size, self._told = world, [None] * world
        self._barrier = threading.Barrier(world, timeout=20)

    def of(self, rank):
        def gather_objects(value):
            self._told[rank] = json.dumps(value)
            self._barrier.wait()
            found = [json.loads(text) for text in self._told]
            self._barrier.wait()
            return found

        return SimpleNamespace(
            rank=rank,
            world_size=self.world_size,
            barrier=self._barrier.wait,
            gather_objects=gather_objects,
            broadcast_object=lambda value: gather_objects(value)[0],
        )

    def do(self, what):
        """The result of each rank."""
        with ThreadPoolExecutor(self.world_size) as pool:
            return list(pool.map(what, range(self.world_size)))


def two_ranks(folder, **settings):
    together = Together(2)
    return together, [Run(folder, communicator=together.of(rank), **settings) for rank in range(2)]


def gone(run):
    run.refit._hooks = RefitHooks(**{**run.refit._hooks.__dict__, "snapshot": lambda: None})


def test_what_goes_wrong_on_the_first_rank_alone_is_told_to_all(tmp_path, children):
    """A rank that waited for what never comes would stop the run."""
    cases = {
        "adopted": lambda ranks: None,
        "late": lambda ranks: None,
        "rejected": lambda ranks: None,
        "failed": lambda ranks: [gone(run) for run in ranks],
    }
    for outcome, prepare in cases.items():
        together, ranks = two_ranks(tmp_path / outcome)
        prepare(ranks)
        together.do(lambda rank, ranks=ranks: ranks[rank].steps(0, 5))
        if outcome == "adopted":
            ranks[0].publish(5)
        if outcome == "rejected":
            (result_folder(tmp_path / outcome, 5) / SCHEDULE_FILE).write_text("[")
        together.do(lambda rank, ranks=ranks: ranks[rank].steps(6, 8))
        assert ranks[0].state == ranks[1].state and ranks[0].counts == {outcome: 1}
        assert ranks[0].refit.plan == ranks[1].refit.plan == (BETTER if outcome == "adopted" else PLAN)
    # One child of the first rank, in all but the last case.
    assert [child.step for child in children] == [5, 5, 5]


def test_ranks_wait_together_and_any_of_them_may_be_asked_to_stop(tmp_path, children, monkeypatch):
    together, ranks = two_ranks(tmp_path, wait=True)
    together.do(lambda rank: ranks[rank].steps(0, 7))
    ranks[1].stopping = True
    assert together.do(lambda rank: ranks[rank].at(8)) == [False, False]
    ranks[1].stopping = False
    looks = []

    def look(seconds):
        looks.append(seconds)
        if len(looks) == 6:
            ranks[0].publish(5)

    monkeypatch.setattr(module.time, "sleep", look)
    assert together.do(lambda rank: ranks[rank].at(8)) == [True, True]
    assert ranks[0].state == ranks[1].state and ranks[1].refit.plan == BETTER


def test_ranks_hear_of_a_damaged_history_together(tmp_path):
    run, states = trained(tmp_path)
    together, ranks = two_ranks(tmp_path)
    for found in (rank.refit for rank in ranks):
        found._run = tmp_path
    together.do(lambda rank: ranks[rank].refit.read_history())
    together.do(lambda rank: ranks[rank].refit.restore(states[3]))
    together.do(lambda rank: ranks[rank].steps(3, 14))
    assert ranks[0].state == ranks[1].state == run.state
    with (refit_folder(tmp_path) / HISTORY_FILE).open("a") as file:
        file.write("7\n")

    def refused(rank):
        with pytest.raises(RefitError) as found:
            ranks[rank].refit.read_history()
        return str(found.value)

    told = together.do(refused)
    assert told[0] == told[1] and "mend the file" in told[0]


def test_another_interval_or_a_late_start_waits_for_its_own_end(tmp_path):
    # A step has 256 tokens: 768 are complete after 3, 6, 9 steps, 2,560 after 10 and 20.
    first = Run(tmp_path, every_tokens=768, lag_steps=1)
    first.steps(0, 7)
    longer = first.continued(first.state, every_tokens=2560, lag_steps=1)
    longer.steps(7, 20)
    assert begun(longer) == [10, 20]
    off = Run(tmp_path / "off", mode="off")
    off.steps(0, 7)
    late = off.continued(off.state, lag_steps=1)
    late.steps(7, 16)
    assert begun(late) == [10, 15]


def test_a_split_that_is_too_short_costs_the_re_fit_alone(tmp_path):
    run = Run(tmp_path, lag_steps=1)

    def refuse():
        raise RefitError("the held-out split has 1 row")

    run.refit._hooks = RefitHooks(**{**run.refit._hooks.__dict__, "expected": refuse})
    run.steps(0, 6)
    assert run.counts == {"failed": 1} and "1 row" in run.lines[-1]


def test_a_disk_that_refuses_to_look_costs_the_re_fit_alone(tmp_path, monkeypatch):
    run = Run(tmp_path, lag_steps=1)
    run.steps(0, 5)

    def refuse(*_):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(run.refit, "_judge", refuse)
    run.at(6)
    assert run.counts == {"failed": 1} and "Stale file handle" in run.lines[-1]
