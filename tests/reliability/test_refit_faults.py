"""Re-fits of real runs: one plan wherever it is made, bit-identical restarts, faults that cost nothing.

The re-fits are processes. Where one must fail in some way, Python itself is made to at the start of it
(``sitecustomize``): the trainer meets the real thing, at a step that the test chooses.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from forked_refits import FORK
from kill_trials import Attempt, Job, curve, differences, finish, kill_by_fault, reported_step, starts
from nursery import Nursery
from refit_runs import (
    ADOPTIONS,
    PROCESS,
    REFIT,
    SNAPSHOTS,
    STEPS,
    Runs,
    console,
    history,
    last_metric,
    learned,
    outcomes,
    schedule,
    step_folder,
    wait_for,
)

from bdtrain.checkpoint.load import TrainingState
from bdtrain.refit.job import only_one
from bdtrain.tracking.jsonl import read_events

FAULTY_START = """\
import json, os, pathlib, shutil, signal, sys
words = pathlib.Path("/proc/self/cmdline").read_text().split(chr(0))
if "bdtrain.refit" in words:
    step = int(words[words.index("--step") + 1])
    refits = pathlib.Path(words[words.index("--run") + 1]) / "refit"
    results = refits / f"step-{step:09d}"
    kind = json.loads(os.environ["BDTRAIN_TEST_FAULTS"]).get(str(step))
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "missing":
        sys.modules["bdtrain"] = None
    elif kind == "damaged snapshot":
        path = next((refits / "snapshots" / f"step-{step:09d}").glob("rank-*.safetensors"))
        content = bytearray(path.read_bytes())
        content[-3] ^= 4
        path.write_bytes(content)
    elif kind == "torn schedule":
        (results / "schedule.json").write_text('{"format": "bdtrain-schedule/1", ')
        os._exit(0)
    elif kind == "stale schedule":
        shutil.copy(os.environ["BDTRAIN_TEST_STALE"], results / "schedule.json")
        os._exit(0)
    elif kind == "nothing":
        os._exit(0)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    with Nursery() as nursery:
        yield Runs(tmp_path_factory.mktemp("refits"), nursery)


def test_a_process_and_the_ranks_themselves_come_to_the_same_plans_and_losses(runs: Runs) -> None:
    assert learned(runs.process) == learned(runs.inline)
    for step in SNAPSHOTS:
        assert schedule(runs.process, step) == schedule(runs.inline, step)
        reports = [
            json.loads((step_folder(run, step) / "report.json").read_text())
            for run in (runs.process, runs.inline)
        ]
        assert reports[0]["results"] == reports[1]["results"]
        assert [one["measurement"]["backend"] for one in reports] == ["process", "inline"]
    assert history(runs.process) == history(runs.inline)
    # And something happened: two plans were taken, and training went on under them.
    found = history(runs.process)
    assert [(line["snapshot_step"], line["adopt_step"]) for line in found] == list(
        zip(SNAPSHOTS, ADOPTIONS, strict=True)
    )
    assert found[0]["outcome"] == "adopted"
    whole, plain = learned(runs.process), learned(runs.off)
    assert {step for step in plain if step <= ADOPTIONS[0]} == {
        step for step in whole if step <= ADOPTIONS[0]
    }
    for step in range(1, STEPS + 1):
        assert (whole[step]["train/loss"] == plain[step]["train/loss"]) is (step <= ADOPTIONS[0]), step


def test_checkpoints_hold_the_plan_and_all_before_it(runs: Runs) -> None:
    found = history(runs.process)
    state = TrainingState.open(runs.process / "checkpoints" / "step-000000015").state
    adopted = [line for line in found if line["outcome"] == "adopted"]
    assert state["noise_plan"] == found[-1]["plan"]
    assert [entry[0] for entry in state["noise_plan_history"]] == [
        0,
        *(line["adopt_step"] for line in adopted),
    ]
    assert [entry[1] for entry in state["noise_plan_history"][1:]] == [line["plan"] for line in adopted]
    # Asked before each step, and the checkpoint of step 15 is older than that question.
    assert state["refit"]["version"] == 2 and state["refit"]["seen"]["samples"] == 14 * 8
    metrics = curve(runs.process)
    for line in found:
        told = metrics[line["adopt_step"]]
        assert float(told["sched/version"]) == line["version"]
        assert [float(told["sched/beta"]), float(told["sched/omega"])] == (
            line["plan"]["clip_range"] or [0, 1]
        )
        assert float(told["sched/nelbo"]) == pytest.approx(line["metrics"]["sched/nelbo"])
    assert json.loads((runs.process / "summary.json").read_text())["goodput"]["refit_seconds"] > 0


