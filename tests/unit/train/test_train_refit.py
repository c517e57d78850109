"""When a re-fit begins, when its plan is used, and what becomes of the run when it does not come."""

import json
from dataclasses import replace

import pytest

from bdtrain.errors import CheckpointError, ConfigError, RankError, RefitError
from bdtrain.refit.history import HISTORY_FILE, read_history
from bdtrain.refit.job import only_one
from bdtrain.refit.schedule_file import REPORT_FILE, SCHEDULE_FILE
from bdtrain.refit.snapshot import refit_folder, result_folder
from bdtrain.train import refit as module
from bdtrain.train.refit import RefitHooks
from bdtrain.train.refit_state import search_metrics
from tests.unit.train.refit_run import BEST, BETTER, PLAN, ROWS, SEQ, FakeChild, Run, begun


@pytest.fixture(autouse=True)
def children(monkeypatch):
    FakeChild.made = []
    monkeypatch.setattr(module, "RefitChild", FakeChild)
    monkeypatch.setattr(module, "WAIT_POLL_S", 0.001)
    return FakeChild.made


def test_one_re_fit_an_epoch_at_its_first_step(tmp_path, children):
    run = Run(tmp_path)
    run.steps(0, 16)
    assert run.snapshots == begun(run) == [child.step for child in children] == [5, 10, 15]


@pytest.mark.parametrize("more", [{}, {"gpu": 0}, {"gpu": 7}, {"placement": "ray", "worker_gpus": 1.0}])
def test_its_process_gets_the_gpus_that_the_settings_say(tmp_path, children, more):
    Run(tmp_path, **more).steps(0, 5)
    (child,) = children
    assert child.reserved == more.get("gpu") and child.gpus == ("worker_gpus" in more)


def test_re_fits_by_tokens_begin_at_the_first_step_that_has_them(tmp_path):
    # A step has 256 tokens: 600 are complete after 3 steps, 1,200 after 5, 1,800 after 8, 2,400 after 10.
    run = Run(tmp_path, every_tokens=600, lag_steps=1)
    run.steps(0, 10)
    assert begun(run) == [3, 5, 8, 10]


def test_several_that_fall_on_one_step_are_one(tmp_path):
    run = Run(tmp_path, every_tokens=100, lag_steps=1)
    run.steps(0, 3)
    assert begun(run) == [1, 2, 3] and run.counts == {"late": 2}


def test_a_young_model_is_not_measured(tmp_path):
    # Enough at step 7: the next epoch's end is the first that counts.
    run = Run(tmp_path, start_tokens=7 * ROWS * SEQ)
    run.steps(0, 16)
    assert begun(run) == [10, 15]
    at_once = Run(tmp_path / "other", mode="off", lag_steps=3)
    at_once.steps(0, 16)
    assert begun(at_once) == [] and at_once.lines == []


def test_a_plan_is_used_exactly_lag_steps_after_its_snapshot(tmp_path, children):
    run = Run(tmp_path)
    run.steps(0, 5)
    assert run.pending["adopt_step"] == 8 and run.refit.objective == "objective of the configuration"
    run.publish(5)
    run.steps(6, 7)
    # It is there, and not due.
    assert run.refit.plan == PLAN and run.written == []
    run.at(8)
    assert run.refit.plan == BETTER and run.refit.objective == ("objective", BETTER)
    assert run.state["noise_plan"] == BETTER.to_dict()
    assert run.state["noise_plan_history"] == [[0, PLAN.to_dict()], [8, BETTER.to_dict()]]
    assert run.pending is None and run.state["refit"]["version"] == 1 and run.counts == {"adopted": 1}
    assert children[0].killed, "nothing is left of it"
    (step, values) = run.written[0]
    assert step == 8 and values["sched/version"] == 1
    assert (values["sched/beta"], values["sched/omega"]) == (0.45, 0.95)
    assert (values["fault/refits_failed"], values["fault/refits_late"], values["fault/refits_skipped"]) == (
        0,
        0,
        0,
    )
    assert run.events[-1] == (
        8,
        "refit",
        {
            "snapshot_step": 5,
            "outcome": "adopted",
            "reason": "better",
            "version": 1,
            "replayed": False,
            # From the full range to a width of 0.5.
            "loss_scale": pytest.approx(0.5, rel=1e-12),
        },
    )
    run.steps(9, 10)
    run.publish(10, BEST)
    run.steps(11, 13)
    assert run.state["noise_plan_history"][-1] == [13, BEST.to_dict()] and run.state["refit"]["version"] == 2
    assert run.history() == {5: "adopted", 10: "adopted"}


