"""The commit protocol: a folder appears under its name only when every byte of it is on disk and listed.

Files are written into ``.tmp-<name>`` beside the final place, synced, listed with size and SHA-256 in
MANIFEST.json (last), and the folder is renamed. A crash at any moment leaves either the old state or the new
one, and a reader can tell damage from completeness without trusting any file's format.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from bdtrain.checkpoint.files import DISK, FileActions, FileFacts, hash_file, write_file
from bdtrain.errors import CheckpointError

MANIFEST = "MANIFEST.json"
FORMAT = "bdtrain-folder/1"
TRAINING_FORMAT = "bdtrain-training/1"
_FORMATS = (FORMAT, TRAINING_FORMAT)


@dataclass(frozen=True)
class Manifest:
    """What a committed folder says of itself.

    Attributes:
        files: name of every other file to its size and digest.
        format: layout of the content, with its version.
        facts: what else stands in it; of a training checkpoint ``run_uid``, ``step`` and ``world_size``.
    """

    files: Mapping[str, FileFacts]
    format: str = FORMAT
    facts: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(facts.size for facts in self.files.values())


@contextlib.contextmanager
def commit_folder(final: Path, *, actions: FileActions = DISK) -> Iterator[Path]:
    """Fill a folder and commit it under its name.

    Args:
        final: where the folder is to appear; an older one of that name is replaced, and stays until the new
            one is complete.
        actions: the disk.

    Yields:
        A temporary folder beside it to write files into, no folders. When the block raises, it is removed
        and ``final`` is untouched.

    Raises:
        CheckpointError: if the disk refuses, with the system's reason.
    """
    temporary = final.parent / f".tmp-{final.name}"
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _recover(final, actions)
        actions.remove(temporary)
        actions.make_folder(temporary)
        yield temporary
        _seal(temporary, actions)
        _replace(temporary, final, actions)
    except OSError as error:
        _discard(temporary, actions)
        raise CheckpointError(
            f"could not write {final}: {error.strerror or error}; what was there before is untouched; "
            "free space or choose another run.folder"
        ) from error
    except BaseException:
        _discard(temporary, actions)
        raise


def write_manifest(folder: Path, manifest: Manifest, *, actions: FileActions = DISK) -> None:
    """Write the manifest and wait until it and the folder's list of names are on disk.

    Raises:
        OSError: if the disk refuses.
    """
    content = {
        "format": manifest.format,
        **manifest.facts,
        "files": {
            name: {"bytes": facts.size, "sha256": facts.sha256}
            for name, facts in sorted(manifest.files.items())
        },
    }
    write_file(folder / MANIFEST, [(json.dumps(content, indent=1) + "\n").encode()], actions=actions)
    actions.fsync(folder)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a committed folder; no other file is looked at.

    Raises:
        CheckpointError: if the folder or its manifest is missing, or the manifest cannot be used.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give the folder that holds {MANIFEST}")
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {MANIFEST}: it was never completed; choose another checkpoint"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = content.get("format")
        if found not in _FORMATS:
            raise CheckpointError(
                f"{path} has format {found!r}; this version reads {' and '.join(map(repr, _FORMATS))}"
            )
        files = {
            name: FileFacts(int(facts["bytes"]), str(facts["sha256"]))
            for name, facts in content["files"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); choose another checkpoint") from error
    for name in files:
        if not is_plain_name(name):
            raise CheckpointError(
                f"{path} lists {name!r}, which is not the name of a file in it; choose another checkpoint"
            )
    facts = {key: value for key, value in content.items() if key not in ("format", "files")}
    return Manifest(files, found, MappingProxyType(facts))


def is_plain_name(name: str) -> bool:
    """Whether a name stays in its folder: a manifest must not lead a reader elsewhere."""
    return name not in ("", ".", "..", MANIFEST) and not any(sign in name for sign in "/\\\0")


def verify_folder(folder: Path, *, part: tuple[int, int] = (0, 1)) -> Manifest:
    """Compare the files of a committed folder with its manifest.

    What a crash of ``commit_folder`` left is undone first: an older folder that stepped aside comes back.

    Args:
        folder: the folder.
        part: (i, n) compares every n-th file from the i-th on, the largest first, so that n readers share
            the work; (0, 1) compares all.

    Returns:
        The manifest.

    Raises:
        CheckpointError: if the folder or its manifest is missing, or a file is missing, of another size or
            content.
    """
    _recover(folder, DISK)
    manifest = read_manifest(folder)
    names = sorted(manifest.files, key=lambda name: (-manifest.files[name].size, name))
    for name in names[part[0] :: part[1]]:
        _verify_file(folder, name, manifest.files[name])
    return manifest


def verify_file(folder: Path, name: str) -> Path:
    """Compare one file of a committed folder with its manifest, so that it can be read before the others.

    Args:
        folder: the folder.
        name: of the file.

    Returns:
        Its path.

    Raises:
        CheckpointError: as ``verify_folder``, or if the manifest does not list the file.
    """
    _recover(folder, DISK)
    manifest = read_manifest(folder)
    if name not in manifest.files:
        raise CheckpointError(f"{folder / MANIFEST} lists no {name}; choose another checkpoint")
    _verify_file(folder, name, manifest.files[name])
    return folder / name


def _verify_file(folder: Path, name: str, wanted: FileFacts) -> None:
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"{folder}: {name} is missing; choose another checkpoint")
    size = path.stat().st_size
    if size != wanted.size:
        raise CheckpointError(
            f"{path} has {size} bytes, the manifest says {wanted.size}; choose another checkpoint"
        )
    try:
        found = hash_file(path)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror or error}); choose another checkpoint"
        ) from error
    if found != wanted:
        raise CheckpointError(f"{path}: its SHA-256 differs from the manifest's; choose another checkpoint")


def _seal(folder: Path, actions: FileActions) -> None:
    """Sync every file and write the manifest, last."""
    files = {}
    for path in sorted(folder.iterdir()):
        assert path.is_file(), f"{path}: a committed folder holds files only"
        actions.fsync(path)
        files[path.name] = hash_file(path)
    write_manifest(folder, Manifest(files), actions=actions)


def _replace(temporary: Path, final: Path, actions: FileActions) -> None:
    """Rename into place; a folder cannot be renamed over a full one, so an older one steps aside first."""
    aside = _aside(final)
    if final.exists():
        actions.rename(final, aside)
    try:
        actions.rename(temporary, final)
    except BaseException:
        if aside.exists():
            actions.rename(aside, final)
        raise
    actions.fsync(final.parent)
    with contextlib.suppress(OSError):
        actions.remove(aside)


def _aside(final: Path) -> Path:
    return final.parent / f".tmp-old-{final.name}"


def _recover(final: Path, actions: FileActions) -> None:
    """Undo what a crash left: the old folder comes back when it stepped aside and nothing took its place."""
    aside = _aside(final)
    if not aside.exists():
        return
    if final.exists():
        actions.remove(aside)
    else:
        actions.rename(aside, final)


def _discard(temporary: Path, actions: FileActions) -> None:
    """Remove what was half written; a disk that refuses this too keeps it until the next save."""
    with contextlib.suppress(OSError):
        actions.remove(temporary)