def test_two_runs_of_one_seed_are_the_same_run(runs: Runs) -> None:
    again = runs.once("inline again", *REFIT, "refit.placement=inline")
    assert differences(again, runs.inline) == [] and history(again) == history(runs.inline)


KILLS = [
    pytest.param(
        ("0:5:step:kill", "0:7:forward:kill", "0:10:data:kill"), (), (0, 3, 6, 9), id="saves in between"
    ),
    pytest.param(
        ("0:11:data:kill",), ("checkpoint.every_steps=50",), (0, 0), id="no save before the snapshot"
    ),
]


@pytest.mark.parametrize(("faults", "overrides", "went_on"), KILLS)
def test_a_run_killed_around_a_snapshot_and_an_adoption_has_the_uninterrupted_bits(
    runs: Runs, faults: tuple[str, ...], overrides: tuple[str, ...], went_on: tuple[int, ...]
) -> None:
    """Just before the snapshot of step 5, between it and the adoption at 9, and right after that."""
    job = runs.job(f"killed {len(faults)} times", *REFIT, *PROCESS, *overrides)
    job = replace(job, overrides=tuple(dict.fromkeys(job.overrides)))
    for fault in faults:
        kill_by_fault(job, fault)
    finish(job)
    assert tuple(starts(job.folder)) == went_on
    assert differences(job.folder, runs.process) == []
    assert history(job.folder) == history(runs.process)
    for step in SNAPSHOTS:
        assert schedule(job.folder, step) == schedule(runs.process, step)
    replayed = [
        event["replayed"] for event in read_events(job.folder / "metrics.jsonl") if event["event"] == "refit"
    ]
    assert replayed.count(True) == 1


def test_a_run_begun_anew_with_other_settings_uses_nothing_of_the_attempt_before(runs: Runs) -> None:
    """Its first attempt had an adoption, and the snapshot of a re-fit at work, but no checkpoint yet."""
    settings = (*REFIT, *PROCESS, "checkpoint.every_steps=50")
    kill_by_fault(runs.job("begun otherwise", *settings, "optim.lr=0.02"), "0:11:data:kill")
    job = runs.job("begun otherwise", *settings)
    other = history(job.folder)
    assert other[0]["outcome"] == "adopted"
    finish(job)
    assert starts(job.folder) == [0, 0]
    assert differences(job.folder, runs.process) == [] and history(job.folder) == history(runs.process)
    for step in SNAPSHOTS:
        assert schedule(job.folder, step) == schedule(runs.process, step)
    assert not any(
        event["replayed"] for event in read_events(job.folder / "metrics.jsonl") if event["event"] == "refit"
    )
    assert "optim.lr: 0.02 -> 0.003" in console(job)
    # What was found then is still there to be looked at.
    aside = job.folder / "refit-before-attempt-2"
    assert [json.loads(line) for line in (aside / "history.jsonl").read_text().splitlines()] == other
    assert (aside / "step-000000005" / "report.json").exists() and not (aside / "snapshots").exists()


FAULTS = {
    2: "killed",
    4: "missing",
    6: "torn schedule",
    8: "stale schedule",
    10: "nothing",
    12: "damaged snapshot",
}
TOLD = {
    2: ("failed", "its process was ended by SIGKILL"),
    4: ("failed", "its process ended with 1: "),
    6: ("rejected", "is no schedule"),
    8: ("rejected", "a schedule of another re-fit: "),
    10: ("failed", "its process ended and left no schedule"),
    12: ("failed", "its process ended with 7: error: "),
}


def faulty(runs: Runs, name: str, faults: dict[int, str], *overrides: str) -> Job:
    """A run of which each re-fit meets a fault."""
    start = runs.folder / "faulty start"
    start.mkdir(exist_ok=True)
    (start / "sitecustomize.py").write_text(FAULTY_START)
    stale = step_folder(runs.inline, SNAPSHOTS[0]) / "schedule.json"
    job = runs.job(
        name,
        "refit.mode=clip",
        *overrides,
        PYTHONPATH=str(start),
        BDTRAIN_TEST_FAULTS=json.dumps(faults),
        BDTRAIN_TEST_STALE=str(stale),
    )
    return replace(job, environment={key: value for key, value in job.environment.items() if key != FORK})


