"""Profiles: which steps and ranks they take, what they write, and that they never cost the run."""

from __future__ import annotations

import errno
import gzip
import inspect
import io
import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bdtrain.checkpoint.communicator import OneProcess
from bdtrain.config import changed_settings, dump_resolved, fixed_changes, fixed_settings, load_config
from bdtrain.errors import ConfigError
from bdtrain.tracking.console import Console
from bdtrain.train.profile_memory import MAX_ALLOCATIONS, CudaMemory, summarise_memory
from bdtrain.train.profile_recording import Recording, check_complete
from bdtrain.train.profiling import StepProfiler, check_ranks, schedule_ranges
from tests.unit.config.helpers import load, only_problem


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("10:13", [10, 11, 12]),
        ("1:2", [1]),
        # Some of these are numbers in base 60 to YAML 1.1, some are not.
        ("58:62", [58, 59, 60, 61]),
        ("99:101", [99, 100]),
        # The last step is 100.
        ("100:101", [100]),
    ],
)
def test_a_range_is_half_open_and_counts_from_one(text, steps):
    config = load(f"profile.steps={text}").config
    assert list(config.profile.traced_steps) == steps
    assert config.profile.steps == text


def test_a_range_is_the_same_from_a_file_from_a_dump_and_in_quotes(tmp_path):
    text = dump_resolved(load("profile.steps=10:13").config)
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert load_config([file]).config.profile == load("profile.steps='10:13'").config.profile
    file.write_text(text.replace("'10:13'", "10:13"))
    assert load_config([file]).config.profile.steps == "10:13"


def test_nothing_is_traced_by_default():
    assert list(load().config.profile.traced_steps) == []


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "profile.steps=10-13",
            "profile.steps='10-13'; it must be FIRST:STOP, as in 10:13 for the steps 10, 11",
        ),
        ("profile.steps=ten", "it must be FIRST:STOP"),
        ("profile.steps=10:", "it must be FIRST:STOP"),
        ("profile.steps=0:3", "read as 0:3; steps count from 1"),
        ("profile.steps=12", "profile.steps=12; it must be FIRST:STOP"),
        ("profile.steps=613", "profile.steps=613; it must be FIRST:STOP"),
        ("profile.steps=1:2:3", "profile.steps='1:2:3'; it must be FIRST:STOP"),
        ("profile.steps=13:10", "read as 13:10, which holds no step"),
        ("profile.steps=90:90", "read as 90:90, which holds no step"),
        ("profile.steps=[10,13]", "profile.steps=[10, 13]; it must be FIRST:STOP"),
        ("profile.steps=true", "it must be FIRST:STOP"),
        (
            "profile.steps=99:102",
            "profile.steps=99:102 is past the last step, train.steps=100; choose profile.steps=98:101 or an "
            "earlier range, or train longer",
        ),
        ("profile.ranks=all", "profile.ranks would be ignored: profile.steps is null, which traces nothing"),
        ("profile.stacks=true", "profile.stacks would be ignored"),
        ("profile.step=1:2", "did you mean profile.steps?"),
    ],
)
def test_a_wrong_setting_is_refused_with_what_is_allowed(override, expected):
    assert expected in only_problem(override)


@pytest.mark.parametrize(
    ("text", "ranks"),
    [("0", (0,)), ("3,1", (1, 3)), ("[0,2]", (0, 2)), ("all", (0, 1, 2, 3)), ("1,1", (1,))],
)
def test_ranks_are_numbers_or_all(text, ranks):
    profile = load("profile.steps=1:2", f"profile.ranks={text}").config.profile
    assert profile.traced_ranks(4) == ranks


@pytest.mark.parametrize("text", ["first", "-1", "0;1", "[]", "1.5", "true"])
def test_what_is_no_rank_is_refused(text):
    assert "profile.ranks" in only_problem("profile.steps=1:2", f"profile.ranks={text}")


def test_a_rank_that_the_run_does_not_have_is_refused():
    config = load("profile.steps=1:2", "profile.ranks=0,2").config
    with pytest.raises(
        ConfigError, match=r"profile.ranks=0,2, but the run has 2 ranks; choose from 0 to 1, or"
    ):
        check_ranks(config, 2)
    check_ranks(config, 3)


def test_a_continued_run_may_change_its_profile():
    saved, now = load().config, load("profile.steps=10:13").config
    assert fixed_changes(fixed_settings(saved), fixed_settings(now)) == []
    assert ("profile.steps", None, "10:13") in changed_settings(saved, now)


