"""Who holds the memory: a snapshot of CUDA's allocator, or the tensors of a CPU run over time."""

from __future__ import annotations

import json
import os
import pickle
import resource
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

MAX_ALLOCATIONS = 1_000_000
"""Events that CUDA's history keeps: three steps of a large model have some ten thousand."""

STEP_PREFIX = "ProfilerStep#"
"""What ranges of whole steps are called: the name by which readers of torch's traces know them."""

_COLUMNS = ("time_us", "bytes", "held_bytes", "operator", "range", "step")


class CudaMemory:
    """History of CUDA's allocator, with the Python line of every allocation made while it is on."""

    suffix = "pickle"
    reader = "https://pytorch.org/memory_viz"

    def __init__(self) -> None:
        """Nothing is recorded yet."""
        self._on = False
        self._recorded: dict[str, Any] | None = None

    def begin(self) -> None:
        """Start to record."""
        torch.cuda.memory._record_memory_history("all", stacks="python", max_entries=MAX_ALLOCATIONS)
        self._on = True

    def halt(self) -> None:
        """Keep what was recorded, and record nothing more: it would cost what comes next a stack each."""
        if self._on:
            # Switching the history off forgets it.
            self._recorded = torch.cuda.memory._snapshot()
            self._switch_off()

    def end(self) -> None:
        """Stop to record; what was recorded is lost."""
        self._recorded = None
        if self._on:
            self._switch_off()

    def _switch_off(self) -> None:
        torch.cuda.memory._record_memory_history(enabled=None)
        self._on = False

    def write(self, path: Path, trace: Path) -> None:
        """Write what was recorded before ``halt``.

        Args:
            path: of the snapshot.
            trace: not needed.

        Raises:
            OSError: if the disk refuses.
        """
        with path.open("wb") as file:
            pickle.dump(self._recorded, file)


class CpuMemory:
    """Tensors of a CPU run over time, taken from the trace, which records them as instant events."""

    suffix = "json"
    reader = "JSON"

    def begin(self) -> None:
        """Nothing: the trace records."""

    def halt(self) -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""

    def write(self, path: Path, trace: Path) -> None:
        """Write what the trace says of memory.

        Args:
            path: of the summary.
            trace: Chrome trace of the steps, not compressed.

        Raises:
            OSError: if the disk refuses.
        """
        with trace.open(encoding="utf-8") as file:
            events = json.load(file)["traceEvents"]
        with path.open("w", encoding="utf-8") as out:
            json.dump({**process_memory(), **summarise_memory(events)}, out)


def process_memory() -> dict[str, int]:
    """What the process holds now and held at most since it began, in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1]) if os.path.exists("/proc/self/statm") else 0
    resident = pages * os.sysconf("SC_PAGE_SIZE")
    # In KiB, and behind by some pages that threads have not reported.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"resident_bytes": resident, "peak_resident_bytes": max(peak, resident)}


@dataclass(frozen=True)
class MemoryChange:
    """An allocation, or a release.

    Attributes:
        time_us: when, on the clock of the trace.
        size: bytes, negative for a release.
        address: of the memory.
        operator: innermost operator that was open on the thread, empty without one.
        range: innermost range besides that of the step.
        step: number of the step; None between two.
    """

    time_us: float
    size: int
    address: int
    operator: str
    range: str
    step: int | None


def summarise_memory(events: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Memory of tensors on the CPU over time, and by operator and by range.

    Args:
        events: of a Chrome trace that was made with ``profile_memory``.

    Returns:
        ``peak``: most bytes at a time that tensors of the traced steps held, where that was, and who held
        them (``holders``: the operator and the range that allocated). ``operators`` and ``ranges``:
        allocations, bytes allocated, and these less the bytes released there. ``timeline``: one entry per
        change, microseconds from the first one; ``operator`` and ``range`` are places in ``names``. What was
        allocated before the steps is not counted.
    """
    changes = memory_changes(events)
    held, peak_bytes, peak_place = 0, 0, -1
    names: dict[str, int] = {}
    columns: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
    for place, change in enumerate(changes):
        held += change.size
        if held > peak_bytes:
            peak_bytes, peak_place = held, place
        values = (
            round(change.time_us - changes[0].time_us, 3),
            change.size,
            held,
            names.setdefault(change.operator, len(names)),
            names.setdefault(change.range, len(names)),
            change.step,
        )
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
    peak: dict[str, Any] = {"bytes": peak_bytes, "holders": _holders(changes[: peak_place + 1])}
    if peak_place >= 0:
        at = changes[peak_place]
        peak |= {"time_us": columns["time_us"][peak_place], "step": at.step}
        peak |= {"operator": at.operator, "range": at.range}
    return {
        "peak": peak,
        "operators": _sums((change.operator, change.size) for change in changes),
        "ranges": _sums((change.range, change.size) for change in changes),
        "names": list(names),
        "timeline": columns,
    }


