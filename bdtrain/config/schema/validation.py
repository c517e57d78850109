"""Sections ``validation`` and ``checkpoint``: what is measured and what is kept."""

from __future__ import annotations

from typing import Literal

from bdtrain.config.schema.fields import NO_UNIT, Int, Section, setting


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
