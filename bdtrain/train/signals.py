"""When to stop early: signals, and a launcher that died.

Only the standard library is imported, so that a launcher can listen before it imports torch.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

LAUNCHER_GONE = "launcher gone"

_ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
_SAME_PRESS_S = 1.0
_LEVELS = 4
_PROGRAMS = ("deepspeed", "deepspeed.pt", "ds", "torchrun")
_MODULES = ("deepspeed.launcher", "torch.distributed.run", "torch.distributed.launch")


class StopRequest:
    """Notices that this process should save and leave; the loop asks ``pending`` at each step.

    SIGTERM, SIGUSR1 and SIGHUP set a flag and nothing else, however often they come: a save is never
    interrupted by them. The first SIGINT does the same; a later one raises KeyboardInterrupt as usual.

    A thread watches the launchers above this process. SIGTERM to the ``deepspeed`` command ends that command
    only: its child and the ranks go on without anybody who could stop them.

    The flag is this process's own. Ranks learn of it at different times (DeepSpeed signals one after another
    has ended), so the loop spreads it by a collective before it acts on it.

    Args:
        poll_s: time between two looks at the launchers, seconds.
        proc: the proc file system; where there is none, launchers are not watched.
    """

    def __init__(self, *, poll_s: float = 0.5, proc: Path = Path("/proc")) -> None:
        self._poll_s, self._proc = poll_s, proc
        self._reason: str | None = None
        self._interrupted: float | None = None
        self._old: dict[signal.Signals, Any] = {}
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self.launchers = find_launchers(proc)

    @property
    def pending(self) -> str | None:
        """Why to stop, a signal's name or ``LAUNCHER_GONE``: the first reason that came; None to go on."""
        return self._reason

    def ask(self, reason: str) -> None:
        """Ask for a stop; the first reason stays."""
        if self._reason is None:
            self._reason = reason

    def __enter__(self) -> StopRequest:
        """Install the handlers and start to watch. Main thread only, as Python has it."""
        for asking in _ASKING:
            if signal.getsignal(asking) is signal.SIG_IGN:
                continue  # nohup, or a parent that knows why
            self._old[asking] = signal.signal(asking, self._handle)
        if self.launchers:
            self._thread = threading.Thread(target=self._watch, name="launcher-watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put the old handlers back and stop watching."""
        self._done.set()
        for asking, old in self._old.items():
            # None: the handler was not installed from Python; there is nothing to put back.
            signal.signal(asking, signal.SIG_DFL if old is None else old)
        self._old.clear()
        if self._thread is not None:
            self._thread.join()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT:
            # A launcher passes on the interrupt that the terminal has already sent to every process.
            if self._interrupted is not None and now - self._interrupted > _SAME_PRESS_S:
                raise KeyboardInterrupt
            self._interrupted = self._interrupted or now
        self.ask(signal.Signals(number).name)

    def _watch(self) -> None:
        while not self._done.wait(self._poll_s):
            if any(not is_running(process, self._proc) for process in self.launchers):
                self.ask(LAUNCHER_GONE)
                return


@dataclass(frozen=True)
class Process:
    """A process that cannot be mistaken for a later one of the same number.

    Attributes:
        pid: its number.
        start_ticks: when it started, clock ticks since the machine did.
    """

    pid: int
    start_ticks: int


def find_launchers(proc: Path = Path("/proc"), pid: int | None = None) -> tuple[Process, ...]:
    """The chain of launchers right above a process: ``torchrun``, or DeepSpeed's two.

    Args:
        proc: the proc file system.
        pid: the process; None for this one.

    Returns:
        Nearest first; empty where the parent is no launcher (a shell, a scheduler, init), or without proc.
    """
    chain: list[Process] = []
    parent = os.getppid() if pid is None else _parent(pid, proc)
    while parent is not None and len(chain) < _LEVELS:
        started = _stat(parent, proc)
        if started is None or not _is_launcher(parent, proc):
            break
        chain.append(Process(parent, started.start_ticks))
        parent = started.parent
    return tuple(chain)


def is_running(process: Process, proc: Path = Path("/proc")) -> bool:
    """Whether the process is still there, is the same one and has not ended."""
    found = _stat(process.pid, proc)
    # A killed process whose parent has not asked for its exit code is still listed, as a zombie.
    return found is not None and found.start_ticks == process.start_ticks and found.state not in "ZX"


@dataclass(frozen=True)
class _Stat:
    state: str
    parent: int
    start_ticks: int


def _stat(pid: int, proc: Path) -> _Stat | None:
    """Fields 3, 4 and 22 of /proc/PID/stat; None if there is no such process."""
    try:
        text = (proc / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError, NotADirectoryError, PermissionError):
        return None
    # The second field is the program's name in brackets, and may itself hold spaces and brackets.
    fields = text.rpartition(")")[2].split()
    return _Stat(state=fields[0], parent=int(fields[1]), start_ticks=int(fields[19]))


def _parent(pid: int, proc: Path) -> int | None:
    found = _stat(pid, proc)
    return None if found is None else found.parent


def _is_launcher(pid: int, proc: Path) -> bool:
    """Whether a process runs DeepSpeed's or torch's launcher; a mention in its arguments is not enough."""
    try:
        words = (proc / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    program = Path(words[0]).name
    if program in _PROGRAMS:
        return True
    if not program.startswith("python"):
        return False
    for position, word in enumerate(words[1:], start=1):
        if word == "-m":
            module = words[position + 1] if position + 1 < len(words) else ""
            return any(module == name or module.startswith(f"{name}.") for name in _MODULES)
        if not word.startswith("-"):
            return Path(word).name in _PROGRAMS
    return False
