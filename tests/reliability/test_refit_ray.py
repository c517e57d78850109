"""A measurement on a real local session of Ray keeps its numbers, its limits and its privacy through faults.

Every test starts drivers of its own: Ray replaces signal handlers and may end the process that uses it.
"""

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

sys.path.append(str(Path(__file__).parent))

from launched import ROOT, Launched, free_port, processes_with, wait_until
from refit_driver import BLOCK_SIZES, shard_records

HERE = Path(__file__).parent
LIMIT_S = 400.0
ENOUGH_S = 300.0
"""A deadline that is none: the start of Ray takes 5 s on a quiet machine and a minute on a busy one."""


@pytest.fixture
def place():
    """For Ray's sockets, whose paths must be short."""
    with tempfile.TemporaryDirectory(prefix="bdt-", dir="/tmp") as path:
        yield Path(path)


def driver(folder, place, *jobs, **environment):
    folder.mkdir(exist_ok=True)
    for job in jobs:
        job.setdefault("settings", {}).setdefault("num_workers", 2)
    plan = folder / "plan.json"
    plan.write_text(json.dumps(jobs))
    ranks = {"RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "192.0.2.9", "SLURM_PROCID": "3"}
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(HERE)])
    return Launched(
        [sys.executable, HERE / "refit_driver.py", plan],
        folder / "log.txt",
        {"PYTHONPATH": path, "TMPDIR": str(place), **ranks, **environment},
    )


def check_records(path, shards):
    """The file holds just these shards, and the numbers that arithmetic says."""
    expected = {
        f"{shard} {size} {name}": column
        for shard in shards
        for size in BLOCK_SIZES
        for name, column in shard_records(shard, size).to_arrays().items()
    }
    with np.load(path) as found:
        assert set(found) == set(expected)
        for name, column in expected.items():
            assert found[name].dtype == column.dtype
            np.testing.assert_array_equal(found[name], column)


def check_gone(run, place, seconds=0.0):
    assert wait_until(lambda: not run.processes(), seconds) or not run.processes(), run.processes()
    assert not list(place.glob("bdr-*"))


def measuring(folder, shards=1):
    return len(list(folder.glob("shard-*"))) >= shards


def listening(run):
    """Process and address of all sockets on which the run listens."""
    pids = set(run.processes())
    return [
        (connection.pid, connection.laddr.ip)
        for connection in psutil.net_connections("tcp")
        if connection.pid in pids and connection.status == psutil.CONN_LISTEN
    ]


def attempts(folder, shard):
    return (folder / f"shard-{shard}").read_text().splitlines()


def test_a_killed_worker_a_failing_shard_and_a_stopped_worker_cost_only_what_they_must(tmp_path, place):
    with driver(
        tmp_path,
        place,
        {
            "request": {"shards": 8, "faults": {"2": "die once", "5": "raise"}, "wait_s": 0.5},
            "quorum": 0.75,
            "deadline_s": ENOUGH_S,
        },
        {
            "request": {"shards": 12, "faults": {"11": "stop"}},
            "quorum": 0.75,
            "seconds_to_measure": 15.0,
        },
    ) as run:
        # Sockets, as another library reads them, while workers are at it.
        assert wait_until(lambda: measuring(tmp_path, 3), LIMIT_S), run.text()
        sockets = listening(run)
        names = " ".join(run.processes().values())
        assert "gcs_server" in names and "raylet" in names and len(sockets) >= 5
        assert {ip for _, ip in sockets} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
        assert run.wait(LIMIT_S) == 0, run.text()
        check_gone(run, place)

    first, second = (json.loads((tmp_path / f"result-{number}.json").read_text()) for number in (0, 1))
    # A worker died in the middle of shard 2: measured again, by another process, to the same numbers.
    check_records(tmp_path / "result-0.npz", [0, 1, 2, 3, 4, 6, 7])
    assert first["failures"] == {"5": "ValueError: nothing to see in 5 (after 3 attempts)"}
    assert first["complete_share"] == 7 / 8
    # Each session has measured shard 2 and shard 5; the first took two attempts and three.
    assert len(attempts(tmp_path, 2)) == 3 and len(attempts(tmp_path, 5)) == 4
    assert attempts(tmp_path, 2)[0] != attempts(tmp_path, 2)[1]
    # The model is loaded once per process, not once per shard.
    workers = list(tmp_path.glob("worker-*.json"))
    assert len(workers) <= 6
    for path in workers:
        assert json.loads(path.read_text()) == {
            **dict.fromkeys(("RANK", "MASTER_ADDR", "SLURM_PROCID")),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "modes": ["0o600", "0o700"],
        }
    # A worker that is stopped for ever costs its shard and no more than the deadline.
    check_records(tmp_path / "result-1.npz", range(11))
    assert set(second["failures"]) == {"11"}
    assert second["failures"]["11"].startswith("running: the deadline of")
    spent = second["seconds"]["start_s"] + second["seconds"]["measure_s"]
    assert second["deadline_s"] - 1 < spent < second["deadline_s"] + 5
    assert second["wall_s"] < spent + 45


