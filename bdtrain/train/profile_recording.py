"""Some steps in a row under torch's profiler, and the three files that come of them."""

from __future__ import annotations

import errno
import gzip
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile

from bdtrain.files import TEMPORARY_PREFIX, temporary_path
from bdtrain.train.profile_memory import STEP_PREFIX, CpuMemory, CudaMemory

TABLE_ROWS = 40
TABLE_WIDTH = 80


class Recording:
    """Steps without a gap between them, recorded on this rank.

    Args:
        device: of this rank; a GPU is traced beside the CPU.
        stacks: whether the Python line of each operator is recorded.
    """

    def __init__(self, device: torch.device, *, stacks: bool) -> None:
        cuda = device.type == "cuda"
        self.memory: CudaMemory | CpuMemory = CudaMemory() if cuda else CpuMemory()
        self._cuda = cuda
        self._profile = profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])],
            record_shapes=True,
            profile_memory=True,
            with_stack=stacks,
        )
        self._state = "new"

    def warm_up(self) -> None:
        """Prepare: the step that follows is not kept, it takes what happens once out of those that are."""
        self._profile.prepare_trace()
        self._state = "warm"

    def begin(self) -> None:
        """Record from here on."""
        if self._state == "new":
            self.warm_up()
        self._profile.start_trace()
        self._state = "on"
        self.memory.begin()

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """A range of the trace for one step; its number is that of the run."""
        with record_function(f"{STEP_PREFIX}{number}"):
            yield

    def halt(self) -> None:
        """Record nothing more; what was recorded can be written."""
        if self._state == "warm":
            # The profiler knows no way back from its preparation.
            self._profile.start_trace()
        if self._state in ("warm", "on"):
            self._state = "off"
            if self._cuda:
                torch.cuda.synchronize()
            self._profile.stop_trace()
            self.memory.halt()

    def write(self, folder: Path, stem: str, title: str) -> list[str]:
        """Write trace, operators and memory, each whole or not at all.

        Args:
            folder: where to; made if it is missing.
            stem: what the names have in common, as in ``rank-00000-steps-10-12``.
            title: first line of the table of operators.

        Returns:
            Names of the files.

        Raises:
            OSError: if the disk refuses.
            RuntimeError: if the profiler fails.
        """
        self.halt()
        folder.mkdir(exist_ok=True)
        _clean(folder, stem)
        trace = folder / f"trace-{stem}.json.gz"
        operators = folder / f"operators-{stem}.txt"
        memory = folder / f"memory-{stem}.{self.memory.suffix}"
        with _temporary(folder / f"trace-{stem}.json") as plain:
            self._profile.export_chrome_trace(str(plain))
            check_complete(plain)
            with _whole(memory) as path:
                self.memory.write(path, plain)
            with _whole(trace) as path, plain.open("rb") as source, gzip.open(path, "wb", 6) as packed:
                shutil.copyfileobj(source, packed, 1 << 20)
        with _whole(operators) as path:
            path.write_text(f"{title}\n\n{self.operators()}", encoding="utf-8")
        return [trace.name, operators.name, memory.name]

    def close(self) -> None:
        """Give back what recording holds."""
        try:
            # First: nobody asks for what the history holds.
            self.memory.end()
        finally:
            self.halt()

    def operators(self) -> str:
        """Tables of ranges and of operators, the longest first."""
        averages: Any = self._profile.key_averages()
        # The GPU's copies of the ranges have no time on the CPU.
        ranges = [event for event in averages if event.is_user_annotation and event.cpu_time_total > 0]
        parts = [_ranges_table(ranges)]
        devices = ["cpu", *(["device"] if self._cuda else [])]
        for device in devices:
            words = "CPU" if device == "cpu" else "GPU"
            parts.append(f"Operators by their own {words} time")
            parts.append(
                averages.table(
                    sort_by=f"self_{device}_time_total",
                    row_limit=TABLE_ROWS,
                    max_name_column_width=TABLE_WIDTH,
                )
            )
        parts.append("Operators and shapes by their own time")
        parts.append(
            self._profile.key_averages(group_by_input_shape=True).table(
                sort_by=f"self_{devices[-1]}_time_total",
                row_limit=TABLE_ROWS,
                max_name_column_width=TABLE_WIDTH,
            )
        )
        return "\n".join(parts)


def check_complete(trace: Path) -> None:
    """Refuse a trace that the disk cut: the library that writes it does not look.

    Raises:
        OSError: if the end of the JSON object is missing.
    """
    with trace.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 64, 0))
        end = file.read().rstrip()
    if not end.endswith(b"}"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(trace))


def _ranges_table(ranges: list[Any]) -> str:
    """Time of the parts of a step; one that is inside another is in both."""
    lines = ["Parts of the step (CPU time; a part inside another one is in both)"]
    for event in sorted(ranges, key=lambda event: -event.cpu_time_total):
        lines.append(
            f"  {event.key:<40} {event.count:>6} x {event.cpu_time_total / event.count / 1e3:>12.3f} ms"
        )
    return "\n".join(lines) + "\n"


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """Name of a file that is gone afterwards."""
    temporary = temporary_path(path)
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Name under which a file is written; it gets its own when it is complete."""
    with _temporary(path) as temporary:
        yield temporary
        os.replace(temporary, path)


def _clean(folder: Path, stem: str) -> None:
    """Remove what a killed attempt left half-written of the same piece."""
    for left in folder.glob(f"{TEMPORARY_PREFIX}*-{stem}.*"):
        left.unlink(missing_ok=True)