def test_a_run_of_which_every_re_fit_fails_learns_what_one_without_them_does(runs: Runs) -> None:
    job = faulty(
        runs,
        "every re-fit fails",
        FAULTS,
        "refit.placement=process",
        "refit.wait=true",
        "refit.deadline_s=120",
        "refit.every_tokens=512",
        "refit.lag_steps=1",
        # None is begun at step 14.
        "train.steps=14",
    )
    finish(job)
    plain, ours = learned(runs.off), learned(job.folder)
    for step in range(14):
        assert ours.get(step) == plain.get(step), step
    assert {line["snapshot_step"]: line["outcome"] for line in history(job.folder)} == {
        step: outcome for step, (outcome, _) in TOLD.items()
    }
    said = console(job)
    for line in history(job.folder):
        step = line["snapshot_step"]
        assert TOLD[step][1] in line["reason"], line
        assert f"re-fit of step {step}: {line['outcome']}: {line['reason']}" in said
        assert line["version"] == 0 and line["adopt_step"] == step + 1
    assert said.count("warning: 3 re-fits in a row had no result") == 1
    assert last_metric(job.folder, "fault/refits_failed") == len(FAULTS)
    state = TrainingState.open(job.folder / "checkpoints" / "step-000000012").state
    assert state["noise_plan_history"] == [[0, state["noise_plan"]]]
    assert state["refit"]["counts"] == {"failed": 3, "rejected": 2} and state["refit"]["version"] == 0
    told = [event for event in read_events(job.folder / "metrics.jsonl") if event["event"] == "refit"]
    assert [event["outcome"] for event in told] == [outcome for outcome, _ in TOLD.values()]


def test_a_child_that_is_stopped_for_ever_costs_no_more_than_the_deadline(runs: Runs) -> None:
    job = faulty(
        runs,
        "stopped for ever",
        {5: "stopped", 10: "stopped"},
        *PROCESS[:2],
        "refit.deadline_s=0.5",
        "refit.every_tokens=1280",
        "refit.lag_steps=1",
    )
    finish(job)
    assert outcomes(job.folder) == {5: "late", 10: "late"}
    assert learned(job.folder) == learned(runs.off)
    assert last_metric(job.folder, "fault/refits_late") == 2
    assert last_metric(job.folder, "fault/refits_failed") == 0
    assert _children_of(job.folder) == [], "a stopped child outlives the run"


def test_a_run_that_is_asked_to_stop_while_it_waits_saves_and_goes_on_with_the_same_bits(runs: Runs) -> None:
    job = faulty(runs, "asked to stop", {SNAPSHOTS[0]: "stopped"}, *REFIT, *PROCESS)
    with Attempt(job) as attempt:
        child = lambda: [pid for pid in _children_of(job.folder) if _state(pid) == "T"]  # noqa: E731
        wait_for(child, "stopped child")
        wait_for(lambda: reported_step(job.folder) == ADOPTIONS[0], "last step before the adoption")
        os.kill(attempt.ranks[0].pid, signal.SIGTERM)
        assert attempt.wait(60) == [0], attempt.output()
    left = json.loads((job.folder / "EXIT.json").read_text())
    assert (left["reason"], left["resumable"], left["step"]) == ("SIGTERM", True, ADOPTIONS[0])
    assert _children_of(job.folder) == [] and not (job.folder / "refit" / "history.jsonl").exists()
    finish(runs.job("asked to stop", *REFIT, *PROCESS))
    assert starts(job.folder) == [0, ADOPTIONS[0]]
    assert differences(job.folder, runs.process) == [] and history(job.folder) == history(runs.process)


def _children_of(run: Path) -> list[int]:
    """Processes of re-fits of a run; a forked one has the words of its nursery and is not among them."""
    wanted = os.fsencode(f"--run\0{run}\0")
    return [
        int(path.parent.name) for path in Path("/proc").glob("[0-9]*/cmdline") if wanted in _content(path)
    ]


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_a_re_fit_of_a_kept_snapshot_writes_the_same_schedule_again(runs: Runs) -> None:
    copy = runs.folder / "after the fact"
    shutil.copytree(runs.process, copy)
    before = (step_folder(copy, 10) / "schedule.json").read_bytes()
    (step_folder(copy, 10) / "schedule.json").unlink()
    command = runs.refit("--run", copy, "--step", 10, log="after the fact.log")
    assert command.wait() == 0, (runs.folder / "after the fact.log").read_text()[-2000:]
    assert (step_folder(copy, 10) / "schedule.json").read_bytes() == before