def _holders(changes: Iterable[MemoryChange]) -> list[dict[str, Any]]:
    """Who allocated what is held after some changes, the largest first."""
    live: dict[int, MemoryChange] = {}
    for change in changes:
        if change.size > 0:
            live[change.address] = change
        else:
            live.pop(change.address, None)
    sums: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for change in live.values():
        total = sums[change.operator, change.range]
        total[0] += 1
        total[1] += change.size
    rows = [
        {"operator": operator, "range": name, "tensors": count, "bytes": size}
        for (operator, name), (count, size) in sums.items()
    ]
    return sorted(rows, key=lambda row: (-int(row["bytes"]), str(row["operator"])))


def _sums(changes: Iterable[tuple[str, int]]) -> list[dict[str, Any]]:
    """Allocations by name, the largest first."""
    table: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for name, size in changes:
        total = table[name]
        total[0] += size > 0
        total[1] += max(size, 0)
        total[2] += size
    rows = [
        {"name": name, "allocations": count, "allocated_bytes": size, "net_bytes": net}
        for name, (count, size, net) in table.items()
    ]
    return sorted(rows, key=lambda row: (-int(row["allocated_bytes"]), str(row["name"])))


def memory_changes(events: Iterable[Mapping[str, Any]]) -> list[MemoryChange]:
    """Every change of a trace that concerns the CPU's memory, in order of time."""
    threads: dict[Any, list[tuple[float, float, Mapping[str, Any]]]] = defaultdict(list)
    for event in events:
        if event.get("name") == "[memory]" and event["args"].get("Device Type") == 0:
            threads[event["tid"]].append((event["ts"], 0.0, event))
        elif event.get("cat") in ("cpu_op", "user_annotation") and "dur" in event:
            # Of two that begin together the longer one is outside.
            threads[event["tid"]].append((event["ts"], -event["dur"], event))
    changes = []
    for entries in threads.values():
        entries.sort(key=lambda entry: entry[:2])
        open_events: list[tuple[float, Mapping[str, Any]]] = []
        for time_us, negative_length, event in entries:
            while open_events and open_events[-1][0] < time_us:
                open_events.pop()
            if event["name"] == "[memory]":
                found = event["args"]
                changes.append(
                    MemoryChange(time_us, int(found["Bytes"]), int(found["Addr"]), **_place(open_events))
                )
            else:
                open_events.append((time_us - negative_length, event))
    return sorted(changes, key=lambda change: change.time_us)


def _place(open_events: Iterable[tuple[float, Mapping[str, Any]]]) -> dict[str, Any]:
    place: dict[str, Any] = {"operator": "", "range": "", "step": None}
    for _, event in open_events:
        name = event["name"]
        if event["cat"] == "cpu_op":
            place["operator"] = name
        elif name.startswith(STEP_PREFIX):
            place["step"] = int(name.removeprefix(STEP_PREFIX))
        else:
            place["range"] = name
    return place
