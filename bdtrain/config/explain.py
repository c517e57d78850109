"""What a setting is, and where its value came from."""

from __future__ import annotations

import textwrap
import types
from dataclasses import dataclass
from typing import Any, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from bdtrain.config.checks import without_effect
from bdtrain.config.loader import LoadedConfig, value_of
from bdtrain.config.problems import (
    config_error,
    item_section,
    known_keys,
    known_sections,
    literal_choices,
    section_type,
    unknown_key,
)
from bdtrain.config.schema import RunConfig, Section

_BOUND_WORDS = (("ge", ">= "), ("gt", "> "), ("le", "<= "), ("lt", "< "), ("pattern", "matching "))


@dataclass(frozen=True)
class Setting:
    """One setting as the documentation shows it.

    Attributes:
        key: dotted key.
        kind: ``integer``, ``number``, ``text``, ``true or false``, ``two numbers``, ``list``.
        unit: what it counts, ``-`` for none.
        default: as YAML, or ``required``.
        allowed: choices or bounds; ``any`` when the type says all.
        meaning: one or two sentences.
    """

    key: str
    kind: str
    unit: str
    default: str
    allowed: str
    meaning: str


def describe(key: str) -> Setting:
    """The documentation of a setting.

    Raises:
        ConfigError: if there is no such setting.
    """
    field = _field(key)
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    return Setting(
        key=key,
        kind=_kind(field.annotation),
        unit=str(extra["unit"]),
        default="required" if field.is_required() else show_value(field.default),
        allowed=_allowed(field),
        meaning=str(field.description),
    )


def explain(key: str, loaded: LoadedConfig | None) -> str:
    """A paragraph about a setting, or the list of a section's settings.

    Args:
        key: dotted key of a setting or a section.
        loaded: the configuration whose value and origin are shown; None shows the default only.

    Raises:
        ConfigError: if there is no such key; the nearest one is named.
    """
    if key in known_sections():
        inside = [describe(k) for k in known_keys() if k.startswith(f"{key}.")]
        width = max(len(setting.key) for setting in inside)
        lines = [f"{key}: a section with {len(inside)} settings"]
        return "\n".join(lines + [f"  {s.key:<{width}}  {s.meaning}" for s in inside])
    setting = describe(key)
    lines = [key, *textwrap.wrap(setting.meaning, 100, initial_indent="  ", subsequent_indent="  ")]
    unit = "none" if setting.unit == "-" else setting.unit
    lines.append(
        f"  type: {setting.kind}   unit: {unit}   allowed: {setting.allowed}   default: {setting.default}"
    )
    if loaded is None:
        return "\n".join(lines)
    lines.append(f"  value: {show_value(value_of(loaded.config, key))}   from: {loaded.source(key)}")
    given = loaded.provenance.get(key, ())
    lines += [f"  overrides: {show_value(o.value)}   from: {o.source}" for o in reversed(given[:-1])]
    reason = without_effect(loaded.config).get(key)
    if reason:
        lines.append(f"  without effect here: {reason.text}")
    return "\n".join(lines)


def show_value(value: Any) -> str:
    """A value as YAML on one line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(show_value, value)) + "]"
    if isinstance(value, Section):
        value = value.model_dump()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {show_value(inner)}" for name, inner in value.items()) + "}"
    if isinstance(value, str):
        return value or '""'
    return str(value)


def _field(key: str) -> FieldInfo:
    if key not in known_keys():
        raise config_error([unknown_key(key).message])
    *path, name = key.split(".")
    section: type[Section] = RunConfig
    for part in path:
        inner = section_type(section.model_fields[part].annotation)
        assert inner is not None, key
        section = inner
    return section.model_fields[name]


def _branches(annotation: Any) -> tuple[Any, ...]:
    """Members of a union, or the annotation alone."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _plain(annotation: Any) -> Any:
    """The type inside ``Annotated``."""
    return get_args(annotation)[0] if hasattr(annotation, "__metadata__") else annotation


def _kind(annotation: Any) -> str:
    names = {int: "integer", float: "number", str: "text", bool: "true or false"}
    kinds = []
    for branch in map(_plain, _branches(annotation)):
        if branch is type(None):
            kinds.append("null")
        elif literal_choices(branch):
            kinds.append("choice")
        elif item_section(branch):
            kinds.append("list")
        elif get_origin(branch) is tuple:
            kinds.append("list" if Ellipsis in get_args(branch) else "two numbers")
        else:
            kinds.append(names[branch])
    return " or ".join(kinds)


def _allowed(field: FieldInfo) -> str:
    for branch in map(_plain, _branches(field.annotation)):
        choices = literal_choices(branch)
        if choices:
            return ", ".join(map(str, choices))
    bounds = []
    for rule in field.metadata:
        for attribute, words in _BOUND_WORDS:
            limit = getattr(rule, attribute, None)
            if limit is not None:
                bounds.append(f"{words}{limit}")
    return " and ".join(bounds) or "any"
