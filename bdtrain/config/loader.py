"""From files and overrides to one checked ``RunConfig``.

Precedence: defaults of the schema < bases < file < later files < overrides. All problems are reported
together, so a user corrects a configuration once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from bdtrain.config.checks import find_conflicts, find_ignored, without_effect
from bdtrain.config.problems import (
    Problem,
    config_error,
    known_keys,
    known_sections,
    section_type,
    type_problem,
)
from bdtrain.config.schema import RunConfig, Section
from bdtrain.config.sources import Origin, read_files, read_overrides

_STAND_INS: Mapping[str, int] = MappingProxyType(
    {
        "model.num_layers": 1,
        "model.hidden_size": 2,
        "model.num_heads": 1,
        "train.steps": 1,
        "train.global_batch_size": 1,
    }
)
"""Values for required settings that are missing or wrong, so that the other rules can still be checked."""


class _Dumper(yaml.SafeDumper):
    """Sections line by line, lists on one line."""

    def represent_sequence(
        self, tag: str, sequence: Any, flow_style: bool | None = None
    ) -> yaml.SequenceNode:
        """A list in brackets."""
        return super().represent_sequence(tag, sequence, flow_style=True)


@dataclass(frozen=True)
class LoadedConfig:
    """A checked configuration and where its values came from.

    Attributes:
        config: the configuration; derived values are filled in.
        provenance: dotted key to every value given for it, lowest precedence first; the last one counts. A
            key that is not in it has its default.
    """

    config: RunConfig
    provenance: Mapping[str, tuple[Origin, ...]]

    def source(self, key: str) -> str:
        """Where the value of a setting came from: ``default``, a file with its line, or ``command line``."""
        given = self.provenance.get(key)
        return given[-1].source if given else "default"


def load_config(paths: Sequence[str | Path], overrides: Sequence[str] = ()) -> LoadedConfig:
    """Read, merge and check a run configuration.

    Args:
        paths: YAML files, later ones win.
        overrides: ``section.key=value`` texts, the value in YAML.

    Returns:
        The configuration with the origin of its values.

    Raises:
        ConfigError: if anything is wrong; the message lists everything, one line each.
    """
    layers = [*read_files(paths), *read_overrides(overrides)]
    lines = [problem for layer in layers for problem in layer.problems]
    provenance: dict[str, list[Origin]] = {}
    for layer in layers:
        for key, origin in layer.values.items():
            _put(provenance, key, origin)
    config, problems = _build({key: given[-1].value for key, given in provenance.items()})
    if not all(layer.readable for layer in layers):
        # What is missing may stand in the file that could not be read.
        problems = [problem for problem in problems if any(key in provenance for key in problem.keys)]
    lines += [_located(problem, provenance) for problem in problems]
    if lines or config is None:
        raise config_error(lines)
    return LoadedConfig(config, MappingProxyType({key: tuple(given) for key, given in provenance.items()}))


def dump_resolved(config: RunConfig) -> str:
    """The whole configuration as YAML, derived values included; ``load_config`` reads it back.

    Settings without effect in this configuration are left out.
    """
    return yaml.dump(_resolved(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def config_sha256(config: RunConfig) -> str:
    """Digest of the resolved configuration, 64 hexadecimal digits; equal for equal runs."""
    text = json.dumps(_resolved(config), sort_keys=True, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def value_of(config: RunConfig, key: str) -> Any:
    """Value of a dotted key."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def plain_value(config: RunConfig, key: str) -> Any:
    """Value of a dotted key as YAML and JSON have it: lists for tuples, mappings for sections."""
    return _plain(value_of(config, key))


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value.model_dump() if isinstance(value, Section) else value


def _resolved(config: RunConfig) -> dict[str, Any]:
    """Nested plain values of the settings that have an effect."""
    skipped = without_effect(config)
    content: dict[str, Any] = {}
    for key in known_keys():
        if key not in skipped:
            _place(content, key, plain_value(config, key))
    return content


def _put(provenance: dict[str, list[Origin]], key: str, origin: Origin) -> None:
    """Add a value. A null section takes back what lower layers gave inside it."""
    if key in known_sections():
        for inner in [k for k in provenance if k.startswith(f"{key}.")]:
            del provenance[inner]
        return
    provenance.setdefault(key, []).append(origin)


def _place(content: dict[str, Any], key: str, value: Any) -> None:
    *path, name = key.split(".")
    for part in path:
        content = content.setdefault(part, {})
    content[name] = value


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    # A section is always there, so that the required settings in it are named one by one.
    for section in known_sections():
        _place(content, section, {})
    nullable = nullable_keys()
    for key, value in values.items():
        # Where null is no value it takes back what was given before: the default counts, or what is derived.
        if value is not None or key in nullable:
            _place(content, key, value)
    return content


def nullable_keys(model: type[BaseModel] = RunConfig, prefix: str = "") -> set[str]:
    """Settings for which null is a value (no limit, switched off), not the request for a default."""
    keys: set[str] = set()
    for name, field in model.model_fields.items():
        inner = section_type(field.annotation)
        if inner:
            keys |= nullable_keys(inner, f"{prefix}{name}.")
        elif type(None) in get_args(field.annotation):
            keys.add(prefix + name)
    return keys


def _build(values: dict[str, Any]) -> tuple[RunConfig | None, list[Problem]]:
    """Validate; when single settings are wrong, the rules between the others are checked all the same."""
    problems: list[Problem] = []
    try:
        config = RunConfig.model_validate(_nested(values))
    except ValidationError as error:
        problems = list({p.message: p for p in map(type_problem, error.errors())}.values())
        refused = {key for problem in problems for key in problem.keys}
        sound = {key: value for key, value in values.items() if key not in refused}
        sound.update({key: stand_in for key, stand_in in _STAND_INS.items() if key not in sound})
        try:
            config = RunConfig.model_validate(_nested(sound))
        except ValidationError:
            return None, problems
    else:
        refused = set()
    for problem in [*find_conflicts(config), *find_ignored(config)]:
        if refused.isdisjoint(problem.keys):
            problems.append(problem)
    return (None if problems else config), problems


def _located(problem: Problem, provenance: Mapping[str, list[Origin]]) -> str:
    """The message with the places that gave the values involved."""
    places = dict.fromkeys(provenance[key][-1].source for key in problem.keys if key in provenance)
    return f"{problem.message} [{', '.join(places)}]" if places else problem.message
