"""Shipping to MLflow: nothing lost, nothing twice, whatever the server and the processes do."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bdtrain.tracking.jsonl import MetricsLog
from bdtrain.tracking.mlflow import default_uri, flatten
from bdtrain.tracking.ship import HOPELESS, LEFT_OVER, SHIPPED, Shipping
from bdtrain.tracking.shipper import Shipper, Shippers
from bdtrain.tracking.spool import MAX_POINTS, ShipState, Tail, lines_left, redact

sys.path.insert(0, str(Path(__file__).parent))
from mlflow_server import FakeMlflow

SECRET = "hunter2"


def write_steps(log, first, last):
    for step in range(first, last + 1):
        log.write(step, {"train/loss": 1.0 / step, "perf/step_seconds": time.monotonic() + step})


def run_folder(path, *, uri=None):
    path.mkdir()
    (path / "run.json").write_text(json.dumps({"run_uid": "u-1"}))
    shown = "null" if uri is None else uri
    (path / "config.yaml").write_text(
        f"run: {{name: tiny, seed: 1}}\ntracking: {{mlflow_uri: {shown}, experiment: tests}}\n"
    )
    return path


def shipper(folder, *, uri=None, attempt=1, extra=()):
    return Shipper(
        folder,
        uri=uri,
        experiment="tests",
        run_name="tiny",
        run_uid="u-1",
        attempt=attempt,
        extra=("--nice", "0", *extra),
    )


def wait_for(condition, seconds=120.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.05)


class MemoryStore:
    """Keeps points as MLflow's table does; fails as told."""

    mark = 0

    def __init__(self, run_id="r"):
        self.run_id = run_id
        self.files, self.refused = [], set()
        self.points, self.batches, self.begun, self.ends = {}, [], [], []
        self.failures = []

    def _fail(self):
        if self.failures:
            error = self.failures.pop(0)
            if error:
                raise error

    def begin(self, start):
        self._fail()
        self.begun.append(start["attempt"])

    def log(self, points):
        self.batches.append(len(points))
        for point in points:
            values = self.points.setdefault((point.name, point.step), set())
            values.add((repr(point.value), point.time_ms))
        self._fail()  # stored, and the answer was lost

    def put(self, name):
        if name in self.refused:
            raise PermissionError("no files here")
        self.files.append(name)

    def finish(self, event, time_ms):
        self._fail()
        self.ends.append(event)


def ship_all(folder, store, *, attempt=None, parent_alive=lambda: False, **more):
    clock = [0.0]

    def sleep(seconds):
        clock[0] += seconds

    shipping = Shipping(
        folder, "memory", lambda run_id: store, attempt=attempt, parent_alive=parent_alive,
        clock=lambda: clock[0], sleep=sleep, say=lambda text: None, **more,
    )  # fmt: skip
    return shipping.run(), clock[0]


def counts(store):
    return {pair: len(values) for pair, values in store.points.items()}


def test_every_point_arrives_once_in_batches_of_the_size_mlflow_takes(tmp_path):
    steps = MAX_POINTS
    with MetricsLog(tmp_path / "metrics.jsonl", 1) as log:
        log.event("start", 0)
        write_steps(log, 1, steps)
        log.event("end", steps)
    store = MemoryStore()
    assert ship_all(tmp_path, store, attempt=1)[0] == SHIPPED
    expected = {
        (name, step): 1 for name in ("train/loss", "perf/step_seconds") for step in range(1, steps + 1)
    }
    assert counts(store) == expected
    assert max(store.batches) <= MAX_POINTS
    assert (store.begun, store.ends) == ([1], ["end"])
    assert lines_left(tmp_path, "memory") == 0


def test_steps_repeated_after_a_restart_are_shipped_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, 1) as log:
        log.event("start", 0)
        write_steps(log, 1, 10)
    store = MemoryStore()
    ship_all(tmp_path, store)
    with MetricsLog(path, 2) as log:
        log.event("start", 6)
        write_steps(log, 7, 8)
    ship_all(tmp_path, store)  # leaves in the middle of the repeated steps
    log = MetricsLog(path, 3)
    log.event("start", 7)
    write_steps(log, 8, 12)
    log.event("end", 12)
    ship_all(tmp_path, store)
    assert counts(store) == {
        (name, step): 1 for name in ("train/loss", "perf/step_seconds") for step in range(1, 13)
    }
    assert store.begun == [1, 2, 3]


