"""``profile.steps`` from the command line: files that can be read, and a run that does not notice."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = (
    "train.steps=6",
    "train.log_every_steps=1",
    "validation.at_start=false",
    "validation.sample_tokens=0",
)
PARTS = ("data wait", "train step", "noise", "count", "gradients and reduction", "update")


def pretrain(folder, *overrides, expect=0, **environment):
    """A tiny run on one process."""
    command = [sys.executable, "launchers/pretrain.py", "--config", "configs/run/tiny_synthetic.yaml"]
    done = subprocess.run(
        [*command, f"run.folder={folder}", *SETTINGS, *overrides],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == expect, (done.stdout[-3000:], done.stderr[-3000:])
    return done


def deterministic(folder):
    from bdtrain.tracking.jsonl import deterministic_fields, read_metrics

    return [deterministic_fields(line) for line in read_metrics(folder / "metrics.jsonl")]


def test_a_profile_is_written_beside_a_run_whose_numbers_stay_the_same_bits(tmp_path):
    plain, profiled = tmp_path / "plain", tmp_path / "profiled"
    assert "profile of" not in pretrain(plain).stdout
    assert not (plain / "profile").exists()
    done = pretrain(profiled, "profile.steps=2:4")
    assert f"profile of steps 2 to 3 on rank 0 in {profiled}/profile:" in done.stdout
    assert deterministic(plain) == deterministic(profiled)
    assert len(deterministic(plain)) >= 6

    files = profiled / "profile"
    stem = "rank-00000-steps-2-3"
    trace = json.loads(gzip.decompress((files / f"trace-{stem}.json.gz").read_bytes()))
    ranges = [e["name"] for e in trace["traceEvents"] if e.get("cat") == "user_annotation"]
    assert [name for name in ranges if name.startswith("ProfilerStep")] == [
        "ProfilerStep#2",
        "ProfilerStep#3",
    ]
    # Two micro-batches in each of the two steps.
    counts = {name: ranges.count(name) for name in PARTS}
    assert counts == dict.fromkeys(PARTS, 2)
    assert ranges.count("forward-compute") == 4
    assert ranges.count("backward-compute") == 4
    operators = (files / f"operators-{stem}.txt").read_text()
    assert "aten::mm" in operators
    assert "Optimizer.step#AveragedAdamW.step" in operators
    memory = json.loads((files / f"memory-{stem}.json").read_text())
    assert memory["peak"]["bytes"] > 0
    assert memory["peak"]["step"] in (2, 3)


def test_a_run_that_is_stopped_and_continued_inside_the_range_profiles_both_parts(tmp_path):
    folder = tmp_path / "run"
    settings = ("profile.steps=2:6", "validation.every_steps=4")
    done = pretrain(folder, *settings, BDTRAIN_FAULT="0:3:data:term")
    assert done.stdout.index("saved step-000000003") < done.stdout.index("profile of steps 2 to 3")
    done = pretrain(folder, *settings)
    assert "only steps 4 to 5 traced, without a warm-up" in done.stdout
    # The validation after step 4 is no part of it.
    traces = sorted(path.name for path in (folder / "profile").glob("trace-*"))
    assert traces == [
        "trace-rank-00000-steps-2-3.json.gz",
        "trace-rank-00000-steps-4-4-attempt-2.json.gz",
        "trace-rank-00000-steps-5-5-attempt-2.json.gz",
    ]
    assert not list((folder / "profile").glob(".tmp*"))
    names = [
        event["name"]
        for name in traces
        for event in json.loads(gzip.decompress((folder / "profile" / name).read_bytes()))["traceEvents"]
        if event.get("name", "").startswith("ProfilerStep")
    ]
    assert names == [f"ProfilerStep#{step}" for step in (2, 3, 4, 5)]


def test_ranks_that_are_not_there_are_refused_before_anything_starts(tmp_path):
    folder = tmp_path / "run"
    done = pretrain(folder, "profile.steps=2:4", "profile.ranks=0,1", expect=3)
    assert "profile.ranks=0,1, but the run has 1 rank; choose from 0 to 0, or all" in done.stderr
    assert not folder.exists()
