"""Samples of the machine: measured beside the trainer, never in its way."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bdtrain.tracking.jsonl import MetricsLog
from bdtrain.tracking.spool import Point
from bdtrain.tracking.system import SYSTEM_METRICS, SystemSampler

GIB = 1 << 30


def sampler(path: Path, parent: int, said: list[str], clock: list[float]) -> SystemSampler:
    return SystemSampler(path, parent, say=said.append, interval_s=10.0, clock=lambda: clock[0])


def values(points: list[Point]) -> dict[str, float]:
    return {point.name: point.value for point in points}


def metrics_file(folder: Path, step: int) -> Path:
    path = folder / "metrics.jsonl"
    with MetricsLog(path, 1) as log:
        log.event("start", 0)
        log.write(step, {"train/loss": 1.0})
    return path


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bdtrain.tracking.system.shutil.which", lambda name: None)


def test_the_trainer_is_measured_with_its_children_and_without_the_sampler(
    tmp_path: Path, no_gpu: None
) -> None:
    # A stand-in for rank 0 with a child that holds 200 MiB and uses as much CPU as it gets.
    child = (
        "b = bytearray(200 << 20); b[::4096] = b'x' * len(b[::4096]); print(1, flush=True)\nwhile True: pass"
    )
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    trainer = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert trainer.stdout is not None and trainer.stdout.read(1) == b"1"
        said: list[str] = []
        work = SystemSampler(metrics_file(tmp_path, 7), trainer.pid, say=said.append, interval_s=0.0)
        first = work.take()
        begin = time.monotonic()
        time.sleep(1.0)
        second = values(work.take())
        passed = time.monotonic() - begin
    finally:
        os.killpg(trainer.pid, 9)
        trainer.wait()
    assert {point.step for point in first} == {7} and not said
    assert abs(first[0].time_ms / 1000 - time.time()) < 60
    # The first sample knows no time since the one before.
    assert set(values(first)) == {"system/memory_percent", "system/trainer_memory_gib"}
    assert 200 / 1024 < second["system/trainer_memory_gib"] < 1.0
    # One core at most, whatever else runs on the machine; the clock ticks in hundredths.
    assert 1.0 < second["system/trainer_cpu_percent"] <= 100.0 * (1 + 0.1 / passed)
    assert 0.0 < second["system/cpu_percent"] <= 100.0
    assert set(second) <= set(SYSTEM_METRICS)


def test_there_is_one_sample_each_interval(tmp_path: Path, no_gpu: None) -> None:
    clock = [100.0]
    work = sampler(metrics_file(tmp_path, 1), os.getpid(), [], clock)
    taken = []
    for _ in range(100):
        taken.append(bool(work.take()))
        clock[0] += 1.0
    assert sum(taken) == 10 and taken[0]


def test_a_trainer_that_is_gone_and_a_file_that_is_missing_are_no_trouble(
    tmp_path: Path, no_gpu: None
) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    said: list[str] = []
    points = sampler(tmp_path / "metrics.jsonl", gone.pid, said, [0.0]).take()
    assert set(values(points)) == {"system/memory_percent"} and points[0].step == 0 and not said


def test_what_cannot_be_measured_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_gpu: None
) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    said: list[str] = []
    clock = [0.0]
    work = sampler(metrics_file(tmp_path, 1), os.getpid(), said, clock)
    for _ in range(3):
        assert work.take() == []
        clock[0] += 60.0
    assert len(said) == 1 and "psutil" in said[0]


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "bin" / "nvidia-smi"
    path.parent.mkdir()
    monkeypatch.setenv("PATH", str(path.parent), prepend=os.pathsep)
    return path


def write_tool(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def test_gpus_are_read_from_the_drivers_tool(tmp_path: Path, tool: Path) -> None:
    write_tool(tool, "echo '0, 93, 2048, 310.5'; echo '1, [N/A], 512, [N/A]'; echo 'No devices'")
    found = values(sampler(metrics_file(tmp_path, 1), os.getpid(), [], [0.0]).take())
    gpus = {name: value for name, value in found.items() if "gpu" in name}
    assert gpus == {
        "system/gpu_0_percent": 93.0,
        "system/gpu_0_memory_gib": 2.0,
        "system/gpu_0_power_watts": 310.5,
        "system/gpu_1_memory_gib": 0.5,
    }


@pytest.mark.parametrize("body", ["exit 9", "sleep 1.2; echo '0, 1, 1, 1'"])
def test_a_tool_that_fails_or_is_slow_is_asked_once(tmp_path: Path, tool: Path, body: str) -> None:
    write_tool(tool, f"echo x >> {tmp_path}/asked; {body}")
    said: list[str] = []
    clock = [0.0]
    work = sampler(metrics_file(tmp_path, 1), os.getpid(), said, clock)
    for _ in range(3):
        assert work.take()
        clock[0] += 60.0
    assert (tmp_path / "asked").read_text() == "x\n" and len(said) == 1
