"""The commit protocol: a folder appears under its name only when every byte of it is on disk and listed.

Files are written into ``.tmp-<name>`` beside the final place, synced, listed with size and SHA-256 in
MANIFEST.json (last), and the folder is renamed. A crash at any moment leaves either the old state or the new
one, and a reader can tell damage from completeness without trusting any file's format.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from bdtrain.errors import CheckpointError

MANIFEST = "MANIFEST.json"
FORMAT = "bdtrain-folder/1"


@contextlib.contextmanager
def commit_folder(final: Path) -> Iterator[Path]:
    """Fill a folder and commit it under its name.

    Args:
        final: where the folder is to appear; an older one of that name is replaced, and stays until the new
            one is complete.

    Yields:
        A temporary folder beside it to write into. When the block raises, it is removed and ``final`` is
        untouched.

    Raises:
        CheckpointError: if the disk refuses, with the system's reason.
    """
    temporary = final.parent / f".tmp-{final.name}"
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _recover(final)
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir()
        yield temporary
        _seal(temporary)
        _replace(temporary, final)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"could not write {final}: {error.strerror or error}; what was there before is untouched; "
            "free space or choose another run.folder"
        ) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def verify_folder(folder: Path) -> None:
    """Compare every file of a committed folder with its manifest.

    Raises:
        CheckpointError: if the folder or its manifest is missing, or a file is missing, of another size or
            content.
    """
    _recover(folder)
    manifest = folder / MANIFEST
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give the folder that holds {MANIFEST}")
    if not manifest.is_file():
        raise CheckpointError(
            f"{folder} has no {MANIFEST}: it was never completed; choose another checkpoint"
        )
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        files: dict[str, dict[str, object]] = content["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{manifest} cannot be read ({error}); choose another checkpoint") from error
    if content.get("format") != FORMAT:
        raise CheckpointError(
            f"{manifest} has format {content.get('format')!r}; this version reads {FORMAT!r}"
        )
    for name, facts in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder}: {name} is missing; choose another checkpoint")
        if path.stat().st_size != facts["bytes"]:
            raise CheckpointError(
                f"{path} has {path.stat().st_size} bytes, the manifest says {facts['bytes']}; "
                "choose another checkpoint"
            )
        if _sha256(path) != facts["sha256"]:
            raise CheckpointError(
                f"{path}: its SHA-256 differs from the manifest's; choose another checkpoint"
            )


def _seal(folder: Path) -> None:
    """Sync every file and write the manifest, last."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        _sync(path)
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"format": FORMAT, "files": files}, indent=1) + "\n", encoding="utf-8")
    _sync(manifest)
    for path in sorted(p for p in folder.rglob("*") if p.is_dir()):
        _sync(path)
    _sync(folder)


def _replace(temporary: Path, final: Path) -> None:
    """Rename into place; a folder cannot be renamed over a full one, so an older one steps aside first."""
    aside = _aside(final)
    if final.exists():
        final.rename(aside)
    try:
        temporary.rename(final)
    except BaseException:
        if aside.exists():
            aside.rename(final)
        raise
    _sync(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _aside(final: Path) -> Path:
    return final.parent / f".tmp-old-{final.name}"


def _recover(final: Path) -> None:
    """Undo what a crash left: the old folder comes back when it stepped aside and nothing took its place."""
    aside = _aside(final)
    if not aside.exists():
        return
    if final.exists():
        shutil.rmtree(aside)
    else:
        aside.rename(final)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
