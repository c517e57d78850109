"""A run that is asked to stop saves, says so, leaves nobody behind and can be continued to the same bits."""

import json
import os
import random
import signal
import sys
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

from kill_trials import Attempt, Job, differences, finish, reported_step
from launched import MARK, Launched, free_port, listens_for_sigterm, processes_with, wait_until
from nursery import Nursery

from bdtrain.checkpoint.folders import find_checkpoints
from bdtrain.tracking.jsonl import read_lines

STEPS = 24
OVERRIDES = (
    f"train.steps={STEPS}",
    "validation.every_steps=4",
    "validation.sequences=4",
    "validation.sample_tokens=4",
)
LIMIT_S = 600.0


@pytest.fixture(scope="module")
def nursery():
    with Nursery() as found:
        yield found


@pytest.fixture(scope="module")
def reference(nursery, tmp_path_factory):
    """Folders of runs that nobody interrupted, by number of ranks."""
    root = tmp_path_factory.mktemp("reference")
    folders = {}
    for world_size in (1, 2):
        job = Job(
            root / f"run-{world_size}", root / f"scratch-{world_size}", world_size, OVERRIDES, nursery=nursery
        )
        finish(job, limit_s=LIMIT_S)
        folders[world_size] = job.folder
    return folders


def slow_from(step):
    """Faults that make every later step last a second, so that a signal meets it."""
    return ";".join(f"0:{number}:forward:slow" for number in range(step, STEPS + 1))


def check_stopped(folder, reason, steps):
    """The run says that it can go on, from a step in ``steps``, and has a whole checkpoint of just that step.

    Returns:
        The step.
    """
    left = json.loads((folder / "EXIT.json").read_text())
    assert (left["reason"], left["resumable"], left["exit_code"]) == (reason, True, 0)
    assert left["step"] in steps, left
    found = find_checkpoints(folder / "checkpoints")
    assert found.rejected == []
    assert int(found.newest.name.removeprefix("step-")) == left["step"]
    last = [line for _, line in read_lines(folder / "metrics.jsonl") if "event" in line][-1]
    assert (last["event"], last["reason"], last["step"]) == ("stop", reason, left["step"])
    return left["step"]


def check_goes_on(job, reference):
    """The same command finishes the run, which is then that of the reference, bit for bit."""
    finish(job, limit_s=LIMIT_S)
    assert differences(job.folder, reference) == []
    assert json.loads((job.folder / "EXIT.json").read_text())["reason"] == "finished"


# --- through the launchers


def start(launcher, job, faults):
    """The job under a launcher with two ranks; see ``Launched``."""
    port = ("--master_port", free_port())
    front = {
        "deepspeed": ("deepspeed", "--num_gpus", 2, *port),
        "torchrun": ("torchrun", "--nproc_per_node", 2, "--master_addr", "127.0.0.1", *port),
    }[launcher]
    number = len(list(job.scratch.glob("launch-*")))
    return Launched([*front, *job.command()], job.scratch / f"launch-{number}.log", {"BDTRAIN_FAULT": faults})


def stop_launched(launcher, job, step, *, whole_group=False):
    """SIGTERM to a launcher once a step is reported; its exit code, when nothing is left of it.

    Returns:
        Exit code, seconds until the last process was gone, output.
    """
    with start(launcher, job, slow_from(step + 1)) as run:
        there = wait_until(
            lambda: reported_step(job.folder) >= step or run.process.poll() is not None, LIMIT_S
        )
        assert there and run.process.poll() is None, run.text()[-3000:]
        if whole_group:
            os.killpg(run.process.pid, signal.SIGTERM)
        else:
            run.process.send_signal(signal.SIGTERM)
        code = run.wait(60)
        assert wait_until(lambda: not run.processes(), 60), run.processes()
        return code, run.text()


