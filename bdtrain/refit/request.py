"""What a re-fit measures: rows of held-out text, cut into shards that any process can take."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from bdtrain.config import RunConfig
from bdtrain.errors import RefitError

MIN_SEQUENCES = 128
"""Rows of a measurement at least: the bootstrap resamples rows."""

SHARDS = 16
"""Shards per block size at most: as many tasks as a measurement has."""


@dataclass(frozen=True)
class Shard:
    """A part of the measurement.

    Attributes:
        block_size: L' of the blocks.
        start: first of its rows, counted among the rows of the measurement.
        stop: one past the last.
    """

    block_size: int
    start: int
    stop: int


@dataclass(frozen=True)
class RefitRequest:
    """A measurement, the same whoever does it.

    Attributes:
        snapshot: folder of the weights; a model folder or a training checkpoint.
        block_sizes: L' of each schedule that is asked for.
        sequences: rows for each of them, spread evenly over the split.
        batch_sequences: rows of a forward pass; part of the request, because a result's last bits may depend
            on it.
        seed: keys the noise, together with the row's position.
        precision: of the forward pass, ``fp32`` or ``bf16``.
        threads: CPU threads of a process; None leaves torch's choice.
        device: ``cpu`` or ``cuda``.
        data_path: corpus in place of the snapshot's.
    """

    snapshot: str
    block_sizes: tuple[int, ...]
    sequences: tuple[int, ...]
    batch_sequences: int
    seed: int
    precision: str = "fp32"
    threads: int | None = None
    device: str = "cpu"
    data_path: str | None = None

    @property
    def parts(self) -> list[Shard]:
        """All shards in order."""
        return [
            Shard(block_size, start, min(start + step, rows))
            for block_size, rows in zip(self.block_sizes, self.sequences, strict=True)
            for step in [self._shard_sequences(rows)]
            for start in range(0, rows, step)
        ]

    @property
    def shards(self) -> int:
        """Number of shards."""
        return len(self.parts)

    @property
    def measured_sequences(self) -> int:
        """Rows that go through the model, over all block sizes."""
        return sum(self.sequences)

    def _shard_sequences(self, rows: int) -> int:
        """Rows of a shard: whole batches."""
        return self.batch_sequences * math.ceil(rows / SHARDS / self.batch_sequences)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RefitRequest:
        """Back from ``to_dict``; lists become tuples."""
        known = {field.name for field in fields(cls)}
        if set(values) != known:
            raise RefitError(
                f"a re-fit's request has the keys {', '.join(sorted(values))}; expected are "
                f"{', '.join(sorted(known))}"
            )
        lists = {key: tuple(values[key]) for key in ("block_sizes", "sequences")}
        return cls(**{**values, **lists})


def make_request(
    config: RunConfig,
    *,
    snapshot: str,
    rows: int,
    block_sizes: tuple[int, ...] = (),
    device: str = "cpu",
    data_path: str | None = None,
) -> RefitRequest:
    """The measurement that a run's settings ask for.

    Args:
        config: of the run.
        snapshot: folder of the weights; empty for the weights in memory.
        rows: that the held-out split has.
        block_sizes: in place of the run's own.
        device: where it is measured.
        data_path: corpus in place of the run's.

    Raises:
        RefitError: for a block size that does not divide a row, or a split that is too short to resample.
    """
    sizes = block_sizes or (config.diffusion.block_size,)
    seq_len = config.data.seq_len
    wrong = [size for size in sizes if size < 1 or seq_len % size]
    if wrong:
        raise RefitError(
            f"block sizes {', '.join(map(str, wrong))} do not divide data.seq_len={seq_len}; choose divisors"
        )
    if rows < 2:
        raise RefitError(
            f"the held-out split has {rows} row; a re-fit resamples rows and needs at least 2: give a longer "
            "text or a larger validation share"
        )
    wanted = [max(MIN_SEQUENCES, math.ceil(config.refit.blocks * size / seq_len)) for size in sizes]
    micro = config.train.micro_batch_size or config.train.global_batch_size
    return RefitRequest(
        snapshot=snapshot,
        block_sizes=tuple(sizes),
        sequences=tuple(min(rows, count) for count in wanted),
        batch_sequences=config.refit.batch_sequences or 4 * micro,
        seed=config.run.seed,
        precision=config.train.precision,
        threads=config.refit.worker_cpus if device == "cpu" else None,
        device=device,
        data_path=data_path,
    )
