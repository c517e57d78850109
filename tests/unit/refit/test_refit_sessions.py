"""One session of Ray for many measurements, and the re-fits of a watch."""

import contextlib
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import bdtrain.refit.command as command
import bdtrain.refit.ray_backend as ray_backend
from bdtrain.checkpoint.folders import step_name
from bdtrain.errors import RefitError
from bdtrain.refit.outcome import RaySettings, ShardOutcome
from bdtrain.refit.ray_pool import RaySession
from bdtrain.refit.request import RefitRequest
from bdtrain.refit.schedule_file import SCHEDULE_FILE
from bdtrain.refit.snapshot import result_folder, snapshots_folder
from bdtrain.tracking.run_files import EXIT_FILE
from tests.unit.refit.sweep_cases import make_records, run_config

# -- One session of Ray --------------------------------------------------------------------------------------


@pytest.fixture
def sessions(monkeypatch):
    """Sessions that were started and ended; the last one is dead while ``dead`` is set."""
    seen = SimpleNamespace(events=[], dead=False, started=0)

    def check():
        if seen.dead:
            raise RefitError("the head died")

    @contextlib.contextmanager
    def session(settings, workers, deadline, log):
        seen.started += 1
        number = seen.started
        seen.dead = False
        seen.events.append(f"start {number} with {workers}")
        try:
            yield RaySession(number, check, lambda: None)
        finally:
            seen.events.append(f"end {number}")

    monkeypatch.setattr(ray_backend, "_session", session)
    return seen


class FakePool:
    """Measures every shard at once."""

    def __init__(self, session, request, settings, worker, queue, log):
        self.queue = queue

    def measure(self, deadline, late, quorum):
        while (shard := self.queue.take()) is not None:
            self.queue.measured(shard, {4: make_records(4, shard)})

    def end(self):
        pass


def ask(shared, *, shards=2, **settings):
    request = SimpleNamespace(shards=shards, threads=1, device="cpu")
    return ray_backend.measure_on_ray(
        request,
        RaySettings(**{"num_workers": 4, **settings}),
        deadline_s=60.0,
        quorum=1.0,
        log=lambda line: None,
        shared=shared,
    )


def test_measurements_that_follow_each_other_share_a_session(sessions, monkeypatch):
    monkeypatch.setattr(ray_backend, "WorkerPool", FakePool)
    with ray_backend.SharedSession() as shared:
        assert sessions.events == []
        # As large as the largest of them needs it.
        for shards in (2, 16, 3):
            assert len(ask(shared, shards=shards).records) == shards
        assert sessions.events == ["start 1 with 4"]
        ask(shared, num_workers=2)
        assert sessions.events[1:] == ["end 1", "start 2 with 2"]
    assert sessions.events[3:] == ["end 2"]
    ask(None)
    assert sessions.events[4:] == ["start 3 with 2", "end 3"]


def test_a_session_that_died_or_broke_is_started_anew_for_the_next_measurement(sessions, monkeypatch):
    class Broken(FakePool):
        def measure(self, deadline, late, quorum):
            raise RefitError("the head died")

    with ray_backend.SharedSession() as shared:
        monkeypatch.setattr(ray_backend, "WorkerPool", FakePool)
        ask(shared)
        sessions.dead = True
        ask(shared)
        assert sessions.events == ["start 1 with 4", "end 1", "start 2 with 4"]
        monkeypatch.setattr(ray_backend, "WorkerPool", Broken)
        with pytest.raises(RefitError, match="the head died"):
            ask(shared)
        assert sessions.events[3:] == ["end 2"]
        monkeypatch.setattr(ray_backend, "WorkerPool", FakePool)
        ask(shared)
        assert sessions.events[4:] == ["start 3 with 4"]
    assert sessions.events[5:] == ["end 3"]


def test_a_measurement_on_ray_is_over_before_the_process_ends_itself(monkeypatch):
    asked = {}

    def measure(request, settings, **more):
        asked.update(more, settings=settings)
        return ShardOutcome({0: {4: make_records(4, 0)}}, {1: "lost"}, {"measure_s": 1.0})

    monkeypatch.setattr(ray_backend, "measure_on_ray", measure)
    config = run_config(placement="ray", deadline_s=100.0, workers=3)
    records, said = ray_backend.measure_refit(RefitRequest("", (4,), (40,), 4, 0), config, None)
    assert records[4].blocks == 320 and said["complete_share"] == 0.5 and said["failures"] == {"1": "lost"}
    # What was measured by then still has to be searched.
    assert 50.0 < asked["deadline_s"] < 95.0 and asked["settings"].num_workers == 3


