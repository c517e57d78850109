"""Sections ``validation`` and ``checkpoint``: what is measured and what is kept."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, field_validator

from bdtrain.config.schema.fields import NO_UNIT, Int, Section, as_tuple, setting

MAIN_SET = "valid"
"""Name of the run's own held-out rows."""

_SET_NAME = re.compile(r"[a-z0-9_]{1,40}")


class HeldOutSet(Section):
    """A text beside the run's own held-out rows."""

    name: str = setting(
        unit=NO_UNIT,
        description="Of its metrics, val_NAME/nelbo; lower case letters, digits and underscores.",
    )
    path: str = setting(
        unit="path",
        description="A UTF-8 text file, or a corpus folder made with the run's tokenizer; relative to the "
        "working directory.",
        min_length=1,
    )
    split: Literal["train", "valid"] | None = setting(
        None,
        unit=NO_UNIT,
        description="Split of the corpus. null means valid, or train in a corpus without one.",
    )
    sequences: Int | None = setting(
        None, unit="rows", description="Rows to use, spread evenly over the text. null means all.", ge=1
    )

    @field_validator("name")
    @classmethod
    def _is_a_name(cls, value: str) -> str:
        if not _SET_NAME.fullmatch(value):
            raise ValueError(
                "it is part of the names of metrics: 1 to 40 lower case letters, digits and underscores"
            )
        if value == MAIN_SET:
            raise ValueError("that is the name of the run's own held-out rows; choose another one")
        return value


HeldOutSets = Annotated[
    tuple[HeldOutSet, ...], BeforeValidator(as_tuple, json_schema_input_type=list[HeldOutSet])
]


class ValidationConfig(Section):
    """Likelihood on held-out rows, and a sample to look at."""

    every_steps: Int = setting(
        0,
        unit="steps",
        description="Steps between two validations; 0 validates only at the ends of the run.",
        ge=0,
    )
    at_start: bool = setting(True, unit=NO_UNIT, description="Validate before the first step.")
    sequences: Int | None = setting(
        None,
        unit="rows",
        description="Rows of the validation split to use, spread evenly over it. null means all.",
        ge=1,
    )
    replicates: Int = setting(
        2,
        unit="draws",
        description="Independent noise draws per row; two or more give the noise part of the standard error.",
        ge=2,
    )
    sets: HeldOutSets = setting(
        (),
        unit=NO_UNIT,
        description="More texts that every validation measures, a list of {name: NAME, path: PATH, split: "
        "null, sequences: null}: UTF-8 text files, which are read with the run's tokenizer, and corpora made "
        "with it. Their metrics are val_NAME/nelbo and so on.",
    )
    sample_tokens: Int = setting(
        64, unit="tokens", description="Tokens of the sample written at each validation; 0 writes none.", ge=0
    )
    sample_method: Literal["ancestral", "first_hitting", "confidence", "static"] = setting(
        "ancestral", unit=NO_UNIT, description="Sampler of that text."
    )
    sample_steps: Int | None = setting(
        None,
        unit="steps",
        description="Denoising steps per block. null means one per token of the block; not with "
        "first_hitting or confidence.",
        ge=1,
    )
    sample_prompt: str = setting("", unit="text", description="Text that the sample continues.")

    @field_validator("sets")
    @classmethod
    def _have_names_of_their_own(cls, value: tuple[HeldOutSet, ...]) -> tuple[HeldOutSet, ...]:
        names = [entry.name for entry in value]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two sets have the name {', '.join(twice)}; give each a name of its own")
        return value


class CheckpointConfig(Section):
    """What is written besides metrics."""

    every_steps: Int = setting(
        0,
        unit="steps",
        description="Steps between two checkpoints; 0 writes none but the final one and those that a signal "
        "asks for.",
        ge=0,
    )
    keep_last: Int = setting(
        2, unit="checkpoints", description="Newest checkpoints that are kept; older ones are deleted.", ge=1
    )
    keep_every_tokens: Int | None = setting(
        None,
        unit="tokens",
        description="Besides the newest, the first checkpoint after each multiple of this many tokens is "
        "kept for good. null keeps none.",
        ge=1,
    )
    save_final: bool = setting(True, unit=NO_UNIT, description="Write a checkpoint after the last step.")
