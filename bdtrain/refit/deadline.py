"""Limits of time: an error in the middle of what takes too long, and with it the deadline of a re-fit."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from bdtrain.errors import RefitError
from bdtrain.refit.schedule_file import SCHEDULE_FILE

END_S = 45.0
"""What a re-fit is given after its deadline to put its Ray away; less than ``apart.GRACE_S``."""


@contextlib.contextmanager
def time_limit(seconds: float, error: Callable[[], Exception]) -> Iterator[None]:
    """Raise an error in the middle of what takes too long; only the main thread can.

    Limits may stand inside each other: each raises its own error when its time is up.

    Args:
        seconds: from now.
        error: makes what is raised.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    left, _ = signal.setitimer(signal.ITIMER_REAL, 0)
    began = time.monotonic()
    outer = signal.getsignal(signal.SIGALRM)
    # 0 says that there is no other limit, or that it has rung.
    waiting = left > 0 and callable(outer)

    def ring(number: int, frame: FrameType | None) -> None:
        nonlocal waiting
        if waiting and callable(outer) and time.monotonic() - began >= left:
            waiting = False
            outer(number, frame)
        raise error()

    signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, min(seconds, left) if waiting else seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, outer)
        if waiting:
            # 0 would stop it.
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - began), 1e-3))


@contextlib.contextmanager
def deadline(limit_s: float, folder: Path, *, alone: bool, grace_s: float = END_S) -> Iterator[None]:
    """End a re-fit that takes too long: with an error first, and what does not hear it with the process.

    Once the schedule is there, only the report on gradients is still to come: that one is left out then.

    Args:
        limit_s: seconds from now, ``refit.deadline_s``.
        folder: of the results.
        alone: whether the process makes this re-fit and nothing more.
        grace_s: seconds from the error to the end of the process.

    Raises:
        RefitError: if the re-fit was not done in time.
    """
    before = _identity(folder)
    late: list[RefitError] = []

    def is_published() -> bool:
        return _identity(folder) != before

    def describe() -> str:
        left = "its schedule is there, gradients are left out" if is_published() else "nothing was written"
        return f"the re-fit took longer than refit.deadline_s={limit_s:g}; {left}"

    def ring() -> RefitError:
        late.append(RefitError(describe()))
        return late[-1]

    def give_up() -> None:
        done = alone and is_published()
        print(f"{'warning' if done else 'error'}: {describe()}", file=sys.stderr, flush=True)
        os._exit(0 if done else RefitError.exit_code)

    # What hangs in a library does not hear an exception.
    timer = threading.Timer(limit_s + grace_s, give_up)
    timer.daemon = True
    timer.start()
    try:
        with time_limit(limit_s, ring):
            yield
    except RefitError as error:
        if error not in late or not is_published():
            raise
        print(f"warning: {error}", file=sys.stderr, flush=True)
    finally:
        timer.cancel()


def _identity(folder: Path) -> tuple[int, int] | None:
    """What tells a schedule from the one that is written in its place; None where there is none."""
    try:
        found = (folder / SCHEDULE_FILE).stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns
