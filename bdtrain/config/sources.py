"""Reading of YAML files and overrides into plain values, each with the place it came from.

A file may name bases, ``base: [../model/small.yaml]``, paths relative to the file. They are merged in order
before the file itself, later wins, and lists are replaced as a whole. There is no interpolation: a value is
what is written.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bdtrain.config.problems import known_keys, known_sections, nearest_key, unknown_key

BASE_KEY = "base"
COMMAND_LINE = "command line"
MAX_FILE_BYTES = 2**20
"""A larger file is no configuration; aliases in YAML could also blow a small one up, so they are refused."""

_COLONS = re.compile(r"[0-9]+(:[0-9]+)+")
"""Numbers with colons: text, as in YAML 1.2. To YAML 1.1, which the library reads, 10:13 is 613."""


@dataclass(frozen=True)
class Origin:
    """A value and the place that gave it.

    Attributes:
        value: what was written.
        source: ``configs/run/x.yaml:12`` or ``command line``.
    """

    value: Any
    source: str


@dataclass(frozen=True)
class Layer:
    """One file or one override, flattened.

    Attributes:
        values: dotted key to value, in the order written. A section that was set to null stands by its own
            key.
        problems: what could not be read, with the place.
        readable: False when nothing of it could be read, so that what it would have given is unknown.
    """

    values: dict[str, Origin]
    problems: list[str]
    readable: bool = True


def read_files(paths: Sequence[str | Path]) -> list[Layer]:
    """Layers of the files and of their bases, lowest precedence first."""
    layers: list[Layer] = []
    for path in paths:
        layers += _read_file(Path(path), ())
    return layers


def read_overrides(overrides: Sequence[str]) -> list[Layer]:
    """One layer per ``key=value``."""
    layers, seen = [], set()
    for text in overrides:
        layer = _read_override(text)
        for key in layer.values:
            if key in seen:
                layer.problems.append(f"{key} is given twice on the command line; give it once")
            seen.add(key)
        layers.append(layer)
    return layers


def _read_file(path: Path, parents: tuple[Path, ...]) -> list[Layer]:
    """Layers of a file: its bases in order, then itself."""
    resolved = path.resolve()
    if resolved in parents:
        chain = " -> ".join(str(p.name) for p in (*parents[parents.index(resolved) :], resolved))
        return [_failed(f"{path}: base files go in a circle: {chain}; remove one of the base entries")]
    content, failure = _parse_file(path)
    if failure:
        return [_failed(failure)]
    problems: list[str] = []
    layers: list[Layer] = []
    bases = content.pop(BASE_KEY, [])
    if not isinstance(bases, list) or not all(isinstance(base, str) and base for base in bases):
        problems.append(
            f"{path}: base={bases!r}; it must be a list of paths, as in base: [../model/small.yaml]"
        )
        bases = []
    for base in bases:
        layers += _read_file(path.parent / base, (*parents, resolved))
    lines, texts = _line_numbers(path), _texts_with_colons(path)
    values: dict[str, Origin] = {}
    for key, value in _flatten(content):
        source = f"{path}:{lines[key]}" if key in lines else str(path)
        value = texts.get(key, value)
        problem = _refused(key, value)
        if problem:
            problems.append(f"{problem} [{source}]")
        else:
            values[key] = Origin(value, source)
    return [*layers, Layer(values, problems)]


def _parse_file(path: Path) -> tuple[dict[str, Any], str | None]:
    """The mapping in a file, or the reason why there is none."""
    if not path.is_file():
        return {}, f"{path} does not exist (working directory {Path.cwd()}){_neighbours(path)}"
    if path.stat().st_size > MAX_FILE_BYTES:
        return {}, f"{path} has {path.stat().st_size} bytes; a configuration has at most {MAX_FILE_BYTES}"
    try:
        text = path.read_text(encoding="utf-8")
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, Loader=yaml.SafeLoader)):
            return {}, f"{path} uses a YAML alias (*name); write the value out, or share it through base:"
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except UnicodeDecodeError as error:
        return {}, f"{path} is not UTF-8 (byte {error.start})"
    except (yaml.YAMLError, OmegaConfBaseException, OSError) as error:
        return {}, f"{path} cannot be read as YAML: {_one_line(error)}"
    if not isinstance(content, dict):
        return {}, f"{path} holds a {type(content).__name__}; it must be a mapping of sections"
    wrong = [key for key in content if not isinstance(key, str)]
    if wrong:
        return {}, f"{path}: the key {wrong[0]!r} is not text"
    return {str(key): value for key, value in content.items()}, None


def _read_override(text: str) -> Layer:
    """The layer of one ``key=value``."""
    key, equals, value_text = text.partition("=")
    if not equals or not key.strip():
        near = nearest_key(text.strip())
        return _failed(
            f"override {text!r} has no value; write key=value" + (f", as in {near}=..." if near else "")
        )
    if key.strip() == BASE_KEY:
        return _failed("base cannot be overridden on the command line; give another --config file")
    if any(mark in key for mark in "[]") or any(part.isdigit() for part in key.split(".")):
        return _failed(
            f"override {text!r} sets part of a list; set the whole list, as in optim.betas=[0.9,0.95]"
        )
    if _COLONS.fullmatch(value_text.strip()):
        text = f"{key}='{value_text.strip()}'"
    try:
        content = OmegaConf.to_container(OmegaConf.from_dotlist([text.strip()]), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        return _failed(f"override {text!r} cannot be read: {_one_line(error)}")
    values: dict[str, Origin] = {}
    problems: list[str] = []
    for name, value in _flatten(content):
        problem = _refused(name, value)
        if problem:
            problems.append(f"{problem} [{COMMAND_LINE}]")
        else:
            values[name] = Origin(value, COMMAND_LINE)
    return Layer(values, problems)


def _failed(problem: str) -> Layer:
    return Layer({}, [problem], readable=False)


def _flatten(content: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings by dotted key; what lies under an unknown key stays whole."""
    sections = set(known_sections())
    for name, value in content.items():
        key = f"{prefix}{name}"
        if key in sections and isinstance(value, dict):
            yield from _flatten(value, f"{key}.")
        else:
            yield key, value


