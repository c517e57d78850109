"""A save that is killed, refused or damaged afterwards: no acknowledged checkpoint is lost, none is wrong.

The runs are real trainers of two ranks, forked from a process that has imported everything. What a
checkpoint must hold is known from a run that nobody disturbed: two runs of one configuration have the same
bits, so the files of a step have the same SHA-256.
"""

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

from kill_trials import Attempt, Job, differences, finish
from nursery import Nursery

from bdtrain.checkpoint.folders import find_checkpoints
from bdtrain.tracking.jsonl import read_lines

ROOT = Path(__file__).resolve().parents[2]
STEPS = 14
QUIET = ("validation.at_start=false", "validation.sequences=4", "validation.sample_tokens=4")
SMALL = (*QUIET, "checkpoint.every_steps=1", "checkpoint.keep_last=100")
FEW = (*SMALL, "train.steps=9")
# 25 MB of state: a save takes long enough to be hit anywhere.
LARGE = (*SMALL, f"train.steps={STEPS}", "model.hidden_size=256", "checkpoint.keep_last=3")
LIMIT_S = 600.0


@pytest.fixture(scope="module")
def nursery():
    with Nursery() as found:
        yield found


def events(folder, name=None):
    """Events of the metrics file, all or those of a name."""
    lines = [line for _, line in read_lines(folder / "metrics.jsonl") if "event" in line]
    return [line for line in lines if name in (None, line["event"])]


def digests(folder):
    """SHA-256 of the tensor files of a step's folder, and the counters beside them."""
    tensors = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")
    }
    state = json.loads((folder / "state.json").read_text())
    progress = {
        name: value for name, value in state["progress"].items() if name not in ("train_seconds", "window")
    }
    return tensors, progress, state["adam_step"], state["lr"], state["data_fingerprint"]


def newest_step(folder):
    """Step of the newest whole checkpoint, 0 for none, and what a new attempt passes over."""
    uid = json.loads((folder / "run.json").read_text())["run_uid"]
    found = find_checkpoints(folder / "checkpoints", run_uid=uid)
    return (0 if found.newest is None else int(found.newest.name.removeprefix("step-"))), found.rejected


def wait_for(condition, attempt, what):
    """Wait for a moment of a run that must not end before.

    Raises:
        AssertionError: if it ends, or the moment does not come.
    """
    while not condition():
        assert None in attempt.codes(), f"ended before {what}: {attempt.codes()}\n{attempt.output()}"
        assert attempt.age_s < LIMIT_S, f"{what} did not come\n{attempt.output()}"
        time.sleep(0.002)


# --- kill -9 inside a save