def test_a_watcher_of_the_run_serves_it_in_time(runs: Runs) -> None:
    # Each attempt stops itself after a snapshot and goes on when the watcher has answered.
    stops = ";".join(f"0:{step + 2}:step:stop" for step in SNAPSHOTS)
    job = runs.job("watched", *REFIT, "refit.placement=external", BDTRAIN_FAULT=stops)
    log = "watcher.log"
    watcher = runs.refit("--run", job.folder, "--watch", log=log)
    with Attempt(job) as attempt:
        for step in SNAPSHOTS:
            answer = step_folder(job.folder, step) / "schedule.json"
            wait_for(answer.exists, f"schedule of step {step}: {(runs.folder / log).read_text()[-1000:]}")
            wait_for(lambda: _state(attempt.ranks[0].pid) == "T", "stop of the trainer")
            os.kill(attempt.ranks[0].pid, signal.SIGCONT)
        # Counted from its start, and each of the two answers had a time of its own.
        assert attempt.wait(360) == [0], attempt.output()
    assert watcher.wait() == 0
    assert history(job.folder) == history(runs.process)
    assert learned(job.folder) == learned(runs.process)
    # Its placement was nobody's to wait for: the third one came too late for the run, and was made.
    assert (step_folder(job.folder, 15) / "schedule.json").exists()


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_two_re_fits_at_once_are_one_and_its_result_is_used(runs: Runs) -> None:
    """The first is somebody else's, who holds the lock; the trainer's own child is refused."""
    job = runs.job("two at once", *REFIT, *PROCESS, f"train.steps={ADOPTIONS[0] + 1}")
    results = step_folder(job.folder, 5)
    aside, log = runs.folder / "aside", results / "log.txt"
    with Attempt(job) as attempt, contextlib.ExitStack() as stack:
        # The run makes its folder itself; its first steps take longer than this.
        wait_for((job.folder / "run.json").exists, "run folder")
        results.mkdir(parents=True)
        stack.enter_context(only_one(results))
        wait_for(lambda: log.exists() and "another re-fit is at work" in log.read_text(), "refusal")
        snapshot = job.folder / "refit" / "snapshots" / "step-000000005"
        first = runs.refit("--checkpoint", snapshot, "--out", aside, log="first.log")
        assert first.wait() == 0
        assert not (results / "schedule.json").exists() and attempt.codes() == [None]
        for name in ("report.json", "schedule.json"):
            shutil.copy(aside / name, results / f".{name}")
            (results / f".{name}").rename(results / name)
        assert attempt.wait(120) == [0], attempt.output()
    assert history(job.folder) == history(runs.process)[:1]


CLOSE = ("train/loss", "train/grad_norm", "val/nelbo")


@pytest.mark.parametrize(
    ("layout", "placement"),
    [("tp2", "process"), ("pp2", "process"), ("dp2 zero2", "process"), ("dp2 zero2", "inline")],
)
def test_every_layout_fits_the_plan_of_one_process_and_takes_it_at_the_same_step(
    runs: Runs, layout: str, placement: str
) -> None:
    where = PROCESS if placement == "process" else ("refit.placement=inline",)
    run = runs.once(f"{layout} {placement}", *REFIT, *where, layout=layout)
    reference = runs.process
    for ours, theirs in zip(history(run), history(reference), strict=True):
        for name in ("snapshot_step", "adopt_step", "outcome", "version", "plan"):
            assert ours[name] == theirs[name], name
        for name, value in theirs["metrics"].items():
            assert ours["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    mine, other = learned(run), learned(reference)
    assert mine.keys() == other.keys()
    for step, values in other.items():
        for name in CLOSE:
            if name in values:
                assert float(mine[step][name]) == pytest.approx(float(values[name]), rel=1e-5), (step, name)
        # The noise is the same, so the shares of masked tokens are: a rank with another plan would tell.
        assert mine[step].get("train/masked_share") == values.get("train/masked_share"), step