# -- A watch -------------------------------------------------------------------------------------------------


RUN = """\
model: {num_layers: 2, hidden_size: 32, num_heads: 4, num_kv_heads: 2, vocab_multiple: 16}
data: {kind: synthetic, seq_len: 32}
train: {steps: 20, global_batch_size: 8}
refit: {mode: clip, placement: external, deadline_s: DEADLINE}
"""


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """A run that has ended with snapshots of three steps, and a watch over it whose children are scripts."""
    run = tmp_path / "run"
    (run / "refit").mkdir(parents=True)
    (run / EXIT_FILE).write_text("{}")
    monkeypatch.setattr(command, "GRACE_S", 0.3)

    def watch(scripts):
        for step, script in scripts.items():
            folder = snapshots_folder(run) / step_name(step)
            folder.mkdir(parents=True)
            (folder / "MANIFEST.json").write_text("{}")
            # Time enough for all others, on a busy machine, too.
            (folder / "config.yaml").write_text(RUN.replace("DEADLINE", "0.2" if script == HANG else "100"))

        def words(step, options):
            assert options.run == run
            result_folder(run, step).mkdir(parents=True, exist_ok=True)
            return [sys.executable, "-S", "-c", scripts[step], str(result_folder(run, step) / SCHEDULE_FILE)]

        monkeypatch.setattr(command, "_command", words)
        return command.main(["--run", str(run), "--watch"])

    watch.run = run
    return watch


WRITE = "import sys; open(sys.argv[1], 'w').close()"
HANG = "import time; time.sleep(600)"
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + HANG


def test_a_re_fit_that_hangs_ends_alone_and_the_watch_goes_on(watched, capsys):
    began = time.monotonic()
    assert watched({1: HANG, 2: "import sys; sys.exit(8)", 3: WRITE}) == 0
    assert time.monotonic() - began < 60
    assert (result_folder(watched.run, 3) / SCHEDULE_FILE).exists()
    # What the second one had to say it said itself.
    assert capsys.readouterr().err.splitlines() == [
        "error: the re-fit of step 1 did not end at its deadline (refit.deadline_s) and was killed"
    ]


def test_a_re_fit_that_was_killed_is_told_and_the_watch_goes_on(watched, capsys):
    kill = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert watched({1: WRITE, 2: kill, 3: WRITE}) == 0
    assert capsys.readouterr().err == "error: the re-fit of step 2 was ended by SIGKILL\n"
    assert not (result_folder(watched.run, 2) / SCHEDULE_FILE).exists()


def test_a_watch_that_is_asked_to_end_takes_its_re_fit_along(watched):
    note = "import os, signal, sys; open(sys.argv[1], 'w').write(str(os.getpid())); "
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        watched({1: f"{note} os.kill(os.getppid(), signal.SIGTERM); {HANG}", 2: WRITE})
    assert end.value.code == 128 + signal.SIGTERM and signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(ProcessLookupError):
        os.kill(int((result_folder(watched.run, 1) / SCHEDULE_FILE).read_text()), 0)
    assert not (result_folder(watched.run, 2) / SCHEDULE_FILE).exists()


def test_a_child_that_does_not_hear_is_ended_with_the_watch(tmp_path):
    process = command.subprocess.Popen([sys.executable, "-S", "-c", DEAF])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "GRACE_S", 0.2)
        command._end(process)
    assert process.poll() is not None


def test_a_watch_hands_its_settings_to_each_re_fit():
    words = ["--run", "r", "--watch", "--data", "d", "--block-sizes", "4,8", "refit.quorum=0.5"]
    options = command._parser().parse_args(words)
    made = command._command(7, options)
    assert made[:4] == [sys.executable, "-P", "-m", "bdtrain.refit"]
    again = command._parser().parse_args(made[4:])
    assert (again.run, again.step, again.watch) == (Path("r"), 7, False)
    same = ("data", "block_sizes", "device", "overrides")
    assert [getattr(again, name) for name in same] == [getattr(options, name) for name in same]


def test_only_a_sweep_is_shown_in_mlflow(capsys):
    assert command.main(["--run", "r", "--mlflow-uri", "sqlite:///x.db"]) == 8
    assert "--mlflow-uri shows a sweep and belongs to --checkpoint" in capsys.readouterr().err
