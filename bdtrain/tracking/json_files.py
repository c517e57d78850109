"""JSON and YAML of a run's folder as whoever shows them must take them: missing, torn or something else."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

MAX_JSON_BYTES = 1 << 22


def number(values: Mapping[str, Any] | None, name: str) -> float | None:
    """A finite number out of a JSON object; None where there is none."""
    value = values.get(name) if isinstance(values, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:  # an integer beyond every float
        return None


def section(values: Mapping[str, Any] | None, name: str) -> dict[str, Any]:
    """An object out of a JSON object; an empty one where there is none."""
    value = values.get(name) if isinstance(values, Mapping) else None
    return value if isinstance(value, dict) else {}


def parse_json(text: str | bytes) -> dict[str, Any]:
    """A JSON object out of text; an empty one where it is torn or something else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where the file is missing, torn or something else."""
    return parse_json(read_text(path))


def parse_yaml(text: str) -> dict[str, Any]:
    """A mapping out of YAML; an empty one where it is torn or something else."""
    try:
        # The C parser is ten times faster; the config alone would else take most of a report's time.
        value = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def read_yaml(path: Path) -> dict[str, Any]:
    """A mapping; an empty one where the file is missing, torn or something else."""
    return parse_yaml(read_text(path))


def read_text(path: Path) -> str:
    """The beginning of a file, at most ``MAX_JSON_BYTES``; nothing where it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_JSON_BYTES).decode("utf-8", errors="replace")
    except OSError:
        return ""


def read_tail(path: Path) -> list[bytes]:
    """The last lines of a file, at most ``MAX_JSON_BYTES`` of them; none where it cannot be read."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - MAX_JSON_BYTES))
            return file.read().split(b"\n")
    except OSError:
        return []