def test_a_deterministic_metric_that_comes_out_differently_is_shown(tmp_path):
    with MetricsLog(tmp_path / "metrics.jsonl", 1) as log:
        log.event("start", 0)
        log.write(1, {"train/loss": 2.0, "train/lr": 0.1})
    with MetricsLog(tmp_path / "metrics.jsonl", 2) as log:
        log.event("start", 0)
        log.write(1, {"train/loss": 2.0000000000000004, "train/lr": 0.1})
    store = MemoryStore()
    ship_all(tmp_path, store)
    assert counts(store) == {("train/loss", 1): 2, ("train/lr", 1): 1}


def test_pauses_double_up_to_the_limit_and_a_lost_answer_duplicates_nothing(tmp_path):
    with MetricsLog(tmp_path / "metrics.jsonl", 1) as log:
        log.event("start", 0)
        write_steps(log, 1, 3)
        store = MemoryStore()
        alive = [True]
        down = ConnectionError("down")
        # begin works, log is stored but fails five times; each pass begins again.
        store.failures = [None, down] * 5
        passes = []

        def parent_alive():
            if len(store.batches) > 5 and len(passes) == 0:
                passes.append(1)
                log.event("end", 3)
            return alive[0]

        code, passed = ship_all(
            tmp_path, store, attempt=1, parent_alive=parent_alive, backoff_limit_s=4.0, interval_s=0.0
        )
    assert code == SHIPPED
    assert set(counts(store).values()) == {1}
    # 1 + 2 + 4 + 4 + 4 seconds of pauses, each rounded up to slices of 0.2 s, and a few slices at the end.
    assert 15.0 <= passed <= 17.5


def test_a_dead_server_keeps_no_orphan_and_the_rest_is_counted(tmp_path):
    with MetricsLog(tmp_path / "metrics.jsonl", 1) as log:
        log.event("start", 0)
        write_steps(log, 1, 3)
    store = MemoryStore()
    store.failures = [ConnectionError("http://me:hunter2@host is down")]
    assert ship_all(tmp_path, store, attempt=1)[0] == LEFT_OVER
    assert lines_left(tmp_path, "memory") == 4
    assert ShipState.load(tmp_path, "memory").problem == "ConnectionError: http://***@host is down"
    store.failures = [ImportError("no mlflow")]
    assert ship_all(tmp_path, store, attempt=1, parent_alive=lambda: True)[0] == HOPELESS


def test_a_trainer_that_died_without_a_word_is_marked_failed(tmp_path):
    with MetricsLog(tmp_path / "metrics.jsonl", 1) as log:
        log.event("start", 0)
        write_steps(log, 1, 3)
    store = MemoryStore()
    assert ship_all(tmp_path, store, attempt=1)[0] == SHIPPED
    assert store.ends == ["failed"]


@pytest.mark.parametrize("says", [True, False])
def test_asked_to_stop_it_waits_for_the_last_word_of_the_attempt_but_not_for_ever(tmp_path, says):
    log = MetricsLog(tmp_path / "metrics.jsonl", 1)
    log.event("start", 0)
    write_steps(log, 1, 3)
    store, clock, asked = MemoryStore(), [0.0], []

    def sleep(seconds):
        clock[0] += seconds
        if clock[0] > 7 and not asked:
            asked.append(clock[0])
            shipping.stop()
        if says and clock[0] > 12 and len(asked) == 1:
            asked.append(clock[0])
            log.event("stop", 3)

    shipping = Shipping(
        tmp_path, "memory", lambda run_id: store, attempt=1, parent_alive=lambda: True,
        clock=lambda: clock[0], sleep=sleep, say=lambda text: None,
    )  # fmt: skip
    assert shipping.run() == SHIPPED
    assert store.ends == (["stop"] if says else [])
    assert clock[0] == pytest.approx(12 if says else 27, abs=1)


