"""Small files and renames that survive what may happen: whole or not at all. Standard library only."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

TEMPORARY_PREFIX = ".tmp."
"""What the names of files begin with that are being written, or were when their writer died."""


def temporary_path(path: Path) -> Path:
    """Name under which ``path`` is written before it is renamed; the process id keeps two writers apart."""
    return path.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}.{path.name}")


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: bytes) -> None:
    """Write a small file whole or not at all.

    Raises:
        OSError: if the disk refuses. The old content stays, unless only the last sync, of the folder, failed:
            then the new one is there, and a loss of power may still bring back the old one.
    """
    temporary = temporary_path(path)
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def append_line(path: Path, text: str, *, sync: bool = False) -> None:
    """Append a line whole or not at all; one that a crash tore gets an end first.

    Args:
        path: of the file; made if it is not there.
        text: without the end of its line.
        sync: wait until it is on disk.

    Raises:
        OSError: if the disk refuses. Nothing of the line is there then, unless the disk refuses this, too.
    """
    content = text.encode() + b"\n"
    # Unbuffered: nothing is left to be written when the file is closed.
    with path.open("a+b", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(end - 1, 0))
        if end and file.read(1) != b"\n":
            content = b"\n" + content
        try:
            rest = memoryview(content)
            while rest:
                # A part of it is no error by itself: the next call says what is wrong, if anything is.
                rest = rest[file.write(rest) :]
            if sync:
                os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(end)
            raise
    if sync and not end:
        sync_folder(path.parent)
