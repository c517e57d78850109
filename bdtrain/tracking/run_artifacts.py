"""What besides numbers is told of a run: files, the data it takes, its environment. For every store alike.

Made by the shipping process from the run's folder, when an event of the metrics file tells of it
(``bdtrain.tracking.spool.files_of``).
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from bdtrain.tracking.json_files import number, read_json, read_yaml, section
from bdtrain.tracking.jsonl import read_lines
from bdtrain.tracking.pictures import draw_refit
from bdtrain.tracking.refits import read_files, read_refit
from bdtrain.tracking.run_files import CHECKPOINTS, CONFIG_FILE, EXIT_FILE, METRICS_FILE, RUN_FILE
from bdtrain.tracking.spool import CHECKPOINTS_FILE, SCHEDULES, redact

MANIFEST = "MANIFEST.json"
INDEX = "index.json"
EXIT_GRACE_S = 2.0


@dataclass(frozen=True)
class DataInput:
    """Text that a run takes.

    Attributes:
        name: of the corpus: the last part of its path.
        digest: of its content.
        context: ``training`` or ``validation``.
        profile: sizes of the split.
    """

    name: str
    digest: str
    context: str
    profile: Mapping[str, Any]


def make_files(folder: Path, name: str, aside: Path) -> Iterator[tuple[Path, str | None]]:
    """Make the files that a name stands for.

    Args:
        folder: of the run.
        name: as in ``bdtrain.tracking.spool.files_of``.
        aside: folder for the copies, which hold no credentials; empty.

    Yields:
        A file and the folder of the store that it belongs to, None for the uppermost.
    """
    kind, _, rest = name.partition("/")
    if kind == SCHEDULES:
        yield from _schedule_files(folder, rest, aside)
        return
    if name == CHECKPOINTS_FILE:
        text = json.dumps(list_checkpoints(folder), indent=1)
    elif name == "environment.json":
        text = json.dumps(describe_environment(), indent=1)
    elif name == "report.html":
        text = _page(folder)
    else:
        path = folder / name
        if not path.is_file():
            return
        text = path.read_text(encoding="utf-8", errors="replace")
    copy = aside / name
    copy.write_text(redact(text, os.environ), encoding="utf-8")
    yield copy, None


def _schedule_files(folder: Path, name: str, aside: Path) -> Iterator[tuple[Path, str]]:
    step = int(name.removeprefix("step-"))
    path = aside / f"step-{step}.json"
    text = json.dumps(read_files(folder, step), indent=1)
    path.write_text(redact(text, os.environ), encoding="utf-8")
    yield path, SCHEDULES
    for picture in draw_refit(read_refit(folder, step), aside / f"step-{step}"):
        yield picture, SCHEDULES


def _page(folder: Path) -> str:
    from bdtrain.tracking.report.page import make_page
    from bdtrain.tracking.report.read import read_run

    # The trainer writes it right behind the event that this process has just read.
    until = time.monotonic() + EXIT_GRACE_S
    while not (folder / EXIT_FILE).exists() and time.monotonic() < until:
        time.sleep(0.05)
    return make_page(read_run(folder))


def list_checkpoints(folder: Path) -> list[dict[str, Any]]:
    """Every committed checkpoint of a run: path, step and SHA-256 of its manifest.

    One that was deleted since has the digest that its event gives, or None.

    Args:
        folder: of the run.
    """
    found: dict[str, dict[str, Any]] = {}
    for _, record in read_lines(folder / METRICS_FILE):
        if record.get("event") != "checkpoint" or not isinstance(record.get("folder"), str):
            continue
        name = Path(record["folder"]).name
        digest = manifest_digest(folder / CHECKPOINTS / name)
        deleted = digest is None
        if digest is None:
            digest = record.get("manifest_sha256")
        found[name] = {
            "path": f"{CHECKPOINTS}/{name}",
            "step": record["step"],
            "bytes": record.get("bytes"),
            "manifest_sha256": digest,
            "deleted": deleted,
        }
    return list(found.values())


def manifest_digest(checkpoint: Path) -> str | None:
    """SHA-256 of a checkpoint's manifest; None where it cannot be read."""
    try:
        return hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest()
    except OSError:
        return None


def describe_inputs(folder: Path) -> list[DataInput]:
    """The text that a run trains on and is validated on.

    Args:
        folder: of the run.
    """
    fingerprint = section(read_json(folder / RUN_FILE), "data_fingerprint")
    if not fingerprint:
        return []
    data = section(read_yaml(folder / CONFIG_FILE), "data")
    path = data.get("path")
    digest = str(fingerprint.get("corpus", "unknown"))
    if not isinstance(path, str):
        return [DataInput(str(data.get("kind") or "text"), _short(digest), "training", dict(fingerprint))]
    splits = section(read_json(Path(path) / INDEX), "splits")
    found = []
    for split, context in ((str(fingerprint.get("split", "train")), "training"), ("valid", "validation")):
        entry = section(splits, split)
        if context == "validation" and not entry:
            continue
        sizes = {
            key: value
            for key in ("tokens", "rows", "documents", "text_bytes")
            if (value := number(entry, key)) is not None
        }
        profile = {"split": split, **sizes, "fingerprint": digest, "seq_len": fingerprint.get("seq_len")}
        found.append(DataInput(f"{Path(path).name}/{split}", _short(digest), context, profile))
    return found


def _short(digest: str) -> str:
    """Of what is no digest but a description, its digest."""
    whole = len(digest) == 64 and all(letter in "0123456789abcdef" for letter in digest)
    return digest[:36] if whole else hashlib.sha256(digest.encode()).hexdigest()[:36]


def describe_environment() -> dict[str, Any]:
    """Software and machine of the process, which are the trainer's; no variables, no paths."""
    packages = {str(found.metadata["Name"]): found.version for found in distributions()}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "commit": _commit(),
        "packages": dict(sorted(packages.items(), key=lambda item: item[0].lower())),
    }


def _commit() -> str | None:
    """Of the checkout that this package lies in; None outside of one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    words = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
