"""Measure shards on Ray: a session of our own on this machine, or a cluster that is there.

Only a process that trains nothing may use this. ``ray.init`` replaces signal handlers, and when Ray's head
dies, Ray ends its driver a minute later.

The scheduling is ours, not Ray's: each worker loads the model once and has one shard at a time, a shard whose
worker dies goes to another one, and nothing waits without a limit. A shard's records are the same whoever
measures it, so neither the number of workers nor the order in which they finish shows in the result.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

from bdtrain.errors import RefitError
from bdtrain.refit.deadline import time_limit
from bdtrain.refit.outcome import RaySettings, ShardOutcome, ShardQueue, required_shards, split_address
from bdtrain.refit.ray_cluster import (
    Process,
    check_loopback,
    end_processes,
    prepare_environment,
    private_folder,
    runs,
    session_processes,
)
from bdtrain.refit.ray_group import describe_error, numeric_host
from bdtrain.refit.ray_pool import Log, RaySession, Request, WorkerPool

if TYPE_CHECKING:
    from bdtrain.config import RunConfig
    from bdtrain.diffusion.variance import BlockRecords
    from bdtrain.refit.request import RefitRequest

WORKER = "bdtrain.refit.worker:RefitWorker"
"""Import path of what measures: ``Worker(request.to_dict()).measure(shard)``."""

MEASURE_SHARE = 0.9
"""Share of ``refit.deadline_s`` for a measurement; the search and the end of Ray need the rest."""

_CONNECT_S = 5.0
_JOIN_S = 60.0
_LEAVE_S = 20.0
_GRACE_S = 10.0
_SLOW_START = "timed out during startup"
# What a session cannot live without.
_HEADS = ("gcs_server", "raylet")


def measure_refit(
    request: RefitRequest,
    config: RunConfig,
    shared: SharedSession | None = None,
    began: float | None = None,
) -> tuple[dict[int, BlockRecords], dict[str, Any]]:
    """Measure a re-fit as its settings say.

    Args:
        request: what to measure.
        config: with the settings of the re-fit.
        shared: the session to use; None starts one and ends it.
        began: when the re-fit did, on the monotonic clock; None: now.

    Returns:
        Records by block size, and what is to be said of the measurement in the report.

    Raises:
        RefitError: as ``measure_on_ray``, and if no time is left.
    """
    # Here: what only measures on Ray does without torch.
    from bdtrain.refit.job import join_shards

    refit = config.refit
    # Who reads and hashes a large model has used a part of it.
    used_s = 0.0 if began is None else time.monotonic() - began
    left_s = MEASURE_SHARE * refit.deadline_s - used_s
    if left_s <= 0:
        raise RefitError(
            f"the snapshot was read for {used_s:.0f} s, which leaves nothing of refit.deadline_s="
            f"{refit.deadline_s:g} to measure it; give it more time"
        )
    settings = RaySettings(
        address=refit.ray_address,
        num_workers=refit.workers,
        cpus_per_worker=refit.worker_cpus,
        gpus_per_worker=refit.worker_gpus,
        tp=refit.worker_tp,
    )
    outcome = measure_on_ray(
        request,
        settings,
        deadline_s=left_s,
        quorum=refit.quorum,
        log=lambda line: print(line, flush=True),
        shared=shared,
    )
    said = {
        "backend": "ray",
        "seconds": dict(outcome.seconds),
        "failures": {str(shard): reason for shard, reason in outcome.failures.items()},
        "complete_share": outcome.complete_share,
    }
    return join_shards(request, outcome.records), said


def measure_on_ray(
    request: Request,
    settings: RaySettings,
    *,
    deadline_s: float,
    quorum: float,
    log: Log,
    worker: str = WORKER,
    shared: SharedSession | None = None,
) -> ShardOutcome:
    """Measure all shards of a request.

    Variables of this process's environment change, and nothing may have imported Ray before.

    Args:
        request: what to measure.
        settings: how Ray is used.
        deadline_s: seconds from now after which nothing more is waited for.
        quorum: share of the shards that must be measured, in (0, 1].
        log: takes one line at a time.
        worker: import path of the class that measures, ``module:Class``.
        shared: the session to use; None starts one and ends it.

    Returns:
        Records of the shards that were measured, and why others were not.

    Raises:
        RefitError: if Ray is not installed, cannot be reached or has no room, if a local session can be
            reached from outside or dies, or if the quorum is not met.
    """
    started = time.monotonic()
    deadline = started + deadline_s
    required_shards(request.shards, quorum)
    if request.device.startswith("cuda") and not settings.gpus_per_worker:
        raise RefitError(
            "the re-fit is to run on a GPU and its Ray workers get none; set gpus_per_worker "
            "(refit.worker_gpus) above 0, or measure on the CPU"
        )
    queue = ShardQueue(request.shards, settings.retries)
    if shared is not None:
        opened = shared.use(settings, deadline, log)
    else:
        opened = _session(settings, min(request.shards, settings.num_workers), deadline, log)
    with opened as session:
        ready = time.monotonic()
        pool = WorkerPool(session, request, settings, worker, queue, log)
        try:
            pool.measure(deadline, f"the deadline of {deadline_s:g} s came", quorum)
        finally:
            pool.end()
        measured = time.monotonic()
    stopped = time.monotonic()
    queue.check_quorum(quorum)
    seconds = {"start_s": ready - started, "measure_s": measured - ready, "stop_s": stopped - measured}
    return ShardOutcome(queue.records, queue.failures, seconds)


class SharedSession:
    """A session of Ray for measurements that follow each other; a ``with`` statement ends it.

    The first measurement starts it. It is started anew for one that uses Ray otherwise, and after one that
    broke it.
    """

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._settings: RaySettings | None = None
        self._session: RaySession | None = None

    def __enter__(self) -> SharedSession:
        """Start nothing yet."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the session, if there is one."""
        self._end()

    @contextlib.contextmanager
    def use(self, settings: RaySettings, deadline: float, log: Log) -> Iterator[RaySession]:
        """The session, for one measurement.

        Args:
            settings: how it uses Ray.
            deadline: on the monotonic clock, for the start.
            log: takes one line at a time.

        Raises:
            RefitError: if Ray cannot be used, as ``measure_on_ray`` says.
        """
        if settings != self._settings or not self._is_alive():
            self._end()
            self._session = self._stack.enter_context(
                # Not the shards of this measurement: the next one may have more.
                _session(settings, settings.num_workers, deadline, log)
            )
            self._settings = settings
        assert self._session is not None
        try:
            yield self._session
        except BaseException:
            # Nobody knows what state it is in.
            self._end()
            raise

    def _is_alive(self) -> bool:
        if self._session is None:
            return False
        try:
            self._session.check()
        except RefitError:
            return False
        return True

    def _end(self) -> None:
        self._session = self._settings = None
        self._stack.close()