@pytest.mark.parametrize(
    ("weighting", "plan", "factor"),
    [
        ("elbo", {"clip_range": (0.45, 0.95)}, 0.5),
        ("elbo", {"clip_range": (0.04, 1.0)}, None),
        ("elbo", {"density": (1.0, 2.0)}, None),
        ("reference", {"clip_range": (0.45, 0.95)}, None),
        # Half of all tokens are masked on average, and then 0.7.
        ("flat", {"clip_range": (0.45, 0.95)}, 1.4),
    ],
)
def test_a_plan_that_puts_the_loss_on_another_scale_says_so_at_its_step(tmp_path, weighting, plan, factor):
    run = Run(tmp_path)
    run.refit.plan = replace(PLAN, weighting=weighting)
    run.steps(0, 5)
    run.publish(5, replace(run.refit.plan, **plan))
    run.steps(6, 8)
    assert run.history() == {5: "adopted"}
    said = [line for line in run.lines if "times its scale" in line]
    kept = read_history(refit_folder(tmp_path))[5].loss_scale
    assert [facts.get("loss_scale") for _, name, facts in run.events if name == "refit"] == (
        [None] if factor is None else [kept]
    )
    if factor is None:
        assert said == [] and kept == pytest.approx(1.0, abs=0.05)
        return
    assert kept == pytest.approx(factor, rel=1e-12)
    assert f"from step 8 on the loss has {factor:g} times its scale" in said[0] and len(said) == 1
    assert f"weighting={weighting}" in said[0] and "weighting=reference keeps the scale" in said[0]


def test_a_plan_that_stays_counts_as_a_result(tmp_path):
    run = Run(tmp_path)
    run.steps(0, 5)
    run.publish(5, PLAN, adopt=False, reason="the best already")
    run.refit._state.failures_in_a_row = 2
    run.steps(6, 8)
    assert run.refit.objective == "objective of the configuration" and run.built.count(PLAN) <= 1
    assert run.state["noise_plan_history"] == [[0, PLAN.to_dict()]]
    assert run.history() == {5: "kept"} and run.state["refit"]["version"] == 1
    assert run.state["refit"]["failures_in_a_row"] == 0
    assert "re-fit of step 5: kept: the best already" in run.lines


def test_a_late_result_is_not_used_then_or_later(tmp_path, children):
    run = Run(tmp_path)
    run.steps(0, 8)
    assert run.history() == {5: "late"} and children[0].killed
    run.publish(5)
    run.steps(9, 9)
    assert run.refit.plan == PLAN and run.counts == {"late": 1} and run.state["refit"]["version"] == 0
    assert run.written[0][1]["fault/refits_late"] == 1
    assert run.written[0][1]["fault/refits_failed"] == 0


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [("its process was ended by SIGKILL", "SIGKILL"), ("", "ended and left no schedule")],
)
def test_a_child_that_ends_without_a_schedule_failed(tmp_path, children, trouble, reason):
    run = Run(tmp_path)
    run.steps(0, 5)
    children[0].end(trouble)
    run.steps(6, 8)
    assert run.history() == {5: "failed"} and reason in run.lines[-1]
    assert run.refit.plan == PLAN and run.written[0][1]["fault/refits_failed"] == 1


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda run: run.publish(5, version=2), "version 2, expected 1"),
        (lambda run: run.publish(5, current=BEST), "plan in use"),
        (lambda run: run.publish(5, digest="another"), "snapshot digest 'another'"),
        (lambda run: run.publish(5, BETTER.with_block_size(8)), "block size 8 under 4"),
        (lambda run: run.publish(5, BETTER, adopt=False), "yet not new"),
        (lambda run: (result_folder(run.folder, 5) / SCHEDULE_FILE).write_text("{"), "is no schedule"),
        (lambda run: (result_folder(run.folder, 5) / SCHEDULE_FILE).mkdir(), "cannot be read"),
    ],
)
def test_a_schedule_that_cannot_be_trusted_is_rejected(tmp_path, wrong, said):
    run = Run(tmp_path)
    run.steps(0, 5)
    wrong(run)
    run.steps(6, 8)
    assert run.history() == {5: "rejected"} and said in run.lines[-1]
    assert run.refit.plan == PLAN and run.state["refit"]["version"] == 0
    assert run.written[0][1]["fault/refits_failed"] == 1