class Run:
    """A run that does nothing but a little arithmetic in each step."""

    def __init__(self, folder: Path, *overrides: str, first_step=1, attempt=1):
        self.folder, self.out, self.events = folder, io.StringIO(), []
        self.transformer = SimpleNamespace(timers=None)
        self.number = first_step
        self.profiler = StepProfiler(
            load(*overrides).config,
            device=torch.device("cpu"),
            folder=folder,
            attempt=attempt,
            communicator=OneProcess(),
            console=Console(stream=self.out),
            metrics=self,
            transformer=self.transformer,
            first_step=first_step,
        )

    def event(self, name, step, **facts):
        """What the metrics file is told."""
        self.events.append((name, step, facts["on_rank"]))

    def steps(self, count):
        for _ in range(count):
            with self.profiler.step(self.number):
                weight = torch.nn.Parameter(torch.ones(64, 64))
                (weight @ torch.ones(64, 64)).relu().sum().backward()
            self.profiler.finish_if_over()
            self.number += 1
        return self

    @property
    def said(self):
        return self.out.getvalue()

    @property
    def files(self):
        return sorted(path.name for path in self.folder.glob("profile/*"))


def events_of(path):
    return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


def traced(path):
    names = [event["name"] for event in events_of(path) if event.get("cat") == "user_annotation"]
    return sorted(int(name.partition("#")[2]) for name in names if name.startswith("ProfilerStep#"))


def test_three_files_tell_of_the_steps_that_were_asked_for(tmp_path):
    run = Run(tmp_path, "profile.steps=3:5").steps(6)
    stem = "rank-00000-steps-3-4"
    assert run.files == [f"memory-{stem}.json", f"operators-{stem}.txt", f"trace-{stem}.json.gz"]
    assert traced(tmp_path / "profile" / f"trace-{stem}.json.gz") == [3, 4]
    operators = (tmp_path / "profile" / f"operators-{stem}.txt").read_text()
    assert operators.startswith("steps 3 to 4 of rank 0 in attempt 1, cpu")
    assert "aten::mm" in operators
    # With shapes.
    assert "[64, 64]" in operators
    assert f"profile of steps 3 to 4 on rank 0 in {tmp_path}/profile:\n  trace-{stem}.json.gz" in run.said
    assert run.profiler.failed == 0


def test_the_memory_file_accounts_for_every_tensor(tmp_path):
    Run(tmp_path, "profile.steps=3:5").steps(5)
    memory = json.loads((tmp_path / "profile" / "memory-rank-00000-steps-3-4.json").read_text())
    timeline = memory["timeline"]
    held = [sum(timeline["bytes"][: place + 1]) for place in range(len(timeline["bytes"]))]
    assert timeline["held_bytes"] == held
    assert memory["peak"]["bytes"] == max(held)
    # What was there before the trace and freed in it (an earlier test's, say) is in the line, held by none.
    assert sum(row["bytes"] for row in memory["peak"]["holders"]) >= max(held)
    # The weight, the other factor, their product, its relu: 64 x 64 float32 each, in both steps.
    assert sum(size for size in timeline["bytes"] if size > 0) >= 2 * 4 * 64 * 64 * 4
    assert memory["peak_resident_bytes"] >= memory["resident_bytes"] > 0
    assert set(timeline["step"]) <= {3, 4, None}
    assert "aten::mm" in {row["name"] for row in memory["operators"]}


def test_memory_is_put_down_to_the_innermost_operator_and_range():
    def event(name, category, start, length, thread=1):
        return {"name": name, "cat": category, "ts": start, "dur": length, "tid": thread, "ph": "X"}

    def change(when, size, address, thread=1):
        arguments = {"Bytes": size, "Addr": address, "Device Type": 0}
        return {"name": "[memory]", "cat": "cpu_instant_event", "ts": when, "tid": thread, "args": arguments}

    summary = summarise_memory(
        [
            change(5.0, 100, 1),
            event("aten::mm", "cpu_op", 4.0, 2.0),
            event("aten::matmul", "cpu_op", 3.0, 4.0),
            event("forward", "user_annotation", 2.0, 10.0),
            event("ProfilerStep#7", "user_annotation", 2.0, 20.0),
            change(6.5, 10, 2),
            change(15.0, -100, 1),
            # Another thread is inside nothing.
            change(16.0, 40, 3, thread=2),
            # Not the CPU's.
            {**change(5.5, 10**9, 4), "args": {"Bytes": 10**9, "Addr": 4, "Device Type": 1}},
        ]
    )
    assert summary["peak"] == {
        "bytes": 110,
        "time_us": 1.5,
        "step": 7,
        "operator": "aten::matmul",
        "range": "forward",
        "holders": [
            {"operator": "aten::mm", "range": "forward", "tensors": 1, "bytes": 100},
            {"operator": "aten::matmul", "range": "forward", "tensors": 1, "bytes": 10},
        ],
    }
    assert summary["timeline"]["held_bytes"] == [100, 110, 10, 50]
    assert summary["timeline"]["step"] == [7, 7, 7, None]
    assert summary["operators"][0] == {
        "name": "aten::mm",
        "allocations": 1,
        "allocated_bytes": 100,
        "net_bytes": 100,
    }
    assert summarise_memory([])["peak"] == {"bytes": 0, "holders": []}