def test_processes_that_share_a_model_meet_on_loopback_and_are_replaced_together(tmp_path, place):
    shared = {
        "worker": "SharedWorker",
        "request": {"shards": 6, "faults": {"2": "die once", "3": "hold"}},
        "settings": {"num_workers": 1, "tp": 2},
        "quorum": 1.0,
        "deadline_s": ENOUGH_S,
    }
    with driver(tmp_path, place, shared) as run:
        # The worker after the one that died: its processes have met, and listen.
        held = tmp_path / "shard-3-1"
        assert wait_until(lambda: held.exists() or run.process.poll() is not None, LIMIT_S), run.text()
        assert held.exists(), run.text()
        sockets = listening(run)
        (tmp_path / "go").touch()
        assert run.wait(LIMIT_S) == 0, run.text()
        check_gone(run, place)
    check_records(tmp_path / "result-0.npz", range(6))
    pids = {rank: attempts(tmp_path, f"2-{rank}") for rank in (0, 1)}
    assert all(len(set(found)) == 2 for found in pids.values())
    assert attempts(tmp_path, "5-0") == pids[0][1:] and attempts(tmp_path, "5-1") == pids[1][1:]
    assert {int(found[1]) for found in pids.values()} <= {pid for pid, _ in sockets}
    assert {ip for _, ip in sockets} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert "shard 2, attempt 1 of 3 failed: the worker died (ActorDiedError)" in run.text()


def test_two_shards_that_always_kill_their_worker_miss_the_quorum_by_name(tmp_path, place):
    with driver(
        tmp_path,
        place,
        {
            "request": {"shards": 6, "faults": {"1": "die", "4": "die"}},
            "settings": {"retries": 1},
            "quorum": 0.75,
            "deadline_s": ENOUGH_S,
        },
    ) as run:
        assert run.wait(LIMIT_S) == 8
        check_gone(run, place)
    assert (
        "error: 4 of 6 shards were measured and quorum=0.75 asks for 5: shards 1, 4: the worker died "
        "(ActorDiedError) (after 2 attempts)"
    ) in run.text()
    assert len(attempts(tmp_path, 1)) == len(attempts(tmp_path, 4)) == 2
    assert not (tmp_path / "result-0.npz").exists()


def test_a_dead_head_ends_the_measurement_in_seconds_and_leaves_nothing(tmp_path, place):
    slow = {"request": {"shards": 4, "wait_s": 600.0}, "quorum": 1.0, "deadline_s": ENOUGH_S}
    with driver(tmp_path, place, slow) as run:
        assert wait_until(lambda: measuring(tmp_path, 2), LIMIT_S), run.text()
        head = next(pid for pid, command in run.processes().items() if "gcs_server --" in command)
        os.kill(head, signal.SIGKILL)
        killed = time.monotonic()
        assert run.wait(LIMIT_S) == 8
        # Ray itself would have ended the driver after a minute, without a word of ours.
        assert time.monotonic() - killed < 55
        check_gone(run, place)
    assert f"error: Ray's gcs_server (process {head}) died" in run.text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["asked to end", "killed"])
def test_a_driver_that_ends_takes_its_session_with_it(tmp_path, place, number):
    slow = {"request": {"shards": 4, "wait_s": 600.0}, "quorum": 1.0, "deadline_s": ENOUGH_S}
    with driver(tmp_path, place, slow) as run:
        assert wait_until(lambda: measuring(tmp_path, 2), LIMIT_S), run.text()
        os.kill(run.process.pid, number)
        assert run.wait(60.0) != 0
        # Ray's own helpers look only now and then whether their head still lives.
        assert wait_until(lambda: not processes_with(run.mark), 120.0), run.processes()
        if number == signal.SIGTERM:
            check_gone(run, place)


def test_a_cluster_is_joined_with_its_token_only_and_says_when_it_has_no_room(tmp_path, place):
    token = place / "token"
    token.write_text("a" * 64)
    loopback = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    private = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    address = f"127.0.0.1:{free_port()}"
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(HERE)])
    start = ["ray", "start", "--head", "--block", f"--port={address.rpartition(':')[2]}", "--num-cpus=2"]
    start += ["--include-dashboard=false", f"--temp-dir={place / 'r'}", "--object-store-memory=80000000"]

    def job(**settings):
        request = {"shards": 4, "faults": {"2": "die once"}}
        settings = {"address": address, **settings}
        return {"request": request, "settings": settings, "quorum": 1.0, "deadline_s": ENOUGH_S}

    with Launched(start, tmp_path / "head.txt", {"PYTHONPATH": path, **loopback, **private}) as head:
        assert wait_until(lambda: "--block" in head.text() or head.process.poll() is not None, LIMIT_S)
        assert head.process.poll() is None, head.text()
        with (
            driver(
                tmp_path / "joins", place, job(), job(tp=2, cpus_per_worker=2.0, placement_s=3.0), **private
            ) as run,
            driver(
                tmp_path / "refused",
                place,
                job(placement_s=8.0),
                **{**private, "RAY_AUTH_TOKEN_PATH": "", "RAY_AUTH_TOKEN": "b" * 64},
            ) as refused,
        ):
            assert refused.wait(LIMIT_S) == 8
            assert run.wait(LIMIT_S) == 8
        assert head.process.poll() is None
    check_records(tmp_path / "joins" / "result-0.npz", range(4))
    # There is room for one of its two processes.
    assert "one needs 2 processes at once, each of 2 CPUs and 0 GPUs, the cluster has 2 CPUs" in run.text()
    assert not (tmp_path / "joins" / "result-1.npz").exists()
    assert "did not let this process in within 8 s: it wants another token" in refused.text()
    assert "a" * 64 not in run.text() and "b" * 64 not in refused.text()