def test_a_run_that_only_reports_keeps_its_plan_whatever_a_schedule_says(tmp_path):
    run = Run(tmp_path, adopt=False)
    run.steps(0, 5)
    run.publish(5, PLAN, adopt=False)
    run.steps(6, 10)
    run.publish(10, version=2)
    run.steps(11, 13)
    assert run.history() == {5: "kept", 10: "rejected"}
    assert run.refit.plan == PLAN and "changes the plan, and refit.adopt=false keeps it" in run.lines[-1]


def test_a_plan_that_cannot_be_built_here_is_rejected(tmp_path):
    run = Run(tmp_path)

    def refuse(plan):
        raise ConfigError("no table for it")

    run.refit._hooks = RefitHooks(**{**run.refit._hooks.__dict__, "build_objective": refuse})
    run.steps(0, 5)
    run.publish(5)
    run.steps(6, 8)
    assert run.history() == {5: "rejected"} and "no table for it" in run.lines[-1]


def test_a_re_fit_that_meets_a_pending_one_is_skipped_and_counted(tmp_path, children):
    run = Run(tmp_path, lag_steps=7)
    run.steps(0, 10)
    assert begun(run) == [5] and run.counts == {"skipped": 1} and len(children) == 1
    run.publish(5)
    run.steps(11, 15)
    assert run.refit.plan == BETTER and begun(run) == [5, 15]
    assert run.written[0][0] == 12 and run.written[0][1]["fault/refits_skipped"] == 1
    assert any("re-fit at step 10 skipped: that of step 5" in line for line in run.lines)


def test_one_that_is_due_when_another_begins_is_settled_first(tmp_path):
    run = Run(tmp_path, lag_steps=5)
    run.steps(0, 5)
    run.publish(5)
    run.steps(6, 10)
    assert run.refit.plan == BETTER and begun(run) == [5, 10] and run.counts == {"adopted": 1}


def test_without_a_lag_and_with_waiting_the_next_step_has_the_plan(tmp_path, monkeypatch):
    run = Run(tmp_path, lag_steps=0, wait=True)
    looks = []

    def look(seconds):
        looks.append(seconds)
        if len(looks) == 3:
            run.publish(run.step)

    monkeypatch.setattr(module.time, "sleep", look)
    run.steps(0, 5)
    assert len(looks) == 3 and run.refit.plan == BETTER
    assert run.state["noise_plan_history"][-1] == [5, BETTER.to_dict()]


def test_waiting_ends_when_the_child_does(tmp_path, children, monkeypatch):
    run = Run(tmp_path, wait=True)
    monkeypatch.setattr(module.time, "sleep", lambda seconds: children[0].end("it broke"))
    run.steps(0, 8)
    assert run.history() == {5: "failed"} and "it broke" in run.lines[-1]


def test_waiting_ends_at_the_deadline(tmp_path, children):
    run = Run(tmp_path, wait=True, deadline_s=0.05)
    run.steps(0, 8)
    assert run.history() == {5: "late"} and children[0].killed


def test_gradients_that_are_asked_for_are_waited_for_too(tmp_path, children, monkeypatch):
    """They come after the schedule, and the child is over when they are there."""
    run = Run(tmp_path, wait=True, gradient_variance=True)
    run.steps(0, 7)
    run.publish(5)
    looks = []

    def look(seconds):
        looks.append(seconds)
        if len(looks) == 3:
            children[0].end()

    monkeypatch.setattr(module.time, "sleep", look)
    run.at(8)
    assert len(looks) == 3 and run.history() == {5: "adopted"}


