"""Tasks spread over processes, each on a pipe of its own.

A pool of the standard library is not used: its workers wait for ever when the parent is killed. Here nobody
else holds an end of a worker's pipe, so each side notices at once that the other is gone, and there is no
lock to be left held.
"""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import TypeVar

from bdtrain.data.progress import ProgressLine
from bdtrain.errors import BdtrainError, DataError

_REPORT_BYTES = 1 << 20
_POLL_SECONDS = 0.5

Task = TypeVar("Task")
Setup = Callable[[], Callable[[Task, Callable[[int], None]], None]]
"""Called once in a worker; gives the function that does a task and reports the bytes it has read."""


def run_in_processes(setup: Setup[Task], tasks: Sequence[Task], workers: int, show: ProgressLine) -> None:
    """Do all tasks; the first error ends the run.

    Args:
        setup: picklable; see :data:`Setup`.
        tasks: picklable; handed out in order, each to the worker that is free first.
        workers: processes.
        show: told of the bytes that were read.

    Raises:
        BdtrainError: the first one that a task raised.
        OSError: likewise.
        DataError: if a worker died.
    """
    # Workers start afresh: nothing of this process, its threads least of all, is copied into them.
    context = multiprocessing.get_context("spawn")
    started = []
    try:
        pipes: list[Connection] = []
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(setup, theirs), daemon=True)
            process.start()
            theirs.close()
            started.append(process)
            pipes.append(ours)
        _hand_out(list(tasks), pipes, show)
        for process in started:
            process.join()
    finally:
        for process in started:
            if process.is_alive():
                process.terminate()
                process.join()


def _hand_out(tasks: list[Task], pipes: list[Connection], show: ProgressLine) -> None:
    """Answer the workers until each has been told that nothing is left."""
    tasks.reverse()
    open_pipes = list(pipes)
    while open_pipes:
        for pipe in wait(open_pipes, timeout=_POLL_SECONDS):
            assert isinstance(pipe, Connection)
            try:
                message = pipe.recv()
                if isinstance(message, Exception):
                    raise message
                if isinstance(message, int):
                    show.advance(message)
                    continue
                if tasks:
                    pipe.send(tasks.pop())
                else:
                    pipe.send(None)
                    open_pipes.remove(pipe)
            except (EOFError, BrokenPipeError, ConnectionResetError) as error:
                raise DataError(
                    "a preprocess worker was killed (out of memory?); what is finished is kept: run the same "
                    "command again, perhaps with fewer --workers"
                ) from error
        show.advance(0)


def _work(setup: Setup[Task], pipe: Connection) -> None:
    """Life of a worker: ask, work, ask again."""
    # Ctrl-C reaches the whole group; the parent ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    unsent = 0

    def report(count: int) -> None:
        nonlocal unsent
        unsent += count
        if unsent >= _REPORT_BYTES:
            pipe.send(unsent)
            unsent = 0

    try:
        do = setup()
        while True:
            pipe.send("next")
            task = pipe.recv()
            if task is None:
                return
            do(task, report)
            pipe.send(unsent)
            unsent = 0
    except (EOFError, BrokenPipeError, ConnectionResetError):
        # The parent is gone; whoever comes next resumes.
        return
    except Exception as error:
        known = isinstance(error, BdtrainError | OSError)
        pipe.send(error if known else RuntimeError(f"a preprocess worker failed:\n{traceback.format_exc()}"))
