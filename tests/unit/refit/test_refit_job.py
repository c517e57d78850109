"""A re-fit's own rules: one at a time in a folder, shards in any order, the report before the schedule."""

import fcntl
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from bdtrain.diffusion.plan import NoisePlan
from bdtrain.diffusion.variance import BlockRecords
from bdtrain.errors import DataError, RefitError
from bdtrain.refit import job
from bdtrain.refit.job import (
    LOCK_FILE,
    is_at_work,
    join_shards,
    judge,
    make_schedule,
    only_one,
    publish,
    run_refit,
    search_settings,
)
from bdtrain.refit.request import RefitRequest
from bdtrain.refit.schedule_file import REPORT_FILE, SCHEDULE_FILE, plan_digest, read_schedule
from bdtrain.refit.snapshot import result_folder, set_aside, snapshot_folder
from tests.unit.refit.sweep_cases import run_config

HOLDER = """\
import fcntl, sys
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def held_elsewhere(tmp_path):
    """Another process that holds the lock of ``tmp_path``."""
    with subprocess.Popen(
        [sys.executable, "-S", "-c", HOLDER, str(tmp_path / LOCK_FILE)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_process_is_refused_until_the_first_one_is_gone(tmp_path, held_elsewhere):
    with pytest.raises(RefitError, match="another re-fit is at work"), only_one(tmp_path):
        pytest.fail("two at once")
    assert is_at_work(tmp_path)
    held_elsewhere.kill()
    held_elsewhere.wait()
    with only_one(tmp_path):
        assert is_at_work(tmp_path)
    assert not is_at_work(tmp_path)


def test_nobody_is_at_work_where_there_is_no_folder(tmp_path):
    assert not is_at_work(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_the_lock_goes_with_an_error(tmp_path):
    with pytest.raises(ValueError), only_one(tmp_path):
        raise ValueError
    assert not is_at_work(tmp_path)


def test_a_lock_is_not_inherited(tmp_path):
    """A worker that outlives the re-fit must not keep the next one out."""
    with only_one(tmp_path), (tmp_path / LOCK_FILE).open() as other:
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert not os.get_inheritable(other.fileno())


def records(sequences, *, seed=0, block_size=4):
    """Blocks whose loss rises with the share of masked tokens."""
    generator = np.random.default_rng(seed)
    count = 8 * len(sequences)
    masked = np.tile(np.arange(1, block_size + 1), -(-count // block_size))[:count]
    nll = masked * (1 + 2 * masked / block_size) * generator.gamma(4, 0.25, count)
    return BlockRecords(
        sequence=np.repeat(sequences, 8),
        maskable=np.full(count, block_size),
        masked=masked,
        nll=nll,
    )


def test_shards_are_joined_in_their_order_whatever_order_they_came_in():
    request = RefitRequest("", (4, 8), (4, 4), 2, 0)
    parts = {
        0: {4: records([0, 1])},
        1: {4: records([2, 3], seed=1)},
        2: {8: records([0, 1], block_size=8)},
        3: {8: records([2, 3], block_size=8, seed=2)},
    }
    one = join_shards(request, parts)
    other = join_shards(request, dict(reversed(parts.items())))
    assert list(one) == list(other) == [4, 8]
    for size in (4, 8):
        assert one[size].sequence.tolist() == sorted([0, 1, 2, 3] * 8)
        np.testing.assert_array_equal(one[size].nll, other[size].nll)
    partial = join_shards(request, {0: parts[0], 3: parts[3]})
    assert (partial[4].sequences, partial[8].sequences) == (2, 2)
    with pytest.raises(RefitError, match="nothing was measured for block size 8"):
        join_shards(request, {0: parts[0], 1: parts[1]})


def test_the_search_follows_the_settings_of_the_run():
    settings = search_settings(run_config(criterion="relative", min_gain=0.1, widths=[0.5]))
    assert (settings.mode, settings.criterion, settings.min_gain) == ("clip", "relative", 0.1)
    assert (settings.widths, settings.bootstrap_draws, settings.seed) == ((0.5,), 50, 3)
    assert settings.adopt and not search_settings(run_config(adopt=False)).adopt
    # Of a run without re-fits one may still be asked for.
    assert search_settings(run_config(mode="off")).mode == "clip"


def test_a_loss_that_is_not_finite_is_no_result():
    with pytest.raises(DataError, match="not finite"):
        BlockRecords([0], [4], [2], [float("nan")])


def test_what_is_published_is_a_schedule_with_its_report_for_each_block_size(tmp_path):
    current = NoisePlan(4)
    found = {4: records(range(64)), 8: records(range(64), block_size=8)}
    results = judge(found, current, run_config())
    schedule = make_schedule(results, current, run_uid="u", step=7, digest="d", version=2)
    request = RefitRequest("", (4, 8), (64, 64), 2, 0)
    folder = tmp_path / "not" / "there"
    contents = []
    for number in (1.0, 2.0):
        publish(
            folder,
            schedule,
            results,
            request=request,
            seconds={"search": number},
            measurement={"backend": str(number)},
        )
        contents.append((folder / SCHEDULE_FILE).read_bytes())
    # Times are in the report alone: the schedule's bytes are of what was decided.
    assert contents[0] == contents[1]
    read = read_schedule(folder / SCHEDULE_FILE)
    assert read == schedule and read.based_on == plan_digest(current)
    assert {size: made.plan.block_size for size, made in read.decisions.items()} == {4: 4, 8: 8}
    report = json.loads((folder / REPORT_FILE).read_text())
    assert (report["run_uid"], report["snapshot_step"], report["version"]) == ("u", 7, 2)
    assert report["request"] == json.loads(json.dumps(request.to_dict()))
    for size, made in read.decisions.items():
        told = report["results"][str(size)]
        assert (told["adopt"], told["reason"], told["plan"]) == (made.adopt, made.reason, made.plan.to_dict())


def test_a_schedule_is_not_seen_before_its_report(tmp_path, monkeypatch):
    current = NoisePlan(4)
    results = judge({4: records(range(64))}, current, run_config())
    schedule = make_schedule(results, current, run_uid="u", step=7, digest="", version=1)
    (tmp_path / REPORT_FILE).mkdir()
    with pytest.raises(OSError):
        publish(
            tmp_path,
            schedule,
            results,
            request=RefitRequest("", (4,), (64,), 2, 0),
            seconds={},
            measurement={},
        )
    assert not (tmp_path / SCHEDULE_FILE).exists()


@pytest.fixture
def outlived(tmp_path, monkeypatch):
    """A re-fit of step 5; ``meanwhile(when)`` is called as it measures and as it looks at gradients."""
    run, snapshot = tmp_path, snapshot_folder(tmp_path, 5)
    snapshot.mkdir(parents=True)
    (snapshot / "MANIFEST.json").write_text("weights")
    saved = SimpleNamespace(config=run_config(gradient_variance=True), facts={"run_uid": "u", "step": 5})
    monkeypatch.setattr(job, "open_model", lambda folder: saved)
    monkeypatch.setattr(job, "open_rows", lambda *_: SimpleNamespace(num_samples=64))
    monkeypatch.setattr(job, "plan_in_use", lambda _: NoisePlan(4))

    def start(meanwhile):
        def measure(request):
            meanwhile("measure")
            return {4: records(range(64))}, {}

        def gradients(*_):
            meanwhile("gradients")
            return {"of": "the first"}

        monkeypatch.setattr(job, "_report_gradients", gradients)
        run_refit(snapshot, result_folder(run, 5), measure=measure)

    return run, start


def begun_anew(run, *, again):
    """What the next attempt does with the re-fits of one before; ``again``: it is at step 5 itself."""
    assert set_aside(run, 2) is not None
    if again:
        folder = result_folder(run, 5)
        folder.mkdir(parents=True)
        (folder / LOCK_FILE).touch()
        (folder / REPORT_FILE).write_text("of the second")


@pytest.mark.parametrize("again", [False, True])
def test_a_re_fit_that_outlives_its_run_writes_nothing_into_the_next_one(outlived, again):
    """Its trainer was killed, its snapshot is gone, and the lock that it holds has another name."""
    run, start = outlived
    with pytest.raises(RefitError, match="begun anew"):
        start(lambda when: begun_anew(run, again=again) if when == "measure" else None)
    found = {path.name for path in (run / "refit").rglob("*")} if (run / "refit").exists() else set()
    assert found == ({result_folder(run, 5).name, LOCK_FILE, REPORT_FILE} if again else set())
    assert not again or (result_folder(run, 5) / REPORT_FILE).read_text() == "of the second"


def test_its_gradients_are_not_for_the_next_run_either(outlived, capsys):
    run, start = outlived
    start(lambda when: begun_anew(run, again=True) if when == "gradients" else None)
    assert (result_folder(run, 5) / REPORT_FILE).read_text() == "of the second"
    assert "no report on gradients: RefitError" in capsys.readouterr().out


def test_a_re_fit_whose_snapshot_alone_is_gone_is_published(outlived):
    """Only two snapshots are kept: a slow re-fit has its weights in memory by then."""
    run, start = outlived
    gone = snapshot_folder(run, 5) / "MANIFEST.json"
    start(lambda when: gone.unlink(missing_ok=True))
    folder = result_folder(run, 5)
    assert (folder / SCHEDULE_FILE).exists()
    assert json.loads((folder / REPORT_FILE).read_text())["gradients"] == {"of": "the first"}
