"""The workers of a measurement on Ray, and the loop that feeds them; Ray itself comes in as an argument."""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from bdtrain.diffusion.variance import BlockRecords
from bdtrain.errors import BdtrainError, RefitError
from bdtrain.refit.outcome import RaySettings, ShardQueue
from bdtrain.refit.ray_cluster import strip_launch_environment

_SLICE_S = 0.5
_FETCH_S = 30.0
_REASON_LIMIT = 300

Log = Callable[[str], None]


class Request(Protocol):
    """What is asked of the workers; ``bdtrain.refit.request.RefitRequest`` is one."""

    @property
    def shards(self) -> int:
        """Number of shards."""

    @property
    def threads(self) -> int | None:
        """CPU threads of a worker; None leaves torch's choice."""

    @property
    def device(self) -> str:
        """Where it is measured, ``cpu`` or ``cuda``."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, from which a worker is made."""


class ShardActor:
    """What runs in a process of Ray: one worker with its model. Errors come back as text, not as objects."""

    def __init__(self) -> None:
        self._worker: Any = None

    def place(self, threads: int | None, use_gpu: bool) -> tuple[str, int]:
        """Make the process fit for a worker, before its libraries are imported.

        Args:
            threads: of the CPU; None leaves the libraries' choice.
            use_gpu: whether it may see a GPU.

        Returns:
            Name of the machine and number of the process.
        """
        strip_launch_environment(os.environ)
        if not use_gpu:
            # Ray leaves it as it found it, and the GPUs may be training.
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        if threads is not None:
            os.environ["OMP_NUM_THREADS"] = str(threads)
        return socket.gethostname(), os.getpid()

    def load(self, worker: str, request: dict[str, Any], threads: int | None) -> tuple[str, str] | None:
        """Make the worker.

        Args:
            worker: import path of its class.
            request: what it is made from.
            threads: of the CPU.

        Returns:
            None, or why it cannot be made: a line and a traceback.
        """
        try:
            module, _, name = worker.partition(":")
            found = getattr(importlib.import_module(module), name)
            # Ray's own libraries may have imported torch before OMP_NUM_THREADS was set.
            if threads is not None and "torch" in sys.modules:
                sys.modules["torch"].set_num_threads(threads)
            self._worker = found(request)
        except Exception as error:
            return describe_error(error), traceback.format_exc()
        return None

    def measure(self, shard: int) -> tuple[dict[int, dict[str, Any]] | None, str, str]:
        """Measure a shard.

        Returns:
            Arrays of its records by block size, or None, then a line and a traceback that say why.
        """
        try:
            records = self._worker.measure(shard)
            return {size: one.to_arrays() for size, one in records.items()}, "", ""
        except Exception as error:
            return None, describe_error(error), traceback.format_exc()


def describe_error(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}{': ' + lines[0] if lines else ''}"[:_REASON_LIMIT]


@dataclass
class RaySession:
    """A connection to Ray.

    Attributes:
        ray: the library.
        check: refuses a session whose head died.
        check_sockets: refuses a session that can be reached from outside.
    """

    ray: Any
    check: Callable[[], None]
    check_sockets: Callable[[], object]


@dataclass
class _Slot:
    """A place for a worker.

    Attributes:
        actor: Ray's handle of it.
        pending: the one call that it is at; None when it is idle.
        step: ``placing``, ``loading``, ``measuring`` or ``idle``.
        shard: that it measures.
        failures: in a row, of starting or of measuring.
        where: machine and process.
    """

    actor: Any = None
    pending: Any = None
    step: str = "placing"
    shard: int = -1
    failures: int = 0
    where: str = ""


