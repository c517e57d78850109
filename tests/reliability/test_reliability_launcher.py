"""The deepspeed command is killed: the ranks save, nobody stays behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RANK = Path(__file__).with_name("saving_rank.py")


def processes_with(mark):
    """Processes that run and have this text in their environment."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            inherited = (entry / "environ").read_bytes()
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if mark.encode() in inherited and state not in "ZX":
            found[int(entry.name)] = command
    return found


def wait_until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


@pytest.fixture
def launched(tmp_path):
    """``deepspeed`` with two working ranks, in a session of its own; yields it and its mark."""
    mark = f"BDTRAIN_TEST_MARK={tmp_path}"
    name, _, value = mark.partition("=")
    scripts = Path(sys.executable).parent
    environment = {
        **os.environ,
        name: value,
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": str(ROOT),
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
    }
    with (tmp_path / "log").open("wb") as log:
        runner = subprocess.Popen(
            [scripts / "deepspeed", "--num_gpus", "2", RANK, tmp_path],
            env=environment,
            stdout=log,
            stderr=log,
            cwd=ROOT,
            start_new_session=True,
        )
    try:
        yield runner, mark
    finally:
        for pid in processes_with(mark):
            os.kill(pid, signal.SIGKILL)
        runner.kill()
        runner.wait()


def test_sigterm_to_the_deepspeed_command_saves_and_leaves_no_orphan(launched, tmp_path):
    runner, mark = launched
    working = [tmp_path / f"working-{rank}" for rank in range(2)]
    assert wait_until(lambda: all(path.exists() and path.read_text() for path in working), 120), (
        tmp_path / "log"
    ).read_text()
    # DeepSpeed's two: the command itself and the launcher under it.
    assert [path.read_text() for path in working] == ["2", "2"]
    assert len(processes_with(mark)) == 4

    runner.send_signal(signal.SIGTERM)
    # The command dies and tells nobody: what a shell sees, and why the watch is needed.
    assert runner.wait(timeout=30) == -signal.SIGTERM
    assert wait_until(lambda: not processes_with(mark), 60), processes_with(mark)
    assert [(tmp_path / f"saved-{rank}").read_text() for rank in range(2)] == ["launcher gone"] * 2
    left = json.loads((tmp_path / "EXIT.json").read_text())
    assert (left["reason"], left["resumable"], left["exit_code"]) == ("launcher gone", True, 0)
