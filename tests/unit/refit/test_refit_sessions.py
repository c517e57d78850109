"""One session of Ray for many measurements, and the re-fits of a watch."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import bdtrain.refit.apart as apart
import bdtrain.refit.backends as backends
import bdtrain.refit.command as command
import bdtrain.refit.job as job
import bdtrain.refit.ray_backend as ray_backend
import bdtrain.refit.snapshot as snapshot
from bdtrain.checkpoint.files import hash_file
from bdtrain.checkpoint.folders import step_name
from bdtrain.checkpoint.manifest import Manifest, write_manifest
from bdtrain.diffusion.plan import NoisePlan
from bdtrain.errors import RefitError
from bdtrain.refit.job import Refit, add_gradients, judge, make_schedule, publish
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
    # Whoever read the snapshot for 40 s has 40 s less.
    whole = asked["deadline_s"]
    began = time.monotonic() - 40.0
    ray_backend.measure_refit(RefitRequest("", (4,), (40,), 4, 0), config, None, began)
    assert 0.0 <= whole - 40.0 - asked["deadline_s"] < 5.0
    with pytest.raises(RefitError, match=r"read for 9\d s, which leaves nothing of refit.deadline_s=100"):
        ray_backend.measure_refit(RefitRequest("", (4,), (40,), 4, 0), config, None, began - 55.0)


def test_the_time_of_a_measurement_on_ray_counts_from_the_start_of_the_re_fit(monkeypatch):
    seen = []
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(ray_backend, "measure_refit", lambda *given: seen.append(given))
    before = time.monotonic()
    measure = backends.choose_measure(run_config(placement="ray"))
    after = time.monotonic()
    monkeypatch.setattr(backends, "time", SimpleNamespace(monotonic=lambda: after + 99.0))
    measure(None)
    assert before <= seen[0][3] <= after


# -- Processes of a watch and of a sweep ---------------------------------------------------------------------


RUN = """\
model: {num_layers: 2, hidden_size: 32, num_heads: 4, num_kv_heads: 2, vocab_multiple: 16}
data: {kind: synthetic, seq_len: 32}
train: {steps: 20, global_batch_size: 8}
refit: {mode: clip, placement: PLACEMENT, deadline_s: DEADLINE}
"""
WRITE = "import sys; open(sys.argv[1] + '/schedule.json', 'w').close()"
HANG = "import time; time.sleep(600)"
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + HANG


def save(folder, script, *, placement="external", content="", deadline_s=None):
    """What the commands look at of a snapshot or a checkpoint, before its process reads the rest."""
    folder.mkdir(parents=True, exist_ok=True)
    # Time enough for all others, on a busy machine, too.
    deadline_s = deadline_s or ("0.2" if script == HANG else "100")
    settings = RUN.replace("DEADLINE", deadline_s).replace("PLACEMENT", placement)
    (folder / "config.yaml").write_text(settings)
    facts = {"made": content}
    listed = {"config.yaml": hash_file(folder / "config.yaml")}
    (folder / "MANIFEST.json").unlink(missing_ok=True)
    write_manifest(folder, Manifest(listed, "bdtrain-training/1", facts))


@pytest.fixture
def scripted(monkeypatch):
    """``scripted[name] = script``: what the process of a step, or of a checkpoint, does; and its command."""
    scripts = {}
    made = []

    def words(arguments):
        options = command._parser().parse_args(arguments)
        made.append(arguments)
        folder = options.out or result_folder(options.run, options.step)
        folder.mkdir(parents=True, exist_ok=True)
        name = options.step if options.run else options.checkpoint[0].name
        return [sys.executable, "-S", "-c", scripts[name], str(folder)]

    monkeypatch.setattr(command, "GRACE_S", 0.3)
    monkeypatch.setattr(apart, "GRACE_S", 0.3)
    monkeypatch.setattr(command, "refit_command", words)
    scripts["made"] = made
    return scripts


@pytest.fixture
def watched(tmp_path, scripted):
    """A run that has ended with snapshots of some steps, and a watch over it whose children are scripts."""
    run = tmp_path / "run"
    (run / "refit").mkdir(parents=True)
    (run / EXIT_FILE).write_text("{}")

    def watch(scripts):
        scripted.update(scripts)
        for step, script in scripts.items():
            save(snapshots_folder(run) / step_name(step), script)
        return command.main(["--run", str(run), "--watch"])

    watch.run = run
    return watch


def test_a_re_fit_that_hangs_ends_alone_and_the_watch_goes_on(watched, capsys):
    began = time.monotonic()
    assert watched({1: HANG, 2: "import sys; sys.exit(8)", 3: WRITE}) == 0
    assert time.monotonic() - began < 60
    assert (result_folder(watched.run, 3) / SCHEDULE_FILE).exists()
    assert capsys.readouterr().err.splitlines() == [
        "error: the re-fit of step 1 did not end at its deadline (refit.deadline_s) and was killed",
        "error: the re-fit of step 2 ended with 8",
    ]


def test_what_a_process_says_is_told_once_and_its_error_last(watched, capsys):
    talk = "import sys; sys.exit('warning: slow\\nerror: two things:\\n  a\\n  b')"
    assert watched({1: talk}) == 0
    assert capsys.readouterr().err == "warning: slow\nerror: two things:\n  a\n  b\n"


def test_a_re_fit_that_was_killed_is_told_and_the_watch_goes_on(watched, capsys):
    kill = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert watched({1: WRITE, 2: kill, 3: WRITE}) == 0
    assert capsys.readouterr().err == "error: the re-fit of step 2 was ended by SIGKILL\n"
    assert not (result_folder(watched.run, 2) / SCHEDULE_FILE).exists()


def test_a_watch_that_is_asked_to_end_takes_its_re_fit_along(watched):
    note = "import os, signal, sys; open(sys.argv[1] + '/schedule.json', 'w').write(str(os.getpid())); "
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        watched({1: f"{note} os.kill(os.getppid(), signal.SIGTERM); {HANG}", 2: WRITE})
    assert end.value.code == 128 + signal.SIGTERM and signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(ProcessLookupError):
        os.kill(int((result_folder(watched.run, 1) / SCHEDULE_FILE).read_text()), 0)
    assert not (result_folder(watched.run, 2) / SCHEDULE_FILE).exists()


def test_a_watch_measures_a_step_again_when_the_run_comes_to_it_with_other_weights(
    watched, scripted, monkeypatch, capsys
):
    """As after a start from the beginning with other settings: the same step, another snapshot."""
    (watched.run / EXIT_FILE).unlink()
    place = snapshots_folder(watched.run) / step_name(1)
    looks = []

    def look(seconds):
        looks.append(len(scripted["made"]))
        if len(looks) == 2:
            save(place, "", content="other weights")
        if len(looks) == 3:
            (watched.run / EXIT_FILE).write_text("{}")

    monkeypatch.setattr(command, "time", SimpleNamespace(sleep=look))
    assert watched({1: "raise SystemExit(8)"}) == 0
    assert looks == [1, 1, 2] and len(scripted["made"]) == 2


def test_a_child_that_does_not_hear_is_ended_with_the_watch():
    process = subprocess.Popen([sys.executable, "-S", "-c", DEAF])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(apart, "GRACE_S", 0.2)
        apart.end_process(process)
    assert process.poll() is not None


def test_a_child_that_does_not_hear_is_ended_when_the_watch_is_asked_a_second_time():
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True)"
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", f"{code}; time.sleep(600)"], stdout=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.read(1) == b"1"
    again = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM))
    try:
        with pytest.raises(SystemExit), apart.exit_on_request():
            again.start()
            apart.end_process(process)
        assert process.poll() == -signal.SIGKILL
    finally:
        again.join()
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_snapshot_that_cannot_be_read_for_a_moment_is_told_and_the_watch_goes_on(
    watched, monkeypatch, capsys
):
    digest = snapshot.snapshot_digest

    def look(folder):
        if folder.name == step_name(1):
            raise OSError(116, "Stale file handle", str(folder))
        if folder.name == step_name(2):
            raise FileNotFoundError(2, "No such file or directory", str(folder))
        return digest(folder)

    monkeypatch.setattr(snapshot, "snapshot_digest", look)
    assert watched({1: WRITE, 2: WRITE, 3: WRITE}) == 0
    made = [step for step in (1, 2, 3) if (result_folder(watched.run, step) / SCHEDULE_FILE).exists()]
    stale = snapshots_folder(watched.run) / step_name(1)
    assert made == [3] and capsys.readouterr().err == f"error: {stale}: Stale file handle\n"


def test_a_watch_and_a_sweep_hand_their_settings_to_each_re_fit(watched, scripted, tmp_path):
    words = ["--data", "d", "--block-sizes", "4,8", "--device", "cpu", "refit.blocks=512"]
    scripted.update(dict.fromkeys((7, "a", "b"), "raise SystemExit(8)"))
    save(snapshots_folder(watched.run) / step_name(7), "")
    for name in "ab":
        save(tmp_path / name, "", placement="process")
    places = [
        "--checkpoint",
        str(tmp_path / "a"),
        "--checkpoint",
        str(tmp_path / "b"),
        "--out",
        str(tmp_path),
    ]
    assert command.main(["--run", str(watched.run), "--watch", *words]) == 0
    assert command.main([*places, *words]) == 8
    options = command._parser().parse_args(words)
    found = [command._parser().parse_args(made) for made in scripted["made"]]
    same = ("data", "block_sizes", "device", "overrides")
    assert all(getattr(one, name) == getattr(options, name) for one in found for name in same)
    assert [(one.run, one.step, one.watch, one.one_of_sweep) for one in found] == [
        (watched.run, 7, False, False),
        (None, None, False, True),
        (None, None, False, True),
    ]
    assert [one.checkpoint for one in found] == [None, [tmp_path / "a"], [tmp_path / "b"]]
    made = apart.refit_command(scripted["made"][0])
    assert made[:4] == [sys.executable, "-P", "-m", "bdtrain.refit"] and made[4:] == scripted["made"][0]


def write_results(folder, records, step=9):
    """What a re-fit leaves behind, and its report."""
    results = judge(records, NoisePlan(block_size=4), run_config())
    schedule = make_schedule(results, NoisePlan(block_size=4), run_uid="u", step=step, digest="", version=1)
    request = RefitRequest("", (4,), (40,), 4, 0)
    folder.mkdir(parents=True, exist_ok=True)
    report = publish(folder, schedule, results, request=request, seconds={}, measurement={})
    return Refit(schedule, results, folder, {}), report


def test_a_checkpoint_of_a_sweep_that_hangs_costs_itself_alone(tmp_path, scripted, capsys):
    said = "the re-fit took longer than refit.deadline_s=0.2; nothing was written"
    scripts = {
        "hangs": HANG,
        "ends-itself": f"raise SystemExit('error: {said}')",
        "damaged": "import sys; print('error: damaged is damaged', file=sys.stderr); sys.exit(7)",
        "good": "import shutil, sys; shutil.copy(sys.argv[1] + '/../report.json', sys.argv[1])",
    }
    scripted.update(scripts)
    out = tmp_path / "out"
    made, _ = write_results(out, {4: make_records(4, 1)})
    words = []
    for name, script in scripts.items():
        # lag_steps and wait are a trainer's: here nobody waits.
        save(tmp_path / name, script, placement="process")
        words += ["--checkpoint", str(tmp_path / name)]
    began = time.monotonic()
    assert command.main([*words, "--out", str(out)]) == 8
    assert time.monotonic() - began < 60
    hung = f"the re-fit of {tmp_path / 'hangs'} did not end at its deadline (refit.deadline_s) and was killed"
    found = capsys.readouterr()
    assert found.err.splitlines() == [f"error: {hung}", f"error: {said}", "error: damaged is damaged"]
    table = json.loads((out / "sweep.json").read_text())
    assert [(Path(one["checkpoint"]).name, one["error"], one["exit_code"]) for one in table["failures"]] == [
        ("hangs", hung, 8),
        ("ends-itself", said, 1),
        ("damaged", "damaged is damaged", 7),
    ]
    (row,) = table["rows"]
    assert (row["checkpoint"], row["step"], row["winner"]) == (
        str(tmp_path / "good"),
        9,
        made.results[4].winner,
    )


def test_a_checkpoint_of_a_sweep_on_ray_that_hangs_costs_itself_alone(
    tmp_path, sessions, monkeypatch, capsys
):
    class Stopped(FakePool):
        def measure(self, deadline, late, quorum):
            if sessions.started == 1:
                time.sleep(60)
            super().measure(deadline, late, quorum)

    def refit(checkpoint, folder, *, measure, **_):
        request = SimpleNamespace(shards=1, threads=1, device="cpu", block_sizes=(4,))
        return write_results(folder, measure(request)[0])[0]

    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(ray_backend, "WorkerPool", Stopped)
    monkeypatch.setattr(job, "run_refit", refit)
    words = []
    for name in ("hangs", "good"):
        save(tmp_path / name, "", placement="ray", deadline_s="1.0" if name == "hangs" else "100")
        words += ["--checkpoint", str(tmp_path / name)]
    assert command.main([*words, "--out", str(tmp_path / "out")]) == 8
    assert sessions.events == ["start 1 with 1", "end 1", "start 2 with 1", "end 2"]
    table = json.loads((tmp_path / "out" / "sweep.json").read_text())
    (failure,), (row,) = table["failures"], table["rows"]
    said = "the re-fit took longer than refit.deadline_s=1; nothing was written"
    assert (failure["error"], failure["exit_code"]) == (said, 8) and table["complete"]
    assert row["checkpoint"] == str(tmp_path / "good")
    assert capsys.readouterr().err == f"error: {said}\n"


def test_gradients_that_take_too_long_cost_their_report_alone(tmp_path, monkeypatch, capsys):
    def refit(checkpoint, folder, **_):
        refit, report = write_results(folder, {4: make_records(4, 1)})
        add_gradients(folder, report, lambda: time.sleep(60) or {})
        return refit

    monkeypatch.setattr(job, "run_refit", refit)
    save(tmp_path / "c", "", placement="process", deadline_s="0.5")
    assert command.main(["--checkpoint", str(tmp_path / "c"), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert "no report on gradients: RefitError: the re-fit took longer than refit.deadline_s=0.5" in said.out
    assert f"wrote {tmp_path / 'out'}\n" in said.out and not said.err
    assert len(json.loads((tmp_path / "out" / "sweep.json").read_text())["rows"]) == 1
    assert "gradients" not in json.loads((tmp_path / "out" / "report.json").read_text())


def test_a_sweep_that_is_asked_to_end_takes_its_process_along_and_keeps_the_table(tmp_path, scripted):
    note = "import os, signal, sys; open(sys.argv[1] + '/pid', 'w').write(str(os.getpid())); "
    scripted.update(a="raise SystemExit(8)", b=f"{note} os.kill(os.getppid(), signal.SIGTERM); {HANG}")
    words = []
    for name in "ab":
        save(tmp_path / name, "", placement="process")
        words += ["--checkpoint", str(tmp_path / name)]
    with pytest.raises(SystemExit) as end:
        command.main([*words, "--out", str(tmp_path / "out")])
    assert end.value.code == 128 + signal.SIGTERM
    (note,) = (tmp_path / "out").glob("*/pid")
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)
    table = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert not table["complete"] and len(table["failures"]) == 1


def test_only_a_sweep_is_shown_in_mlflow(capsys):
    assert command.main(["--run", "r", "--mlflow-uri", "sqlite:///x.db"]) == 8
    assert "--mlflow-uri shows a sweep and belongs to --checkpoint" in capsys.readouterr().err