class WorkerPool:
    """The workers of a measurement, and the loop that feeds them.

    Args:
        session: where they run.
        request: what is measured.
        settings: how many workers, how many attempts.
        worker: import path of their class.
        queue: shards to measure.
        log: takes one line at a time.
    """

    def __init__(
        self,
        session: RaySession,
        request: Request,
        settings: RaySettings,
        worker: str,
        queue: ShardQueue,
        log: Log,
    ) -> None:
        self._ray, self._session, self._settings, self._queue = session.ray, session, settings, queue
        self._request, self._worker, self._log = request, worker, log
        self._actor_class = session.ray.remote(ShardActor).options(
            num_cpus=settings.cpus_per_worker,
            num_gpus=settings.gpus_per_worker,
            max_restarts=0,
            max_task_retries=0,
        )
        self._slots = [_Slot() for _ in range(min(request.shards, settings.num_workers))]
        self._placed = False
        self._last_reason = ""

    def measure(self, deadline: float, late: str, quorum: float) -> None:
        """Measure until no shard is left, or it makes no sense to go on.

        Args:
            deadline: on the monotonic clock.
            late: what is said of shards that are not finished by then.
            quorum: share of the shards that must be measured.

        Raises:
            RefitError: if there is no room for a worker, or the session breaks.
        """
        room_until = time.monotonic() + self._settings.placement_s
        while self._queue.open:
            now = time.monotonic()
            if now >= deadline:
                self._queue.close(late)
            elif self._queue.hopeless(quorum):
                self._queue.close("stopped, as the quorum could not be met any more")
            elif not self._slots:
                self._queue.close(f"no worker could be started: {self._last_reason}")
            elif now >= room_until and not self._placed:
                raise RefitError(self._no_room())
            else:
                self._session.check()
                for slot in self._slots:
                    self._feed(slot)
                self._step(min(_SLICE_S, deadline - now))

    def end(self) -> None:
        """End all workers, whatever they are at."""
        for slot in self._slots:
            self._kill(slot)

    def _feed(self, slot: _Slot) -> None:
        """Give an idle worker a shard, and a place without one a worker."""
        if slot.actor is None:
            slot.actor = self._actor_class.remote()
            slot.step = "placing"
            use_gpu = self._settings.gpus_per_worker > 0
            slot.pending = slot.actor.place.remote(self._request.threads, use_gpu)
        elif slot.pending is None:
            shard = self._queue.take()
            if shard is not None:
                slot.step, slot.shard = "measuring", shard
                slot.pending = slot.actor.measure.remote(shard)

    def _step(self, seconds: float) -> None:
        """Wait for an answer and take what has come."""
        pending = {slot.pending: slot for slot in self._slots if slot.pending is not None}
        done, _ = self._ray.wait(list(pending), num_returns=1, timeout=max(0.0, seconds))
        for answer in done:
            slot = pending[answer]
            slot.pending = None
            try:
                value = self._ray.get(answer, timeout=_FETCH_S)
            except Exception as error:
                # The class of the error says enough: Ray's text is a page.
                self._lost(slot, f"the worker died ({type(error).__name__})")
                continue
            self._take(slot, value)

    def _take(self, slot: _Slot, value: Any) -> None:
        if slot.step == "placing":
            slot.where = f"process {value[1]} on {value[0]}"
            self._placed = True
            self._session.check_sockets()
            self._log(f"worker in {slot.where}")
            slot.step = "loading"
            slot.pending = slot.actor.load.remote(
                self._worker, self._request.to_dict(), self._request.threads
            )
        elif slot.step == "loading":
            if value is None:
                slot.step, slot.failures = "idle", 0
            else:
                self._log(value[1])
                self._lost(slot, value[0])
        else:
            arrays, reason, trace = value
            if arrays is None:
                self._log(trace)
            else:
                try:
                    records = {size: BlockRecords.from_arrays(one) for size, one in arrays.items()}
                except BdtrainError as error:
                    arrays, reason = None, describe_error(error)
            if arrays is not None:
                self._queue.measured(slot.shard, records)
                slot.step, slot.failures = "idle", 0
                return
            self._log(self._queue.failed(slot.shard, reason))
            slot.step, slot.failures = "idle", slot.failures + 1
            if slot.failures > 1:
                # After an error a process may be spoilt for good: CUDA's are.
                self._kill(slot)

    def _lost(self, slot: _Slot, reason: str) -> None:
        """A worker died or cannot be made: another one takes its place, or nobody, after too many."""
        if slot.step == "measuring":
            self._log(self._queue.failed(slot.shard, reason))
        else:
            self._last_reason = reason
            slot.failures += 1
            self._log(f"worker not started ({slot.step}), attempt {slot.failures}: {reason}")
        self._kill(slot)
        if slot.failures > self._settings.retries:
            self._slots.remove(slot)

    def _kill(self, slot: _Slot) -> None:
        if slot.actor is not None:
            with contextlib.suppress(Exception):
                self._ray.kill(slot.actor, no_restart=True)
        slot.actor = slot.pending = None

    def _no_room(self) -> str:
        def told(resources: dict[str, float]) -> str:
            return f"{resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs"

        settings = self._settings
        return (
            f"Ray had no room for a worker within {settings.placement_s:g} s: one needs "
            f"{settings.cpus_per_worker:g} CPUs and {settings.gpus_per_worker:g} GPUs, the cluster has "
            f"{told(self._ray.cluster_resources())}, of them free {told(self._ray.available_resources())}; "
            "ask for less (refit.worker_cpus, refit.worker_gpus) or wait until the cluster is free"
        )