@pytest.mark.parametrize("done", [False, True])
def test_gradients_that_come_too_late_are_said_to_be_left_out(tmp_path, children, monkeypatch, done):
    metrics = {"sched/gain": 0.5, **({"sched/gradient_variance": 3.0} if done else {})}
    monkeypatch.setattr(module, "search_metrics", lambda *_: metrics)
    run = Run(tmp_path, gradient_variance=True)
    run.steps(0, 7)
    run.publish(5)
    run.at(8)
    told = [line for line in run.lines if "its gradients were not done in time" in line]
    # A child that has said all it has to say may still be on its way out.
    assert len(told) == (not done) and run.history() == {5: "adopted"} and children[0].killed


def test_a_child_that_another_re_fit_keeps_out_is_waited_for_in_its_place(tmp_path, children, monkeypatch):
    """What a killed trainer left at work holds the lock; the child of the next trainer is refused."""
    run = Run(tmp_path, wait=True)
    run.steps(0, 7)
    children[0].end("its process ended with 8: another re-fit is at work")
    looks = []

    def look(seconds):
        looks.append(seconds)
        if len(looks) == 3:
            run.publish(5)

    monkeypatch.setattr(module.time, "sleep", look)
    with only_one(result_folder(tmp_path, 5)):
        run.at(8)
    assert len(looks) == 3 and run.history() == {5: "adopted"}
    # Without waiting it is late, and no failure of the run's own.
    other = Run(tmp_path / "other")
    other.steps(0, 7)
    children[1].end("its process ended with 8")
    with only_one(result_folder(other.folder, 5)):
        other.at(8)
    assert other.history() == {5: "late"}


def test_three_failures_in_a_row_are_worth_a_warning_and_only_one(tmp_path, children):
    run = Run(tmp_path)
    for number in range(1, 6):
        run.steps(5 * number - 4, 5 * number)
        if number == 2:
            children[-1].end("it broke")
    warnings = [line for line in run.lines if line.startswith("warning: 3 re-fits in a row")]
    assert len(warnings) == 1 and str(result_folder(tmp_path, 15)) in warnings[0]
    assert run.counts == {"late": 3, "failed": 1}
    run.publish(25)
    run.steps(26, 28)
    assert run.state["refit"]["failures_in_a_row"] == 0


@pytest.mark.parametrize("error", [CheckpointError("the disk is full"), OSError("no such device")])
def test_a_snapshot_that_cannot_be_written_costs_the_re_fit_alone(tmp_path, children, error):
    run = Run(tmp_path)
    run.snapshot_error = error
    run.steps(0, 8)
    assert run.history() == {5: "failed"} and str(error) in run.lines[-1] and children == []


def test_a_snapshot_that_is_gone_when_its_digest_is_read_costs_the_re_fit_alone(
    tmp_path, children, monkeypatch
):
    run = Run(tmp_path)
    monkeypatch.setattr(
        run.refit, "_hooks", RefitHooks(**{**run.refit._hooks.__dict__, "snapshot": lambda: None})
    )
    run.steps(0, 8)
    assert run.history() == {5: "failed"} and "MANIFEST.json" in run.lines[-1] and children == []


def test_inline_measures_at_once_and_uses_it_at_the_same_step(tmp_path, children):
    run = Run(tmp_path, placement="inline")
    run.steps(0, 7)
    assert run.refit.plan == PLAN and run.snapshots == [] and children == []
    run.at(8)
    assert run.refit.plan == BETTER and run.history() == {5: "adopted"}
    broken = Run(tmp_path / "broken", placement="inline")
    broken.measure_error = RefitError("too few rows")
    broken.steps(0, 8)
    assert broken.history() == {5: "failed"} and "too few rows" in broken.lines[-1]


def test_a_rank_that_others_wait_for_is_no_failure_of_the_re_fit_alone(tmp_path):
    run = Run(tmp_path, placement="inline")
    run.measure_error = RankError("this rank ran out of memory")
    with pytest.raises(RankError):
        run.steps(0, 5)
    assert not (refit_folder(tmp_path) / HISTORY_FILE).exists()


def test_inline_does_not_take_an_old_schedule_for_its_own_failure(tmp_path):
    run = Run(tmp_path, placement="inline")
    run.measure_error = RefitError("too few rows")
    run.publish(5, digest="", version=1)
    run.steps(0, 8)
    assert run.history() == {5: "failed"} and run.refit.plan == PLAN


