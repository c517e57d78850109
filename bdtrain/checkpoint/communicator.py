"""How the ranks that save or load together talk: small JSON values, never pickles."""

from __future__ import annotations

import json
from typing import Any, Protocol

import torch
import torch.distributed as dist


class Communicator(Protocol):
    """A group of ranks; every method is called by all of them, in the same order."""

    @property
    def rank(self) -> int:
        """Number of this rank in the group."""

    @property
    def world_size(self) -> int:
        """Ranks in the group."""

    def barrier(self) -> None:
        """Wait for all ranks."""

    def gather_objects(self, value: Any) -> list[Any]:
        """The JSON values of all ranks by rank, on every rank."""

    def broadcast_object(self, value: Any) -> Any:
        """The JSON value of rank 0, on every rank; what the others give is ignored."""


class OneProcess:
    """A group of one."""

    rank = 0
    world_size = 1

    def barrier(self) -> None:
        """Nobody to wait for."""

    def gather_objects(self, value: Any) -> list[Any]:
        """The value, as it would arrive."""
        return [_decode(_encode(value))]

    def broadcast_object(self, value: Any) -> Any:
        """The value, as it would arrive."""
        return _decode(_encode(value))


class TorchCommunicator:
    """A group of ``torch.distributed``.

    Torch's own object collectives pickle; here a value travels as the bytes of its JSON.

    Args:
        group: a group with tensors on the CPU (gloo); None for the default one.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self._source = 0 if group is None else dist.get_global_rank(group, 0)

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier(group=self._group)

    def gather_objects(self, value: Any) -> list[Any]:
        """The JSON values of all ranks by rank, on every rank."""
        data = _encode(value)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([len(data)]), group=self._group)
        lengths = [int(size) for size in sizes]
        # One length for all: gloo gathers equal tensors only.
        buffers = [torch.zeros(max(lengths), dtype=torch.uint8) for _ in lengths]
        mine = torch.zeros(max(lengths), dtype=torch.uint8)
        mine[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        dist.all_gather(buffers, mine, group=self._group)
        return [
            _decode(buffer[:length].numpy().tobytes())
            for buffer, length in zip(buffers, lengths, strict=True)
        ]

    def broadcast_object(self, value: Any) -> Any:
        """The JSON value of rank 0, on every rank; what the others give is ignored."""
        data = _encode(value) if self.rank == 0 else b""
        size = torch.tensor([len(data)])
        dist.broadcast(size, src=self._source, group=self._group)
        buffer = torch.zeros(int(size), dtype=torch.uint8)
        if self.rank == 0:
            buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        dist.broadcast(buffer, src=self._source, group=self._group)
        return _decode(buffer.numpy().tobytes())


def _encode(value: Any) -> bytes:
    return json.dumps(value).encode()


def _decode(data: bytes) -> Any:
    return json.loads(data)
