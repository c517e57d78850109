"""The workers of a measurement on Ray, and the loop that feeds them; Ray itself comes in as an argument."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from bdtrain.diffusion.variance import BlockRecords
from bdtrain.errors import BdtrainError, RefitError
from bdtrain.refit.outcome import RaySettings, ShardQueue
from bdtrain.refit.ray_group import WorkerGroup, describe_error

_SLICE_S = 0.5
_FETCH_S = 30.0
_PEERS_S = 1.0

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


@dataclass
class RaySession:
    """A connection to Ray.

    Attributes:
        ray: the library.
        check: refuses a session whose head died.
        check_sockets: refuses a session that can be reached from outside.
        head: numeric address of its head.
    """

    ray: Any
    check: Callable[[], None]
    check_sockets: Callable[[], object]
    head: str = "127.0.0.1"


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
        self._use_gpu = settings.gpus_per_worker > 0 and request.device.startswith("cuda")
        count = min(request.shards, settings.num_workers)
        self._groups = [WorkerGroup(session.ray, settings, session.head) for _ in range(count)]
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
            elif not self._groups:
                self._queue.close(f"no worker could be started: {self._last_reason}")
            elif now >= room_until and not self._placed:
                raise RefitError(self._no_room())
            else:
                self._session.check()
                for group in self._groups:
                    self._feed(group)
                self._step(min(_SLICE_S, deadline - now))

    def end(self) -> None:
        """End all workers, whatever they are at."""
        for group in self._groups:
            group.leave()

    def _feed(self, group: WorkerGroup) -> None:
        """Give an idle worker a shard, and an empty place a worker."""
        if group.step == "empty":
            group.start(self._request.threads, self._use_gpu)
        elif group.step == "idle":
            shard = self._queue.take()
            if shard is not None:
                group.measure(shard)

    def _step(self, seconds: float) -> None:
        """Wait for an answer and take it."""
        asked = {call: group for group in self._groups for call in group.pending}
        done, _ = self._ray.wait(list(asked), num_returns=1, timeout=max(0.0, seconds))
        for call in done:
            group = asked[call]
            try:
                value = self._ray.get(call, timeout=_FETCH_S)
            except Exception as error:
                self._lost(group, _describe_death(error))
                continue
            if value[1]:
                self._refused(group, call, *value[1:])
            elif (answers := group.take(call, value)) is not None:
                self._take(group, answers)

    def _take(self, group: WorkerGroup, answers: list[Any]) -> None:
        """Go on with a worker whose processes have all done what was asked."""
        if group.step == "placing":
            self._placed = True
            placed = [place for place, _, _ in answers]
            group.load(self._worker, self._request.to_dict(), self._request.threads, placed)
            self._session.check_sockets()
            self._log(f"worker in {group.where}")
            return
        if group.step == "loading":
            # Its processes have met, and listen for each other.
            self._session.check_sockets()
        else:
            try:
                records = {size: BlockRecords.from_arrays(one) for size, one in answers[0][0].items()}
            except BdtrainError as error:
                self._failed(group, describe_error(error))
                return
            self._queue.measured(group.shard, records)
        group.step, group.failures = "idle", 0

    def _refused(self, group: WorkerGroup, call: Any, reason: str, trace: str) -> None:
        """A process said why it could not do what was asked."""
        self._log(trace)
        # Where it is now there was room for it.
        self._placed = True
        del group.pending[call]
        if group.step == "measuring" and group.size == 1:
            self._failed(group, reason)
        else:
            # The others may wait for it for ever, and what they exchange is out of step. Where it was one of
            # them that died, this one only noticed.
            self._lost(group, self._death_among(list(group.pending)) or reason)

    def _death_among(self, calls: list[Any]) -> str:
        """How a process died whose answer is still to come; empty if none did."""
        if not calls:
            return ""
        done, _ = self._ray.wait(calls, num_returns=len(calls), timeout=_PEERS_S)
        for call in done:
            try:
                self._ray.get(call, timeout=_FETCH_S)
            except Exception as error:
                return _describe_death(error)
        return ""

    def _failed(self, group: WorkerGroup, reason: str) -> None:
        """A shard could not be measured by a worker that lives."""
        self._log(self._queue.failed(group.shard, reason))
        group.step, group.failures = "idle", group.failures + 1
        if group.failures > 1:
            # After an error a process may be spoilt for good: CUDA's are.
            group.end()

    def _lost(self, group: WorkerGroup, reason: str) -> None:
        """A worker died or cannot be made: another one takes its place, or nobody, after too many."""
        if group.step == "measuring":
            self._log(self._queue.failed(group.shard, reason))
        else:
            self._last_reason = reason
            group.failures += 1
            self._log(f"worker not started ({group.step}), attempt {group.failures}: {reason}")
        group.end()
        if group.failures > self._settings.retries:
            group.leave()
            self._groups.remove(group)

    def _no_room(self) -> str:
        def told(resources: dict[str, float]) -> str:
            return f"{resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs"

        settings, keys = self._settings, "refit.worker_cpus, refit.worker_gpus"
        processes = ""
        if settings.tp > 1:
            processes, keys = f"{settings.tp} processes at once, each of ", f"{keys}, refit.worker_tp"
        return (
            f"Ray had no room for a worker within {settings.placement_s:g} s: one needs {processes}"
            f"{settings.cpus_per_worker:g} CPUs and {settings.gpus_per_worker:g} GPUs, the cluster has "
            f"{told(self._ray.cluster_resources())}, of them free {told(self._ray.available_resources())}; "
            f"ask for less ({keys}) or wait until the cluster is free"
        )


def _describe_death(error: Exception) -> str:
    # The class of the error says enough: Ray's text is a page.
    return f"the worker died ({type(error).__name__})"
