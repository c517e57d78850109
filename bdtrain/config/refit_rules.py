"""Rules of the section ``refit`` against the rest of a run; ``bdtrain.config.checks`` applies them."""

from __future__ import annotations

import re
from collections.abc import Iterator

from bdtrain.config.problems import Problem
from bdtrain.config.schema import RunConfig


def refit_conflicts(config: RunConfig) -> Iterator[Problem]:
    """What a re-fit cannot do in this run."""
    refit, diffusion = config.refit, config.diffusion
    if refit.mode == "off":
        return
    if diffusion.algo == "ar":
        yield Problem(
            ("refit.mode", "diffusion.algo"),
            f"refit.mode={refit.mode} with diffusion.algo=ar, which draws no noise; use refit.mode=off",
        )
        return
    yield from _plan(config)
    yield from _search(config)
    if refit.lag_steps == 0 and not refit.wait and refit.placement not in ("inline", "auto"):
        yield Problem(
            ("refit.lag_steps", "refit.wait", "refit.placement"),
            f"refit.lag_steps=0 with refit.placement={refit.placement}: its plan would always come too late; "
            "set refit.wait=true, or give refit.lag_steps time for it",
        )
    if refit.gradient_variance and refit.placement in ("auto", "inline") and config.parallel.zero_stage == 3:
        yield Problem(
            ("refit.gradient_variance", "refit.placement", "parallel.zero_stage"),
            f"refit.gradient_variance=true with refit.placement={refit.placement} and parallel.zero_stage=3: "
            "one rank alone does not have the weights; use placement=process or ray, or zero_stage 1 or 2",
        )
    if refit.placement == "external" and refit.wait:
        yield Problem(
            ("refit.placement", "refit.wait"),
            "refit.wait=true with refit.placement=external: nobody may be there to wait for; use wait=false, "
            "or another placement",
        )
    if not re.fullmatch(r"local|auto|\S+:\d+", refit.ray_address):
        yield Problem(
            ("refit.ray_address",),
            f"refit.ray_address={refit.ray_address} is no address; use local, auto or host:port",
        )
    on_ray = refit.placement == "ray" or (refit.placement == "auto" and refit.ray_address != "local")
    if refit.worker_gpus and not on_ray:
        yield Problem(
            ("refit.worker_gpus", "refit.placement"),
            f"refit.worker_gpus={refit.worker_gpus} with refit.placement={refit.placement}; GPUs are "
            "reserved by Ray: use placement=ray, or remove it",
        )


def _plan(config: RunConfig) -> Iterator[Problem]:
    refit, diffusion, plan = config.refit, config.diffusion, config.diffusion.plan
    keys = ("refit.mode", "diffusion.schedule")
    if (
        refit.mode == "clip"
        and diffusion.schedule != "linear"
        and not diffusion.schedule.startswith("reference_")
    ):
        yield Problem(
            keys,
            f"refit.mode=clip with diffusion.schedule={diffusion.schedule}; a range of the masking "
            "probability is defined for schedule=linear",
        )
    if plan.clip_range == (1.0, 1.0) and diffusion.block_size != 1:
        yield Problem(
            ("refit.mode", "diffusion.plan.clip_range"),
            f"refit.mode={refit.mode} with diffusion.plan.clip_range=[1, 1], which masks every token; begin "
            "with another range, or use refit.mode=off",
        )
    if refit.mode == "counts" and (plan.kind != "count" or plan.resample):
        found = "kind=bernoulli" if plan.kind != "count" else "resample=true"
        yield Problem(
            ("refit.mode", "diffusion.plan.kind", "diffusion.plan.resample"),
            f"refit.mode=counts with diffusion.plan.{found}; a density of the number of masked tokens needs "
            "kind=count without resample",
        )
    if refit.mode == "counts" and diffusion.block_size == 1:
        yield Problem(
            ("refit.mode", "diffusion.block_size"),
            "refit.mode=counts with diffusion.block_size=1: one token is masked or nothing is; use "
            "refit.mode=clip or off",
        )


def _search(config: RunConfig) -> Iterator[Problem]:
    refit = config.refit
    if refit.mode == "clip" and (not refit.widths or not all(0 < width < 1 for width in refit.widths)):
        yield Problem(
            ("refit.widths",),
            f"refit.widths={list(refit.widths)}; give at least one, each above 0 and below 1 (the full range "
            "is always judged)",
        )
    if len(set(refit.widths)) != len(refit.widths):
        yield Problem(("refit.widths",), f"refit.widths={list(refit.widths)} names a width twice")


def refit_without_effect(config: RunConfig) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Switch, its value in words, and the settings that it leaves without effect."""
    refit = config.refit
    if refit.mode == "off":
        return  # an off switch leaves the rest dormant
    if refit.mode == "counts":
        yield "refit.mode", "counts", ("refit.widths", "refit.start_step")
    else:
        yield "refit.mode", "clip", ("refit.uniform_share",)
    if refit.placement in ("inline", "process", "external"):
        keys = ("refit.ray_address", "refit.workers", "refit.quorum")
        yield "refit.placement", refit.placement, keys
    if refit.placement in ("inline", "external"):
        yield "refit.placement", refit.placement, ("refit.worker_cpus",)
    if refit.placement == "inline":
        yield (
            "refit.placement",
            "inline, which is done before the next step",
            ("refit.wait", "refit.deadline_s"),
        )
