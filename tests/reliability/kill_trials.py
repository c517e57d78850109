"""Training runs that are killed and started again, and what must come out of them.

A run is ``launchers/pretrain.py`` on a tiny configuration, its ranks started directly: no launcher stands
between the test and the process it kills. ``kill -9`` is the only way out here; orderly ends are tested
elsewhere.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from nursery import RECORD, Nursery, NurseryRank

from bdtrain.checkpoint.folders import step_name
from bdtrain.testing.ranks import rank_environment
from bdtrain.tracking.jsonl import attempt_spans, deterministic_fields, read_metrics

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "configs" / "run" / "tiny_synthetic.yaml"
METRICS = "metrics.jsonl"
POLL_S = 0.005


@dataclass(frozen=True)
class Job:
    """A run.

    Attributes:
        folder: of the run.
        scratch: where logs and meeting files go; not inside ``folder``.
        world_size: ranks.
        overrides: ``key.path=value`` besides the folder; MLflow is off, every step is reported.
        config: YAML file.
        environment: variables for all ranks.
        nursery: forks the ranks; None starts each with its own imports.
        record: write a digest of every row that a rank trains on into ``rank-N.rows`` beside its log.
    """

    folder: Path
    scratch: Path
    world_size: int = 1
    overrides: tuple[str, ...] = ()
    config: Path = TINY
    environment: Mapping[str, str] = field(default_factory=dict)
    nursery: Nursery | None = None
    record: bool = False

    def command(self) -> list[str]:
        """What each rank runs, after the interpreter."""
        own = (f"run.folder={self.folder}", "train.log_every_steps=1", "tracking.mlflow=false")
        # The launcher refuses a key that is given twice; here a later one replaces an earlier one.
        settings = dict(override.split("=", 1) for override in (*own, *self.overrides))
        return [
            "launchers/pretrain.py",
            "--config",
            str(self.config),
            *(f"{key}={value}" for key, value in settings.items()),
        ]


class Attempt:
    """One start of a run; ``with`` it, so that nothing is left behind."""

    def __init__(self, job: Job) -> None:
        self.job = job
        job.scratch.mkdir(parents=True, exist_ok=True)
        self.number = len(list(job.scratch.glob("attempt-*")))
        self.logs = job.scratch / f"attempt-{self.number}"
        self.logs.mkdir()
        self.started = time.monotonic()
        self.ranks: list[subprocess.Popen[bytes] | NurseryRank] = []
        for rank in range(job.world_size):
            environment = {
                **rank_environment(rank, job.world_size, self.logs / "meeting"),
                **({RECORD: str(self.logs / f"rank-{rank}.rows")} if job.record else {}),
                **job.environment,
            }
            self.ranks.append(self._start(environment, self.logs / f"rank-{rank}.log"))

    def _start(self, environment: Mapping[str, str], log: Path) -> subprocess.Popen[bytes] | NurseryRank:
        if self.job.nursery is not None:
            return self.job.nursery.start(self.job.command(), environment=environment, log=log)
        assert not self.job.record, "only ranks of a nursery record their rows"
        with log.open("wb") as output:
            return subprocess.Popen(
                [sys.executable, *self.job.command()],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> Attempt:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    @property
    def age_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def codes(self) -> list[int | None]:
        """Exit code of each rank, None while it runs."""
        return [rank.poll() for rank in self.ranks]

    def kill(self, order: Sequence[int] | None = None) -> None:
        """``kill -9`` every rank and what it started, in this order, then reap them."""
        for number in order if order is not None else range(len(self.ranks)):
            rank = self.ranks[number]
            if rank.returncode is None:
                try:
                    os.killpg(rank.pid, signal.SIGKILL)
                except ProcessLookupError:
                    # A rank that was forked this moment has no group of its own yet.
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(rank.pid, signal.SIGKILL)
        for rank in self.ranks:
            rank.wait()

    def wait(self, limit_s: float) -> list[int]:
        """Exit codes when all ranks have ended.

        Raises:
            AssertionError: if they have not in time, with what they printed.
        """
        while None in self.codes():
            assert self.age_s < limit_s, f"not finished after {limit_s:g} s\n{self.output()}"
            time.sleep(0.05)
        return [code for code in self.codes() if code is not None]

    def output(self, lines: int = 30) -> str:
        """The last lines of every rank."""
        parts = []
        for path in sorted(self.logs.glob("rank-*.log")):
            tail = path.read_text(errors="replace").splitlines()[-lines:]
            parts += [f"--- {self.job.folder.name}, attempt {self.number}, {path.stem}", *tail]
        return "\n".join(parts)


Moment = Callable[[Attempt], bool]
"""Whether now is the time to kill; asked every few milliseconds."""


def after(seconds: float) -> Moment:
    """So long after the start."""
    return lambda attempt: attempt.age_s >= seconds


def when_exists(pattern: str, then_s: float = 0.0) -> Moment:
    """When a path of this pattern appears in the run's folder (``**/.tmp-*``: a save has begun), or later."""
    seen: dict[int, float] = {}

    def moment(attempt: Attempt) -> bool:
        if attempt.number not in seen and any(attempt.job.folder.glob(pattern)):
            seen[attempt.number] = attempt.age_s
        return attempt.number in seen and attempt.age_s >= seen[attempt.number] + then_s

    return moment


