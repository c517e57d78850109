"""Small files and renames that survive what may happen: whole or not at all. Standard library only."""

from __future__ import annotations

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
