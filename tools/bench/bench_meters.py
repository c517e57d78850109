"""Time and memory of benchmarks: CPU seconds or CUDA events, bytes kept for backward, most bytes allocated.

A benchmark written against this module differs between devices in nothing but the device.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bdtrain.errors import BdtrainError


class DeviceMissingError(BdtrainError):
    """A benchmark was asked for a device that is not there."""


def find_device(name: str) -> torch.device:
    """The device of a command line.

    Args:
        name: "cpu" or "cuda".

    Raises:
        DeviceMissingError: for "cuda" without a GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceMissingError(
            "--device cuda: torch sees no GPU here (torch.cuda.is_available() is False); run it on a machine "
            "with one, or try the same code with --device cpu"
        )
    return torch.device(name)


def run_benchmark(
    options: argparse.Namespace,
    measure: Callable[[Any, torch.device], dict[str, Any]],
    describe: Callable[[dict[str, Any]], str],
) -> int:
    """A benchmark's whole command: measure in one process, print, write.

    Args:
        options: command line with ``device``, ``threads`` and ``json``.
        measure: gives the result, from process groups of size 1 and the device.
        describe: the result as text; it has ``versions``, ``machine`` and ``threads`` besides.

    Returns:
        The exit code.
    """
    # Waiting threads must sleep: on a shared machine they would be counted as work.
    if os.environ.get("OMP_WAIT_POLICY") != "passive":
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.execv(sys.executable, [sys.executable, *sys.argv])

    from bdtrain.parallel.libraries import prepare_libraries

    prepare_libraries()
    from bdtrain.testing import single_process_groups

    torch.set_num_threads(options.threads)
    try:
        device = find_device(options.device)
        with single_process_groups() as groups:
            result = measure(groups, device)
    except BdtrainError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    result["threads"] = options.threads
    result["versions"] = {"python": platform.python_version(), "torch": torch.__version__}
    result["machine"] = (
        torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    )
    print(describe(result))
    if options.json is not None:
        write_result(options.json, result)
    return 0


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write what was measured.

    Args:
        path: of a JSON file; its folder is made.
        result: plain values.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def failure_of(error: Exception) -> str:
    """Why a side could not be measured, in one line for a table."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    words = next(iter(str(error).strip().splitlines()), "").replace("|", "/")
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def forget_failure(model: nn.Module, device: torch.device) -> None:
    """Give back what a side that failed left: gradients, and memory that only its error held."""
    model.zero_grad(set_to_none=True)
    gc.collect()
    if device.type == "cuda":
        # A device that is broken says so to the next side.
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()


def forget_compiled(backend: str) -> None:
    """Before FlexAttention is measured: torch compiles a function for few shapes, then no more.

    Args:
        backend: of attention; nothing is done for others.
    """
    if backend == "flex":
        torch._dynamo.reset()


class Marks:
    """Moments of a device's work, and the seconds between them.

    On a CPU a moment is the CPU time of the process, all threads together: a shared machine disturbs it
    little. On CUDA it is an event of the current stream; nothing waits for the device before ``seconds``.
    """

    def __init__(self, device: torch.device) -> None:
        """No moment yet."""
        self._cuda = device.type == "cuda"
        self._moments: list[tuple[str, Any]] = []

    def mark(self, name: str) -> None:
        """Note the end of a part."""
        moment: Any
        if self._cuda:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        else:
            moment = time.process_time()
        self._moments.append((name, moment))

    def seconds(self) -> dict[str, float]:
        """Seconds of each part: from the moment before it; parts of one name are added up."""
        if self._cuda:
            torch.cuda.synchronize()
        parts: dict[str, float] = {}
        for (_, before), (name, after) in zip(self._moments, self._moments[1:], strict=False):
            spent = before.elapsed_time(after) / 1e3 if self._cuda else after - before
            parts[name] = parts.get(name, 0.0) + spent
        return parts


def time_call(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call."""
    marks = Marks(device)
    marks.mark("start")
    run()
    marks.mark("call")
    return marks.seconds()["call"]