@contextlib.contextmanager
def _session(settings: RaySettings, workers: int, deadline: float, log: Log) -> Iterator[RaySession]:
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(private_folder(settings.temp_folder)) if settings.is_local else None
        prepare_environment(settings, folder, os.environ)
        address = split_address(settings.address)
        if address is not None:
            _check_reachable(*address)
        ray = _import_ray(settings)
        options: dict[str, Any] = {
            "address": settings.address,
            "log_to_driver": False,
            "logging_level": logging.ERROR,
        }
        if folder is None:
            stack.callback(_leave, ray)
            _connect(ray, settings, options, deadline)
            head = ray.get_runtime_context().gcs_address
            log(f"joined the Ray cluster at {head}")
            yield RaySession(ray, lambda: None, lambda: None, numeric_host(head))
            return
        before = set(session_processes(os.getpid(), folder))
        watch = _Watch(folder, before, log)
        stack.callback(watch.end, ray)
        local = {
            "num_cpus": math.ceil(workers * settings.tp * settings.cpus_per_worker) or 1,
            "num_gpus": math.ceil(workers * settings.tp * settings.gpus_per_worker),
            "object_store_memory": settings.object_store_mb * 1_000_000,
            "include_dashboard": False,
            "_temp_dir": str(folder / "r"),
        }
        try:
            _connect(ray, settings, {**options, **local}, deadline)
        except RefitError as error:
            # Ray gives its own processes 30 s to start; a machine that is busy for a moment needs more.
            if _SLOW_START not in str(error.__cause__):
                raise
            log("Ray did not start within its own limit; once more")
            watch.end(ray)
            _connect(ray, settings, {**options, **local}, deadline)
        watch.begin()
        yield RaySession(ray, watch.check, watch.check_sockets)


def _import_ray(settings: RaySettings) -> Any:
    try:
        import ray
    except ImportError as error:
        raise RefitError(f"Ray cannot be imported ({error}); pip install 'bdtrain[ray]'") from error
    if settings.is_local:
        from ray._private import ray_constants

        if getattr(ray_constants, "ENABLE_RAY_CLUSTER", False):
            raise RefitError(
                "Ray was imported before its environment was set, and would listen on all addresses; import "
                "nothing of Ray before measure_on_ray"
            )
    # A second session of this process has another token than the one that the library remembers.
    loader = getattr(ray._raylet, "AuthenticationTokenLoader", None)
    if loader is not None:
        loader.instance().reset_cache()
    return ray


