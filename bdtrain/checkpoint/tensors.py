"""Safetensors files written one tensor at a time.

The library wants all tensors of a file in host memory at once and hides the system's errors in its own; the
format is a length, a JSON header and raw bytes. Reading is the library's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bdtrain.checkpoint.files import DISK, FileActions, FileFacts, write_file

FLOAT_BYTES = 4


@dataclass(frozen=True)
class TensorSource:
    """A tensor to be written.

    Attributes:
        key: its name in the file.
        shape: its shape.
        read: gives it, on any device, when its turn comes.
    """

    key: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def write_tensors(path: Path, sources: Sequence[TensorSource], *, actions: FileActions = DISK) -> FileFacts:
    """Write a safetensors file of float32 tensors, with one of them in host memory at a time.

    Args:
        path: must not exist.
        sources: what goes in, in this order; keys differ.
        actions: the disk.

    Raises:
        OSError: if the disk refuses.
    """
    return write_file(path, _chunks(sources), actions=actions)


def _chunks(sources: Sequence[TensorSource]) -> Iterator[bytes | memoryview]:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for source in sources:
        begin, end = end, end + FLOAT_BYTES * math.prod(source.shape)
        header[source.key] = {"dtype": "F32", "shape": list(source.shape), "data_offsets": [begin, end]}
    assert len(header) == len(sources) + 1, "two tensors of one key"
    text = json.dumps(header, separators=(",", ":")).encode()
    # Readers that map the file want the numbers aligned; trailing spaces are part of the format.
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for source in sources:
        tensor = source.read().detach().to("cpu", torch.float32).contiguous()
        assert tuple(tensor.shape) == source.shape, f"{source.key} is not what its header says"
        # The format is little-endian, as is every machine that torch supports.
        yield tensor.reshape(-1).numpy().data
