"""The order of samples: a stateless function of the global position.

The stream of samples is endless and made of passes over the corpus. In pass ``e``, with every permutation
keyed by the seed (purpose ``DATA_ORDER``, step ``e``):

1. the shards are permuted (stream 0) and taken in windows of ``window_shards``; the last window may have
   fewer;
2. in window ``w`` its members, listed shard by shard, are permuted (stream ``(w + 1) << 32``) and the samples
   they hold are laid end to end: R samples, numbered as they lie;
3. these are cut into G = ``lanes`` consecutive runs as equal as can be: lane g has ``R // G`` samples, and
   one more if ``g < R % G``;
4. position p of the window belongs to lane ``p % G`` and takes that lane's sample number ``permute(p // G)``
   (stream ``(w + 1) << 32 | g + 1``).

Lane g is asked for exactly ``ceil((R - g) / G)`` samples, which is its size, so every sample comes once per
pass. Rank r of dp takes the indices ``i % dp == r`` of each global batch: where dp divides G and the batch,
all its positions in a window fall into the same G / dp lanes, that is into about 1 / dp of the members. Where
it does not, the samples are the same and only the locality is lost. Nothing but the position is state, so any
dp, any micro-batch and any restart see the same global batches. The name :data:`ALGORITHM` stands in the
state; a change of any line above is a new name.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bdtrain.diffusion.keyed import NoiseKey, Purpose, permute
from bdtrain.errors import ConfigError, DataError

ALGORITHM = "lanes/1"
"""Name of the order in the state; the generator under it is ``philox/1``."""

_STREAM_SHARDS = 0
_LANE_CHUNK = 4096
"""Images of a lane are computed this many at a time: neighbours in a lane are asked for one after another."""

_MAX_WINDOWS = 4
_MAX_PASSES = 3


class Place(NamedTuple):
    """Where a sample lies: its shard, the member of the shard, and its number in the member."""

    shard: int
    member: int
    sample: int


@dataclass(frozen=True)
class _Pass:
    """One pass: shards in their order and the first position of each window, [windows + 1]."""

    shards: npt.NDArray[np.int64]
    bounds: list[int]


class _Window:
    """The permuted members of a window and, as they are asked for, parts of its lanes' permutations."""

    def __init__(
        self, shard: npt.NDArray[np.int64], member: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]
    ) -> None:
        # Lists: one number at a time is looked up, for which numpy is ten times slower.
        self.shard: list[int] = shard.tolist()
        self.member: list[int] = member.tolist()
        self.bounds: list[int] = [0, *np.cumsum(counts).tolist()]
        self.samples = self.bounds[-1]
        self.chunks: dict[int, tuple[int, list[int]]] = {}


class LaneOrder:
    """Position -> place for one split of a corpus. Not thread-safe."""

    def __init__(
        self,
        member_samples: Sequence[npt.NDArray[np.integer]],
        *,
        seed: int,
        window_shards: int = 16,
        lanes: int = 64,
    ) -> None:
        """Describe the corpus; O(shards).

        Args:
            member_samples: for every shard, the samples of each of its members, int [members].
            seed: the run's seed, in [0, 2**32).
            window_shards: shards that are shuffled together, at least 1.
            lanes: G above, at least 1; a power of two lets every usual dp keep to its own members.

        Raises:
            ConfigError: if ``window_shards``, ``lanes`` or ``seed`` is out of range.
            DataError: if there is no sample.
        """
        if window_shards < 1:
            raise ConfigError(f"data.window_shards={window_shards}; it must be at least 1")
        if not 1 <= lanes < 1 << 31:
            raise ConfigError(f"data.lanes={lanes}; it must be at least 1 and below 2**31")
        NoiseKey(seed, Purpose.DATA_ORDER)
        self._members = [np.asarray(counts, dtype=np.int64) for counts in member_samples]
        self._shard_samples = np.array([counts.sum() for counts in self._members], dtype=np.int64)
        self.pass_samples = int(self._shard_samples.sum())
        if self.pass_samples == 0:
            raise DataError("there is no sample to put in order: the corpus is empty at this data.seq_len")
        self.seed, self.window_shards, self.lanes = seed, window_shards, lanes
        self._passes: OrderedDict[int, _Pass] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], _Window] = OrderedDict()

    def locate(self, position: int) -> Place:
        """Place of the sample at a global position.

        Args:
            position: 0 or more; passes follow each other without end.
        """
        number, rest = divmod(position, self.pass_samples)
        current = self._pass(number)
        index = bisect_right(current.bounds, rest) - 1
        window = self._window(number, index)
        turn, lane = divmod(rest - current.bounds[index], self.lanes)
        size, more = divmod(window.samples, self.lanes)
        start = lane * size + min(lane, more)
        row = start + self._lane_sample(number, index, window, lane, turn, size + (lane < more))
        entry = bisect_right(window.bounds, row) - 1
        return Place(window.shard[entry], window.member[entry], row - window.bounds[entry])

    def _lane_sample(self, number: int, index: int, window: _Window, lane: int, turn: int, size: int) -> int:
        """Image of ``turn`` under the lane's permutation of ``range(size)``."""
        chunk = turn // _LANE_CHUNK
        held = window.chunks.get(lane)
        if held is None or held[0] != chunk:
            start = chunk * _LANE_CHUNK
            turns = np.arange(start, min(start + _LANE_CHUNK, size), dtype=np.int64)
            key = NoiseKey(self.seed, Purpose.DATA_ORDER, number)
            held = (chunk, permute(turns, size, key, stream=(index + 1) << 32 | (lane + 1)).tolist())
            window.chunks[lane] = held
        return held[1][turn - chunk * _LANE_CHUNK]

    def _pass(self, number: int) -> _Pass:
        """The shard order of a pass and its windows, kept for the passes in use."""
        current = self._passes.get(number)
        if current is None:
            key = NoiseKey(self.seed, Purpose.DATA_ORDER, number)
            count = len(self._members)
            shards = permute(np.arange(count, dtype=np.int64), count, key, stream=_STREAM_SHARDS)
            sums = np.add.reduceat(self._shard_samples[shards], np.arange(0, count, self.window_shards))
            bounds = [0, *np.cumsum(sums).tolist()]
            current = self._passes[number] = _Pass(shards, bounds)
            if len(self._passes) > _MAX_PASSES:
                self._passes.popitem(last=False)
        return current

    def _window(self, number: int, index: int) -> _Window:
        """The members of a window in their order, kept for the windows in use."""
        window = self._windows.get((number, index))
        if window is None:
            first = index * self.window_shards
            shards = self._pass(number).shards[first : first + self.window_shards]
            sizes = np.array([len(self._members[shard]) for shard in shards], dtype=np.int64)
            shard = np.repeat(shards, sizes)
            member = np.concatenate([np.arange(size, dtype=np.int64) for size in sizes])
            counts = np.concatenate([self._members[one] for one in shards])
            key = NoiseKey(self.seed, Purpose.DATA_ORDER, number)
            order = permute(
                np.arange(len(counts), dtype=np.int64), len(counts), key, stream=(index + 1) << 32
            )
            window = self._windows[number, index] = _Window(shard[order], member[order], counts[order])
            if len(self._windows) > _MAX_WINDOWS:
                self._windows.popitem(last=False)
        return window
