"""Where tokens come from: a position of the stream, or a number of a split, to one row of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from bdtrain.data.order import ALGORITHM, LaneOrder
from bdtrain.data.packing import check_seq_len, samples_in
from bdtrain.data.shards import CorpusIndex, ShardCache, load_tokenizer, read_index
from bdtrain.data.tokenizer import TokenizerInfo
from bdtrain.errors import DataError

Fingerprint = Mapping[str, str | int]
"""What must be equal when a run goes on: plain values by name, ready for JSON."""

Row = npt.NDArray[np.integer]
"""Tokens of one sequence, [seq]."""


class Source(Protocol):
    """A split that a loader or a validation can read. Need not be thread-safe.

    Attributes:
        seq_len: tokens per row.
        num_samples: rows of one pass.
        tokenizer_info: size and special ids.
        byte_lengths: UTF-8 bytes that each id decodes to, int64 [vocab].
        fingerprint: what decides which row each position gives.
    """

    seq_len: int
    num_samples: int
    tokenizer_info: TokenizerInfo
    byte_lengths: npt.NDArray[np.int64]
    fingerprint: Fingerprint

    def sample(self, position: int) -> Row:
        """The row at a position of the endless, shuffled stream; a pure function of it."""
        ...

    def row(self, number: int) -> Row:
        """Row ``number`` of the split in stored order, below ``num_samples``."""
        ...


class TokenSource:
    """One split of a corpus folder."""

    def __init__(
        self,
        folder: str | Path,
        *,
        split: str,
        seq_len: int,
        seed: int,
        window_shards: int = 16,
        lanes: int = 64,
    ) -> None:
        """Open a split; every side file is read and every archive's size is compared, no data is touched.

        Args:
            folder: of the corpus.
            split: ``train`` or ``valid``.
            seq_len: tokens per row; must divide what a full member holds.
            seed: of the order, in [0, 2**32).
            window_shards: shards that are shuffled together.
            lanes: see :mod:`bdtrain.data.order`.

        Raises:
            DataError: if the corpus is missing, unfinished or damaged, or cannot be cut into ``seq_len``.
            TokenizerError: if its tokenizer is not the one that made it.
        """
        folder = Path(folder)
        self.index = CorpusIndex.load(folder)
        self.tokenizer = load_tokenizer(folder, self.index)
        chosen = self.index.split(split, folder)
        row_length = self.index.row_length
        check_seq_len(seq_len, row_length=row_length, member_rows=self.index.member_rows)
        self._shards = ShardCache(folder, self.index, chosen)
        self._counts = []
        for record in chosen.shards:
            self._shards.check(record)
            rows = read_index(folder, record)["rows"]
            self._counts.append(samples_in(rows, row_length=row_length, seq_len=seq_len))
        self.num_samples = int(sum(counts.sum() for counts in self._counts))
        if self.num_samples == 0:
            raise DataError(
                f"split {split!r} of {folder} holds no sequence of {seq_len} tokens (it has {chosen.tokens} "
                f"tokens in rows of {row_length}); choose a data.seq_len of at most {row_length}, or give "
                f"more text"
            )
        self.seq_len = seq_len
        self.tokenizer_info = self.tokenizer.info
        self.byte_lengths = self.tokenizer.byte_lengths
        self._order = LaneOrder(self._counts, seed=seed, window_shards=window_shards, lanes=lanes)
        self._bounds: npt.NDArray[np.int64] | None = None
        self.fingerprint: Fingerprint = {
            "order": ALGORITHM,
            "corpus": self.index.fingerprint,
            "split": split,
            "tokenizer": self.tokenizer.sha256,
            "seq_len": seq_len,
            "seed": seed,
            "window_shards": window_shards,
            "lanes": lanes,
        }

    @property
    def order(self) -> LaneOrder:
        """Position -> place."""
        return self._order

    def sample(self, position: int) -> Row:
        """The row at a position of the endless, shuffled stream, read-only [seq]."""
        place = self._order.locate(position)
        return self._cut(place.shard, place.member, place.sample)

    def row(self, number: int) -> Row:
        """Row ``number`` of the split in stored order, read-only [seq]."""
        if not 0 <= number < self.num_samples:
            raise IndexError(f"row {number} of {self.num_samples}")
        if self._bounds is None:
            # One entry per member, made only where rows are read in order: the held-out split.
            counts = np.concatenate(self._counts)
            self._bounds = np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(counts)))
        entry = int(np.searchsorted(self._bounds, number, side="right")) - 1
        member, shard = entry, 0
        while member >= len(self._counts[shard]):
            member -= len(self._counts[shard])
            shard += 1
        return self._cut(shard, member, number - int(self._bounds[entry]))

    def _cut(self, shard: int, member: int, sample: int) -> Row:
        start = sample * self.seq_len
        return self._shards[shard].member(member)[start : start + self.seq_len]


_ADVICE = {
    "order": "use the version of bdtrain that wrote the checkpoint, or start a new run",
    "corpus": "point data.path at the corpus of the first run, or start a new run",
    "tokenizer": "point data.path at a corpus made with the same tokenizer, or start a new run",
}


def check_fingerprint(saved: Mapping[str, object], current: Fingerprint) -> None:
    """Refuse to go on with other data than a run began with.

    Args:
        saved: fingerprint stored by the run.
        current: fingerprint of the source at hand.

    Raises:
        DataError: naming every field that differs and what to do.
    """
    problems = [
        f"{name}: the run has {saved.get(name)!r}, the data now {current.get(name)!r}; "
        f"{_ADVICE.get(name, f'set it back (data.{name}), or start a new run')}"
        for name in sorted({*saved, *current})
        if saved.get(name) != current.get(name)
    ]
    if problems:
        raise DataError("these are not the data that the run began with:\n  " + "\n  ".join(problems))