@pytest.fixture(scope="module")
def undisturbed(nursery, tmp_path_factory):
    """The run of the kill trials without kills: folder, digests by step, how long saves take."""
    root = tmp_path_factory.mktemp("undisturbed")
    job = Job(root / "run", root / "scratch", 2, (*LARGE, "checkpoint.keep_last=100"), nursery=nursery)
    finish(job, limit_s=LIMIT_S)
    steps = {int(path.name[5:]): digests(path) for path in (job.folder / "checkpoints").glob("step-*")}
    assert sorted(steps) == list(range(1, STEPS + 1))
    reports = [line for _, line in read_lines(job.folder / "metrics.jsonl")]
    seconds = sorted(line["ckpt/seconds"] for line in reports if "ckpt/seconds" in line)
    shutil.rmtree(job.folder / "checkpoints")
    yield job.folder, steps, seconds[len(seconds) // 2]
    shutil.rmtree(root)


def phase_of(folder, step):
    """How far a killed save had come, by what it left."""
    if (folder / "checkpoints" / f"step-{step:09d}").exists():
        return "renamed or later"
    temporary = folder / "checkpoints" / f".tmp-step-{step:09d}"
    if not temporary.exists():
        return "not begun"
    names = {path.name for path in temporary.iterdir()}
    if "MANIFEST.json" in names:
        return "manifest written"
    if "state.json" in names:
        return "state written"
    return f"{sum(name.endswith('.json') for name in names)} of 2 ranks done"


def kill_inside_a_save(job, draw, step, typical_s):
    """One trial: which ranks were killed, how far the save of the step was, what a survivor did."""
    before = len(events(job.folder, "start")) if job.folder.exists() else 0
    temporary = job.folder / "checkpoints" / f".tmp-step-{step:09d}"
    victims = draw.choice([(0, 1), (1, 0), (0,), (1,)])
    delay = draw.uniform(0.0, 1.3 * typical_s)
    with Attempt(job) as attempt:
        # What an earlier attempt left is gone when this one has said that it started.
        wait_for(lambda: len(events(job.folder, "start")) > before, attempt, "the start")
        # A save that this process slept through is over: then the kill comes some time after it.
        final = job.folder / "checkpoints" / f"step-{step:09d}"
        wait_for(lambda: temporary.exists() or final.exists(), attempt, f"the save of step {step}")
        if not final.exists():
            time.sleep(delay)
        for rank in victims:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(attempt.ranks[rank].pid, signal.SIGKILL)
        killed = time.monotonic()
        reached = phase_of(job.folder, step)
        codes = attempt.wait(attempt.age_s + 60)
        survived_s = time.monotonic() - killed
    assert all(codes[rank] == -signal.SIGKILL for rank in victims), codes
    return victims, reached, codes, survived_s


def five_kills(nursery, tmp_path, undisturbed, seed):
    """Five kills of one run, each inside a save, then the end of the run.

    Returns:
        How far the saves had come, and the exit codes of survivors with the time they took to leave.
    """
    reference, steps, typical_s = undisturbed
    draw = random.Random(seed)
    job = Job(tmp_path / "run", tmp_path / "scratch", 2, LARGE, nursery=nursery)
    acknowledged, newest, reached, survivors = 0, 0, [], []
    for _ in range(5):
        target = min(newest + draw.randint(1, 2), STEPS - 3)
        victims, phase, codes, seconds = kill_inside_a_save(job, draw, target, typical_s)
        reached.append(phase)
        survivors += [(codes[rank], round(seconds, 1)) for rank in range(2) if rank not in victims]
        acknowledged = max([acknowledged, *(line["step"] for line in events(job.folder, "checkpoint"))])
        newest, rejected = newest_step(job.folder)
        assert rejected == []
        assert newest >= acknowledged, (
            f"lost: step {acknowledged} was said to be saved, step {newest} is there"
        )
        for path in (job.folder / "checkpoints").glob("step-*"):
            step = int(path.name.removeprefix("step-"))
            assert digests(path) == steps[step], f"wrong: step {step} is not what was saved"
    finish(job, limit_s=LIMIT_S)
    assert differences(job.folder, reference) == []
    assert digests(job.folder / "checkpoints" / f"step-{STEPS:09d}") == steps[STEPS]
    assert not list((job.folder / "checkpoints").glob(".tmp-*"))
    # A survivor leaves by itself, with an error, long before a launcher would kill it.
    assert all(code == 1 and seconds < 30 for code, seconds in survivors), survivors
    return reached, survivors


def test_five_kills_inside_saves_lose_nothing_and_spoil_nothing(nursery, tmp_path, undisturbed):
    reached, survivors = five_kills(nursery, tmp_path, undisturbed, seed=7)
    print(Counter(reached), survivors)


@pytest.mark.soak
def test_thirty_kills_inside_saves_lose_nothing_and_spoil_nothing(nursery, tmp_path, undisturbed):
    reached, survivors = [], []
    for seed in range(6):
        folder = tmp_path / f"seed-{seed}"
        phases, left = five_kills(nursery, folder, undisturbed, seed)
        reached += phases
        survivors += left
        shutil.rmtree(folder)
    print(f"30 kills, 0 lost, 0 wrong; the saves were at {dict(Counter(reached))}; survivors: {survivors}")
    assert len(reached) == 30
    assert len(set(reached)) >= 3, "the kills did not hit different parts of a save"


# --- a death at every action of one save


def crash_everywhere(tmp_path, rank, how):
    """The trials of ``crash_trials.py`` for one rank, as it told them."""
    worker = Path(__file__).with_name("crash_trials.py")
    done = subprocess.run(
        [sys.executable, worker, tmp_path, str(rank), how],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_crashes(results, rank):
    """Old or new, whole, never neither; the kinds of actions that were hit."""
    *crashes, last = results
    assert last["codes"] == [0, 0]
    for number, crash in enumerate(crashes):
        assert crash["codes"][rank] == -signal.SIGKILL, crash
        assert crash["codes"][1 - rank] == 1, crash
        # The peer noticed by itself; it did not take the step for saved.
        assert "Connection" in crash["survivor"], crash
        assert crash["rejected"] == [], crash
        assert crash["wrong"] == [], crash
        assert crash["acknowledged"] == crash["good"], crash
        assert crash["newest"] in (crash["good"], crash["good"] + 1), crash
        # Nothing piles up: at most what this one trial left.
        assert len(crash["left"]) <= 1, crash
        assert number == crash["at"]
    return Counter(crash["action"] for crash in crashes), {
        crash["action"] for crash in crashes if crash["newest"] > crash["good"]
    }


@pytest.mark.parametrize("how", ["whole", pytest.param("half", marks=pytest.mark.soak)])
def test_death_of_the_second_rank_at_any_action_leaves_the_older_checkpoint(tmp_path, how):
    actions, replaced = check_crashes(crash_everywhere(tmp_path, 1, how), 1)
    # Header, 4 kinds of 6 cut parameters, the index; both files are synced. All else is rank 0's.
    assert actions == {"write": 1 + 4 * 6 + 1, "fsync": 2}
    assert replaced == set()


@pytest.mark.soak
@pytest.mark.parametrize("how", ["whole", "half"])
def test_death_of_the_first_rank_at_any_action_leaves_the_older_or_the_new_checkpoint(tmp_path, how):
    actions, replaced = check_crashes(crash_everywhere(tmp_path, 0, how), 0)
    # All 8 parameters, then state, configuration and manifest; 5 files and 2 folders are synced.
    assert actions == {"remove": 1, "make": 1, "write": 1 + 4 * 8 + 1 + 3, "fsync": 7, "rename": 1}
    # Only the folder above was not synced yet.
    assert replaced == {"fsync"}


# --- damage, a second writer


def flip_bit(folder):
    path = folder / "rank-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(folder):
    os.truncate(folder / "rank-00000.safetensors", 1000)


def lose_file(folder):
    (folder / "rank-00001.json").unlink()


def lose_manifest(folder):
    (folder / "MANIFEST.json").unlink()


@pytest.fixture(scope="module")
def plain(nursery, tmp_path_factory):
    """A finished run of 9 steps, every one of them saved."""
    root = tmp_path_factory.mktemp("plain")
    job = Job(root / "run", root / "scratch", 2, FEW, nursery=nursery)
    finish(job, limit_s=LIMIT_S)
    return job.folder


def test_damaged_checkpoints_are_named_and_passed_over_and_a_second_writer_is_refused(
    nursery, tmp_path, plain
):
    job = Job(tmp_path / "run", tmp_path / "scratch-1", 2, FEW, nursery=nursery)
    shutil.copytree(plain, job.folder)
    # As if it had been killed in step 9.
    (job.folder / "EXIT.json").unlink()
    shutil.rmtree(job.folder / "checkpoint")
    shutil.rmtree(job.folder / "checkpoints" / "step-000000009")
    checkpoints = job.folder / "checkpoints"
    for number, damage in ((8, flip_bit), (7, truncate), (6, lose_file), (5, lose_manifest)):
        damage(checkpoints / f"step-{number:09d}")

    # Stopped in step 8, so that the second writer meets it alive.
    stopped = Job(**{**vars(job), "environment": {"BDTRAIN_FAULT": "0:8:data:stop"}})
    with Attempt(stopped) as attempt:
        wait_for((checkpoints / ".damaged-step-000000007").exists, attempt, "step 7")
        wait_for((checkpoints / "step-000000007").exists, attempt, "the save of step 7")
        second = Job(job.folder, tmp_path / "scratch-2", 1, FEW, nursery=nursery)
        with Attempt(second) as other:
            assert other.wait(60) == [3]
            refusal = (other.logs / "rank-0.log").read_text()
        os.killpg(attempt.ranks[0].pid, signal.SIGCONT)
        assert attempt.wait(LIMIT_S) == [0, 0], attempt.output()
        told = (attempt.logs / "rank-0.log").read_text()
    pid = events(job.folder, "start")[-1]["pid"]
    assert refusal.startswith(f"error: {job.folder} is being written by process {pid} on "), refusal
    assert refusal.rstrip().endswith(
        "one run folder has one writer: wait for it or stop it (SIGTERM saves first), or choose another "
        "folder with run.name=... or run.folder=..."
    ), refusal
    assert refusal.count("error:") == 1
    assert "Traceback" not in refusal

    size = (plain / "checkpoints" / "step-000000007" / "rank-00000.safetensors").stat().st_size
    said = {
        8: f"{checkpoints}/step-000000008/rank-00001.safetensors: its SHA-256 differs from the manifest's; "
        "choose another checkpoint",
        7: f"{checkpoints}/step-000000007/rank-00000.safetensors has 1000 bytes, the manifest says {size}; "
        "choose another checkpoint",
        6: f"{checkpoints}/step-000000006: rank-00001.json is missing; choose another checkpoint",
        5: f"{checkpoints}/step-000000005 has no MANIFEST.json: it was never completed; choose another "
        "checkpoint",
    }
    for step, reason in said.items():
        assert f"checkpoint step-{step:09d} passed over: {reason}\n" in told, told
    assert "attempt 2 continues at step 4 from step-000000004\n" in told, told
    rejected = {int(line["folder"][5:]): line["reason"] for line in events(job.folder, "rejected_checkpoint")}
    assert rejected == said
    # The run went over the damaged steps again; what was damaged is the user's to look at.
    assert {path.name for path in checkpoints.glob(".*")} == {f".damaged-step-{s:09d}" for s in said}
    for step in range(1, 10):
        name = f"step-{step:09d}"
        assert digests(checkpoints / name) == digests(plain / "checkpoints" / name), name
    assert differences(job.folder, plain) == []


# --- a full disk


def messages(attempt):
    return [(attempt.logs / f"rank-{rank}.log").read_text() for rank in range(attempt.job.world_size)]


def test_refused_save_is_counted_and_three_in_a_row_end_the_run_which_can_be_resumed(
    nursery, tmp_path, plain
):
    job = Job(tmp_path / "run", tmp_path / "scratch-1", 2, FEW, nursery=nursery)
    # Once on the second rank, then three times in a row on the first, the second, the first.
    faults = ";".join(f"{rank}:{step}:save:enospc" for rank, step in ((1, 2), (0, 5), (1, 6), (0, 7)))
    with Attempt(Job(**{**vars(job), "environment": {"BDTRAIN_FAULT": faults}})) as attempt:
        assert attempt.wait(LIMIT_S) == [7, 7], attempt.output()
        first, second = messages(attempt)
    reason = {
        step: f"step {step} was not saved in {job.folder}/checkpoints: rank {rank}: No space left on device "
        f"(asked for by BDTRAIN_FAULT in save of step {step}); older checkpoints are untouched"
        for rank, step in ((1, 2), (0, 5), (1, 6), (0, 7))
    }
    for step in (2, 5, 6, 7):
        assert f"checkpoint failed: {reason[step]}; training goes on\n" in first, first
    end = f"error: 3 checkpoints in a row could not be written, the last one: {reason[7]}\n"
    assert end in first, first
    assert "Traceback" not in first
    assert second == ""
    counted = {
        line["step"]: line["fault/checkpoints_failed"]
        for _, line in read_lines(job.folder / "metrics.jsonl")
        if "fault/checkpoints_failed" in line
    }
    # A report is written before the save of its step.
    assert counted == {1: 0, 2: 0, 3: 1, 4: 1, 5: 1, 6: 2, 7: 3}
    assert [line["step"] for line in events(job.folder, "checkpoint_failed")] == [2, 5, 6, 7]
    left = json.loads((job.folder / "EXIT.json").read_text())
    assert (left["reason"], left["step"], left["resumable"], left["exit_code"]) == ("error", 7, True, 7)
    assert sorted(path.name for path in (job.folder / "checkpoints").iterdir()) == [
        f"step-{step:09d}" for step in (1, 3, 4)
    ]

    finish(job, limit_s=LIMIT_S)
    assert [line["step"] for line in events(job.folder, "start")] == [0, 4]
    # The count of failures is a fact of this run's disk, not of the mathematics: only it may differ.
    assert [text for text in differences(job.folder, plain) if "checkpoints_failed" not in text] == []


@contextlib.contextmanager
def small_disk(folder, mib):
    """A file system of its own; yields whether one could be mounted."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", folder], capture_output=True, check=False
    )
    try:
        yield mounted.returncode == 0
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "-l", folder], check=True)


def fill(folder):
    """Take every byte that is left."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while file.write(b"x" * size):
                    pass
    return path


def test_run_on_a_disk_that_fills_up_ends_with_advice_and_goes_on_when_there_is_room(
    nursery, tmp_path, plain
):
    few = (*FEW, "checkpoint.keep_last=2")
    with small_disk(tmp_path / "disk", 8) as mounted:
        job = Job(tmp_path / "disk" / "run", tmp_path / "scratch-1", 2, few, nursery=nursery)
        # Where nothing can be mounted, the disk says what a full one would.
        faults = "0:4:data:stop" + ("" if mounted else ";1:4:save:enospc;1:5:save:enospc;1:6:save:enospc")
        with Attempt(Job(**{**vars(job), "environment": {"BDTRAIN_FAULT": faults}})) as attempt:
            wait_for(lambda: len(events(job.folder, "checkpoint")) == 3, attempt, "the save of step 3")
            filler = fill(tmp_path / "disk") if mounted else None
            os.killpg(attempt.ranks[0].pid, signal.SIGCONT)
            codes = attempt.wait(LIMIT_S)
            first, second = messages(attempt)
        assert codes == [7, 7], (codes, first, second)
        assert "checkpoint failed: step 4 was not saved in " in first, first
        assert first.count("training goes on\n") == 3, first
        assert first.count("error:") == 1, first
        assert (
            "error: 3 checkpoints in a row could not be written, the last one: step 6 was not saved" in first
        )
        if mounted:
            assert (
                "has 0 GB free; make room, lower checkpoint.keep_last, or put run.folder on a larger disk"
                in first
            )
        assert "Traceback" not in first + second, (first, second)
        assert newest_step(job.folder) == (3, [])
        if filler is not None:
            # Too early: the disk is still full.
            with Attempt(job) as attempt:
                assert attempt.wait(LIMIT_S) == [3, 3], attempt.output()
                first, second = messages(attempt)
            assert first.endswith(
                f"\nerror: run.folder={job.folder} cannot be written: No space left on device; make room, or "
                "choose another folder with run.folder=...\n"
            ), first
            assert second == ""
            assert not list(job.folder.glob(".*"))
            filler.unlink()
        finish(job, limit_s=LIMIT_S)
        ours = [text for text in differences(job.folder, plain) if "checkpoints_failed" not in text]
        assert ours == []
        assert [line["step"] for line in events(job.folder, "start")] == [0, 3]
