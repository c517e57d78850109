"""Several ranks on one machine, for tests: started, watched, and none left behind.

Ranks meet through a file, never through a port. The failure that is shown is the first one, not that of a
peer which noticed that somebody was gone.
"""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

RENDEZVOUS = "BDTRAIN_RENDEZVOUS"
"""Environment variable with the ``init_method`` for ``torch.distributed.init_process_group``."""

_GRACE_S = 2.0
_DUMP_S = 0.5
_POLL_S = 0.01
_LOG_LINES = 40
_FROM_LAUNCHERS = ("MASTER_", "LOCAL_SIZE", "CROSS_", "TORCHELASTIC_", "OMPI_COMM_WORLD_", "SLURM_")


class RankFailure(Exception):  # noqa: N818
    """A rank raised, died or hung.

    Attributes:
        rank: the one that failed first.
        report: its traceback, or how it died; when ranks hung, where each of them was.
    """

    def __init__(self, rank: int, report: str) -> None:
        super().__init__(f"rank {rank}: {report}")
        self.rank = rank
        self.report = report


def run_ranks(
    target: str | Callable[..., Any],
    world_size: int,
    *arguments: Any,
    timeout_s: float = 120.0,
    environment: Mapping[str, str] | None = None,
) -> list[Any]:
    """Run ``function(rank, world_size, *arguments)`` in ``world_size`` processes of their own.

    Each finds RANK, LOCAL_RANK and WORLD_SIZE in its environment, and in BDTRAIN_RENDEZVOUS the address at
    which the ranks meet. The function starts its process group itself. One launch costs seconds of imports,
    so check many claims in one.

    Args:
        target: "package.module:function" or "path/to/file.py:function", or the function itself, at the top
            level of its file.
        world_size: number of processes.
        *arguments: anything that survives JSON; paths arrive as text, tuples as lists.
        timeout_s: for all of it, seconds of wall time.
        environment: variables to set besides this process's own.

    Returns:
        What the function returned, by rank: values of JSON, or what ``torch.load(weights_only=True)`` reads.

    Raises:
        RankFailure: if a rank fails or the time is up. No process is left behind in any case.
        TypeError: if an argument does not survive JSON.
    """
    given = json.dumps(arguments, default=os.fspath)
    with tempfile.TemporaryDirectory(prefix="bdtrain-ranks-") as name:
        folder = Path(name)
        (folder / "job.json").write_text(
            json.dumps({"target": _target_text(target), "world_size": world_size, "arguments": given}),
            encoding="utf-8",
        )
        ranks: list[_Rank] = []
        try:
            for rank in range(world_size):
                ranks.append(_start(rank, world_size, folder, environment or {}))
            _wait(ranks, time.monotonic() + timeout_s, timeout_s)
            return [_result(folder, rank) for rank in range(world_size)]
        finally:
            for rank_process in ranks:
                rank_process.end()