def test_a_metrics_file_that_is_not_the_same_is_shipped_from_its_beginning(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, 1) as log:
        log.event("start", 0)
        write_steps(log, 1, 5)
    ship_all(tmp_path, MemoryStore())
    state = ShipState.load(tmp_path, "memory")
    assert state.offset == path.stat().st_size == Tail(path, state).offset
    path.write_bytes(path.read_bytes().replace(b'"step": 5', b'"step": 6'))
    assert Tail(path, state).offset == 0
    path.write_bytes(path.read_bytes()[:50])
    assert Tail(path, state).offset == 0


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("http://user:p4ss@host:5000/x", "http://***@host:5000/x"),
        ("http://user:p@4ss@host", "http://***@host"),
        ("https://token@host and https://b:c@d", "https://***@host and https://***@d"),
        ("postgresql://h/db?user=a&password=hunter2&x=1", "postgresql://h/db?user=a&password=***&x=1"),
        ("sqlite:////data/a@b/mlflow.db", "sqlite:////data/a@b/mlflow.db"),
    ],
)
def test_credentials_are_taken_out(text, clean):
    assert redact(text) == clean


def test_secrets_of_the_environment_are_taken_out():
    assert redact("refused abc123", {"MLFLOW_TRACKING_TOKEN": "abc123"}) == "refused ***"


def test_settings_become_pairs_without_credentials():
    settings = {"a": {"b": 1, "c": [1, 2]}, "d": "http://u:p@h", "e": None, "f": "x" * 9999}
    assert dict(flatten(settings)) == {
        "a.b": "1", "a.c": "[1, 2]", "d": "http://***@h", "e": "null", "f": "x" * 500,
    }  # fmt: skip


def test_a_server_that_is_down_dies_and_comes_back_loses_nothing(tmp_path):
    server = FakeMlflow(tmp_path / "files")
    uri = f"http://user:{SECRET}@127.0.0.1:{server.port}"
    folder = run_folder(tmp_path / "run", uri=uri)
    fast = ("--interval", "0.1", "--backoff-limit", "0.5")
    log = MetricsLog(folder / "metrics.jsonl", 1)
    log.event("start", 0)
    process = shipper(folder, uri=uri, extra=fast)
    said = []

    def poll():
        said.append(process.poll())
        return process

    process.start()
    write_steps(log, 1, 20)
    # Down at the start: the trainer goes on, and is told.
    wait_for(lambda: poll() and any(said))
    assert "takes no metrics" in next(filter(None, said))
    server.up()
    wait_for(lambda: ("train/loss", 20) in server.points)
    wait_for(lambda: poll() and "takes metrics again" in str(said[-1]))
    # The answers get lost, then it dies, hangs, and comes back.
    server.mode = "lose_answers"
    write_steps(log, 21, 40)
    wait_for(lambda: ("train/loss", 40) in server.points)
    server.down()
    write_steps(log, 41, 60)
    log.write(61, {"train/loss": float("nan"), "train/grad_norm": float("inf")})
    time.sleep(0.7)
    server.mode = "ok"
    server.up()
    (folder / "summary.json").write_text('{"steps": 61}')
    log.event("end", 61)
    assert process.close(120) is None
    assert process.pid is None
    expected = {(name, step) for name in ("train/loss", "perf/step_seconds") for step in range(1, 61)}
    # What the machine did meanwhile is no part of the metrics file.
    sampled = {pair for pair in server.points if pair[0].startswith("system/")}
    assert sampled and set(server.points) - sampled == expected | {
        ("train/loss", 61),
        ("train/grad_norm", 61),
    }
    assert {len(server.points[pair]) for pair in set(server.points) - sampled} == {1}
    assert [server.points["train/loss", step][0][0] for step in (1, 3)] == [1.0, 1 / 3]
    run = server.runs["run0"]
    assert (len(server.runs), run["info"]["status"]) == (1, "FINISHED")
    assert run["tags"]["bdtrain.run_uid"] == "u-1"
    assert run["params"]["run.name"] == "tiny"
    assert "***@127.0.0.1" in run["params"]["tracking.mlflow_uri"]
    stored = {path.name for path in (tmp_path / "files").rglob("*") if path.is_file()}
    assert stored == {"config.yaml", "summary.json", "environment.json", "report.html"}
    # The configuration of the run has the password, nothing that was written for others has.
    shown = [path for path in tmp_path.rglob("*") if path.is_file() and path != folder / "config.yaml"]
    assert not [path for path in shown if SECRET.encode() in path.read_bytes()]
    server.down()


