"""Section ``parallel``: how a run is cut over its ranks."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator

from bdtrain.config.schema.fields import NO_UNIT, Int, Section, setting


def _not_zero(value: object) -> object:
    """Refuse stage 0 with its reason; everything else is the type's to judge."""
    # False equals 0, but is no stage at all.
    if value == 0 and not isinstance(value, bool):
        raise ValueError(
            "choose 1, 2 or 3: DeepSpeed's stage 0 clips gradients by a wrong norm under tensor and pipeline "
            "parallelism; with one data-parallel rank stage 1 costs the same"
        )
    return value


class ParallelConfig(Section):
    """Axes of the grid of ranks; what tp and pp leave over is dp, the data-parallel size.

    The world is tp x pp x dp ranks, tp fastest, then dp, then pp. ``bdtrain.config.layout`` checks it.
    """

    tp: Int = setting(
        1,
        unit="ranks",
        description="Ranks that share each layer (tensor parallelism); divides the heads, ffn_size and the "
        "padded vocabulary.",
        ge=1,
    )
    pp: Int = setting(
        1,
        unit="ranks",
        description="Stages that share the layers (pipeline parallelism); divides model.num_layers.",
        ge=1,
    )
    sequence_parallel: bool = setting(
        False,
        unit=NO_UNIT,
        description="Split the activations between the layers over the tp ranks as well; with tp above 1 "
        "only, and tp must divide data.seq_len.",
    )
    zero_stage: Annotated[Literal[1, 2, 3], BeforeValidator(_not_zero)] = setting(
        1,
        unit=NO_UNIT,
        description="What DeepSpeed ZeRO partitions over data-parallel ranks: 1 optimizer state, 2 also "
        "gradients, 3 also weights (not with pp above 1).",
    )
