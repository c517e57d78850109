"""What training feels of a re-fit in another process: CPU time per step, and seconds in its own thread.

Each run is a trainer of its own on one core and one thread, on a corpus; its re-fit gets the other core.
Kinds of runs, in turns:

off      no re-fits
on       a re-fit is begun early and its plan is due near the end
toggled  the same, but the re-fit is stopped and continued every few steps (SIGSTOP, SIGCONT): steps with and
         without it are neighbours in one process, which no drift of the machine sets apart
foreign  no re-fits; matrix products that have nothing to do with training are stopped and continued on the
         other core instead: what the machine itself takes for a neighbour at work

CPU time of a step is the process's, all threads, from the end of one ``ScheduleRefit.at`` to the start of
the next: data, step, report. ``at`` is all that the trainer's main thread does for re-fits; it is timed by
itself.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

KINDS = ("off", "on", "toggled", "foreign")
TOGGLED = ("toggled", "foreign")
WARM_UP = 15
"""Steps that are not counted."""


@dataclass(frozen=True)
class Call:
    """One call of ``ScheduleRefit.at`` and the step after it.

    Attributes:
        step: that was done before.
        wall: seconds of the call.
        cpu: CPU seconds of the main thread in it.
        event: ``begun`` or ``settled`` if a re-fit was; else empty.
        step_cpu: CPU seconds of the process in the step that follows; None after the last one.
        refit: whether the re-fit's process was at work before and after that step: ``yes``, ``no`` or
            ``partly``.
    """

    step: int
    wall: float
    cpu: float
    event: str
    step_cpu: float | None
    refit: str


class Watch:
    """Times a trainer in this process, and keeps its re-fit on another core.

    Args:
        core: of the re-fit; None leaves it to the kernel.
        toggle: steps after which it is stopped or continued; 0 never.
    """

    def __init__(self, *, core: int | None, toggle: int) -> None:
        self._core, self._toggle = core, toggle
        self._child: Any = None
        self._stopped = False
        self._rows: list[dict[str, Any]] = []
        self._before: tuple[float, bool] | None = None

    def install(self) -> None:
        """Take the place of the two functions that matter; for the life of this process."""
        from bdtrain.train.refit import ScheduleRefit
        from bdtrain.train.refit_child import RefitChild

        at, start = ScheduleRefit.at, RefitChild.start

        def timed(refit: Any, progress: Any) -> bool:
            return self._call(lambda: at(refit, progress), refit, progress.step)

        def pinned(child: Any, environment: Mapping[str, str]) -> None:
            start(child, environment)
            self._child, self._stopped = child, False
            if self._core is not None and child.running:
                # It has hardly begun: threads that it makes later stay there.
                os.sched_setaffinity(child._process.pid, {self._core})

        ScheduleRefit.at = timed  # type: ignore[method-assign, assignment]
        RefitChild.start = pinned  # type: ignore[method-assign, assignment]

    def follow(self, child: Any) -> None:
        """Stop and continue a process that is there already; it has ``_process`` and ``running``."""
        self._child = child

    def calls(self) -> list[Call]:
        """All calls so far."""
        return [Call(**row) for row in self._rows]

    def _call(self, run: Callable[[], bool], refit: Any, step: int) -> bool:
        cpu = time.process_time()
        self._finish_step(cpu)
        self._switch(step)
        pending = refit._state.pending
        before = (time.perf_counter(), time.thread_time())
        done = run()
        after = (time.perf_counter(), time.thread_time())
        now = refit._state.pending
        event = "begun" if now is not None and now is not pending else ""
        event = event or ("settled" if pending is not None and now is None else "")
        wall, thread = after[0] - before[0], after[1] - before[1]
        self._rows.append(
            {"step": step, "wall": wall, "cpu": thread, "event": event, "step_cpu": None, "refit": "no"}
        )
        self._before = (time.process_time(), self._at_work())
        return done

    def _finish_step(self, cpu: float) -> None:
        if self._before is None:
            return
        started, worked = self._before
        works = self._at_work()
        self._rows[-1]["step_cpu"] = cpu - started
        self._rows[-1]["refit"] = "partly" if works != worked else "yes" if works else "no"

    def _at_work(self) -> bool:
        return self._child is not None and not self._stopped and bool(self._child.running)

    def _switch(self, step: int) -> None:
        stop = bool(self._toggle) and step // self._toggle % 2 == 1
        if self._child is None or stop == self._stopped or not self._child.running:
            return
        os.killpg(self._child._process.pid, signal.SIGSTOP if stop else signal.SIGCONT)
        self._stopped = stop


class Foreign:
    """A process that multiplies matrices, at the priority of a re-fit.

    Args:
        core: where it runs.
    """

    def __init__(self, core: int) -> None:
        work = "import numpy as np\nm = np.ones((256, 256), np.float32)\nwhile True: m @ m"
        self._process = subprocess.Popen(
            ["nice", "-n", "10", sys.executable, "-c", work],
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,
        )
        os.sched_setaffinity(self._process.pid, {core})

    @property
    def running(self) -> bool:
        """Whether it is there."""
        return self._process.poll() is None

    def end(self) -> None:
        """End it, stopped or not."""
        self._process.kill()
        self._process.wait()


def overrides(kind: str, options: argparse.Namespace, folder: str) -> list[str]:
    """Settings of a run of one kind, on top of the books run's."""
    steps = options.steps
    settings = [
        "run.name=refit-step-cost",
        f"run.folder={folder}",
        f"data.path={options.corpus}",
        f"train.steps={steps}",
        "train.num_threads=1",
        "train.log_every_steps=10",
        "optim.warmup_steps=10",
        "optim.decay_steps=100",
        "validation.every_steps=0",
        "validation.at_start=false",
        "validation.sequences=16",
        "validation.sample_tokens=0",
        "checkpoint.every_steps=0",
        "checkpoint.save_final=false",
        "tracking.mlflow=false",
    ]
    if kind in ("off", "foreign"):
        return settings
    # A row counts 127 tokens or fewer, eight rows a step: begun near step 20, due 10 steps before the end. In
    # between others fall due and are skipped, as they are while one is pending.
    return [
        *settings,
        "refit.mode=clip",
        "refit.placement=process",
        "refit.every_tokens=20000",
        f"refit.lag_steps={steps - 30}",
        f"refit.blocks={options.blocks}",
    ]