def interrupt(launcher, job, reference, seed, *, code, reason, whole_group=False):
    """One run: SIGTERM at a random step, what it said, and its end without a launcher."""
    step = random.Random(seed).randint(2, STEPS - 6)
    found, text = stop_launched(launcher, job, step, whole_group=whole_group)
    assert found == code, text[-3000:]
    stopped = check_stopped(job.folder, reason, range(step, STEPS))
    said = f"stopped by {reason} at step {stopped}, saved in {job.folder}/checkpoints/step-{stopped:09d}"
    assert said in text, text[-3000:]
    print(f"{launcher}, seed {seed}: SIGTERM after step {step}, saved step {stopped}, exit code {found}")
    check_goes_on(job, reference)


def test_sigterm_to_the_deepspeed_command_saves_and_leaves_no_orphan(nursery, tmp_path, reference):
    job = Job(tmp_path / "run", tmp_path / "scratch", 2, OVERRIDES, nursery=nursery)
    # The command dies of the signal and tells nobody: the ranks notice that it is gone.
    interrupt("deepspeed", job, reference[2], 1, code=-signal.SIGTERM, reason="launcher gone")


def test_sigterm_to_torchrun_saves_and_leaves_no_orphan(nursery, tmp_path, reference):
    job = Job(tmp_path / "run", tmp_path / "scratch", 2, OVERRIDES, nursery=nursery)
    # Torchrun passes it on, waits for the ranks and calls it a failure.
    interrupt("torchrun", job, reference[2], 2, code=1, reason="SIGTERM")


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(10, 13))
def test_sigterm_to_the_deepspeed_command_at_any_step_with_a_shipping_process(
    nursery, tmp_path, reference, seed
):
    overrides = (*OVERRIDES, "tracking.mlflow=true")
    job = Job(tmp_path / "run", tmp_path / "scratch", 2, overrides, nursery=nursery)
    interrupt("deepspeed", job, reference[2], seed, code=-signal.SIGTERM, reason="launcher gone")


@pytest.mark.soak
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_sigterm_to_every_process_of_a_launch_saves_once(nursery, tmp_path, reference, launcher):
    job = Job(tmp_path / "run", tmp_path / "scratch", 2, OVERRIDES, nursery=nursery)
    code = {"deepspeed": -signal.SIGTERM, "torchrun": 1}[launcher]
    interrupt(launcher, job, reference[2], 20, code=code, reason="SIGTERM", whole_group=True)


@pytest.mark.soak
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_sigterm_to_a_launcher_before_the_first_step_saves_that_step(nursery, tmp_path, reference, launcher):
    job = Job(tmp_path / "run", tmp_path / "scratch", 2, OVERRIDES, nursery=nursery)
    with start(launcher, job, slow_from(2)) as run:

        def ranks():
            return [
                pid
                for pid, command in run.processes().items()
                if "launchers/pretrain.py" in command
                and command.count("-m") == 0
                and listens_for_sigterm(pid)
                and not any(name in command for name in ("torchrun", "bin/deepspeed", "launcher.launch"))
            ]

        assert wait_until(lambda: len(ranks()) == 2, LIMIT_S), run.text()[-3000:]
        run.process.send_signal(signal.SIGTERM)
        code = run.wait(90)
        assert wait_until(lambda: not run.processes(), 90), run.processes()
        print(launcher, code)
    reason = {"deepspeed": "launcher gone", "torchrun": "SIGTERM"}[launcher]
    check_stopped(job.folder, reason, [1])
    check_goes_on(job, reference[2])


# --- without a launcher


def stop_ranks(job, send, *, faults):
    """Start the ranks, let ``send`` signal some of them, and see all of them end well; nothing is left."""
    mark = uuid.uuid4().hex
    marked = replace(job, environment={MARK: mark, "BDTRAIN_FAULT": faults})
    with Attempt(marked) as attempt:
        send(attempt)
        codes = attempt.wait(LIMIT_S)
        assert codes == [0] * job.world_size, attempt.output()
        assert wait_until(lambda: not processes_with(mark), 10), processes_with(mark)


def at_step(step, number, *ranks):
    """Signal ranks once a step is reported."""

    def send(attempt):
        assert wait_until(
            lambda: reported_step(attempt.job.folder) >= step or None not in attempt.codes(), LIMIT_S
        )
        for rank in ranks:
            os.kill(attempt.ranks[rank].pid, number)

    return send


