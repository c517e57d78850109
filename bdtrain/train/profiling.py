"""Profiles of a few steps (``profile.steps=10:13``) in the folder ``profile/`` of a run.

trace-rank-00000-steps-10-12.json.gz   what ran when; https://ui.perfetto.dev opens it as it is
operators-rank-00000-steps-10-12.txt   parts of the step and operators, the longest first
memory-rank-00000-steps-10-12.pickle   GPU: every allocation, for https://pytorch.org/memory_viz
memory-rank-00000-steps-10-12.json     CPU: bytes that tensors hold over time, by operator and by range

Steps are counted as the console counts them, from 1. The step before the first one warms the profiler up,
unless the attempt begins with the first one. Validation and checkpoints are no part of a profile: one
between two traced steps cuts it into pieces, each with files of its own. Later attempts add ``-attempt-2``
to the names. Whatever fails here costs the profile and not the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler import record_function

from bdtrain.checkpoint.communicator import Communicator
from bdtrain.config import RunConfig
from bdtrain.errors import ConfigError
from bdtrain.tracking.console import Console
from bdtrain.tracking.jsonl import MetricsLog
from bdtrain.train.profile_recording import Recording

PROFILES = "profile"
"""Name of the folder in a run's folder."""


def check_ranks(config: RunConfig, world_size: int) -> None:
    """Refuse ranks that the run does not have.

    Args:
        config: the run.
        world_size: ranks of the run.

    Raises:
        ConfigError: the same on all ranks.
    """
    wrong = [rank for rank in config.profile.traced_ranks(world_size) if rank >= world_size]
    if config.profile.steps is not None and wrong:
        raise ConfigError(
            f"profile.ranks={config.profile.ranks}, but the run has {world_size} "
            f"rank{'s' * (world_size > 1)}; choose from 0 to {world_size - 1}, or all"
        )


