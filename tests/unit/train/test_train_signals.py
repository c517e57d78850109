"""What asks a run to stop."""

import os
import signal
import subprocess
import sys
import time

import pytest

from bdtrain.train.signals import (
    LAUNCHER_GONE,
    Process,
    StopRequest,
    find_launchers,
    is_running,
)


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def fake_proc(folder, processes):
    """A proc file system: pid -> (parent, start ticks, state, words of the command line)."""
    for pid, (parent, ticks, state, words) in processes.items():
        (folder / str(pid)).mkdir(parents=True, exist_ok=True)
        # Fields 5 to 21 are of no interest here; the name holds what a careless reader would trip over.
        fields = [state, str(parent), *["7"] * 17, str(ticks), "0"]
        (folder / str(pid) / "stat").write_text(f"{pid} (a) b (c) {' '.join(fields)}\n")
        (folder / str(pid) / "cmdline").write_bytes("".join(f"{word}\0" for word in words).encode())
    return folder


LAUNCH = ["/venv/bin/python", "-u", "-m", "deepspeed.launcher.launch", "--world_info=x", "train.py"]
RUNNER = ["/venv/bin/python3.11", "/venv/bin/deepspeed", "--num_gpus", "2", "train.py"]


@pytest.fixture(autouse=True)
def terminal():
    """Signals as a shell in the foreground leaves them: in the background it has SIGINT ignored."""
    asked = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in asked.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_signal_sets_a_flag_however_often_it_comes(number):
    before = signal.getsignal(number)
    with StopRequest() as request:
        assert request.pending is None
        for _ in range(3):
            os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)
        assert wait_until(lambda: request.pending)
        assert request.pending == signal.Signals(number).name
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_signal_that_the_parent_had_ignored_stays_ignored(number):
    signal.signal(number, signal.SIG_IGN)
    with StopRequest() as request:
        signal.raise_signal(number)
        assert request.pending is None
    assert signal.getsignal(number) is signal.SIG_IGN


def test_first_interrupt_asks_and_a_later_one_interrupts(monkeypatch):
    with StopRequest() as request:
        signal.raise_signal(signal.SIGINT)
        # A launcher's copy of the same key press.
        signal.raise_signal(signal.SIGINT)
        assert request.pending == "SIGINT"
        later = time.monotonic() + 5
        monkeypatch.setattr(time, "monotonic", lambda: later)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_interrupt_after_another_reason_needs_a_second_one_too(monkeypatch):
    with StopRequest() as request:
        request.ask("SIGTERM")
        signal.raise_signal(signal.SIGINT)
        later = time.monotonic() + 5
        monkeypatch.setattr(time, "monotonic", lambda: later)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert request.pending == "SIGTERM"


@pytest.mark.parametrize(
    ("parents", "expected"),
    [
        ([LAUNCH, RUNNER, ["bash", "-c", "deepspeed train.py"]], [101, 102]),
        ([["/venv/bin/python", "/venv/bin/torchrun", "train.py"], ["/sbin/init"]], [101]),
        ([["python", "-m", "torch.distributed.run", "train.py"]], [101]),
        ([["bash", "/venv/bin/deepspeed"], RUNNER], []),
        ([["/venv/bin/python", "-m", "pytest", "tests/test_deepspeed.py", "torchrun"]], []),
        ([["/venv/bin/python", "train_deepspeed.py", "deepspeed"]], []),
        ([[""]], []),
        ([LAUNCH, RUNNER, RUNNER, RUNNER, RUNNER], [101, 102, 103, 104]),
    ],
)
def test_launchers_are_told_from_other_parents(tmp_path, parents, expected):
    processes = {100: (101, 50, "R", ["python", "train.py"])}
    for pid, words in enumerate(parents, start=101):
        processes[pid] = (pid + 1, 900 + pid, "S", words)
    found = find_launchers(fake_proc(tmp_path, processes), pid=100)
    assert found == tuple(Process(pid, 900 + pid) for pid in expected)


def test_nothing_is_watched_without_proc(tmp_path):
    assert find_launchers(tmp_path / "none") == ()
    with StopRequest(proc=tmp_path / "none") as request:
        assert request.launchers == ()


@pytest.mark.parametrize("change", ["gone", "zombie", "another process"])
def test_launcher_that_ends_asks_for_a_stop(tmp_path, change):
    parent = os.getppid()
    proc = fake_proc(
        tmp_path, {parent: (500, 10, "S", LAUNCH), 500: (1, 20, "S", RUNNER), 1: (0, 1, "S", ["init"])}
    )
    with StopRequest(poll_s=0.01, proc=proc) as request:
        assert request.launchers == (Process(parent, 10), Process(500, 20))
        time.sleep(0.1)
        assert request.pending is None
        if change == "gone":
            (proc / "500").rename(proc / "gone")
        else:
            new = (1, 20, "Z", []) if change == "zombie" else (1, 21, "S", RUNNER)
            fake_proc(tmp_path / "next", {500: new})
            (tmp_path / "next" / "500" / "stat").replace(proc / "500" / "stat")
        assert wait_until(lambda: request.pending)
        assert request.pending == LAUNCHER_GONE


def test_real_process_is_running_until_it_has_ended():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    ticks = int(open(f"/proc/{child.pid}/stat").read().rpartition(")")[2].split()[19])
    assert is_running(Process(child.pid, ticks))
    assert not is_running(Process(child.pid, ticks - 1))
    child.kill()
    # Not yet waited for: a zombie.
    assert wait_until(lambda: not is_running(Process(child.pid, ticks)))
    child.communicate()
    assert not is_running(Process(child.pid, ticks))


def test_listening_needs_no_heavy_library():
    code = "import sys, bdtrain.train.signals; assert not {'torch', 'deepspeed', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