def _check_reachable(host: str, port: int) -> None:
    """Ask the port ourselves: Ray tries for minutes where nobody answers."""
    try:
        socket.create_connection((host, port), timeout=_CONNECT_S).close()
    except OSError as error:
        raise RefitError(
            f"no Ray cluster answers at {host}:{port} ({error}); start one (ray start --head), name the "
            "right address (refit.ray_address), or use refit.ray_address=local"
        ) from error


def _connect(ray: Any, settings: RaySettings, options: dict[str, Any], deadline: float) -> None:
    """Start or join, and put the handler of SIGTERM back that Ray replaces.

    Raises:
        RefitError: if Ray does not come up in time, or refuses.
    """
    where = "a local session of Ray" if settings.is_local else f"the Ray cluster at {settings.address}"
    limit_s = max(0.1, min(settings.placement_s, deadline - time.monotonic()))
    if settings.is_local:
        late = RefitError(f"{where} did not start within {limit_s:.0f} s; the machine may be too busy")
    else:
        # Refused, Ray tries again for minutes and tells only its log.
        limit_s = min(limit_s, _JOIN_S)
        late = RefitError(
            f"{where} did not let this process in within {limit_s:.0f} s: it wants another token than the "
            "one in RAY_AUTH_TOKEN_PATH (or none is named there), or has another version of Ray"
        )
    previous = signal.getsignal(signal.SIGTERM)
    try:
        with time_limit(limit_s, lambda: late):
            ray.init(**options)
    except RefitError:
        raise
    except Exception as error:
        refused = type(error).__name__ == "AuthenticationError" or "Unauthenticated" in str(error)
        if refused:
            raise RefitError(
                f"{where} refuses the token ({describe_error(error)}); put the cluster's token into a file "
                "and name it in RAY_AUTH_TOKEN_PATH"
            ) from error
        raise RefitError(f"{where} cannot be used: {describe_error(error)}") from error
    finally:
        if threading.current_thread() is threading.main_thread():
            # By default the process would end at once and leave the private folder behind.
            keep = callable(previous) or previous is signal.SIG_IGN
            signal.signal(signal.SIGTERM, previous if keep else _exit_on_signal)


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _leave(ray: Any) -> None:
    """Disconnect; what cannot be said to a dead head is not said."""
    with contextlib.suppress(TimeoutError), time_limit(_LEAVE_S, TimeoutError):
        ray.shutdown()


class _Watch:
    """An eye on a local session: on loopback, alive, and gone at the end.

    Args:
        folder: its private folder.
        before: processes that are none of its.
        log: takes one line at a time.
    """

    def __init__(self, folder: Any, before: set[Process], log: Log) -> None:
        self._folder, self._before, self._log = folder, before, log
        self._known: set[Process] = set()
        self._heads: dict[Process, str] = {}

    def begin(self) -> None:
        """Look at the session that has started.

        Raises:
            RefitError: if it can be reached from outside.
        """
        found = self._look()
        self._heads = {process: name for process, name in found.items() if name in _HEADS}
        sockets = self.check_sockets()
        self._log(
            f"local session of Ray: {len(found)} processes, {sockets} listening sockets, all on loopback"
        )

    def check_sockets(self) -> int:
        """Number of listening sockets.

        Raises:
            RefitError: if one can be reached from outside.
        """
        return check_loopback(os.getpid(), self._folder)

    def check(self) -> None:
        """Refuse to go on without Ray's head: in a minute Ray would end this process.

        Raises:
            RefitError: if it died.
        """
        for process, name in self._heads.items():
            if not runs(process):
                raise RefitError(f"Ray's {name} (process {process.pid}) died; the session was ended")

    def end(self, ray: Any) -> None:
        """Shut down, and see to it that nothing of the session is left."""
        self._look()
        if any(not runs(process) for process in self._heads):
            # Nobody is there to be asked, and asking lasts.
            end_processes(self._known, grace_s=0)
        _leave(ray)
        self._look()
        killed = end_processes(self._known, grace_s=_GRACE_S)
        if killed:
            self._log(f"{len(killed)} processes of the Ray session did not go by themselves and were killed")

    def _look(self) -> dict[Process, str]:
        found = session_processes(os.getpid(), self._folder)
        found = {process: name for process, name in found.items() if process not in self._before}
        self._known.update(found)
        return found