def test_sigusr1_to_one_rank_stops_all(nursery, tmp_path, reference):
    job = Job(tmp_path / "run", tmp_path / "scratch", 2, OVERRIDES, nursery=nursery)
    stop_ranks(job, at_step(5, signal.SIGUSR1, 1), faults=slow_from(6))
    check_stopped(job.folder, "SIGUSR1", range(5, 9))
    check_goes_on(job, reference[2])


def test_sigterm_to_a_single_process_ends_the_shipping_process_too(nursery, tmp_path, reference):
    job = Job(
        tmp_path / "run", tmp_path / "scratch", 1, (*OVERRIDES, "tracking.mlflow=true"), nursery=nursery
    )
    seen = []

    def send(attempt):
        mark = attempt.job.environment[MARK]
        at_step(3, 0, 0)(attempt)  # signal 0 sends nothing
        assert wait_until(
            lambda: any("bdtrain.tracking.ship" in command for command in processes_with(mark).values()), 60
        )
        seen.extend(processes_with(mark).values())
        os.kill(attempt.ranks[0].pid, signal.SIGTERM)

    stop_ranks(job, send, faults=slow_from(4))
    # Only what a rank starts is found by its environment: a forked rank shows that of its parent.
    assert len(seen) == 1, seen
    check_stopped(job.folder, "SIGTERM", range(3, 12))
    check_goes_on(replace(job, overrides=OVERRIDES), reference[1])


def test_sigterm_while_the_model_is_built_saves_the_first_step(nursery, tmp_path, reference):
    job = Job(tmp_path / "run", tmp_path / "scratch", 2, OVERRIDES, nursery=nursery)

    def send(attempt):
        pids = [rank.pid for rank in attempt.ranks]
        assert wait_until(lambda: all(map(listens_for_sigterm, pids)), 60)
        for pid in pids:
            os.kill(pid, signal.SIGTERM)
        assert not (attempt.job.folder / "metrics.jsonl").exists(), "too late: the run had begun"

    stop_ranks(job, send, faults="")
    assert check_stopped(job.folder, "SIGTERM", [1]) == 1
    check_goes_on(job, reference[2])


def test_sigterm_before_anything_is_listening_leaves_nothing(tmp_path):
    job = Job(tmp_path / "run", tmp_path / "scratch")
    with Attempt(job) as attempt:
        assert not listens_for_sigterm(attempt.ranks[0].pid)
        os.kill(attempt.ranks[0].pid, signal.SIGTERM)
        assert attempt.wait(60) == [-signal.SIGTERM]
    assert not job.folder.exists()


@pytest.mark.parametrize(
    ("fault", "step"),
    [
        # The wish to stop travels with the counts of the next step, which is taken before the run is left.
        ("0:0:validate:term", 1),
        ("1:8:validate:term", 9),
        ("1:6:save:term", 7),
    ],
)
def test_sigterm_during_validation_or_a_save_stops_after_the_next_step(
    nursery, tmp_path, reference, fault, step
):
    overrides = (*OVERRIDES, "checkpoint.every_steps=6")
    job = Job(tmp_path / "run", tmp_path / "scratch", 2, overrides, nursery=nursery)
    stop_ranks(job, lambda attempt: None, faults=fault)
    check_stopped(job.folder, "SIGTERM", [step])
    check_goes_on(job, reference[2])


def test_sigterm_during_the_last_validation_ends_a_finished_run(nursery, tmp_path, reference):
    job = Job(tmp_path / "run", tmp_path / "scratch", 2, OVERRIDES, nursery=nursery)
    stop_ranks(job, lambda attempt: None, faults=f"0:{STEPS}:validate:term")
    left = json.loads((job.folder / "EXIT.json").read_text())
    assert (left["reason"], left["step"], left["resumable"]) == ("finished", STEPS, False)
    assert differences(job.folder, reference[2]) == []