def test_a_run_that_starts_inside_the_range_traces_the_rest_and_says_so_once(tmp_path):
    run = Run(tmp_path, "profile.steps=10:13", first_step=11, attempt=2)
    assert run.said.count("only steps 11 to 12 traced, without a warm-up") == 1
    run.steps(3)
    assert [name for name in run.files if name.startswith("trace")] == [
        "trace-rank-00000-steps-11-12-attempt-2.json.gz"
    ]


def test_a_run_that_starts_with_the_range_says_that_nothing_warmed_it_up(tmp_path):
    run = Run(tmp_path, "profile.steps=1:2")
    assert "without a warm-up, since the attempt begins with step 1" in run.said
    assert len(run.steps(2).files) == 3


def test_a_run_that_starts_after_the_range_traces_nothing_and_says_so_once(tmp_path):
    run = Run(tmp_path, "profile.steps=10:13", first_step=13).steps(3)
    assert run.said == "profile.steps=10:13: this attempt begins with step 13, nothing is traced\n"
    assert not (tmp_path / "profile").exists()


def test_an_attempt_never_writes_over_the_files_of_another(tmp_path):
    Run(tmp_path, "profile.steps=2:3").steps(3)
    before = {path: path.read_bytes() for path in tmp_path.glob("profile/*")}
    run = Run(tmp_path, "profile.steps=2:3", attempt=2).steps(3)
    assert len(run.files) == 6
    assert {path: path.read_bytes() for path in before} == before


def test_what_comes_between_two_steps_cuts_the_profile(tmp_path):
    """Validation and checkpoints may be long: they are no part of it."""
    run = Run(tmp_path, "profile.steps=2:5").steps(3)
    run.profiler.finish()
    torch.ones(7, 7) @ torch.ones(7, 7)
    run.steps(2)
    traces = sorted(tmp_path.glob("profile/trace-*"))
    assert [path.name for path in traces] == [
        "trace-rank-00000-steps-2-3.json.gz",
        "trace-rank-00000-steps-4-4.json.gz",
    ]
    assert [traced(path) for path in traces] == [[2, 3], [4]]
    assert all("7, 7" not in path.read_text() for path in tmp_path.glob("profile/operators-*"))


def test_a_run_that_stops_early_writes_what_there_is_after_its_save(tmp_path):
    run = Run(tmp_path, "profile.steps=2:9").steps(3)
    run.profiler.halt()
    assert run.files == []
    torch.ones(7, 7) @ torch.ones(7, 7)
    run.profiler.finish()
    assert [name for name in run.files if name.startswith("trace")] == ["trace-rank-00000-steps-2-3.json.gz"]
    assert "7, 7" not in next(tmp_path.glob("profile/operators-*")).read_text()


def test_a_run_that_fails_leaves_no_recording_and_no_file(tmp_path):
    run = Run(tmp_path, "profile.steps=2:9").steps(2)
    with pytest.raises(ValueError, match="of the step"), run.profiler.step(3):
        raise ValueError("of the step")
    run.profiler.close()
    assert run.files == []
    assert run.transformer.timers is None
    # The library is free for the next one.
    assert len(Run(tmp_path, "profile.steps=2:3").steps(3).files) == 3


def test_another_rank_traces_nothing(tmp_path):
    run = Run(tmp_path, "profile.steps=2:3", "profile.ranks=1").steps(3)
    assert (run.files, run.said) == ([], "")


def test_a_folder_that_cannot_be_made_costs_the_profile_and_not_the_run(tmp_path):
    (tmp_path / "profile").write_text("in the way")
    run = Run(tmp_path, "profile.steps=2:3").steps(4)
    assert "the profile of step 2 on rank 0 was not written:" in run.said
    assert "File exists; training goes on" in run.said
    assert run.profiler.failed == 1
    assert run.events == [("profile_failed", 2, 0)]


