"""What the machine does meanwhile, measured by the shipping process and not by the trainer."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from bdtrain.tracking.jsonl import last_record
from bdtrain.tracking.spool import Point

INTERVAL_S = 10.0
GIB = 1 << 30
GPU_TIMEOUT_S = 5.0
DEAR_S = 1.0
"""A look at the GPUs that takes longer is not taken again."""

MAX_GPUS = 16

SYSTEM_METRICS: Mapping[str, str] = MappingProxyType(
    {
        "system/cpu_percent": "share of the machine's cores that were busy, since the last sample",
        "system/memory_percent": "share of the machine's memory that is in use",
        "system/trainer_cpu_percent": "CPU time of rank 0 and its processes; 100 is one core",
        "system/trainer_memory_gib": "memory of rank 0 and its processes (sum of resident sets)",
        "system/gpu_{index}_percent": "share of the time in which a kernel ran",
        "system/gpu_{index}_memory_gib": "memory of the GPU in use",
        "system/gpu_{index}_power_watts": "power it draws",
    }
)
"""Metrics and their meaning. They are in no metrics file: what a dead store does not take is lost."""


class SystemSampler:
    """Samples, one every ten seconds.

    A store that fails takes the next sample; none is kept.

    Args:
        path: the metrics file: samples belong to its last step.
        parent: the trainer's process.
        say: told once what cannot be measured.
        interval_s: between two samples.
        clock: seconds that never run backwards.
    """

    def __init__(
        self,
        path: Path,
        parent: int,
        *,
        say: Callable[[str], None] = print,
        interval_s: float = INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path, self._parent, self._say = path, parent, say
        self._interval_s, self._clock = interval_s, clock
        self._next_at = clock()
        self._hopeless = False
        self._gpu_tool: str | None = shutil.which("nvidia-smi")
        # (CPU seconds, when) of each process of the trainer at the last sample.
        self._before: dict[int, float] = {}
        self._before_at = 0.0

    def take(self) -> list[Point]:
        """A sample if one is due, else nothing. Never raises."""
        now = self._clock()
        if self._hopeless or now < self._next_at:
            return []
        self._next_at = now + self._interval_s
        try:
            record = last_record(self._path)
            values = {**self._machine(), **self._trainer(now), **self._gpus()}
            step, time_ms = int(record["step"]) if record else 0, round(time.time() * 1000)
            return [Point(name, float(value), time_ms, step) for name, value in values.items()]
        except Exception as error:
            self._hopeless = True
            self._say(f"the machine is not measured: {type(error).__name__}: {error}")
            return []

    def _machine(self) -> dict[str, float]:
        import psutil

        # The first answer is about the time since the machine started.
        busy = psutil.cpu_percent(interval=None)
        first = self._before_at == 0.0
        return {
            **({} if first else {"system/cpu_percent": busy}),
            "system/memory_percent": psutil.virtual_memory().percent,
        }

    def _trainer(self, now: float) -> dict[str, float]:
        used, memory = {}, 0
        for pid, seconds, resident in self._processes():
            used[pid] = seconds
            memory += resident
        found = {"system/trainer_memory_gib": memory / GIB} if used else {}
        passed = now - self._before_at
        if self._before and passed > 0:
            # A process that came since has used its time since; one that went takes its last share with it.
            spent = sum(seconds - self._before.get(pid, 0.0) for pid, seconds in used.items())
            found["system/trainer_cpu_percent"] = 100.0 * max(spent, 0.0) / passed
        self._before, self._before_at = used, now
        return found

    def _processes(self) -> Iterator[tuple[int, float, int]]:
        """(process, CPU seconds, resident bytes) of the trainer and what it started, but this process."""
        import psutil

        try:
            trainer = psutil.Process(self._parent)
            family: list[Any] = [trainer, *trainer.children(recursive=True)]
        except psutil.Error:
            return
        for process in family:
            if process.pid == os.getpid():
                continue
            try:
                with process.oneshot():
                    times, memory = process.cpu_times(), process.memory_info()
            except psutil.Error:
                continue
            yield process.pid, times.user + times.system, memory.rss

    def _gpus(self) -> dict[str, float]:
        if self._gpu_tool is None:
            return {}
        query = "--query-gpu=index,utilization.gpu,memory.used,power.draw"
        begin = time.monotonic()
        try:
            done = subprocess.run(
                [self._gpu_tool, query, "--format=csv,noheader,nounits"],
                capture_output=True,
                text=True,
                check=True,
                timeout=GPU_TIMEOUT_S,
            )
        except (OSError, subprocess.SubprocessError) as error:
            self._gpu_tool = None
            self._say(f"GPUs are not measured: {error}")
            return {}
        took = time.monotonic() - begin
        if took > DEAR_S:
            self._gpu_tool = None
            self._say(f"GPUs are measured no more: a look at them took {took:.1f} s")
        return dict(_parse_gpus(done.stdout))


def _parse_gpus(text: str) -> Iterator[tuple[str, float]]:
    """Lines of ``index, percent, MiB, watts``; what is not supported there is no number."""
    for line in text.splitlines()[:MAX_GPUS]:
        index, *cells = [cell.strip() for cell in line.split(",")]
        for name, scale, cell in zip(
            ("percent", "memory_gib", "power_watts"), (1.0, 1 / 1024, 1.0), cells, strict=False
        ):
            try:
                value = float(cell)
            except ValueError:
                continue
            if index.isdigit():
                yield f"system/gpu_{index}_{name}", value * scale
