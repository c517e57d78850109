"""Sections ``optim`` and ``train``: the update rule, and how many of which batches it gets."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, field_validator, model_validator

from bdtrain.config.schema.fields import NO_UNIT, Int, Pair, Section, as_tuple, setting


class ParameterGroup(Section):
    """Parameters that take another learning rate or another weight decay than the rest."""

    match: str = setting(
        unit="regular expression",
        description="Searched for in the parameter's name in the whole model, as in "
        "decoder.layers.0.mlp.linear_fc1.weight.",
        min_length=1,
    )
    lr_scale: float = setting(1.0, unit=NO_UNIT, description="Factor of the learning rate.", ge=0)
    weight_decay: float | None = setting(
        None,
        unit=NO_UNIT,
        description="Decoupled weight decay of these parameters, vectors included. null leaves "
        "optim.weight_decay and its rule.",
        ge=0,
    )

    @field_validator("match")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(
                f"it is not a regular expression ({error}); put a backslash before ( ) [ ] * + ? to mean "
                "the sign itself"
            ) from error
        return value

    @model_validator(mode="after")
    def _changes_something(self) -> Self:
        if not self.model_fields_set & {"lr_scale", "weight_decay"}:
            raise ValueError("it changes nothing; give lr_scale or weight_decay beside match")
        return self


ParameterGroups = Annotated[
    tuple[ParameterGroup, ...], BeforeValidator(as_tuple, json_schema_input_type=list[ParameterGroup])
]


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
        0,
        unit="steps",
        description="Steps of the linear warm-up, the first at lr / warmup_steps (the paper: 2500).",
        ge=0,
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
    groups: ParameterGroups = setting(
        (),
        unit=NO_UNIT,
        description="Exceptions, a list of {match: REGEX, lr_scale: 1.0, weight_decay: null}: parameters "
        "whose name in the whole model holds a match take lr_scale times the learning rate, and that weight "
        "decay where one is given; the first match wins.",
    )
    ema_decay: float | None = setting(
        0.9999,
        unit=NO_UNIT,
        description="Decay of the averaged weights that evaluation uses, per applied step. null turns the "
        "average off.",
        gt=0,
        lt=1,
    )


class TrainConfig(Section):
    """Length of the run and the cut of its batches."""

    steps: Int = setting(unit="steps", description="Optimizer steps of the whole run.", ge=1)
    global_batch_size: Int = setting(
        unit="rows", description="Rows per optimizer step, over all ranks.", ge=1
    )
    micro_batch_size: Int | None = setting(
        None,
        unit="rows",
        description="Rows per forward pass on one rank; divides the rows of a data-parallel rank, "
        "global_batch_size / dp. Memory only: the result does not depend on it. null means all of them.",
        ge=1,
    )
    init_from: str | None = setting(
        None,
        unit="path",
        description="Model folder or checkpoint whose weights the run begins with, averaged ones where it "
        "has any: of the same shape and tokenizer, trained with any objective or block size. null begins at "
        "random.",
        min_length=1,
    )
    precision: Literal["fp32", "bf16"] = setting(
        "fp32",
        unit=NO_UNIT,
        description="Type of weights and activations. With bf16 the optimizer's copy of the weights and the "
        "sum of gradients stay fp32.",
    )
    recompute: Literal["none", "core_attn", "full"] = setting(
        "none",
        unit=NO_UNIT,
        description="What the backward pass computes again to save memory: nothing, the inside of "
        "attention, or whole layers.",
    )
    peak_tflops: float | None = setting(
        None,
        unit="TFLOP/s",
        description="Peak of one device at this precision, for the share of it that is used (MFU). null "
        "means what is known of the GPU by its name; a CPU has none.",
        gt=0,
    )
    num_threads: Int | None = setting(
        None,
        unit="threads",
        description="CPU threads of the arithmetic. null means OMP_NUM_THREADS, else this rank's share of "
        "the machine's cores.",
        ge=1,
    )
    log_every_steps: Int = setting(10, unit="steps", description="Steps between two progress lines.", ge=1)
    max_nonfinite_steps: Int = setting(
        10,
        unit="steps",
        description="Skipped steps in a row (loss or gradient not finite) that end the run.",
        ge=1,
    )