def rank_environment(rank: int, world_size: int, meeting: Path) -> dict[str, str]:
    """The environment of a rank on this machine: this process's own without what another launcher said.

    Args:
        rank: its number.
        world_size: processes in the run.
        meeting: a file that does not exist yet, in a folder that does; the ranks of one start meet there.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_FROM_LAUNCHERS)}
    return {
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        **kept,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        RENDEZVOUS: f"file://{meeting.absolute()}",
    }


@dataclass
class _Rank:
    """One process, the leader of its own session."""

    number: int
    process: subprocess.Popen[bytes]
    folder: Path
    log: IO[bytes]
    ended_at: float | None = None
    last_alive: float = 0.0

    def look(self) -> int | None:
        """The exit code once it has ended; the process is left unreaped, so that its number stays taken."""
        if self.process.returncode is not None:
            return self.process.returncode
        now = time.monotonic()
        found = os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if found is None:
            self.last_alive = now
            return None
        if self.ended_at is None:
            self.ended_at = now
        return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status

    def send(self, number: int) -> None:
        """Signal the whole group."""
        if self.process.returncode is None:
            try:
                os.killpg(self.process.pid, number)
            except (ProcessLookupError, PermissionError):
                return

    def end(self) -> None:
        """Kill whatever is left of the group, then reap its leader."""
        self.send(signal.SIGKILL)
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()
        self.log.close()

    def failure(self) -> dict[str, Any] | None:
        """What the rank wrote about its own failure."""
        path = self.folder / f"failure-{self.number}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def left_early(self) -> bool:
        """Whether it ended with code 0, but not by the return of its function."""
        names = (f"result-{self.number}.json", f"result-{self.number}.pt")
        return self.look() == 0 and not any((self.folder / name).exists() for name in names)

    def log_tail(self) -> str:
        """The last lines of what it printed."""
        text = (self.folder / f"log-{self.number}.txt").read_text(encoding="utf-8", errors="replace")
        lines = text.splitlines()[-_LOG_LINES:]
        return "\n".join(["--- its output ends with", *lines]) if lines else ""


def _target_text(target: str | Callable[..., Any]) -> str:
    if not isinstance(target, str):
        if "." in target.__qualname__:
            raise TypeError(f"{target.__qualname__} is not at the top level of its file; move it there")
        target = f"{Path(inspect.getfile(target)).resolve()}:{target.__name__}"
    module, _, function = target.rpartition(":")
    if not module or not function:
        raise TypeError(f"target {target!r} is not 'module:function' or 'file.py:function'")
    return f"{Path(module).resolve()}:{function}" if module.endswith(".py") else target


def _start(rank: int, world_size: int, folder: Path, environment: Mapping[str, str]) -> _Rank:
    log = (folder / f"log-{rank}.txt").open("wb")
    process = subprocess.Popen(
        [sys.executable, "-m", "bdtrain.testing.rank_main", str(folder), str(rank)],
        env={**rank_environment(rank, world_size, folder / "meeting"), **environment},
        # The rank ends when this pipe does: it cannot outlive a parent that was killed.
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    return _Rank(rank, process, folder, log, last_alive=time.monotonic())


def _wait(ranks: Sequence[_Rank], deadline: float, timeout_s: float) -> None:
    """Return when all ranks have ended well.

    Raises:
        RankFailure: otherwise.
    """
    while True:
        codes = [rank.look() for rank in ranks]
        if any(codes) or any(rank.left_early() for rank in ranks):
            _fail(ranks)
        if None not in codes:
            return
        if time.monotonic() > deadline:
            _time_out(ranks, timeout_s)
        time.sleep(_POLL_S)


def _fail(ranks: Sequence[_Rank]) -> None:
    """Give the others a moment to say what they saw, then name the first."""
    end = time.monotonic() + _GRACE_S
    while time.monotonic() < end and any(rank.look() is None for rank in ranks):
        time.sleep(_POLL_S)
    stories = []
    for rank in ranks:
        code, told = rank.look(), rank.failure()
        if told is not None:
            # A peer that notices may say so before the culprit has left its `finally` blocks.
            stories.append((told["peer_gone"], told["time"], rank, told["traceback"]))
        elif code or rank.left_early():
            # It died without a word, at some time after it was last seen alive.
            how = signal.Signals(-code).name if code and code < 0 else f"exit code {code}"
            stories.append((False, rank.last_alive, rank, f"ended by {how} before its function returned"))
    _, _, first, report = min(stories, key=lambda story: story[:2])
    raise RankFailure(
        first.number, "\n".join(filter(None, ("failed first", report.rstrip(), first.log_tail())))
    )


def _time_out(ranks: Sequence[_Rank], timeout_s: float) -> None:
    """Ask every rank that still runs where it is."""
    running = [rank for rank in ranks if rank.look() is None]
    for rank in running:
        rank.send(signal.SIGUSR2)
    time.sleep(_DUMP_S)
    where = "\n".join(f"rank {rank.number} of {len(ranks)}:\n{rank.log_tail()}" for rank in running)
    raise RankFailure(
        running[0].number, f"not finished after {timeout_s:g} s; where the ranks were:\n{where}"
    )


def _result(folder: Path, rank: int) -> Any:
    plain = folder / f"result-{rank}.json"
    if plain.exists():
        return json.loads(plain.read_text(encoding="utf-8"))
    import torch

    return torch.load(folder / f"result-{rank}.pt", weights_only=True)
