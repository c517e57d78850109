"""One writer per run folder, and no owner that outlives its process."""

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from bdtrain.errors import ConfigError
from bdtrain.train import run_lock
from bdtrain.train.run_lock import RunLock

HOLD = """
import sys, time
from pathlib import Path
from bdtrain.train.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
print(lock.acquire(), flush=True)
time.sleep(120)
"""


@pytest.fixture
def owner(tmp_path):
    """Another process that holds the folder."""
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "None\n"
    yield child
    child.kill()
    child.communicate()


def leave(folder, machine, age_s=0.0):
    """A lock file as an owner on another machine leaves it."""
    path = folder / ".lock"
    path.write_text(json.dumps({"host": "far", "machine": machine, "pid": 4711, "since": 1.7e9}))
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def test_second_writer_is_told_who_and_what_to_do(tmp_path, owner):
    with pytest.raises(ConfigError) as caught:
        RunLock(tmp_path).acquire()
    said = str(caught.value)
    for part in (
        str(tmp_path),
        f"process {owner.pid}",
        socket.gethostname(),
        time.strftime("%Y-%m-%d"),
        "run.folder=",
    ):
        assert part in said
    # The refused one has changed nothing.
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == owner.pid


def test_killed_owner_blocks_nobody_and_is_named(tmp_path, owner):
    owner.kill()
    owner.wait()
    start = time.monotonic()
    lock = RunLock(tmp_path)
    note = lock.acquire()
    assert time.monotonic() - start < 2
    assert f"process {owner.pid}" in note
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    lock.release()


def test_folder_is_as_before_after_an_orderly_end(tmp_path):
    folder = tmp_path / "new" / "run"
    for _ in range(2):
        with RunLock(folder):
            assert [path.name for path in folder.iterdir()] == [".lock"]
            with pytest.raises(ConfigError):
                RunLock(folder).acquire()
        assert list(folder.iterdir()) == []
    lock = RunLock(folder)
    assert lock.acquire() is None
    lock.release()
    lock.release()


def test_owner_touches_the_file(tmp_path):
    with RunLock(tmp_path, heartbeat_s=0.05):
        path = tmp_path / ".lock"
        os.utime(path, (1, 1))
        end = time.monotonic() + 10
        while path.stat().st_mtime < 2 and time.monotonic() < end:
            time.sleep(0.02)
        assert abs(path.stat().st_mtime - time.time()) < 60


def test_silent_owner_on_another_machine_is_waited_for_then_replaced(tmp_path):
    leave(tmp_path, "another", age_s=1.0)
    said = []
    start = time.monotonic()
    lock = RunLock(tmp_path, stale_s=2.0, tell=said.append)
    note = lock.acquire()
    assert 0.5 < time.monotonic() - start < 10
    assert "process 4711 on far" in note
    assert "process 4711 on far" in said[0]
    lock.release()


def test_owner_on_another_machine_long_silent_is_replaced_at_once(tmp_path):
    leave(tmp_path, "another", age_s=100)
    said = []
    lock = RunLock(tmp_path, tell=said.append)
    assert "process 4711 on far" in lock.acquire()
    assert said == []
    lock.release()


def test_owner_on_another_machine_that_gives_a_sign_is_respected(tmp_path):
    path = leave(tmp_path, "another")
    before = path.read_text()
    beat = threading.Timer(0.5, lambda: os.utime(path, (time.time() + 1,) * 2))
    beat.start()
    start = time.monotonic()
    with pytest.raises(ConfigError, match="process 4711 on far"):
        RunLock(tmp_path, stale_s=60).acquire()
    beat.join()
    assert time.monotonic() - start < 30
    assert path.read_text() == before


def test_heartbeat_decides_where_the_system_has_no_locks(tmp_path, monkeypatch):
    def no_locks(descriptor, how):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with RunLock(tmp_path, heartbeat_s=0.05), pytest.raises(ConfigError, match="one writer"):
        RunLock(tmp_path, stale_s=30).acquire()


def test_folder_that_cannot_be_made_is_an_error_of_the_configuration(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"run\.folder"):
        RunLock(tmp_path / "file" / "run").acquire()


def test_child_made_by_fork_does_not_keep_the_lock(tmp_path):
    code = HOLD.replace(
        "time.sleep(120)",
        "import os\nif os.fork() == 0:\n    time.sleep(120)\n    os._exit(0)\ntime.sleep(120)",
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert owner.stdout.readline() == "None\n"
        children = f"/proc/{owner.pid}/task/{owner.pid}/children"
        end = time.monotonic() + 20
        while not open(children).read().strip() and time.monotonic() < end:
            time.sleep(0.02)
        time.sleep(0.2)
        os.kill(owner.pid, 9)
        os.waitpid(owner.pid, 0)
        lock = RunLock(tmp_path)
        assert str(owner.pid) in lock.acquire()
        lock.release()
    finally:
        os.killpg(owner.pid, 9)
        owner.stdout.close()
        owner.returncode = -9


def test_file_removed_by_somebody_does_not_take_the_next_owners_lock_with_it(tmp_path):
    first = RunLock(tmp_path)
    first.acquire()
    (tmp_path / ".lock").unlink()
    second = RunLock(tmp_path)
    second.acquire()
    first.release()
    with pytest.raises(ConfigError):
        RunLock(tmp_path).acquire()
    second.release()


def test_file_torn_by_a_crash_is_no_obstacle(tmp_path):
    (tmp_path / ".lock").write_text('{"host": "fa')
    lock = RunLock(tmp_path)
    assert lock.acquire() is None
    lock.release()


def test_machine_is_the_same_text_in_two_processes():
    code = "from bdtrain.train import run_lock; print(run_lock._machine())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert other.strip() == run_lock._machine()
