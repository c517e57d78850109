"""Text of configuration errors: what was found, what is allowed, the nearest known key."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from bdtrain.config.schema import RunConfig, Section
from bdtrain.errors import ConfigError

OTHER_WORDS: Mapping[str, str] = MappingProxyType(
    {
        "learning_rate": "optim.lr",
        "max_steps": "train.steps",
        "num_steps": "train.steps",
        "n_layer": "model.num_layers",
        "n_layers": "model.num_layers",
        "n_head": "model.num_heads",
        "n_heads": "model.num_heads",
        "d_model": "model.hidden_size",
        "n_embd": "model.hidden_size",
        "context_length": "data.seq_len",
        "max_seq_len": "data.seq_len",
        "sequence_length": "data.seq_len",
        "gradient_clipping": "optim.grad_clip_norm",
        "max_grad_norm": "optim.grad_clip_norm",
        "tensor_parallel_size": "parallel.tp",
        "pipeline_parallel_size": "parallel.pp",
        "dtype": "train.precision",
    }
)
"""What other trainers call a setting, and what it is called here."""


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


def divisors_text(number: int, limit: int = 8, *, smallest: bool = False) -> str:
    """Divisors of a number as text, the largest ``limit`` of them, or the smallest."""
    low = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    divisors = sorted({*low, *(number // d for d in low)})
    shown = divisors[:limit] if smallest else divisors[-limit:]
    text = ", ".join(map(str, shown))
    if len(shown) == len(divisors):
        return text
    return f"{text}, ..." if smallest else f"..., {text}"


def section_type(annotation: object) -> type[Section] | None:
    """The section model of a field's annotation, or None for a plain setting."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return None


def item_section(annotation: object) -> type[Section] | None:
    """The section model of the items of a list setting, or None for any other setting."""
    arguments = get_args(annotation)
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return section_type(arguments[0])
    return None


def annotation_of(key: str) -> object:
    """The type of a setting or section, None for a key that does not exist."""
    annotation: object = RunConfig
    for part in key.split("."):
        section = section_type(annotation)
        if section is None or part not in section.model_fields:
            return None
        annotation = section.model_fields[part].annotation
    return annotation


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

    Words of other trainers are known. The last word counts most: ``train.lr`` means ``optim.lr`` rather than
    ``train.steps``. A word that names a setting exactly in another section wins over a similar word in the
    same one.
    """
    section, _, word = key.rpartition(".")
    if word in OTHER_WORDS:
        return OTHER_WORDS[word]
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
    key, place = _place(error["loc"])
    value = error["input"]
    kind = error["type"]
    context = error.get("ctx", {})
    item = item_section(annotation_of(key))
    if kind == "missing":
        if item is None and (place != key or isinstance(value, (tuple, list))):
            return Problem((key,), f"{key}={_show(value)}; it must be a list of two numbers")
        hint = "give it" if item else f"set it in the file or add {key}=VALUE"
        return Problem((key,), f"{place} is required and has no default; {hint}")
    if kind == "literal_error":
        return Problem((key,), f"{place}={_show(value)}; {_choices(value, context)}")
    if kind == "extra_forbidden" and item is not None:
        *_, word = place.split(".")
        near = difflib.get_close_matches(word, item.model_fields, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(item.model_fields)}"
        return Problem((key,), f"{place} is not a setting; {hint}")
    if kind in ("tuple_type", "model_type") and item is not None:
        fields = ", ".join(f"{name}: ..." for name in item.model_fields)
        form = f"{{{fields}}}" if kind == "model_type" else f"a list of {{{fields}}}"
        return Problem((key,), f"{place}={_show(value)}; it must be {form}")
    if kind == "tuple_type" and Ellipsis in get_args(annotation_of(key)):
        return Problem((key,), f'{place}={_show(value)}; it must be a list, written "{key}=[A]" or [A,B]')
    return Problem(
        (key,),
        f"{place}={_show(value)}; {_wanted(kind, context, error['msg'])}{_yaml_hint(kind, value)}"
        + (f', written "{key}=[A,B]"' if kind == "tuple_type" and isinstance(value, str) else ""),
    )


def _place(location: tuple[int | str, ...]) -> tuple[str, str]:
    """The key of the setting an error is about, and the place inside its value: ``optim.groups[0].match``."""
    parts = [part for part in location if not str(part).startswith("function-")]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).lstrip(".")
    # A list reports the index of the element; the setting is the whole list.
    return place.partition("[")[0], place


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