def test_a_hanging_server_delays_the_end_by_no_more_than_it_was_told(tmp_path):
    server = FakeMlflow(tmp_path / "files")
    server.mode = "hang"
    server.up()
    folder = run_folder(tmp_path / "run", uri=server.uri)
    with MetricsLog(folder / "metrics.jsonl", 1) as log:
        log.event("start", 0)
        write_steps(log, 1, 3)
        log.event("end", 3)
    process = shipper(folder, uri=server.uri)
    process.start()
    wait_for(lambda: server.requests > 0)
    begin = time.monotonic()
    message = process.close(0.5)
    assert time.monotonic() - begin < 5
    assert message.startswith("MLflow: 5 lines") and f"tools/mlflow_sync.py {folder}" in message
    assert process.pid is None
    server.mode = "ok"
    server.down()


def points_in(database):
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select key, step, count(*) from metrics group by key, step")
        return {(key, step): count for key, step, count in rows}


def test_the_default_store_continues_its_run_after_a_kill_and_takes_nothing_twice(tmp_path):
    folder = run_folder(tmp_path / "run")
    database = folder / "mlflow.db"
    log = MetricsLog(folder / "metrics.jsonl", 1)
    log.event("start", 0)
    write_steps(log, 1, 10)
    first = shipper(folder, extra=("--interval", "0.2"))
    first.start()
    wait_for(lambda: ShipState.load(folder, default_uri(folder)).offset)
    os.kill(first.pid, signal.SIGKILL)
    log.close()

    log = MetricsLog(folder / "metrics.jsonl", 2)
    log.event("start", 6)
    write_steps(log, 7, 12)
    log.event("stop", 12)
    # The place is lost as well: everything is sent again, to the same run, which then has the same points.
    (folder / "mlflow_ship.json").unlink()
    tool = Path(__file__).parents[3] / "tools" / "mlflow_sync.py"
    done = subprocess.run(
        [sys.executable, tool, folder], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "19 lines shipped" in done.stdout and "0 left" in done.stdout
    found = points_in(database)
    assert {pair: count for pair, count in found.items() if not pair[0].startswith("system/")} == {
        (name, step): 1 for name in ("train/loss", "perf/step_seconds") for step in range(1, 13)
    }
    with sqlite3.connect(database) as connection:
        ((name, status),) = connection.execute("select name, status from runs")
        tags = dict(connection.execute("select key, value from tags"))
    assert (name, status) == ("tiny", "KILLED")
    assert tags["bdtrain.attempt"] == "2"
    assert not list(tmp_path.rglob("mlruns"))


def test_several_writers_are_one_for_the_trainer_and_share_the_time_of_the_end(tmp_path):
    folder = run_folder(tmp_path / "run")
    server = FakeMlflow(tmp_path / "files")
    server.mode = "hang"
    server.up()
    both = Shippers([shipper(folder, uri=server.uri), shipper(folder, uri="tensorboard")])
    assert both.addresses == [f"MLflow: {server.uri}", "TensorBoard: tensorboard"]
    with MetricsLog(folder / "metrics.jsonl", 1) as log:
        log.event("start", 0)
        write_steps(log, 1, 3)
        log.event("end", 3)
    both.start()
    wait_for(lambda: ShipState.load(folder, "tensorboard").finished and server.requests)
    begin = time.monotonic()
    message = both.close(0.5)
    assert time.monotonic() - begin < 5
    # Each keeps its own place: the one that hangs holds nothing up.
    assert message.startswith("MLflow: 5 lines") and "TensorBoard" not in message
    assert lines_left(folder, "tensorboard") == 0 and lines_left(folder, server.uri) == 5
    assert list((folder / "tensorboard").glob("events.out.tfevents.*"))
    server.mode = "ok"
    server.down()


def test_files_that_are_left_are_told_with_what_stores_them(tmp_path):
    folder = run_folder(tmp_path / "run")
    with MetricsLog(folder / "metrics.jsonl", 1) as log:
        log.event("start", 0)
        log.event("end", 0)
    store = MemoryStore()
    store.refused = {"report.html"}
    ship_all(folder, store)
    state = ShipState.load(folder, "memory")
    state.store = "tensorboard"
    state.save(folder)
    message = shipper(folder, uri="tensorboard").close(0.0)
    assert message.startswith("TensorBoard: report.html is not in tensorboard")
    assert message.endswith(f"python tools/mlflow_sync.py {folder} --uri tensorboard ships them")
