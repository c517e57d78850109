"""The process that carries the metrics file to a store: ``python -m bdtrain.tracking.ship RUN_FOLDER``.

The store is MLflow, TensorBoard's files or W&B's. A process of its own, because importing MLflow and
setting up its database hold Python's lock for seconds: in a thread of the trainer, every step would wait for
them (``bdtrain/tracking/README.md`` has the numbers). It reads what the trainer appends, keeps its place in a
file (``mlflow_ship.json``), tries again for ever, and leaves when everything up to the end of the attempt is
shipped, or when the trainer is gone. It may be killed at any moment: a batch that was not noted is shipped
again, and the store keeps one of two equal points, or takes back what was not noted. Files are named by the
events of the metrics file and stored the same way.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

from bdtrain.tracking.jsonl import last_attempt, read_lines
from bdtrain.tracking.mlflow import (
    URI_VARIABLE,
    MlflowStore,
    StoreOptions,
    default_uri,
    quiet_environment,
    read_run_uid,
)
from bdtrain.tracking.pictures import has_matplotlib
from bdtrain.tracking.run_files import METRICS_FILE
from bdtrain.tracking.spool import (
    SCHEDULES,
    TENSORBOARD,
    WANDB,
    Point,
    RedactedStream,
    ShipState,
    Tail,
    check_sum,
    ended,
    lock_file,
    place,
    redact,
)
from bdtrain.tracking.system import SystemSampler

SHIPPED, LEFT_OVER, HOPELESS = 0, 1, 2
"""Exit codes. ``HOPELESS``: trying again cannot help: no MLflow is installed, or it knows no such address."""

INTERVAL_S = 5.0
BACKOFF_LIMIT_S = 60.0
CLOSING_BACKOFF_S = 2.0
SLICE_S = 0.2
STOP_GRACE_S = 20.0
ORPHAN_DRAIN_S = 20.0
FILE_RETRY_S = 60.0


class Store(Protocol):
    """Where points go. Every method may raise anything and be called again."""

    run_id: str

    @property
    def mark(self) -> int:
        """How much it has written, for one that takes back what was not noted; else 0."""

    def begin(self, start: dict[str, Any]) -> None:
        """Note that an attempt began."""

    def log(self, points: list[Point]) -> None:
        """Store points."""

    def put(self, name: str) -> None:
        """Store what a name stands for (``bdtrain.tracking.spool.files_of``)."""

    def finish(self, event: str, time_ms: int) -> None:
        """Note how an attempt ended."""


class Shipping:
    """Ships what a metrics file holds and what is appended to it.

    Args:
        folder: of the run.
        store: its address, for the state file.
        open_store: from MLflow's name of the run, or None, to the store.
        attempt: of the trainer; an end of an earlier attempt is not the end. None: no trainer's.
        parent_alive: whether the trainer is still there.
        interval_s: between two batches.
        backoff_limit_s: longest pause after failures; the first is 1 s, each next one twice as long.
        clock: seconds that never run backwards.
        sleep: waits.
        say: writes one line to the log.
        sample: measures the machine; its points are shipped beside those of the file.
    """

    def __init__(
        self,
        folder: Path,
        store: str,
        open_store: Callable[[str | None], Store],
        *,
        attempt: int | None,
        parent_alive: Callable[[], bool],
        interval_s: float = INTERVAL_S,
        backoff_limit_s: float = BACKOFF_LIMIT_S,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        say: Callable[[str], None] = print,
        sample: Callable[[], list[Point]] = list,
    ) -> None:
        self.folder, self.path = folder, folder / METRICS_FILE
        self.attempt, self.parent_alive = attempt, parent_alive
        self.interval_s, self.backoff_limit_s = interval_s, backoff_limit_s
        self.clock, self.sleep, self.say, self.sample = clock, sleep, say, sample
        self.state = ShipState.load(folder, store)
        self._open_store = open_store
        self._store: Store | None = None
        self._tail = Tail(self.path, self.state)
        self._batch_was_full = False
        self._stop_at: float | None = None
        self._orphan_since: float | None = None
        self._seen_size, self._seen_end = -1, False
        self._files_again_at, self._said_pictures = -float("inf"), False

    def stop(self) -> None:
        """Leave with the end of the attempt, which a trainer that is saving has still to write, or soon."""
        if self._stop_at is None:
            self._stop_at = self.clock() + STOP_GRACE_S

    def run(self) -> int:
        """Ship until there is nothing more to do.

        Returns:
            An exit code.
        """
        pause = 1.0
        while True:
            # Asked before reading: a line written before the trainer went is then read.
            alone, stopped = not self.parent_alive(), self._stop_at is not None
            try:
                more = self.step()
            except Exception as error:
                self.trouble(error)
                if is_hopeless(error):
                    return HOPELESS
                if alone or stopped:
                    return LEFT_OVER
                self._store = None
                self._wait(pause, CLOSING_BACKOFF_S)
                pause = min(2 * pause, self.backoff_limit_s)
                continue
            pause = 1.0
            if more and (alone or stopped or self._batch_was_full):
                if alone and self._drained_long_enough():
                    return LEFT_OVER
            elif not more and self.state.finished and ended(self.path, self.attempt or 0):
                return SHIPPED
            elif alone:
                return self._leave_orphaned()
            elif self._stop_at is not None and self.clock() >= self._stop_at:
                return SHIPPED
            else:
                self._wait(self.interval_s, 0.0)

    def step(self) -> bool:
        """Ship one batch.

        Returns:
            Whether there is more to ship.
        """
        store = self._store or self._open()
        batch = self._tail.read()
        measured = self.sample()
        if measured:
            store.log(measured)
        if batch.last is None:
            self._try_again(store)
            return False
        if batch.start is not None:
            store.begin(batch.start)
        if batch.points:
            store.log(batch.points)
        left = self._put(store, list(dict.fromkeys([*self.state.files, *batch.files])))
        # A file that ends with "stop" goes on when the run is resumed.
        more = next(read_lines(self.path, batch.end), None) is not None
        finished = batch.ending is not None and not more
        if batch.ending is not None and finished:
            store.finish(batch.ending["event"], round(batch.ending["time"] * 1000))
        self._tail.advance(batch)
        self._batch_was_full = batch.full
        self._note(store, finished=finished, files=left)
        return more

    def _put(self, store: Store, names: list[str]) -> list[str]:
        """Store files; those that the store does not take wait, and hold nothing else up."""
        left = []
        for name in names:
            if name.startswith(SCHEDULES) and not self._said_pictures and not has_matplotlib():
                self._said_pictures = True
                self.say("matplotlib is not installed: pictures of re-fits are SVG files, or left out")
            try:
                store.put(name)
            except Exception as error:
                left.append(name)
                if name not in self.state.files:
                    reason = f"{type(error).__name__}: {error}".split("\n")[0][:160]
                    self.say(f"{name} was not stored: {redact(reason, os.environ)}")
        self._files_again_at = self.clock() + FILE_RETRY_S
        return left

    def _try_again(self, store: Store) -> None:
        if self.state.files and self.clock() >= self._files_again_at:
            left = self._put(store, self.state.files)
            if left != self.state.files:
                self._note(store, finished=self.state.finished, files=left)

    def trouble(self, error: BaseException) -> None:
        """Note why nothing is shipped; a failure that lasts is said once."""
        problem = redact(f"{type(error).__name__}: {error}", os.environ).split("\n")[0][:160]
        if problem != self.state.problem:
            self.say(f"not shipped: {problem}")
            self.state.problem = problem
            self.state.save(self.folder)

    def _open(self) -> Store:
        store = self._open_store(self.state.run_id)
        if store.run_id != self.state.run_id:
            # Another run than the one this place belongs to, or none so far: it gets everything.
            self.state = ShipState(self.state.store, run_id=store.run_id, problem=self.state.problem)
            self.state.save(self.folder)
            self._tail = Tail(self.path, self.state)
            self.say(f"run {store.run_id} in {self.state.store}")
        self._store = store
        return store

    def _note(self, store: Store, *, finished: bool, files: list[str]) -> None:
        if self.state.problem is not None:
            self.say("shipping again")
        offset = self._tail.offset
        self.state = ShipState(
            self.state.store,
            self.state.run_id,
            offset,
            check_sum(self.path, offset),
            finished,
            files=files,
            mark=store.mark,
        )
        self.state.save(self.folder)

    def _leave_orphaned(self) -> int:
        """The trainer went without a word: say so, unless a new one writes already."""
        if self.attempt is not None and self._store is not None:
            try:
                if last_attempt(self.path) == self.attempt:
                    self._store.finish("failed", round(time.time() * 1000))
            except Exception as error:
                self.trouble(error)
                return LEFT_OVER
        return SHIPPED

    def _drained_long_enough(self) -> bool:
        if self.attempt is None:
            return False
        self._orphan_since = self._orphan_since or self.clock()
        return self.clock() - self._orphan_since > ORPHAN_DRAIN_S

    def _wait(self, seconds: float, seconds_at_end: float) -> None:
        """Pause, shorter when the attempt has ended, when asked to stop and when the trainer is gone."""
        begin = self.clock()
        while True:
            self.sleep(SLICE_S)
            passed = self.clock() - begin
            if passed >= seconds or self._stop_at is not None or not self.parent_alive():
                return
            if passed >= seconds_at_end and self._has_ended():
                return

    def _has_ended(self) -> bool:
        try:
            size = self.path.stat().st_size
        except OSError:
            return False
        if size != self._seen_size:
            self._seen_size, self._seen_end = size, ended(self.path, self.attempt or 0)
        return self._seen_end


def is_hopeless(error: BaseException) -> bool:
    """Whether trying again cannot help."""
    unknown_address = type(error).__name__.startswith("Unsupported") or "maintenance mode" in str(error)
    return isinstance(error, ImportError) or unknown_address


@contextmanager
def only_shipper(folder: Path, store: str, *, wait: Callable[[], bool]) -> Iterator[None]:
    """Hold a lock in a run's folder: two shippers to one writer would undo each other's notes.

    Args:
        folder: of the run.
        store: its address.
        wait: asked while another one holds it; pauses and says whether to go on waiting.

    Raises:
        BlockingIOError: if another one holds it and ``wait`` says no.
    """
    with (folder / lock_file(store)).open("a") as file:
        _lock(file, wait)
        yield


def _lock(file: IO[str], wait: Callable[[], bool]) -> None:
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if not wait():
                raise


def open_store(folder: Path, options: StoreOptions, run_id: str | None) -> Store:
    """Open the store that an address names.

    Args:
        folder: of the run.
        options: which run of which store.
        run_id: the store's name of the run, if known.

    Raises:
        Exception: whatever the store's library raises.
    """
    if options.uri == TENSORBOARD:
        from bdtrain.tracking.tensorboard import TensorBoardStore

        state = ShipState.load(folder, TENSORBOARD)
        noted = state.mark if place(folder / METRICS_FILE, state) else 0
        return TensorBoardStore(folder, options.run_name, noted)
    if options.uri == WANDB:
        from bdtrain.tracking.wandb import WandbStore

        return WandbStore(folder, options)
    return MlflowStore(folder, options, run_id)


def main(arguments: list[str]) -> int:
    """Ship for a trainer.

    Returns:
        An exit code.
    """
    # The shell's Ctrl-C and a scheduler's warning are for the trainer, which ends its attempt in its own way.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    parser = argparse.ArgumentParser(description="Carry a run's metrics to a store.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--experiment", required=True)
    parser.add_argument("--name", required=True, help="of the run")
    parser.add_argument("--uid", help="of the run")
    parser.add_argument("--attempt", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True, help="process that writes the metrics")
    parser.add_argument("--interval", type=float, default=INTERVAL_S, help="seconds")
    parser.add_argument("--backoff-limit", type=float, default=BACKOFF_LIMIT_S, help="seconds")
    parser.add_argument("--nice", type=int, default=10, help="how far to stand back from the trainer")
    options = parser.parse_args(arguments)
    os.nice(options.nice)
    sys.stdout, sys.stderr = RedactedStream(sys.stdout), RedactedStream(sys.stderr)
    os.environ.update(quiet_environment())
    uri = os.environ.get(URI_VARIABLE) or default_uri(options.folder)
    settings = StoreOptions(
        uri, options.experiment, options.name, options.uid or read_run_uid(options.folder)
    )

    def parent_alive() -> bool:
        return os.getppid() == options.parent

    def wait() -> bool:
        time.sleep(SLICE_S)
        return parent_alive()

    stopped: list[Shipping] = []

    def stop(*_: object) -> None:
        # A call that hangs does not see the flag; nothing is lost by leaving in the middle of it.
        signal.signal(signal.SIGALRM, lambda *_: os._exit(LEFT_OVER))
        signal.setitimer(signal.ITIMER_REAL, STOP_GRACE_S + 1)
        for shipping in stopped:
            shipping.stop()
        if not stopped:
            os._exit(LEFT_OVER)

    signal.signal(signal.SIGTERM, stop)
    with only_shipper(options.folder, uri, wait=wait):
        shipping = Shipping(
            options.folder,
            uri,
            lambda run_id: open_store(options.folder, settings, run_id),
            attempt=options.attempt,
            parent_alive=parent_alive,
            interval_s=options.interval,
            backoff_limit_s=options.backoff_limit,
            say=log_line,
            sample=SystemSampler(options.folder / METRICS_FILE, options.parent, say=log_line).take,
        )
        stopped.append(shipping)
        return shipping.run()


def log_line(text: str) -> None:
    """One line of the log, with the time."""
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} [{os.getpid()}] {text}", flush=True)


if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
    except BlockingIOError:
        code = LEFT_OVER
    # Not sys.exit: MLflow's threads have nothing left to do and may hang.
    sys.stdout.flush()
    os._exit(code)
