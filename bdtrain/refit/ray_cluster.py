"""What a session of Ray needs around it: environment, token, private folder, a look at its sockets, an end.

Nothing here imports Ray. Most of its settings are environment variables that it reads while it is imported,
so ``prepare_environment`` comes first. A local session is closed to everyone else three times over: all
sockets on loopback, a token of its own, a folder that only its owner can enter.
"""

from __future__ import annotations

import fcntl
import ipaddress
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bdtrain.errors import RefitError
from bdtrain.parallel.network import is_loopback
from bdtrain.refit.outcome import AUTO, RaySettings, split_address
from bdtrain.tracking.child import LAUNCHER_PREFIXES, RANK_VARIABLES

LOOPBACK_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""At 0, on any system, Ray takes 127.0.0.1 for the node's address instead of the one others reach."""

TOKEN_MODE, TOKEN_PATH, TOKEN = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_TOKEN"

_FOLDER_PREFIX = "bdr-"
_LOCK = "lock"
_SOCKET_PATH_LIMIT = 107
# What Ray puts behind the folder: its own, session_DATE_TIME_MICROSECONDS_PID, sockets/plasma_store.
_SOCKET_TAIL = len("/r/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")
_POLL_S = 0.05
_LISTEN = "0A"


def strip_launch_environment(environment: MutableMapping[str, str]) -> list[str]:
    """Take away what a launcher of ranks said: a worker is no rank, and would wait for the others.

    Args:
        environment: variables; changed.

    Returns:
        Names that were taken away, in order.
    """
    names = sorted(
        name for name in environment if name in RANK_VARIABLES or name.startswith(LAUNCHER_PREFIXES)
    )
    for name in names:
        del environment[name]
    return names