def train_here(kind: str, options: argparse.Namespace, folder: str) -> list[Call]:
    """One run in this process."""
    from bdtrain.config import load_config, resolve_layout
    from bdtrain.parallel.launch_environment import read_launch
    from bdtrain.parallel.libraries import prepare_libraries
    from bdtrain.train.signals import StopRequest

    prepare_libraries()
    from bdtrain.tracking.console import Console
    from bdtrain.train.launch import train_from_config

    # Before torch makes threads: they inherit it.
    os.sched_setaffinity(0, {options.cores[0]})
    base = ROOT / "configs" / "run" / "books_cpu.yaml"
    config = load_config([base], overrides(kind, options, folder)).config
    launch = read_launch(os.environ)
    watch = Watch(core=options.cores[1], toggle=options.toggle if kind in TOGGLED else 0)
    watch.install()
    with StopRequest() as stop, ExitStack() as stack:
        if kind == "foreign":
            foreign = Foreign(options.cores[1])
            stack.callback(foreign.end)
            watch.follow(foreign)
        train_from_config(
            config,
            launch,
            resolve_layout(config, launch.world_size),
            os.environ,
            console=Console(enabled=True),
            stop=stop,
        )
    return watch.calls()


def add_trainer_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of this part."""
    parser.add_argument("--corpus", type=Path, required=True, help="of tools/preprocess.py, vocabulary 4096")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--blocks", type=int, default=48_000, help="of the re-fit: how long it takes")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--toggle", type=int, default=10, help="steps between stop and continue")
    parser.add_argument("--cores", type=int, nargs=2, default=(0, 1), help="of the trainer and of its re-fit")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--calls", type=Path, help=argparse.SUPPRESS)


def run_trainer(options: argparse.Namespace) -> dict[str, Any] | None:
    """The part ``trainer`` of the command; None in the process of a single run."""
    if options.one is not None:
        calls = train_here(options.one, options, options.folder)
        options.calls.write_text(json.dumps([asdict(call) for call in calls]), encoding="utf-8")
        return None
    runs: dict[str, list[list[Call]]] = {kind: [] for kind in KINDS}
    outcomes: list[str] = []
    for number in range(options.repeats):
        for kind in options.kinds if number % 2 == 0 else options.kinds[::-1]:
            calls, told = one_run(kind, options)
            runs[kind].append(calls)
            outcomes += told
            print(f"{kind} {number + 1}: {describe_run(calls)}", flush=True)
    result = summarise(runs)
    result["outcomes"] = outcomes
    print(describe(result))
    return result


def one_run(kind: str, options: argparse.Namespace) -> tuple[list[Call], list[str]]:
    """One run in a process of its own: its calls, and what it said of its re-fits.

    Raises:
        RuntimeError: if it failed.
    """
    with tempfile.TemporaryDirectory(prefix="refit-step-cost-") as folder:
        calls, words = Path(folder) / "calls.json", []
        for name in ("steps", "blocks", "toggle"):
            words += [f"--{name}", str(getattr(options, name))]
        words += ["--corpus", str(options.corpus), "--cores", *map(str, options.cores)]
        words += ["--one", kind, "--folder", str(Path(folder) / "run"), "--calls", str(calls)]
        command = [sys.executable, str(ROOT / "tools" / "bench" / "refit_cost.py"), "trainer", *words]
        environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            raise RuntimeError(f"the run {kind} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        told = [line for line in done.stdout.splitlines() if "re-fit of step" in line]
        return [Call(**row) for row in json.loads(calls.read_text(encoding="utf-8"))], told


def steps_of(calls: Sequence[Call], refit: str) -> list[float]:
    """CPU seconds of the counted steps with (``yes``) or without (``no``) a re-fit at work."""
    return [
        call.step_cpu
        for call in calls
        if call.step_cpu is not None and call.refit == refit and call.step >= WARM_UP
    ]


def window_ratios(calls: Sequence[Call]) -> list[float]:
    """Median step of each stretch with the re-fit over the mean of the stretches without it around it."""
    stretches: list[tuple[str, list[float]]] = []
    for call in calls:
        if call.step < WARM_UP or call.step_cpu is None or call.refit == "partly":
            continue
        if not stretches or stretches[-1][0] != call.refit:
            stretches.append((call.refit, []))
        stretches[-1][1].append(call.step_cpu)
    long = [(refit, statistics.median(seconds)) for refit, seconds in stretches if len(seconds) >= 5]
    ratios = []
    for (left, before), (refit, median), (right, after) in zip(long, long[1:], long[2:], strict=False):
        if (left, refit, right) == ("no", "yes", "no"):
            ratios.append(2.0 * median / (before + after))
    return ratios


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[max(-(-int(share * 1e9) * len(ordered) // 10**9), 1) - 1]


def call_times(calls: Sequence[Call], what: str) -> dict[str, Any]:
    """Quantiles of the calls' ``wall`` or ``cpu``, seconds; those that began or settled a re-fit apart."""
    every = [getattr(call, what) for call in calls]
    plain = [getattr(call, what) for call in calls if not call.event]
    events = {
        name: [getattr(call, what) for call in calls if call.event == name] for name in ("begun", "settled")
    }
    return {
        "calls": len(every),
        "p50": quantile(every, 0.5),
        "p99": quantile(every, 0.99),
        "max": max(every),
        "plain_p99": quantile(plain, 0.99),
        "plain_max": max(plain),
        **events,
    }


