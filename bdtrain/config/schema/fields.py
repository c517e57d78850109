"""How a setting is declared: a typed field with a meaning, a unit and its bounds.

Every section of the schema is a frozen pydantic model of such fields. Types are strict, because a lenient
reading turns typos into values ("yes" into 1). Two leniencies that users of YAML expect are here: a whole
float for an integer (``train.steps=1e6``) and a list for a tuple.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo
from pydantic_core import PydanticUndefined

NO_UNIT = "-"
"""Unit of a setting that is a name, a switch or a pure number."""


class Section(BaseModel):
    """Base of every section: frozen, strict about types, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def setting(default: Any = PydanticUndefined, *, unit: str, description: str, **options: Any) -> Any:
    """Declare one setting.

    Args:
        default: value when nothing is given; left out, the setting is required.
        unit: what the number counts (``tokens``, ``steps``), or ``NO_UNIT``.
        description: what the setting means, one or two sentences.
        **options: bounds and other arguments of ``pydantic.Field`` (``ge``, ``gt``, ``le``, ``lt``,
            ``validate_default``).

    Returns:
        The pydantic field.
    """
    return Field(default, description=description, json_schema_extra={"unit": unit}, **options)


def _whole(value: object) -> object:
    """A float without a fraction as an integer; anything else unchanged, for the strict type to judge."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def as_tuple(value: object) -> object:
    """A list as a tuple: frozen sections hold nothing that can be changed in place."""
    return tuple(value) if isinstance(value, list) else value


Int = Annotated[int, BeforeValidator(_whole, json_schema_input_type=int)]
"""An integer; ``1e6`` counts as one."""

Pair = Annotated[tuple[float, float], BeforeValidator(as_tuple, json_schema_input_type=tuple[float, float])]
"""Two numbers, written as a list."""


def derived_int(derive: Callable[[dict[str, Any]], int]) -> BeforeValidator:
    """A validator that turns ``null`` into a value computed from the fields above it in the same section.

    The field is then an ``int`` for every reader: nobody repeats the rule. Use it with
    ``validate_default=True``.

    Args:
        derive: the rule, from the validated fields above. It raises KeyError when one of them was refused;
            that error is reported by itself, and a harmless 1 stands in.

    Returns:
        The validator, for use inside ``Annotated``.
    """

    def fill(value: object, info: ValidationInfo) -> object:
        if value is not None:
            return _whole(value)
        try:
            return derive(info.data)
        except KeyError:
            return 1

    return BeforeValidator(fill, json_schema_input_type=int | None)
