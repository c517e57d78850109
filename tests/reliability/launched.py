"""Real launchers in tests: started with a mark that every process below them carries; none is left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bdtrain.testing.ranks import RENDEZVOUS

ROOT = Path(__file__).resolve().parents[2]
MARK = "BDTRAIN_TEST_MARK"
SCRIPTS = Path(sys.executable).parent
_FROM_LAUNCHERS = ("MASTER_", "LOCAL_", "CROSS_", "TORCHELASTIC_", "OMPI_COMM_WORLD_", "SLURM_")


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def processes_with(mark: str) -> dict[int, str]:
    """Number and command of all processes that run and were started with ``BDTRAIN_TEST_MARK=mark``."""
    wanted = f"{MARK}={mark}".encode()
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            inherited = (entry / "environ").read_bytes().split(b"\0")
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if wanted in inherited and state not in "ZX":
            found[int(entry.name)] = command
    return found


def wait_until(condition: Callable[[], object], seconds: float) -> bool:
    """Whether something came true in time."""
    end = time.monotonic() + seconds
    while not (met := bool(condition())) and time.monotonic() < end:
        time.sleep(0.02)
    return met


def listens_for_sigterm(pid: int) -> bool:
    """Whether a process has a handler for SIGTERM."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


class Launched:
    """A command in a session of its own; ``with`` it.

    Args:
        command: program and arguments; programs of the environment's ``bin`` by their name.
        log: where its output goes.
        environment: variables besides this process's own, from which what a launcher said is taken away.
    """

    def __init__(
        self, command: Sequence[object], log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.mark = uuid.uuid4().hex
        self.log = log
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(_FROM_LAUNCHERS) and name not in ("RANK", "WORLD_SIZE", RENDEZVOUS)
        }
        words = [str(word) for word in command]
        if (SCRIPTS / words[0]).exists():
            words[0] = str(SCRIPTS / words[0])
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                words,
                cwd=ROOT,
                env={
                    **kept,
                    "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}",
                    "OMP_NUM_THREADS": "1",
                    "OMP_WAIT_POLICY": "passive",
                    MARK: self.mark,
                    **(environment or {}),
                },
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> Launched:
        return self

    def __exit__(self, *error: object) -> None:
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.kill()
        self.process.wait()

    def processes(self) -> dict[int, str]:
        """Number and command of all that is left of it."""
        return processes_with(self.mark)

    def text(self) -> str:
        """What it printed."""
        return self.log.read_text(errors="replace")

    def wait(self, limit_s: float = 240.0) -> int:
        """Exit code of the command.

        Raises:
            AssertionError: if it does not end in time, with what it printed.
        """
        try:
            return self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not finished after {limit_s:g} s\n{self.text()[-3000:]}") from None