def summarise(runs: Mapping[str, Sequence[Sequence[Call]]]) -> dict[str, Any]:
    """All runs as plain values."""
    off = [statistics.median(steps_of(calls, "no")) for calls in runs["off"]]
    on = [statistics.median(steps_of(calls, "yes")) for calls in runs["on"]]
    with_refit = [call for kind in ("on", "toggled") for calls in runs[kind] for call in calls]
    without = [call for kind in ("off", "foreign") for calls in runs[kind] for call in calls]
    return {
        "step_cpu": {"off": off, "on": on},
        "run_ratios": [b / a for a, b in zip(off, on, strict=False)],
        "window_ratios": {
            kind: [ratio for calls in runs[kind] for ratio in window_ratios(calls)] for kind in TOGGLED
        },
        "at": {
            name: {what: call_times(calls, what) for what in ("wall", "cpu")}
            for name, calls in (("on", with_refit), ("off", without))
            if calls
        },
        "cpu_per_step_of_at": statistics.fmean([call.cpu for call in with_refit or without]),
    }


def describe_run(calls: Sequence[Call]) -> str:
    """One line."""
    parts = []
    for refit, words in (("no", "without"), ("yes", "with")):
        seconds = steps_of(calls, refit)
        if seconds:
            median = statistics.median(seconds) * 1e3
            parts.append(f"{len(seconds)} steps {words} a re-fit at work, median {median:.2f} CPU ms")
    events = ", ".join(f"{call.event} after step {call.step}" for call in calls if call.event)
    return "; ".join(parts) + (f" ({events})" if events else "")


def describe(result: Mapping[str, Any]) -> str:
    """The result as text."""
    lines = []
    for kind, medians in result["step_cpu"].items():
        if medians:
            lines.append(f"CPU ms per step, {kind}: " + ", ".join(f"{one * 1e3:.2f}" for one in medians))
    ratios = result["run_ratios"]
    if ratios:
        lines.append(
            f"runs in pairs, on over off: median {statistics.median(ratios) - 1:+.2%} "
            f"({min(ratios) - 1:+.2%} to {max(ratios) - 1:+.2%})"
        )
    for kind, windows in result["window_ratios"].items():
        if len(windows) < 2:
            continue
        error = statistics.stdev(windows) / len(windows) ** 0.5
        lines.append(
            f"neighbouring stretches, {kind}, at work over stopped: mean "
            f"{statistics.fmean(windows) - 1:+.2%} +- {error:.2%}, median "
            f"{statistics.median(windows) - 1:+.2%}, half within {quantile(windows, 0.25) - 1:+.2%} to "
            f"{quantile(windows, 0.75) - 1:+.2%} ({len(windows)})"
        )
    for kind, clocks in result["at"].items():
        for what, one in clocks.items():
            lines.append(
                f"ScheduleRefit.at, {kind}, {what}, ms, {one['calls']} calls: p50 {one['p50'] * 1e3:.4f}, "
                f"p99 {one['p99'] * 1e3:.4f}, max {one['max'] * 1e3:.2f}; neither begun nor settled: p99 "
                f"{one['plain_p99'] * 1e3:.4f}, max {one['plain_max'] * 1e3:.3f}"
            )
            for name in ("begun", "settled"):
                if one[name]:
                    lines.append(f"  {name}: " + ", ".join(f"{value * 1e3:.1f}" for value in one[name]))
    lines.append(f"CPU ms of `at` per step, all in all: {result['cpu_per_step_of_at'] * 1e3:.3f}")
    return "\n".join([*lines, *sorted(set(result.get("outcomes", [])))])
