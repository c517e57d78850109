"""Section ``diffusion``: the objective and its noise."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from bdtrain.config.schema.fields import NO_UNIT, Int, Pair, Section, derived_int, setting

DEFAULT_BLOCK_SIZE = 16
"""Block size of ``block_diffusion`` when none is given: the largest of the paper's three (4, 8, 16)."""

ScheduleName = Literal[
    "linear",
    "cosine",
    "square",
    "square_root",
    "logarithmic",
    "reference_linear",
    "reference_cosine",
    "reference_square",
    "reference_square_root",
    "reference_logarithmic",
    "reference_mdlm",
]


def _block_size(above: dict[str, Any]) -> int:
    algo = above["algo"]
    if algo == "mdlm":
        # RunConfig fills in the row length before it comes here; the section alone does not know it.
        raise ValueError("algo=mdlm has one block per row; give block_size, the row length")
    return 1 if algo == "ar" else DEFAULT_BLOCK_SIZE


class PlanConfig(Section):
    """How noise levels are drawn in training and how the loss is weighted."""

    kind: Literal["count", "bernoulli"] = setting(
        "count",
        unit=NO_UNIT,
        description="count draws the number of masked tokens of a block (t integrated out); bernoulli draws "
        "t and masks each token by itself.",
    )
    clip_range: Pair | None = setting(
        None,
        unit="move_chance",
        description="Interval [beta, omega] of the masking probability drawn in training. null is the full "
        "range; [1, 1] masks everything. Linear schedule only.",
    )
    weighting: Literal["elbo", "reference", "flat"] = setting(
        "elbo",
        unit=NO_UNIT,
        description="Weight of the loss: elbo restricts the bound to the range, reference is the published "
        "code's 1/t, flat is 1. Where re-fits change the range, elbo scales loss and gradient with its "
        "width; reference keeps their scale.",
    )
    resample: bool = setting(
        False,
        unit=NO_UNIT,
        description="The paper's resampling: a block's masked share must itself lie in clip_range.",
    )
    strata: Literal["permuted", "reference_grid", "independent"] = setting(
        "permuted",
        unit=NO_UNIT,
        description="How draws are spread over the global batch: permuted strata, the published code's "
        "fixed grid, or independent draws.",
    )


class DiffusionConfig(Section):
    """Objective, block size, schedule and noise plan."""

    algo: Literal["block_diffusion", "mdlm", "ar"] = setting(
        "block_diffusion",
        unit=NO_UNIT,
        description="Objective: block_diffusion, or the baselines mdlm (one block per row) and ar (next "
        "token).",
    )
    block_size: Annotated[int, derived_int(_block_size)] = setting(
        None,
        unit="tokens",
        description="Tokens per diffusion block (L'); divides data.seq_len. null means 16 with "
        "block_diffusion, data.seq_len with mdlm and 1 with ar.",
        validate_default=True,
        ge=1,
    )
    schedule: ScheduleName = setting(
        "linear",
        unit=NO_UNIT,
        description="Masking probability as a function of t. The reference_* forms repeat the published "
        "code's clamps, for parity.",
    )
    noise_copies: Int = setting(
        1, unit="copies", description="Noisy copies that share one clean stream in a forward pass (C).", ge=1
    )
    plan: PlanConfig = Field(default_factory=PlanConfig, description="Noise plan of training.")
