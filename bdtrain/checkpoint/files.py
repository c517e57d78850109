"""Writing to disk so that it stays, every step of it through one small object.

Tests hand in a ``FileActions`` that refuses, dies or forgets at any chosen action; a run uses ``DISK``.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

CHUNK_BYTES = 1 << 24


class FileActions:
    """What a save does to the disk, one method an action."""

    def make_folder(self, path: Path) -> None:
        """Make a folder whose parent exists."""
        path.mkdir()

    def write(self, file: BinaryIO, data: bytes | memoryview) -> None:
        """Append bytes to an open file."""
        file.write(data)

    def fsync(self, path: Path) -> None:
        """Wait until a file's content, or a folder's list of names, is on disk."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Give a file or folder another name, at once or not at all."""
        source.rename(target)

    def remove(self, path: Path) -> None:
        """Delete a file, or a folder with all in it; what is not there is no error."""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def free_bytes(self, folder: Path) -> int:
        """Bytes that can still be written where ``folder`` is."""
        return shutil.disk_usage(folder).free


DISK = FileActions()
"""The real disk. It has no state."""


@dataclass(frozen=True)
class FileFacts:
    """Size and digest of a file.

    Attributes:
        size: in bytes.
        sha256: hexadecimal.
    """

    size: int
    sha256: str


def write_file(path: Path, chunks: Iterable[bytes | memoryview], *, actions: FileActions = DISK) -> FileFacts:
    """Write a new file and wait until it is on disk.

    The digest is of what was to be written, so that a later verification also finds what the disk got wrong.

    Args:
        path: must not exist.
        chunks: its content, in order; each is used before the next is asked for.
        actions: the disk.

    Raises:
        OSError: if the disk refuses.
    """
    digest, size = hashlib.sha256(), 0
    with path.open("xb") as file:
        for chunk in chunks:
            if len(chunk) == 0:
                continue
            view = memoryview(chunk).cast("B")
            for begin in range(0, len(view), CHUNK_BYTES):
                piece = view[begin : begin + CHUNK_BYTES]
                digest.update(piece)
                actions.write(file, piece)
            size += len(view)
    actions.fsync(path)
    return FileFacts(size, digest.hexdigest())


def copy_file(source: Path, target: Path, *, actions: FileActions = DISK) -> FileFacts:
    """Copy a file and wait until the copy is on disk.

    Raises:
        OSError: if the source cannot be read or the disk refuses.
    """
    with source.open("rb") as file:
        return write_file(target, iter(lambda: file.read(CHUNK_BYTES), b""), actions=actions)


def hash_file(path: Path) -> FileFacts:
    """Size and digest of what is on disk."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            size += len(chunk)
    return FileFacts(size, digest.hexdigest())