def _refused(key: str, value: Any) -> str | None:
    """Why this key or value cannot be taken, before any type is looked at."""
    if key in known_sections():
        if value is None:
            return None
        inside = [k for k in known_keys() if k.startswith(f"{key}.")]
        return f"{key}={value!r}; {key} is a section with {', '.join(inside)}"
    if key not in known_keys():
        return unknown_key(_deepest(key, value)).message
    if _contains(value, "${"):
        return f"{key}={value!r}; interpolation (${{...}}) is not supported: write the value out"
    if value == "???":
        return f"{key}=???; give a value"
    return None


def _deepest(key: str, value: Any) -> str:
    """The full key of what was written under an unknown section with a single entry."""
    while isinstance(value, dict) and len(value) == 1:
        name, value = next(iter(value.items()))
        key = f"{key}.{name}"
    return key


def _contains(value: Any, mark: str) -> bool:
    if isinstance(value, str):
        return mark in value
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return any(_contains(item, mark) for item in items)


def _line_numbers(path: Path) -> dict[str, int]:
    """Line of each dotted key of a YAML file that parses."""
    lines: dict[str, int] = {}

    def walk(node: yaml.Node | None, prefix: str) -> None:
        if not isinstance(node, yaml.MappingNode):
            return
        for key, value in node.value:
            lines[f"{prefix}{key.value}"] = key.start_mark.line + 1
            walk(value, f"{prefix}{key.value}.")

    walk(yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader), "")
    return lines


def _texts_with_colons(path: Path) -> dict[str, str]:
    """Values of dotted keys that are numbers with colons, as they are written in a YAML file that parses."""
    texts: dict[str, str] = {}

    def walk(node: yaml.Node | None, prefix: str) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                walk(value, f"{prefix}.{key.value}" if prefix else str(key.value))
        elif isinstance(node, yaml.ScalarNode) and _COLONS.fullmatch(node.value):
            texts[prefix] = node.value

    walk(yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader), "")
    return texts


def _neighbours(path: Path) -> str:
    """Files of the same folder with a similar name, as a hint."""
    if not path.parent.is_dir():
        return ""
    names = [p.name for p in path.parent.glob("*.y*ml")]
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