def prepare_environment(
    settings: RaySettings, folder: Path | None, environment: MutableMapping[str, str]
) -> None:
    """Set what Ray reads while it is imported; call this before anything imports it.

    Args:
        settings: of the measurement.
        folder: private folder of a local session, with its token; None otherwise.
        environment: variables, normally ``os.environ``, from which Ray's processes inherit; changed.

    Raises:
        RefitError: if the token that the user names for a cluster cannot be read.
    """
    strip_launch_environment(environment)
    environment["RAY_USAGE_STATS_ENABLED"] = "0"
    if settings.is_local:
        assert folder is not None
        # A token in a variable would win over the one in our file.
        for name in (TOKEN, "RAY_ADDRESS", "RAY_NAMESPACE", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
            environment.pop(name, None)
        environment[LOOPBACK_VARIABLE] = "0"
        environment[TOKEN_MODE] = "token"
        environment[TOKEN_PATH] = str(token_path(folder))
        # Else a session that is asked to end waits 30 s for services that nobody runs here.
        environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "0"
        return
    if environment.get(TOKEN) or environment.get(TOKEN_PATH):
        environment.setdefault(TOKEN_MODE, "token")
    if environment.get(TOKEN_PATH) and not environment.get(TOKEN):
        _check_token_file(Path(environment[TOKEN_PATH]))
    if is_loopback_cluster(settings.address, environment):
        # Without it Ray asks for 127.0.0.1 under the machine's outer address, where nobody listens.
        environment.setdefault(LOOPBACK_VARIABLE, "0")


def _check_token_file(path: Path) -> None:
    try:
        empty = not path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise RefitError(
            f"{TOKEN_PATH}={path} cannot be read ({error}); name a file with the cluster's token"
        ) from error
    if empty:
        raise RefitError(f"{TOKEN_PATH}={path} is empty; put the cluster's token into it")


def is_loopback_cluster(address: str, environment: MutableMapping[str, str]) -> bool:
    """Whether a cluster's address is on loopback; ``auto`` is what ``RAY_ADDRESS`` or Ray's own note says."""
    if address == AUTO:
        address = environment.get("RAY_ADDRESS", "") or _noted_address(environment)
    found = split_address(address)
    return found is not None and (found[0] == "localhost" or is_loopback(found[0]))


def _noted_address(environment: MutableMapping[str, str]) -> str:
    """What ``ray start --head`` left in its folder; empty where it left nothing."""
    note = Path(environment.get("RAY_TMPDIR") or "/tmp", "ray", "ray_current_cluster")
    try:
        return note.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


@contextmanager
def private_folder(parent: Path | None) -> Iterator[Path]:
    """A folder for one session, closed to other users, with a fresh token; gone afterwards.

    Folders whose owner was killed are removed on the way.

    Args:
        parent: where it is made; None for the system's folder for temporary files.

    Raises:
        RefitError: if the path leaves no room for the names of Ray's sockets.
    """
    room = _SOCKET_PATH_LIMIT - _SOCKET_TAIL - len(f"/{_FOLDER_PREFIX}") - 8
    place = (parent or Path(tempfile.gettempdir())).resolve()
    if parent is None and len(os.fsencode(place)) > room:
        place = Path("/tmp")
    if len(os.fsencode(place)) > room:
        raise RefitError(
            f"the path {place} is too long for the sockets of Ray: {len(os.fsencode(place))} characters, at "
            f"most {room} are allowed; choose a shorter folder"
        )
    if not place.is_dir():
        raise RefitError(f"{place} is no folder; a session of Ray needs one for its temporary files")
    remove_abandoned(place)
    # mkdtemp makes it with mode 0700.
    folder = Path(tempfile.mkdtemp(prefix=f".{_FOLDER_PREFIX}", dir=place))
    try:
        with (folder / _LOCK).open("w") as lock:
            # Tells a living session from an abandoned folder; it goes with the process. Its name that others
            # look for comes after the lock.
            fcntl.flock(lock, fcntl.LOCK_EX)
            write_token(token_path(folder))
            folder = folder.rename(folder.with_name(folder.name.removeprefix(".")))
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned(place: Path) -> None:
    """Remove private folders of this user whose process is gone."""
    for folder in place.glob(f"{_FOLDER_PREFIX}*"):
        try:
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            with (folder / _LOCK).open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            continue


def token_path(folder: Path) -> Path:
    """Where a private folder keeps its token."""
    return folder / "token"


def write_token(path: Path) -> None:
    """Write a new token that only its owner can read; Ray itself would let everyone read it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))


@dataclass(frozen=True)
class Process:
    """A process that will not be taken for another one that gets its number later.

    Attributes:
        pid: its number.
        started: when, in clock ticks since the machine started.
    """

    pid: int
    started: int


def session_processes(driver: int, folder: Path, *, proc: Path = Path("/proc")) -> dict[Process, str]:
    """Processes of a local session, the driver aside.

    They are what the driver started, and what inherited the token's path: when a parent dies, only that tells
    whose a process was.

    Args:
        driver: process that started Ray.
        folder: its private folder.
        proc: the process file system.

    Returns:
        Name of the program of each process that runs.
    """
    found: dict[Process, str] = {}
    parents: dict[int, int] = {}
    marked: dict[Process, bool] = {}
    marker = os.fsencode(f"{TOKEN_PATH}={token_path(folder)}")
    for entry in proc.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            name, _, rest = (entry / "stat").read_text(errors="replace").rpartition(")")
            fields = rest.split()
            process = Process(int(entry.name), int(fields[19]))
            parents[process.pid] = int(fields[1])
            if fields[0] in "ZX":
                continue
            found[process] = name.partition("(")[2]
            environment = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        marked[process] = marker in environment
    ours = {}
    for process, name in found.items():
        if process.pid != driver and (marked.get(process) or _descends(process.pid, driver, parents)):
            ours[process] = name
    return ours


def _descends(pid: int, ancestor: int, parents: dict[int, int]) -> bool:
    # A process file system that changes while it is read may show a circle.
    for _ in range(len(parents) + 1):
        pid = parents.get(pid, 0)
        if pid in (0, 1):
            return False
        if pid == ancestor:
            return True
    return False


@dataclass(frozen=True)
class ListeningSocket:
    """Where a process takes connections.

    Attributes:
        pid: of the process.
        host: numeric address.
        port: TCP port.
    """

    pid: int
    host: str
    port: int


def listening_sockets(pids: Collection[int], *, proc: Path = Path("/proc")) -> list[ListeningSocket]:
    """TCP sockets, IPv4 and IPv6, on which some processes listen.

    Args:
        pids: of the processes; all in this process's network.
        proc: the process file system.
    """
    listening: dict[str, tuple[str, int]] = {}
    for table in ("tcp", "tcp6"):
        try:
            lines = (proc / "net" / table).read_text().splitlines()[1:]
        except FileNotFoundError:
            # A machine without IPv6.
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == _LISTEN:
                listening[fields[9]] = read_socket_address(fields[1])
    found = []
    for pid in sorted(pids):
        for inode in _socket_inodes(proc / str(pid) / "fd"):
            if inode in listening:
                found.append(ListeningSocket(pid, *listening[inode]))
    return found


def _socket_inodes(folder: Path) -> list[str]:
    inodes = set()
    try:
        for entry in folder.iterdir():
            try:
                target = os.readlink(entry)
            except OSError:
                continue
            if target.startswith("socket:["):
                inodes.add(target[len("socket:[") : -1])
    except OSError:
        # The process is gone, and its sockets with it.
        return []
    return sorted(inodes)


def read_socket_address(text: str) -> tuple[str, int]:
    """Host and port from the kernel's table: words of 32 bits in the machine's order, as hexadecimals."""
    address, _, port = text.partition(":")
    raw = b"".join(
        # Written by printing the word as a number: little-endian machines show its bytes backwards.
        int(address[start : start + 8], 16).to_bytes(4, sys.byteorder)
        for start in range(0, len(address), 8)
    )
    return str(ipaddress.ip_address(raw)), int(port, 16)


def check_loopback(driver: int, folder: Path, *, proc: Path = Path("/proc")) -> int:
    """Refuse a local session that other machines can reach.

    Args:
        driver: process that started Ray; it listens too.
        folder: its private folder.
        proc: the process file system.

    Returns:
        Number of listening sockets, all on loopback.

    Raises:
        RefitError: with each socket that is not.
    """
    names = {process.pid: name for process, name in session_processes(driver, folder, proc=proc).items()}
    names[driver] = "driver"
    sockets = listening_sockets(names, proc=proc)
    outside = [
        f"{names[one.pid]} (process {one.pid}) on {one.host} port {one.port}"
        for one in sockets
        if not is_loopback(one.host)
    ]
    if outside:
        raise RefitError(
            "Ray was to listen on loopback only, but these sockets can be reached from outside: "
            f"{'; '.join(outside)}; the session was ended. {LOOPBACK_VARIABLE}=0 has no effect in this "
            "version of Ray: install the one in constraints.txt, or use refit.placement=process"
        )
    return len(sockets)


def end_processes(processes: Collection[Process], *, grace_s: float, limit_s: float = 10.0) -> list[int]:
    """Wait until processes are gone, and kill those that stay.

    Args:
        processes: of our own session.
        grace_s: seconds in which they may go by themselves.
        limit_s: seconds to wait after the kill.

    Returns:
        Numbers of the processes that had to be killed.

    Raises:
        RefitError: if one outlives even that.
    """
    left = _wait_for(processes, grace_s)
    for process in left:
        try:
            os.kill(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    stuck = _wait_for(left, limit_s)
    if stuck:
        numbers = ", ".join(str(process.pid) for process in stuck)
        raise RefitError(f"processes {numbers} of the Ray session outlive SIGKILL; look at the machine")
    return sorted(process.pid for process in left)


def _wait_for(processes: Collection[Process], seconds: float) -> list[Process]:
    """Those that still run after some seconds; returns early when none does."""
    end = time.monotonic() + seconds
    while (left := [process for process in processes if runs(process)]) and time.monotonic() < end:
        time.sleep(_POLL_S)
    return left


def runs(process: Process, *, proc: Path = Path("/proc")) -> bool:
    """Whether this very process runs; one that ended and waits for its parent does not."""
    try:
        fields = (proc / str(process.pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return False
    return int(fields[19]) == process.started and fields[0] not in "ZX"