class StepProfiler:
    """Profiles the steps of one attempt that the configuration asks for.

    Every rank has one and makes the same calls: ranks that are not traced take part in the telling.

    Args:
        config: the run.
        device: of this rank.
        folder: of the run.
        attempt: number of this start, from 1.
        communicator: all ranks.
        console: prints on the first rank.
        metrics: the metrics file; None on all ranks but the first.
        transformer: Megatron's configuration of this rank's model; its schedule marks its parts through it.
        first_step: number of the first step of this attempt.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        device: torch.device,
        folder: Path,
        attempt: int,
        communicator: Communicator,
        console: Console,
        metrics: MetricsLog | None,
        transformer: Any,
        first_step: int,
    ) -> None:
        settings = config.profile
        self._steps = settings.traced_steps
        self._ranks = settings.traced_ranks(communicator.world_size)
        self._stacks = settings.stacks
        self._device, self._folder, self._attempt = device, folder / PROFILES, attempt
        self._communicator, self._console, self._transformer = communicator, console, transformer
        self._metrics = metrics
        self._recording: Recording | None = None
        self._problem: str | None = None
        self._taken: list[int] = []
        self.failed = 0
        self._say_what_is_left(first_step)

    def _say_what_is_left(self, first_step: int) -> None:
        steps = self._steps
        if not steps or first_step < steps[0]:
            return
        asked = f"profile.steps={steps.start}:{steps.stop}"
        if first_step > steps[-1]:
            self._console.line(f"{asked}: this attempt begins with step {first_step}, nothing is traced")
            return
        begins = "" if first_step == steps[0] else f"only {_words(range(first_step, steps.stop))} traced, "
        self._console.line(
            f"{asked}: {begins}without a warm-up, since the attempt begins with step {first_step}: its times "
            "hold what happens once"
        )

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around a step. Every rank calls it.

        Args:
            number: of the step, from 1.
        """
        # One comparison, and nothing else, on steps that nobody asked for.
        if not self._steps or not self._steps[0] - 1 <= number <= self._steps[-1]:
            yield
            return
        if number not in self._steps:
            self._guarded(Recording.warm_up)
            yield
            return
        if not self._taken:
            self._guarded(Recording.begin)
        self._taken.append(number)
        if self._recording is None:
            yield
        else:
            with self._recording.step(number), schedule_ranges(self._transformer):
                yield
        if number == self._steps[-1]:
            self.halt()

    def halt(self) -> None:
        """Record nothing more, and write later: something else is more urgent."""
        self._guarded(Recording.halt, start=False)

    def finish_if_over(self) -> None:
        """After each step: when the last one that is traced was taken, write. Every rank calls it."""
        if self._taken and self._taken[-1] == self._steps[-1]:
            self.finish()

    def finish(self) -> None:
        """Write what was recorded, and say where it is. Every rank calls it; no steps, no files.

        Before validation and checkpoints too: they are no part of a profile.
        """
        steps, self._taken = self._taken, []
        recording, self._recording = self._recording, None
        problem, self._problem = self._problem, None
        names: list[str] = []
        try:
            if recording is not None and steps:
                names = recording.write(self._folder, self._stem(steps), self._title(steps))
        except Exception as error:
            problem = _reason(error)
        finally:
            if recording is not None:
                _close(recording)
        if steps:
            told = self._communicator.gather_objects((names, problem))
            self._tell(steps, told)

    def close(self) -> None:
        """Give back what recording holds; nothing is written. For the end of an attempt by an error."""
        recording, self._recording = self._recording, None
        if recording is not None:
            _close(recording)

    def _guarded(self, action: Callable[[Recording], None], *, start: bool = True) -> None:
        """Do something with the recording, made here if ``start`` says so; trouble is told later."""
        if self._communicator.rank not in self._ranks or self._problem is not None:
            return
        try:
            if self._recording is None and start:
                self._recording = Recording(self._device, stacks=self._stacks)
            if self._recording is not None:
                action(self._recording)
        except Exception as error:
            # A profiler that another tool holds, a driver that forbids counters: no reason to end a run.
            self._problem = _reason(error)
            self.close()

    def _stem(self, steps: Sequence[int]) -> str:
        attempt = "" if self._attempt == 1 else f"-attempt-{self._attempt}"
        return f"rank-{self._communicator.rank:05d}-steps-{steps[0]}-{steps[-1]}{attempt}"

    def _title(self, steps: Sequence[int]) -> str:
        return (
            f"{_words(steps)} of rank {self._communicator.rank} in attempt {self._attempt}, {self._device}, "
            f"torch {torch.__version__}"
        )

    def _tell(self, steps: Sequence[int], told: Sequence[tuple[list[str], str | None]]) -> None:
        for rank, (_, problem) in enumerate(told):
            if problem is not None:
                self.failed += 1
                if self._metrics is not None:
                    self._metrics.event("profile_failed", steps[-1], on_rank=rank, reason=problem)
                self._console.line(
                    f"the profile of {_words(steps)} on rank {rank} was not written: {problem}; "
                    "training goes on"
                )
        written = [(rank, names) for rank, (names, _) in enumerate(told) if names]
        if not written:
            return
        first, (trace, operators, memory) = written[0]
        if len(written) > 1:
            trace, operators, memory = (
                name.replace(f"rank-{first:05d}", "rank-*") for name in (trace, operators, memory)
            )
        viewer = ", for https://pytorch.org/memory_viz" if memory.endswith(".pickle") else ""
        ranks = f"rank {first}" if len(written) == 1 else f"{len(written)} ranks"
        self._console.line(
            f"profile of {_words(steps)} on {ranks} in {self._folder}:\n"
            f"  {trace}, for https://ui.perfetto.dev\n  {operators}\n  {memory}{viewer}"
        )


def part(name: str) -> AbstractContextManager[Any]:
    """A range of the trace around a part of the step; half a microsecond where nothing is recorded.

    Args:
        name: as it is shown.
    """
    # A range costs some 15 microseconds whether anybody records it or not.
    return record_function(name) if torch.autograd._profiler_enabled() else nullcontext()


@contextmanager
def schedule_ranges(transformer: Any) -> Iterator[None]:
    """Let Megatron's schedule mark forward, backward and transfers of each micro-batch in the trace.

    It calls timers where it is given some; while the block lasts, these begin and end ranges.

    Args:
        transformer: Megatron's configuration of the model.
    """
    before = transformer.timers
    transformer.timers = _Timers()
    try:
        yield
    finally:
        transformer.timers = before


class _Timers:
    """What Megatron takes for its timers."""

    def __init__(self) -> None:
        self._ranges: dict[str, _Timer] = {}

    def __call__(self, name: str, log_level: int | None = None) -> _Timer:
        return self._ranges.setdefault(name, _Timer(name))


class _Timer:
    """A range of the trace that one call opens and another one closes."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._range: Any = None

    def start(self, barrier: bool = False) -> None:
        """Open it; a barrier would change what is measured."""
        self._range = record_function(self._name)
        self._range.__enter__()

    def stop(self, barrier: bool = False) -> None:
        """Close it."""
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None


def _words(steps: Sequence[int]) -> str:
    return f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.filename or PROFILES}: {error.strerror or error}"
    return " ".join(str(error).split()) or type(error).__name__


def _close(recording: Recording) -> None:
    try:
        recording.close()
    except Exception:
        # Its first trouble was told, or the run ends by another error.
        return
