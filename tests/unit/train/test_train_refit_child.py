"""The trainer's hold on a process: it starts it, never waits for it, says why it ended, and ends it."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from bdtrain.train.refit_child import LOG_FILE, RefitChild


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A program in the place of Python: ``stand_in(script)``, with the child's arguments as its own."""

    def make(script, **more):
        program = tmp_path / "program"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))
        return RefitChild(tmp_path / "run", step=40, folder=tmp_path / "results", **more)

    return make


def ended(child, limit_s=20.0):
    end = time.monotonic() + limit_s
    while child.running:
        assert time.monotonic() < end
        time.sleep(0.005)
    return child.problem()


def test_it_is_told_the_snapshot_and_where_the_package_is(stand_in, tmp_path):
    child = stand_in('echo "$@"; echo "$RANK $SECRET [$CUDA_VISIBLE_DEVICES] $PYTHONPATH" >&2')
    assert not child.running and child.problem() == ""
    child.start({"RANK": "0", "SECRET": "kept", "PATH": os.environ["PATH"]})
    assert ended(child) == ""
    words, variables = (tmp_path / "results" / LOG_FILE).read_text().splitlines()
    assert words == f"-P -m bdtrain.refit --run {tmp_path / 'run'} --step 40 --nice 10"
    assert variables == f" kept [] {Path(__file__).resolve().parents[3]}"


@pytest.mark.parametrize(
    ("variables", "seen"),
    [
        ({}, "5"),
        ({"CUDA_VISIBLE_DEVICES": "7,6,5,4,3,2"}, "2"),
        ({"CUDA_VISIBLE_DEVICES": " GPU-a, GPU-b,GPU-c ,MIG-d,4,GPU-f"}, "GPU-f"),
        # The deepspeed launcher shows what training uses; the others have the machine's numbers.
        ({"CUDA_VISIBLE_DEVICES": "0,1,2", "LOCAL_SIZE": "3", "CROSS_SIZE": "1"}, "5"),
    ],
)
def test_it_sees_the_gpus_that_are_left_to_it_and_no_other(stand_in, tmp_path, variables, seen):
    child = stand_in('echo "$@"; echo "[$CUDA_VISIBLE_DEVICES]" >&2', reserved=5)
    child.start({"PATH": os.environ["PATH"], **variables})
    assert ended(child) == ""
    words, shown = (tmp_path / "results" / LOG_FILE).read_text().splitlines()
    assert words.endswith("--nice 10 --device cuda") and shown == f"[{seen}]"


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (
            "echo working; echo 'error: no room' >&2; echo bye; exit 7",
            "its process ended with 7: error: no room",
        ),
        ("echo one; echo two; echo; exit 1", "its process ended with 1: two"),
        ("exit 3", "its process ended with 3: it said nothing"),
        ("printf 'error: %1000s' x; exit 8", "its process ended with 8: error: "),
        ("printf '\\377\\376'; exit 8", "its process ended with 8: "),
        ("kill -9 $$", "its process was ended by SIGKILL"),
        ("kill -15 $$", "its process was ended by SIGTERM"),
    ],
)
def test_it_says_why_it_ended(stand_in, script, said):
    child = stand_in(script)
    child.start(os.environ)
    told = ended(child)
    assert told.startswith(said) and len(told) < 400 and "\n" not in told


def test_a_program_that_is_not_there_is_a_problem_and_no_error(stand_in, tmp_path, monkeypatch):
    child = stand_in("exit 0")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "gone"))
    child.start(os.environ)
    assert not child.running and child.problem() == "it could not be started: No such file or directory"
    child.kill()


def test_a_folder_that_cannot_be_made_is_a_problem_and_no_error(stand_in, tmp_path):
    child = stand_in("exit 0")
    (tmp_path / "results").write_text("a file")
    child.start(os.environ)
    assert not child.running and "could not be started" in child.problem()


@pytest.mark.parametrize("stopped", [False, True])
def test_its_end_takes_along_all_that_it_started_even_when_it_is_stopped(stand_in, tmp_path, stopped):
    child = stand_in(f"sleep 60 & echo $! > {tmp_path}/pid; {'kill -STOP $$' if stopped else 'wait'}")
    child.start(os.environ)
    end = time.monotonic() + 20
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().strip():
        assert time.monotonic() < end
        time.sleep(0.005)
    grandchild = int((tmp_path / "pid").read_text())
    assert child.running
    child.kill()
    assert not child.running and child.problem() == "its process was ended by SIGKILL"
    state = ""
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{grandchild}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            break
        if state in "ZX":
            break
        time.sleep(0.005)
    else:
        os.kill(grandchild, signal.SIGKILL)
        pytest.fail("a process of the re-fit outlives it")


def test_an_end_after_its_end_does_nothing(stand_in):
    child = stand_in("exit 0")
    child.kill()
    child.start(os.environ)
    ended(child)
    child.kill()
    assert child.problem() == ""


def test_its_log_is_of_its_own_and_not_of_the_attempt_before(stand_in, tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / LOG_FILE).write_text("error: of yesterday\n")
    child = stand_in("exit 3")
    child.start(os.environ)
    assert ended(child) == "its process ended with 3: it said nothing"
