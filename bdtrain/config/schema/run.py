"""Section ``run``: the name of a run, where its files go, the seed, and whether it goes on."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, ValidationInfo

from bdtrain.config.schema.fields import NO_UNIT, Int, Section, setting


def _folder(value: object, info: ValidationInfo) -> object:
    return f"runs/{info.data.get('name', 'run')}" if value is None else value


class RunSection(Section):
    """Identity of a run."""

    name: str = setting(
        "run",
        unit=NO_UNIT,
        description="Name of the run: letters, digits, dot, dash and underscore.",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
    )
    folder: Annotated[str, BeforeValidator(_folder, json_schema_input_type=str | None)] = setting(
        None,
        unit="path",
        description="Folder that receives everything the run writes; null means runs/NAME.",
        validate_default=True,
        min_length=1,
    )
    seed: Int = setting(
        1234,
        unit=NO_UNIT,
        description="Seed of every random draw: initialisation, data order, noise and samples.",
        ge=0,
        lt=2**32,
    )
    resume: bool = setting(
        True,
        unit=NO_UNIT,
        description="A folder that holds this run is continued from its newest valid checkpoint; false "
        "refuses a folder that holds anything.",
    )