def when_reported(step: int, then_s: float = 0.0) -> Moment:
    """When the attempt has reported this step or a later one, or that much later."""
    began: dict[int, int] = {}
    seen: dict[int, float] = {}

    def moment(attempt: Attempt) -> bool:
        folder, number = attempt.job.folder, attempt.number
        # What earlier attempts reported is in the file already, and counts until this one has begun.
        began.setdefault(number, len(starts(folder)))
        if number not in seen and len(starts(folder)) > began[number] and reported_step(folder) >= step:
            seen[number] = attempt.age_s
        return number in seen and attempt.age_s >= seen[number] + then_s

    return moment


def reported_step(folder: Path) -> int:
    """Last step whose report counts; -1 before the first."""
    return max((line["step"] for line in read_metrics(folder / METRICS)), default=-1)


def kill_at(job: Job, moment: Moment, *, limit_s: float = 180.0, order: Sequence[int] | None = None) -> bool:
    """Start a run and ``kill -9`` all its ranks at a moment.

    Returns:
        Whether it was killed; False if it had finished before.

    Raises:
        AssertionError: if a rank failed by itself, or the moment did not come in time.
    """
    with Attempt(job) as attempt:
        while not moment(attempt):
            codes = attempt.codes()
            if codes == [0] * job.world_size:
                return False
            assert not any(codes), f"exit codes {codes} before the kill\n{attempt.output()}"
            assert attempt.age_s < limit_s, f"the moment did not come in {limit_s:g} s\n{attempt.output()}"
            time.sleep(POLL_S)
        attempt.kill(order)
        return True


def kill_by_fault(job: Job, fault: str, *, limit_s: float = 180.0) -> None:
    """Start a run in which BDTRAIN_FAULT kills a rank; when one is dead, ``kill -9`` the rest.

    Args:
        job: the run.
        fault: ``rank:step:phase:kill``; rank ``*`` for all. Added to those of the job.
        limit_s: time for it, seconds.

    Raises:
        AssertionError: if no rank died of it.
    """
    asked = ";".join(filter(None, (job.environment.get("BDTRAIN_FAULT"), fault)))
    faulty = replace(job, environment={**job.environment, "BDTRAIN_FAULT": asked})
    with Attempt(faulty) as attempt:
        while -signal.SIGKILL not in (codes := attempt.codes()):
            assert None in codes, f"{fault} did not happen; exit codes {codes}\n{attempt.output()}"
            assert attempt.age_s < limit_s, f"{fault} did not happen in {limit_s:g} s\n{attempt.output()}"
            time.sleep(POLL_S)


def finish(job: Job, *, limit_s: float = 180.0) -> float:
    """Run to the end.

    Returns:
        Wall time, seconds.

    Raises:
        AssertionError: if a rank fails.
    """
    with Attempt(job) as attempt:
        codes = attempt.wait(limit_s)
        assert not any(codes), f"exit codes {codes}\n{attempt.output()}"
        return attempt.age_s


def random_fault(draw: random.Random, job: Job, steps: int, phases: Sequence[str]) -> str:
    """A kill of one rank in a random phase of a random step after the first."""
    return f"{draw.randrange(job.world_size)}:{draw.randint(2, steps)}:{draw.choice(phases)}:kill"


def curve(folder: Path) -> dict[int, dict[str, str]]:
    """Deterministic metrics of every step, of the lines that count: step -> name -> exact text."""
    steps: dict[int, dict[str, str]] = {}
    for line in read_metrics(folder / METRICS):
        fields = deterministic_fields(line)
        del fields["step"]
        steps.setdefault(line["step"], {}).update(fields)
    return steps


def differences(folder: Path, reference: Path, *, limit: int = 10) -> list[str]:
    """Where two runs differ, bit for bit, in words; empty if nowhere.

    Args:
        folder: of the run that was interrupted.
        reference: of the one that was not.
        limit: differences to list.
    """
    ours, theirs = curve(folder), curve(reference)
    if not theirs:
        return [f"{reference / METRICS} holds no reports"]
    found = []
    for step in sorted(ours.keys() | theirs.keys()):
        mine, other = ours.get(step, {}), theirs.get(step, {})
        for name in sorted(mine.keys() | other.keys()):
            if mine.get(name) != other.get(name):
                found.append(f"step {step} {name}: {mine.get(name)} instead of {other.get(name)}")
    return found[:limit]


def recorded_rows(logs: Path) -> dict[tuple[int, int], tuple[str, str]]:
    """What an attempt trained on: (batches before, position of the row) -> digests of data and noise.

    Args:
        logs: ``Attempt.logs`` of a job that records.

    Raises:
        AssertionError: if two ranks saw another row, or other noise, at the same place.
    """
    rows: dict[tuple[int, int], tuple[str, str]] = {}
    for path in sorted(logs.glob("rank-*.rows")):
        for line in path.read_text().splitlines():
            step, position, data, noise = json.loads(line)
            found = rows.setdefault((step, position), (data, noise))
            assert found == (data, noise), f"{path.name}: step {step}, row {position} differs between ranks"
    return rows


def keep_one_checkpoint(source: Path, target: Path, step: int) -> None:
    """Copy a run as if it had been killed after the save of this step, later lines and all."""
    later = [path.name for path in (source / "checkpoints").iterdir() if path.name != step_name(step)]
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(*later, "EXIT.json", "checkpoint"))


def starts(folder: Path) -> list[int]:
    """The step from which each attempt went on, in order: 0, then more where a checkpoint was found."""
    return [span.step for span in attempt_spans(folder / METRICS)]
