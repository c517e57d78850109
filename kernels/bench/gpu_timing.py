"""Clocks and tables that the GPU benchmarks share; on a CPU the same code runs, for a trial without a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Clock:
    """Times a call in turns over several input sets, so that no call finds its inputs in the cache.

    Attributes:
        device: "cuda", or "cpu" for a trial.
        repeats: timed calls of each input set.
    """

    device: str
    repeats: int

    def milliseconds(self, calls: Sequence[Callable[[], Any]]) -> tuple[float, float, float]:
        """Median, lower and upper quartile of one call; ``calls`` do the same with other inputs."""
        for call in calls:  # compiles, fills caches
            call()
            call()
        taken = self._on_cuda(calls) if self.device == "cuda" else self._on_cpu(calls)
        low, middle, high = statistics.quantiles(taken, n=4) if len(taken) > 1 else taken * 3
        return middle, low, high

    def _on_cuda(self, calls: Sequence[Callable[[], Any]]) -> list[float]:
        pairs = []
        for _ in range(self.repeats):
            for call in calls:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                call()
                end.record()
                pairs.append((begin, end))
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) for begin, end in pairs]

    def _on_cpu(self, calls: Sequence[Callable[[], Any]]) -> list[float]:
        taken = []
        for call in [call for _ in range(self.repeats) for call in calls]:
            begin = time.perf_counter()
            call()
            taken.append(1e3 * (time.perf_counter() - begin))
        return taken


def measure_ceilings(clock: Clock, *, size: int, numbers: int) -> dict[str, float]:
    """What the device does at best: TFLOP/s of a bfloat16 product of ``size``, TB/s of a copy."""
    a, b = (torch.randn(size, size, device=clock.device, dtype=torch.bfloat16) for _ in range(2))
    product = clock.milliseconds([lambda: a @ b])[0]
    source = torch.empty(numbers, device=clock.device, dtype=torch.bfloat16).normal_()
    target = torch.empty_like(source)
    copy = clock.milliseconds([lambda: target.copy_(source)])[0]
    return {
        "matmul_tflops": 2 * size**3 / product / 1e9,
        "copy_tb_per_s": 2 * source.numel() * source.element_size() / copy / 1e9,
    }


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as a table; the columns are those of all rows, in the order they first appear."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(name, "")) for name in columns) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
