"""Section ``profile``: which steps are traced, on which ranks."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BeforeValidator, field_validator

from bdtrain.config.schema.fields import NO_UNIT, Section, setting

ALL_RANKS = "all"

_STEPS = re.compile(r"([0-9]+):([0-9]+)")
_RANKS = re.compile(r"[0-9]+(,[0-9]+)*")
_FORM = "it must be FIRST:STOP, as in 10:13 for the steps 10, 11 and 12"


def _range_text(value: object) -> object:
    """Text or null; anything else gets the form in its refusal."""
    if value is None or isinstance(value, str):
        return value
    raise ValueError(_FORM)


def _ranks_text(value: object) -> object:
    """One number, or a list of them, as text."""
    numbers = value if isinstance(value, (list, tuple)) else [value]
    if numbers and all(isinstance(number, int) and not isinstance(number, bool) for number in numbers):
        return ",".join(map(str, numbers))
    return value.replace(" ", "") if isinstance(value, str) else value


class ProfileConfig(Section):
    """Tracing of a few steps; the numbers of the run stay the same bits."""

    steps: Annotated[str | None, BeforeValidator(_range_text, json_schema_input_type=str | None)] = setting(
        None,
        unit="steps",
        description="FIRST:STOP traces the steps FIRST to STOP - 1 as the console counts them, from 1 (10:13 "
        "is 10, 11 and 12), and writes a trace, a table of operators and a memory snapshot into the folder "
        "profile/ of the run. null traces nothing.",
    )
    ranks: Annotated[str, BeforeValidator(_ranks_text, json_schema_input_type=str | int | list[int])] = (
        setting(
            "0",
            unit="ranks",
            description="Ranks that are traced, joined by commas (0,3), or all. Each writes its own files.",
        )
    )
    stacks: bool = setting(
        False,
        unit=NO_UNIT,
        description="Record the Python line of every operator; the traced steps become slower and their "
        "files larger.",
    )

    @field_validator("steps")
    @classmethod
    def _holds_a_step(cls, value: str | None) -> str | None:
        if value is None:
            return None
        found = _STEPS.fullmatch(value.strip())
        if found is None:
            raise ValueError(_FORM)
        first, stop = map(int, found.groups())
        if first < 1:
            raise ValueError(f"read as {first}:{stop}; steps count from 1, and {_FORM}")
        if stop <= first:
            raise ValueError(
                f"read as {first}:{stop}, which holds no step: STOP is the first step that is not traced; "
                f"{first}:{first + 3} traces three"
            )
        return f"{first}:{stop}"

    @field_validator("ranks")
    @classmethod
    def _are_ranks(cls, value: str) -> str:
        if value != ALL_RANKS and not _RANKS.fullmatch(value):
            raise ValueError("it must be all, or numbers of ranks joined by commas, as in 0 or 0,3")
        return value if value == ALL_RANKS else ",".join(map(str, sorted({int(n) for n in value.split(",")})))

    @property
    def traced_steps(self) -> range:
        """Numbers of the steps that are traced, counted from 1; empty without ``steps``."""
        return range(*map(int, self.steps.split(":"))) if self.steps is not None else range(0)

    def traced_ranks(self, world_size: int) -> tuple[int, ...]:
        """Ranks that are traced, in ascending order; some may be past the last one of the run.

        Args:
            world_size: ranks of the run.
        """
        if self.ranks == ALL_RANKS:
            return tuple(range(world_size))
        return tuple(map(int, self.ranks.split(",")))