def test_a_full_disk_leaves_no_half_of_a_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("bdtrain.train.profile_recording.shutil.copyfileobj", full)
    run = Run(tmp_path, "profile.steps=2:3").steps(3)
    assert "No space left on device; training goes on" in run.said
    assert not [name for name in run.files if name.startswith((".tmp", "trace"))]


def test_a_trace_that_the_disk_cut_is_noticed(tmp_path):
    path = tmp_path / "trace.json"
    path.write_text('{"traceEvents": []}\n')
    check_complete(path)
    path.write_text('{"traceEvents": [')
    with pytest.raises(OSError, match="No space left"):
        check_complete(path)


def test_a_profiler_that_cannot_start_is_said_once(tmp_path, monkeypatch):
    def refuse(_):
        raise RuntimeError("another profiler\nis on")

    monkeypatch.setattr(Recording, "begin", refuse)
    run = Run(tmp_path, "profile.steps=2:5").steps(5)
    assert run.said.count("was not written: another profiler is on; training goes on") == 1
    assert run.profiler.failed == 1


def test_stacks_are_recorded_on_request(tmp_path):
    Run(tmp_path / "without", "profile.steps=2:3")
    for name, stacks in (("without", "false"), ("with", "true")):
        (tmp_path / name).mkdir()
        Run(tmp_path / name, "profile.steps=2:3", f"profile.stacks={stacks}").steps(3)
    found = {
        name: any("test_profiling.py" in event.get("name", "") for event in events_of(path))
        for name in ("without", "with")
        for path in (tmp_path / name).glob("profile/trace-*")
    }
    assert found == {"without": False, "with": True}


def test_marks_of_the_schedule_are_ranges_while_a_step_is_traced_only():
    transformer = SimpleNamespace(timers=None)
    with torch.profiler.profile() as profiler, schedule_ranges(transformer):
        timers = transformer.timers
        timers("forward-backward", log_level=1).start(barrier=True)
        for _ in range(2):
            timers("forward-compute", log_level=2).start()
            torch.ones(3).sum()
            timers("forward-compute").stop()
        timers("forward-backward").stop()
        # Never begun.
        timers("backward-compute").stop()
    assert transformer.timers is None
    counts = {event.key: event.count for event in profiler.key_averages() if event.is_user_annotation}
    assert counts == {"forward-backward": 1, "forward-compute": 2}


@pytest.fixture
def history(monkeypatch):
    """CUDA's allocator and what is asked of it; its history is a number of the calls so far."""
    calls = []

    def switch(enabled, **_):
        calls.append(enabled)

    def snapshot():
        calls.append("snapshot")
        return {"calls": len(calls)}

    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", switch)
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", snapshot)
    monkeypatch.setattr("bdtrain.train.profile_recording.CpuMemory", CudaMemory)
    return calls


def test_a_gpu_keeps_the_history_of_its_allocator_for_the_traced_steps_only(tmp_path, history):
    run = Run(tmp_path, "profile.steps=2:3").steps(1)
    assert history == []
    with run.profiler.step(2):
        assert history == ["all"]
    assert history == ["all", "snapshot", None]
    run.profiler.finish_if_over()
    assert history == ["all", "snapshot", None]
    path = tmp_path / "profile" / "memory-rank-00000-steps-2-2.pickle"
    assert pickle.loads(path.read_bytes()) == {"calls": 2}
    assert "memory-rank-00000-steps-2-2.pickle, for https://pytorch.org/memory_viz" in run.said


def test_the_history_is_off_while_an_early_stop_saves_and_is_written_after_it(tmp_path, history):
    run = Run(tmp_path, "profile.steps=2:9").steps(3)
    run.profiler.halt()
    assert history == ["all", "snapshot", None]
    run.profiler.halt()
    run.profiler.finish()
    assert history == ["all", "snapshot", None]
    path = tmp_path / "profile" / "memory-rank-00000-steps-2-3.pickle"
    assert pickle.loads(path.read_bytes()) == {"calls": 2}


def test_the_history_is_off_after_an_error_and_nobody_looks_at_it(tmp_path, history):
    run = Run(tmp_path, "profile.steps=2:9").steps(2)
    run.profiler.close()
    assert history == ["all", None]
    assert run.files == []


def test_the_allocators_history_is_asked_for_as_torch_has_it():
    # Private to torch, so that a new version may change it.
    inspect.signature(torch.cuda.memory._record_memory_history).bind(
        "all", stacks="python", max_entries=MAX_ALLOCATIONS
    )
    inspect.signature(torch.cuda.memory._record_memory_history).bind(enabled=None)
    inspect.signature(torch.cuda.memory._snapshot).bind()