def test_external_starts_nothing_and_takes_what_comes_in_time(tmp_path, children):
    run = Run(tmp_path, placement="external")
    run.steps(0, 5)
    run.publish(5)
    run.steps(6, 13)
    assert children == [] and run.history() == {5: "adopted", 10: "late"}


def test_a_schedule_of_another_snapshot_on_disk_is_forgotten(tmp_path):
    run = Run(tmp_path, placement="external")
    for content in ("{", None):
        path = result_folder(tmp_path, 5) / SCHEDULE_FILE
        run.publish(5, digest="of a run that was deleted")
        if content is not None:
            path.write_text(content)
        fresh = Run(tmp_path, placement="external")
        fresh.steps(0, 5)
        assert not path.exists()
    # That of the same snapshot stays: an earlier attempt had it made.
    run.publish(5)
    again = Run(tmp_path, placement="external")
    again.steps(0, 8)
    assert again.refit.plan == BETTER


def test_a_plan_whose_record_the_disk_refuses_is_not_used(tmp_path):
    run = Run(tmp_path)
    run.steps(0, 5)
    run.publish(5)
    (refit_folder(tmp_path) / HISTORY_FILE).mkdir()
    run.steps(6, 8)
    assert run.refit.plan == PLAN and run.counts == {"failed": 1}
    assert "could not be written" in run.lines[-1]


def report(**changes):
    rows = [
        {"name": "current", "is_current": True, "variance": 3.0, "variance_error": 0.2, "p_best": 0.1},
        {"name": "clip", "is_current": False, "variance": 2.0, "variance_error": 0.1, "p_best": 0.9},
    ]
    found = {"candidates": rows, "winner": "clip", "gain": 0.5, "at_edge": ["narrowest"], "nelbo": 4.0}
    return {"results": {"4": {**found, "nelbo_error": 0.25, **changes}}}


def test_numbers_of_a_search_go_to_the_metrics(tmp_path):
    path = tmp_path / REPORT_FILE
    path.write_text(json.dumps(report()))
    assert search_metrics(path, 4) == {
        "sched/variance": 3.0,
        "sched/variance_error": 0.2,
        "sched/variance_best": 2.0,
        "sched/gain": 0.5,
        "sched/p_best": 0.9,
        "sched/at_edge": 1.0,
        "sched/nelbo": 4.0,
        "sched/nelbo_error": 0.25,
    }
    # A gain without a value is left out.
    path.write_text(json.dumps(report(gain=None)))
    assert "sched/gain" not in search_metrics(path, 4) and len(search_metrics(path, 4)) == 7
    plans = [{"name": "current", "gradient": 9.0, "gradient_error": 0.3}, {"name": "clip", "gradient": 6.0}]
    gradients = {"plans": plans, "pearson": 0.9}
    path.write_text(json.dumps({**report(), "gradients": {"4": gradients}}))
    found = search_metrics(path, 4)
    assert {name: value for name, value in found.items() if "gradient" in name} == {
        "sched/gradient_variance": 9.0,
        "sched/gradient_variance_error": 0.3,
        "sched/gradient_variance_best": 6.0,
        "sched/gradient_correlation": 0.9,
    }


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        "[" * 200_000,
        "\udcff",
        json.dumps({"results": {"8": {}}}),
        json.dumps(report(winner="x")),
    ],
)
def test_a_report_that_cannot_be_read_gives_no_numbers(tmp_path, content):
    path = tmp_path / REPORT_FILE
    path.write_text(content, errors="surrogateescape")
    assert search_metrics(path, 4) == {}
    assert search_metrics(tmp_path / "none", 4) == search_metrics(tmp_path, 4) == {}


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999"])
def test_a_number_that_no_history_can_hold_is_left_out(tmp_path, value):
    run = Run(tmp_path)
    run.steps(0, 5)
    run.publish(5)
    path = result_folder(tmp_path, 5) / REPORT_FILE
    path.write_text(json.dumps(report()).replace('"nelbo": 4.0', f'"nelbo": {value}'))
    run.steps(6, 8)
    assert run.refit.plan == BETTER and "sched/nelbo" not in run.written[0][1]
    path.write_text(json.dumps(report(nelbo=10**400)))
    assert search_metrics(path, 4) == {}