def in_turns(
    sides: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    *,
    warm_up: int = 2,
    slow_s: float = float("inf"),
    failed: dict[str, str] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each side, A B A B ..., the order turned round every other time.

    Args:
        sides: name -> what is timed.
        rounds: timed calls of each side.
        device: whose time counts.
        warm_up: calls of each side before, not counted.
        slow_s: a side whose last warm-up took longer is timed once only.
        failed: takes name -> why of sides that raise, which the result then leaves out; without it the error
            of a side ends the measurement.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    slow = set()

    def timed(name: str) -> float | None:
        try:
            return time_call(sides[name], device)
        except Exception as error:
            if failed is None:
                raise
            failed[name] = failure_of(error)
            del seconds[name]
            return None

    for name in sides:
        spent: float | None = 0.0
        for number in range(warm_up):
            if spent is not None and (number == 0 or spent <= slow_s):
                spent = timed(name)
        if spent is not None and spent > slow_s:
            slow.add(name)
    for number in range(rounds):
        order = list(sides) if number % 2 == 0 else list(sides)[::-1]
        for name in order:
            if name in seconds and (number == 0 or name not in slow):
                spent = timed(name)
                if spent is not None:
                    seconds[name].append(spent)
    return seconds


def describe_spread(values: Sequence[float], *, factor: float = 1.0, digits: int = 3) -> str:
    """``median (least to most)``."""
    low, high = min(values) * factor, max(values) * factor
    return f"{statistics.median(values) * factor:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


class KeptBytes:
    """What autograd keeps for backward: bytes of distinct storages, now and at most.

    Args:
        ignore: tensors that live anyway (parameters); their storages do not count.
    """

    def __init__(self, ignore: Iterable[Tensor] = ()) -> None:
        """Nothing kept yet."""
        self.now = 0
        self.most = 0
        self._users: dict[int, int] = {}
        self._ignored = {_storage(tensor) for tensor in ignore}

    def add(self, tensor: Tensor) -> None:
        """A tensor is kept."""
        key = _storage(tensor)
        if key in self._ignored:
            return
        users = self._users.get(key, 0)
        self._users[key] = users + 1
        if users == 0:
            self.now += tensor.untyped_storage().nbytes()
            self.most = max(self.most, self.now)

    def drop(self, tensor: Tensor) -> None:
        """It is kept no longer by one of its users."""
        key = _storage(tensor)
        if key in self._ignored:
            return
        self._users[key] -= 1
        if self._users[key] == 0:
            del self._users[key]
            self.now -= tensor.untyped_storage().nbytes()


class _Kept:
    """One saved tensor; the graph lets go of it after the backward of its node."""

    def __init__(self, tensor: Tensor, meter: KeptBytes) -> None:
        # Without its history: an output saved by its own node would keep that node alive for ever.
        self.tensor, self.meter = tensor.detach(), meter
        meter.add(self.tensor)

    def __del__(self) -> None:
        self.meter.drop(self.tensor)


@contextmanager
def watch_kept_bytes(model: nn.Module) -> Iterator[KeptBytes]:
    """Count what is saved for backward inside the block; the model's own tensors do not count."""
    meter = KeptBytes([*model.parameters(), *model.buffers()])
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: _Kept(tensor, meter), lambda kept: kept.tensor
    ):
        yield meter


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Most bytes that a call had allocated at one moment, above what was there before it.

    On CUDA torch's allocator counts; on a CPU the profiler's record of every allocation, which leaves out
    scratch memory of the libraries below torch.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
        run()
    recorded = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted(
        (event.start_ns(), number, event.nbytes())
        for number, event in enumerate(recorded)
        if event.name() == "[memory]"
    )
    level = most = 0
    for _, _, change in changes:
        level += change
        most = max(most, level)
    return most


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
