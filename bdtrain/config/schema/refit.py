"""Section ``refit``: when the noise plan is fitted again to what the model has learned, where, and how."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator

from bdtrain.config.schema.fields import NO_UNIT, Int, Section, as_tuple, setting

Widths = Annotated[tuple[float, ...], BeforeValidator(as_tuple, json_schema_input_type=tuple[float, ...])]
"""Some numbers, written as a list."""


def _off(value: object) -> object:
    """YAML reads the word ``off`` as false."""
    return "off" if value is False else value


class RefitConfig(Section):
    """The re-fit of the noise plan: one pass over held-out rows, every range judged from it."""

    mode: Annotated[
        Literal["off", "clip", "counts"],
        BeforeValidator(_off, json_schema_input_type=Literal["off", "clip", "counts"]),
    ] = setting(
        "off",
        unit=NO_UNIT,
        description="clip searches the clip range of the least variance, counts fits the density of the "
        "number of masked tokens; off keeps diffusion.plan for the whole run.",
    )
    every_tokens: Int | None = setting(
        None, unit="tokens", description="Tokens between two re-fits. null means one at each epoch.", ge=1
    )
    start_tokens: Int = setting(
        0,
        unit="tokens",
        description="No re-fit before this many tokens: what a young model shows misleads.",
        ge=0,
    )
    lag_steps: Int = setting(
        100,
        unit="steps",
        description="Steps from a re-fit's snapshot to the use of its plan. Fixed in advance, so that the "
        "run does not depend on how fast the re-fit was; a later result is not used.",
        ge=0,
    )
    wait: bool = setting(
        False,
        unit=NO_UNIT,
        description="Wait for a re-fit that is not done when its plan is due, up to refit.deadline_s. With "
        "lag_steps=0 it is the paper's procedure.",
    )
    placement: Literal["auto", "inline", "process", "ray", "external"] = setting(
        "auto",
        unit=NO_UNIT,
        description="Where it runs: inline on the training ranks between two steps; process, one more "
        "process beside rank 0; ray, tasks on Ray; external, somebody else's (refit_schedule.py --watch). "
        "auto: ray where ray_address names a cluster, process where gpu names one, else inline on GPUs, else "
        "process.",
    )
    gpu: Int | None = setting(
        None,
        unit="GPU number",
        description="GPU of rank 0's machine that training does not use and a process measures on, as "
        "training counts them; under the deepspeed launcher as the machine does. null measures on CPUs.",
        ge=0,
    )
    ray_address: str = setting(
        "local",
        unit="address",
        description="Ray cluster: local starts one on this machine, on loopback only; auto takes the running "
        "one; or host:port.",
        min_length=1,
    )
    workers: Int = setting(
        1, unit="workers", description="Workers on Ray, each with a model, that measure at a time.", ge=1
    )
    worker_tp: Int = setting(
        1,
        unit="processes",
        description="Ray processes of a worker, which share each layer of its model (as parallel.tp): for a "
        "model that one of them has no room for.",
        ge=1,
    )
    worker_cpus: Int = setting(
        1, unit="CPUs", description="CPUs, and threads, of a process of the re-fit.", ge=1
    )
    worker_gpus: float = setting(
        0.0, unit="GPUs", description="GPUs of a Ray process; 0 measures on CPUs.", ge=0.0
    )
    blocks: Int = setting(
        32768,
        unit="blocks",
        description="Blocks of held-out text that are measured, in at least 128 rows; all of the split if it "
        "has fewer.",
        ge=256,
    )
    batch_sequences: Int | None = setting(
        None,
        unit="rows",
        description="Rows of a forward pass. null means four micro-batches of training.",
        ge=1,
    )
    widths: Widths = setting(
        (0.5, 0.6, 0.7, 0.8, 0.9),
        unit="move_chance",
        description="Widths of the clip ranges that are judged, besides the full range (mode clip).",
    )
    start_step: float = setting(
        0.05,
        unit="move_chance",
        description="Distance of the ranges' lower bounds (mode clip).",
        gt=0.0,
        le=0.5,
    )
    criterion: Literal["raw", "relative"] = setting(
        "raw",
        unit=NO_UNIT,
        description="What is least: the variance of the loss averaged over the range (the paper's), or that "
        "over its squared mean.",
    )
    uniform_share: float = setting(
        0.05,
        unit=NO_UNIT,
        description="Share of the uniform density in a fitted one, which bounds the weights (mode counts).",
        gt=0.0,
        le=1.0,
    )
    min_gain: float = setting(
        0.02,
        unit=NO_UNIT,
        description="A plan is exchanged only for one that is better by this share, and beyond chance.",
        ge=0.0,
        lt=1.0,
    )
    adopt: bool = setting(
        True,
        unit=NO_UNIT,
        description="Use what a re-fit finds. false measures, judges and reports all the same, and keeps the "
        "plan.",
    )
    bootstrap_draws: Int = setting(
        500, unit="draws", description="Resamples of the rows, for the errors of the search.", ge=50
    )
    gradient_variance: bool = setting(
        False,
        unit=NO_UNIT,
        description="Report the variance of the last layer's gradient by mask count as well, and whether it "
        "ranks plans as the variance of the loss does: one more pass over 8192 blocks, in the re-fit's own "
        "process (inline: on rank 0, tp=pp=1). It decides nothing.",
    )
    deadline_s: float = setting(
        1800.0, unit="seconds", description="A re-fit that takes longer is ended; the plan stays.", gt=0.0
    )
    quorum: float = setting(
        0.75,
        unit=NO_UNIT,
        description="Share of the measurement that must succeed (Ray tasks may fail for good).",
        gt=0.0,
        le=1.0,
    )
    replay: Literal["history", "live"] = setting(
        "history",
        unit=NO_UNIT,
        description="A continued run uses at each step the plan that it used there before (history), or "
        "fits anew (live), and is then another run.",
    )
