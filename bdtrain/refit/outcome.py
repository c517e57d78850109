"""What a measurement in shards is asked for and comes back as; nothing here knows Ray."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from bdtrain.diffusion.variance import BlockRecords
from bdtrain.errors import RefitError

LOCAL, AUTO = "local", "auto"
"""Addresses that are no host: start Ray here and end it again; the cluster that this process belongs to."""

MIN_OBJECT_STORE_MB = 80
"""Ray refuses a store below about 75 MB."""


@dataclass(frozen=True)
class RaySettings:
    """How a measurement uses Ray.

    Attributes:
        address: ``local`` starts a session on this machine's loopback and ends it, ``auto`` joins the cluster
            that this process runs in, ``host:port`` joins that one.
        num_workers: workers, each of which holds a model, at least 1.
        cpus_per_worker: what each process of a worker takes of Ray's count of CPUs; threads are the request's
            business.
        gpus_per_worker: what each process of a worker takes of Ray's count of GPUs; with 0 it sees none.
        retries: further attempts at a shard whose measurement failed, and at starting a worker.
        temp_folder: where the private folder of a local session is made; its path must be short. None: the
            system's folder for temporary files.
        object_store_mb: size of a local session's object store in megabytes.
        placement_s: seconds in which the cluster must be reached, and then in which it must have room for
            the first worker.
        tp: processes of a worker, which share its model.

    Raises:
        RefitError: at construction, for values that cannot work.
    """

    address: str = LOCAL
    num_workers: int = 1
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    retries: int = 2
    temp_folder: Path | None = None
    object_store_mb: int = MIN_OBJECT_STORE_MB
    placement_s: float = 120.0
    tp: int = 1

    def __post_init__(self) -> None:
        """Refuse what Ray would refuse later and in other words."""
        problems = [
            f"{name}={getattr(self, name)} must be {allowed}"
            for name, good, allowed in (
                ("num_workers", self.num_workers >= 1, "at least 1"),
                ("cpus_per_worker", 0 <= self.cpus_per_worker < math.inf, "0 or more"),
                ("gpus_per_worker", 0 <= self.gpus_per_worker < math.inf, "0 or more"),
                ("retries", self.retries >= 0, "0 or more"),
                (
                    "object_store_mb",
                    self.object_store_mb >= MIN_OBJECT_STORE_MB,
                    f"at least {MIN_OBJECT_STORE_MB}",
                ),
                ("placement_s", 0 < self.placement_s < math.inf, "positive"),
                ("tp", self.tp >= 1, "at least 1"),
            )
            if not good
        ]
        if self.tp > 1 and self.gpus_per_worker not in (0, 1):
            problems.append(
                f"gpus_per_worker={self.gpus_per_worker:g} must be 0 or 1 with tp={self.tp}: processes that "
                "share a model have a GPU each"
            )
        if self.tp > 1 and not (self.cpus_per_worker or self.gpus_per_worker):
            problems.append(f"cpus_per_worker=0 must be above 0 with tp={self.tp} on CPUs")
        if self.address not in (LOCAL, AUTO) and split_address(self.address) is None:
            problems.append(f"address={self.address!r} must be local, auto or host:port")
        if problems:
            raise RefitError("settings of Ray: " + "; ".join(problems))

    @property
    def is_local(self) -> bool:
        """Whether a session of our own is started."""
        return self.address == LOCAL


def split_address(address: str) -> tuple[str, int] | None:
    """Host and port of ``host:port`` (``[::1]:6379`` for IPv6); None for anything else."""
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]") if host.startswith("[") else host
    # A further colon outside brackets is a scheme, or an IPv6 address whose port cannot be told.
    bare = ":" in host and not address.startswith("[")
    if not colon or not host or "/" in host or bare or not (port.isascii() and port.isdigit()):
        return None
    return (host, int(port)) if 0 < int(port) < 65536 else None


@dataclass(frozen=True)
class ShardOutcome:
    """What a measurement in shards came to.

    Attributes:
        records: of each shard that was measured, by block size.
        failures: why each other shard was not.
        seconds: how long it took, by part: ``start_s``, ``measure_s``, ``stop_s``.

    Raises:
        RefitError: at construction, if a shard is in both, or none is in either, or a time is no time.
    """

    records: Mapping[int, Mapping[int, BlockRecords]]
    failures: Mapping[int, str]
    seconds: Mapping[str, float]

    def __post_init__(self) -> None:
        """Refuse what no measurement can have come to."""
        both = sorted(set(self.records) & set(self.failures))
        if both:
            raise RefitError(f"{name_shards(both)} cannot be both measured and failed")
        if not self.records and not self.failures:
            raise RefitError("a measurement has no shards; ask for at least one")
        wrong = [name for name, value in self.seconds.items() if not 0 <= value < math.inf]
        if wrong:
            raise RefitError(f"times of a measurement must be 0 s or more: {', '.join(sorted(wrong))}")

    @property
    def complete_share(self) -> float:
        """Share of the shards that were measured, in [0, 1]."""
        return len(self.records) / (len(self.records) + len(self.failures))


def name_shards(shards: Iterable[int]) -> str:
    """``shard 3`` or ``shards 1, 4, 5``, ascending."""
    numbers = sorted(shards)
    return f"shard{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def required_shards(shards: int, quorum: float) -> int:
    """Shards that must be measured.

    Args:
        shards: of the whole measurement, at least 1.
        quorum: least share, in (0, 1].

    Raises:
        RefitError: for numbers outside their ranges.
    """
    if shards < 1 or not 0 < quorum <= 1:
        raise RefitError(f"shards={shards} must be at least 1, and quorum={quorum:g} above 0 and at most 1")
    # 0.7 * 10 is a little more than 7 in floating point.
    return max(1, math.ceil(quorum * shards - 1e-9))


class ShardQueue:
    """Which shards are still to be measured, and how those that were tried went.

    Args:
        shards: number of them; all wait, in order.
        retries: further attempts after a failed one.
    """

    def __init__(self, shards: int, retries: int) -> None:
        self.shards, self.retries = shards, retries
        self.records: dict[int, dict[int, BlockRecords]] = {}
        self.failures: dict[int, str] = {}
        self._waiting = deque(range(shards))
        self._running: set[int] = set()
        self._attempts = dict.fromkeys(range(shards), 0)

    @property
    def open(self) -> bool:
        """Whether a shard waits or is being measured."""
        return bool(self._waiting or self._running)

    def take(self) -> int | None:
        """A shard to measure now; None when none waits."""
        if not self._waiting:
            return None
        shard = self._waiting.popleft()
        self._running.add(shard)
        self._attempts[shard] += 1
        return shard

    def measured(self, shard: int, records: dict[int, BlockRecords]) -> None:
        """Note the records of a shard that was taken."""
        self._running.remove(shard)
        self.records[shard] = records

    def failed(self, shard: int, reason: str) -> str:
        """Note that an attempt at a shard failed; it waits again, behind the others, or is given up.

        Returns:
            What happened, as one line.
        """
        self._running.remove(shard)
        attempt, attempts = self._attempts[shard], self.retries + 1
        if attempt < attempts:
            self._waiting.append(shard)
            return f"shard {shard}, attempt {attempt} of {attempts} failed: {reason}"
        count = f"{attempts} attempts" if attempts > 1 else "the only attempt"
        self.failures[shard] = f"{reason} (after {count})"
        return f"shard {shard} given up: {self.failures[shard]}"

    def close(self, reason: str) -> None:
        """Give up all that is not finished.

        Args:
            reason: said of each such shard, after how far it had come.
        """
        for shard in sorted([*self._waiting, *self._running]):
            state = "running" if shard in self._running else "waiting"
            self.failures[shard] = f"{state}: {reason}"
        self._waiting.clear()
        self._running.clear()

    def hopeless(self, quorum: float) -> bool:
        """Whether so many shards were given up that the rest cannot make the quorum."""
        return len(self.failures) > self.shards - required_shards(self.shards, quorum)

    def check_quorum(self, quorum: float) -> None:
        """Refuse a measurement with too few shards.

        Raises:
            RefitError: with the shards that are missing and why, those of one reason together.
        """
        needed = required_shards(self.shards, quorum)
        if len(self.records) >= needed:
            return
        by_reason: dict[str, list[int]] = {}
        for shard in sorted(self.failures):
            by_reason.setdefault(self.failures[shard], []).append(shard)
        reasons = "; ".join(f"{name_shards(missing)}: {reason}" for reason, missing in by_reason.items())
        raise RefitError(
            f"{len(self.records)} of {self.shards} shards were measured and quorum={quorum:g} asks for "
            f"{needed}: {reasons}"
        )
