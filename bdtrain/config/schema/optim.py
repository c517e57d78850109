"""Sections ``optim`` and ``train``: the update rule, and how many of which batches it gets."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from bdtrain.config.schema.fields import NO_UNIT, Int, Pair, Section, derived_int, setting


class OptimConfig(Section):
    """AdamW, its learning rate over the run, clipping and the average of weights."""

    lr: float = setting(3e-4, unit=NO_UNIT, description="Peak learning rate.", gt=0)
    betas: Pair = setting(
        (0.9, 0.999), unit=NO_UNIT, description="Decay of Adam's first and second moment, both in [0, 1)."
    )
    epsilon: float = setting(1e-8, unit=NO_UNIT, description="Adam's epsilon.", gt=0)
    weight_decay: float = setting(
        0.0, unit=NO_UNIT, description="Decoupled weight decay; matrices only.", ge=0
    )
    grad_clip_norm: float | None = setting(
        1.0,
        unit=NO_UNIT,
        description="Gradients are scaled down to this global norm. null turns it off.",
        gt=0,
    )
    schedule: Literal["constant", "cosine", "wsd"] = setting(
        "constant",
        unit=NO_UNIT,
        description="Learning rate after the warm-up: constant, cosine to the last step, or wsd (constant, "
        "then a linear decay over the last decay_steps).",
    )
    warmup_steps: Int = setting(
        0, unit="steps", description="Steps of the linear warm-up from 0 (the paper: 2500).", ge=0
    )
    decay_steps: Int | None = setting(
        None, unit="steps", description="Length of the final decay; with schedule wsd only.", ge=1
    )
    min_lr_ratio: float = setting(
        0.0,
        unit=NO_UNIT,
        description="Learning rate at the end of a decay, as a share of lr; not with schedule constant.",
        ge=0,
        le=1,
    )
    ema_decay: float | None = setting(
        0.9999,
        unit=NO_UNIT,
        description="Decay of the averaged weights that evaluation uses, per applied step. null turns the "
        "average off.",
        gt=0,
        lt=1,
    )


def _micro_batch_size(above: dict[str, Any]) -> int:
    return int(above["global_batch_size"])


class TrainConfig(Section):
    """Length of the run and the cut of its batches."""

    steps: Int = setting(unit="steps", description="Optimizer steps of the whole run.", ge=1)
    global_batch_size: Int = setting(
        unit="rows", description="Rows per optimizer step, over all ranks.", ge=1
    )
    micro_batch_size: Annotated[int, derived_int(_micro_batch_size)] = setting(
        None,
        unit="rows",
        description="Rows per forward pass on one rank; divides global_batch_size. Memory only: the result "
        "does not depend on it. null means global_batch_size.",
        validate_default=True,
        ge=1,
    )
    num_threads: Int | None = setting(
        None,
        unit="threads",
        description="CPU threads of the arithmetic. null means the cores that the process may use.",
        ge=1,
    )
    log_every_steps: Int = setting(10, unit="steps", description="Steps between two progress lines.", ge=1)
    zero_stage: Literal[1, 2] = setting(
        1,
        unit=NO_UNIT,
        description="What DeepSpeed ZeRO partitions over data-parallel ranks: 1 optimizer state, 2 also "
        "gradients.",
    )
    max_nonfinite_steps: Int = setting(
        10,
        unit="steps",
        description="Skipped steps in a row (loss or gradient not finite) that end the run.",
        ge=1,
    )
