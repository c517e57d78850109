"""One writer per run folder: a lock that the kernel frees when its owner dies, and a heartbeat beside it.

The lock of the operating system decides on one machine. Some network file systems keep it to themselves, so
the owner also touches the file every few seconds; a writer on another machine waits to see whether it does.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from bdtrain.errors import ConfigError
from bdtrain.tracking.run_files import LOCK_FILE

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Owner:
    """Who holds a folder, as the lock file says.

    Attributes:
        host: name of the machine.
        machine: what tells this start of the machine's kernel from any other.
        pid: number of the process.
        since: when it took the lock, seconds since 1970.
    """

    host: str
    machine: str
    pid: int
    since: float

    def describe(self) -> str:
        """In words, for a message."""
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {self.host}, since {when}"


class RunLock:
    """The right to write into a run's folder; held by rank 0 for as long as its process lives.

    ``kill -9`` of the owner frees it at once on the same machine. On another machine the next start waits
    until the heartbeat is ``stale_s`` old, at most that long; a heartbeat seen meanwhile is a refusal.

    Args:
        folder: of the run; made when it is missing.
        heartbeat_s: time between two signs of life, seconds.
        stale_s: age from which a missing sign of life means death, seconds.
        tell: told what a long start is waiting for.
    """

    def __init__(
        self,
        folder: Path,
        *,
        heartbeat_s: float = 5.0,
        stale_s: float = 30.0,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self.path = folder / LOCK_FILE
        self._heartbeat_s, self._stale_s = heartbeat_s, stale_s
        self._tell = tell or (lambda message: None)
        self._file: int | None = None
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> str | None:
        """Take the folder.

        Returns:
            Whose lock was taken over, as a sentence; None where the last owner left in order.

        Raises:
            ConfigError: if another process writes into this folder, or the folder cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, locked = self._open()
        except OSError as error:
            raise ConfigError(
                f"cannot lock {self.path}: {error.strerror or error}; choose a run.folder that can be written"
            ) from error
        try:
            before = _read(descriptor)
            note = None
            if before is not None:
                if not (locked and before.machine == _machine()):
                    self._wait_for_silence(descriptor, before)
                note = f"the last owner of {self.path.parent} ended without notice: {before.describe()}"
            _write(descriptor, Owner(socket.gethostname(), _machine(), os.getpid(), round(time.time(), 3)))
        except BaseException:
            os.close(descriptor)
            raise
        self._file = descriptor
        # A child made by fork would hold the lock after this process is dead.
        lock = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _forget(lock))
        self._thread = threading.Thread(target=self._beat, name="run-lock", daemon=True)
        self._thread.start()
        return note

    def release(self) -> None:
        """Give the folder back; nothing happens where it is not held."""
        if self._file is None:
            return
        self._done.set()
        if self._thread is not None:
            self._thread.join()
        # Only its own file: somebody may have removed it, and another writer made a new one.
        if _same_file(self._file, self.path):
            self.path.unlink(missing_ok=True)
        os.close(self._file)
        self._file = None

    def __enter__(self) -> RunLock:
        """Take the folder; see ``acquire``."""
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the folder back."""
        self.release()

    def _open(self) -> tuple[int, bool]:
        """The lock file, open, and whether the system's lock on it is ours.

        Raises:
            ConfigError: if another process holds it.
        """
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            locked = True
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = _read(descriptor)
                os.close(descriptor)
                raise self._refusal(owner) from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    os.close(descriptor)
                    raise
                locked = False
            # The last owner may have removed the file between our opening and our locking it.
            if _same_file(descriptor, self.path):
                return descriptor, locked
            os.close(descriptor)

    def _refusal(self, owner: Owner | None) -> ConfigError:
        who = owner.describe() if owner else "a process that has just started"
        return ConfigError(
            f"{self.path.parent} is being written by {who}; one run folder has one writer: wait for it or "
            "stop it (SIGTERM saves first), or choose another folder with run.name=... or run.folder=..."
        )

    def _wait_for_silence(self, descriptor: int, owner: Owner) -> None:
        """Return when no sign of life has come for ``stale_s``.

        Raises:
            ConfigError: at the first sign.
        """
        last = os.fstat(descriptor).st_mtime_ns
        # Both times are the file system's own: clocks of two machines differ.
        left_s = self._stale_s - (_now_ns(self.path) - last) / 1e9
        if left_s > 0:
            self._tell(
                f"{self.path.parent} was left by {owner.describe()}; waiting {left_s:.0f} s for a sign of it"
            )
        end = time.monotonic() + left_s
        while time.monotonic() < end:
            time.sleep(min(0.2, self._heartbeat_s))
            # By name: some file systems answer for an open file from a cache.
            if _mtime_ns(self.path) != last:
                raise self._refusal(owner)

    def _beat(self) -> None:
        while not self._done.wait(self._heartbeat_s):
            try:
                if self._file is not None:
                    os.utime(self._file)
            except OSError:
                # A file system in trouble must not end the training; the next beat may pass.
                continue


def _forget(lock: weakref.ref[RunLock]) -> None:
    """In a child made by fork: close the file without freeing the parent's lock."""
    held = lock()
    if held is not None and held._file is not None:
        os.close(held._file)
        held._file = None


def _machine() -> str:
    """The same text in all processes of one running kernel, containers included."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _mtime_ns(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _now_ns(path: Path) -> int:
    """The file system's clock, from a file made for it."""
    probe = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        probe.touch()
        return probe.stat().st_mtime_ns
    finally:
        probe.unlink(missing_ok=True)


def _read(descriptor: int) -> Owner | None:
    """What the file says; None for an empty or torn one."""
    try:
        return Owner(**json.loads(os.pread(descriptor, 4096, 0)))
    except (ValueError, TypeError):
        return None


def _write(descriptor: int, owner: Owner) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, (json.dumps(asdict(owner)) + "\n").encode(), 0)
    os.fsync(descriptor)
