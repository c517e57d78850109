"""Text of configuration errors: what was found, what is allowed, the nearest known key."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from bdtrain.config.schema import RunConfig, Section
from bdtrain.errors import ConfigError


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        keys: dotted keys involved; empty for a problem of a file or of the command line.
        message: text for the user, without the place where the value was given.
    """

    keys: tuple[str, ...]
    message: str


def config_error(lines: Iterable[str]) -> ConfigError:
    """One error that lists everything, in the order found, each line once."""
    unique = list(dict.fromkeys(lines))
    head = (
        "1 problem in the configuration:"
        if len(unique) == 1
        else f"{len(unique)} problems in the configuration:"
    )
    return ConfigError("\n".join([head, *(f"  {line}" for line in unique)]))


def section_type(annotation: object) -> type[Section] | None:
    """The section model of a field's annotation, or None for a plain setting."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return None


def known_keys(model: type[BaseModel] = RunConfig, prefix: str = "") -> list[str]:
    """Dotted keys of all settings (not of sections), in the order of the schema."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        inner = section_type(field.annotation)
        keys += known_keys(inner, f"{prefix}{name}.") if inner else [prefix + name]
    return keys


def known_sections(model: type[BaseModel] = RunConfig, prefix: str = "") -> list[str]:
    """Dotted keys of all sections, outer before inner."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        inner = section_type(field.annotation)
        if inner:
            keys += [prefix + name, *known_sections(inner, f"{prefix}{name}.")]
    return keys


def nearest_key(key: str) -> str | None:
    """The known key or section that the writer of ``key`` most likely meant, or None when nothing is near.

    The last word counts most: ``train.lr`` means ``optim.lr`` rather than ``train.steps``. A word that names
    a setting exactly in another section wins over a similar word in the same one.
    """
    section, _, word = key.rpartition(".")
    best, best_score = None, 0.0
    for candidate in known_keys() + known_sections():
        candidate_section, _, candidate_word = candidate.rpartition(".")
        likeness = difflib.SequenceMatcher(None, word, candidate_word).ratio()
        if likeness < 0.6:
            continue
        score = likeness + 0.2 * difflib.SequenceMatcher(None, section, candidate_section).ratio()
        if score > best_score:
            best, best_score = candidate, score
    return best


def unknown_key(key: str) -> Problem:
    """The problem of a key that the schema does not have."""
    near = nearest_key(key)
    if near:
        return Problem((key,), f"{key} is not a setting; did you mean {near}?")
    section = key.rpartition(".")[0]
    inside = [k for k in known_keys() if k.startswith(f"{section}.")] if section else []
    hint = (
        f"settings of {section}: {', '.join(inside)}"
        if inside
        else f"sections: {', '.join(RunConfig.model_fields)}"
    )
    return Problem((key,), f"{key} is not a setting; {hint}")


def type_problem(error: ErrorDetails) -> Problem:
    """The problem behind one error of pydantic."""
    # Tuples report the index of the element; the setting is the whole list.
    path = [str(part) for part in error["loc"] if not isinstance(part, int)]
    key = ".".join(part for part in path if not part.startswith("function-"))
    index = "".join(f"[{part}]" for part in error["loc"] if isinstance(part, int))
    value = error["input"]
    kind = error["type"]
    context = error.get("ctx", {})
    if kind == "missing":
        if index or isinstance(value, (tuple, list)):
            return Problem((key,), f"{key}={_show(value)}; it must be a list of two numbers")
        return Problem((key,), f"{key} is required and has no default; set it in the file or add {key}=VALUE")
    if kind == "literal_error":
        return Problem((key,), f"{key}={_show(value)}; {_choices(value, context)}")
    return Problem(
        (key,),
        f"{key}{index}={_show(value)}; {_wanted(kind, context, error['msg'])}{_yaml_hint(kind, value)}",
    )


def _choices(value: object, context: dict[str, Any]) -> str:
    allowed = str(context.get("expected", ""))
    words = [word.strip(" '") for word in allowed.replace(" or ", ", ").split(",")]
    near = difflib.get_close_matches(str(value), words, n=1, cutoff=0.6)
    return f"choose from {', '.join(words)}" + (f" (did you mean {near[0]}?)" if near else "")


def _wanted(kind: str, context: dict[str, Any], fallback: str) -> str:
    """What the setting must be, in the project's words."""
    bounds = {"greater_than_equal": "ge", "greater_than": "gt", "less_than_equal": "le", "less_than": "lt"}
    words = {"ge": "at least", "gt": "greater than", "le": "at most", "lt": "less than"}
    if kind in bounds:
        name = bounds[kind]
        return f"it must be {words[name]} {context[name]}"
    simple = {
        "int_type": "it must be a whole number",
        "int_from_float": "it must be a whole number",
        "float_type": "it must be a number",
        "finite_number": "it must be a finite number",
        "bool_type": "it must be true or false",
        "string_type": "it must be text",
        "string_too_short": "it must not be empty",
        "tuple_type": "it must be a list of two numbers",
        "too_long": "it must be a list of two numbers",
        "model_type": "it is a section; give its settings",
        "string_pattern_mismatch": f"it must match {context.get('pattern', '')}",
        "value_error": str(context.get("error", fallback)),
    }
    return simple.get(kind, fallback)


def _yaml_hint(kind: str, value: object) -> str:
    if kind == "string_type" and isinstance(value, (bool, int, float)):
        return " (YAML read it as another type: put it in quotes)"
    return ""


def _show(value: object) -> str:
    """A value as a user would write it in YAML, cut to a readable length."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        value = list(value)
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def literal_choices(annotation: object) -> tuple[Any, ...]:
    """Choices of a Literal annotation; empty for any other."""
    arguments = get_args(annotation)
    return arguments if arguments and all(isinstance(a, (str, int)) for a in arguments) else ()
