"""Parallel layouts without processes: what each rank owns of a small model, and ranks that are threads."""

from __future__ import annotations

import json
import math
import random
import threading
from dataclasses import dataclass
from pathlib import Path

import torch

from bdtrain.checkpoint.files import FileActions
from bdtrain.errors import CheckpointError
from bdtrain.parallel.fragments import StateFragment

PARAMETERS = {
    # name: shape, dimension that is cut, matrices stacked along it
    "embedding.weight": ((24, 6), 0, 1),
    "decoder.layers.0.norm.weight": ((7,), None, 1),
    "decoder.layers.0.fc1.weight": ((16, 5), 0, 2),
    "decoder.layers.0.fc2.weight": ((5, 8), 1, 1),
    "decoder.layers.1.stacked": ((3, 16, 2), 1, 2),
    "decoder.layers.1.deep": ((2, 3, 4), 2, 1),
    "decoder.layers.1.fc1.bias": ((16,), 0, 2),
    "scale": ((), None, 1),
}
KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")


def serial(name, kind):
    """The serial tensor: bits that say which element it is, with odd floats among them."""
    shape = PARAMETERS[name][0]
    tag = list(PARAMETERS).index(name) * 10 + KINDS.index(kind)
    values = torch.arange(math.prod(shape), dtype=torch.float32) + 1000 * tag + 0.1
    values[0] = [float("nan"), -0.0, 1e-42, float("inf")][tag % 4]
    return values.view(shape)


def shard(full, dim, stride, rank, size):
    """A rank's part, row by row: of each stacked matrix the rank-th of ``size`` equal stretches."""
    if dim is None:
        return full
    matrix = full.shape[dim] // stride
    part = matrix // size
    rows = [m * matrix + rank * part + i for m in range(stride) for i in range(part)]
    return full.index_select(dim, torch.tensor(rows))


@dataclass(frozen=True)
class Layout:
    tp: int = 1
    pp: int = 1
    dp: int = 1
    seed: int = 0
    forget_cut: bool = False  # a serial model need not say how it would be cut

    @property
    def world(self):
        return self.tp * self.pp * self.dp


def fragments(layout, *, kinds=KINDS, blank=False, parameters=tuple(PARAMETERS)):
    """Of each rank (tp fastest, then dp, then pp): its fragments, cut anywhere between dp ranks."""
    ranks = []
    for stage in range(layout.pp):
        names = [n for i, n in enumerate(parameters) if i * layout.pp // len(parameters) == stage]
        for dp_rank in range(layout.dp):
            for tp_rank in range(layout.tp):
                ranks.append(_rank(layout, names, dp_rank, tp_rank, kinds, blank))
    return ranks


def _rank(layout, names, dp_rank, tp_rank, kinds, blank):
    sizes = []
    for name in names:
        shape, dim, _ = PARAMETERS[name]
        sizes.append(math.prod(shape) // (layout.tp if dim is not None else 1))
    total = sum(sizes)
    chance = random.Random(f"{layout} {names}")
    bounds = [0, *sorted(chance.randrange(total + 1) for _ in range(layout.dp - 1)), total]
    low, high = bounds[dp_rank], bounds[dp_rank + 1]
    found, offset = [], 0
    for name, size in zip(names, sizes, strict=True):
        begin, end = max(low, offset), min(high, offset + size)
        if begin < end:
            shape, dim, stride = PARAMETERS[name]
            start, count = begin - offset, end - begin
            tensors = {}
            for kind in kinds:
                flat = shard(serial(name, kind), dim, stride, tp_rank, layout.tp).reshape(-1)
                tensors[kind] = flat[start : start + count].clone()
                if blank:
                    tensors[kind].fill_(-7.0)
            if layout.forget_cut and layout.tp == 1:
                dim, stride = None, 1
            found.append(StateFragment(name, shape, dim, stride, tp_rank, layout.tp, start, count, tensors))
        offset += size
    return found


def same_bits(one, other):
    return one.shape == other.shape and torch.equal(one.view(torch.int32), other.view(torch.int32))


class ThreadRank:
    """A rank that is a thread; a peer that dies breaks the barrier, as a closed socket would."""

    def __init__(self, rank, world_size, shared):
        self.rank, self.world_size, self._shared = rank, world_size, shared

    def barrier(self):
        self._shared["barrier"].wait(timeout=30)

    def gather_objects(self, value):
        self._shared[self.rank] = json.dumps(value)
        self.barrier()
        values = [json.loads(self._shared[rank]) for rank in range(self.world_size)]
        self.barrier()
        return values

    def broadcast_object(self, value):
        return self.gather_objects(value if self.rank == 0 else None)[0]


def on_ranks(world_size, function):
    """``function(communicator)`` of every rank at the same time: results, or what each raised."""
    shared = {"barrier": threading.Barrier(world_size)}
    outcomes = [None] * world_size

    def run(rank):
        try:
            outcomes[rank] = function(ThreadRank(rank, world_size, shared))
        except BaseException as error:
            outcomes[rank] = error
            # A CheckpointError is raised by all ranks together; anything else leaves the others waiting.
            if not isinstance(error, CheckpointError):
                shared["barrier"].abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def first_error(outcomes):
    """Raise what the ranks raised, if any did."""
    errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    own = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)]
    if errors:
        raise (own or errors)[0]
    return outcomes


class Crash(BaseException):
    """The process is gone: no handler of errors sees it, and nothing it does afterwards reaches the disk."""


class UnluckyDisk(FileActions):
    """Counts what a save does, and dies or refuses at one of these actions.

    With ``lose`` the machine dies too: what was written and never synced is gone.
    """

    def __init__(self, at=None, *, error=None, only=None, half=False, lose=False):
        self._at, self._error, self._only, self._half, self._lose = at, error, only, half, lose
        self.log, self._dead, self._unsynced, self._lock = [], False, set(), threading.Lock()

    def _next(self, kind, *paths):
        if self._dead:
            raise Crash
        if self._only is not None and kind != self._only:
            return False
        self.log.append((kind, *paths))
        return self._at is not None and len(self.log) - 1 == self._at

    def _fail(self):
        if self._error is not None:
            raise self._error
        self._dead = True
        if self._lose:
            for path in self._unsynced:
                if path.exists():
                    path.write_bytes(b"")
        raise Crash

    def make_folder(self, path):
        with self._lock:
            if self._next("make", path):
                self._fail()
            super().make_folder(path)

    def write(self, file, data):
        with self._lock:
            now = self._next("write", Path(file.name))
            self._unsynced.add(Path(file.name))
            if now:
                if self._half:
                    super().write(file, data[: len(data) // 2])
                    file.flush()
                self._fail()
            super().write(file, data)

    def fsync(self, path):
        with self._lock:
            if self._next("fsync", path):
                self._fail()
            super().fsync(path)
            self._unsynced.discard(path)

    def rename(self, source, target):
        with self._lock:
            if self._next("rename", source, target):
                self._fail()
            super().rename(source, target)

    def remove(self, path):
        with self._lock:
            if self._next("remove", path):
                self._fail()
            super().remove(path)
