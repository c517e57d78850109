"""Rules of the section ``refit`` against the rest of a run; ``bdtrain.config.checks`` applies them."""

from __future__ import annotations

import re
from collections.abc import Iterator

from bdtrain.config.layout import tensor_problems
from bdtrain.config.problems import Problem
from bdtrain.config.schema import RefitConfig, RunConfig


def known_placement(refit: RefitConfig) -> str:
    """Where re-fits happen, as far as the configuration says it.

    Returns:
        ``inline``, ``process``, ``ray`` or ``external``; ``auto`` where the machine decides between the first
        two.
    """
    if refit.placement != "auto":
        return refit.placement
    if refit.ray_address != "local":
        return "ray"
    return "process" if refit.gpu is not None else "auto"


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
    placement = known_placement(refit)
    if refit.lag_steps == 0 and not refit.wait and placement not in ("inline", "auto"):
        yield Problem(
            ("refit.lag_steps", "refit.wait", "refit.placement"),
            f"refit.lag_steps=0 with {_placed(refit)}: its plan would always come too late; "
            "set refit.wait=true, or give refit.lag_steps time for it",
        )
    if refit.gradient_variance and placement in ("auto", "inline") and config.parallel.zero_stage == 3:
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
    yield from _workers(config)
    if refit.gpu is not None and placement != "process":
        yield Problem(
            ("refit.gpu", "refit.placement"),
            f"refit.gpu={refit.gpu} with {_placed(refit)}; it is for a process beside rank 0: use "
            "placement=process, or remove it (workers on Ray get theirs with refit.worker_gpus)",
        )


def _placed(refit: RefitConfig) -> str:
    """The placement in words, for a refusal."""
    words = f"refit.placement={refit.placement}"
    if refit.placement == "auto" and refit.ray_address != "local":
        return f"{words}, which takes the cluster of refit.ray_address={refit.ray_address}"
    if refit.placement == "auto" and refit.gpu is not None:
        return f"{words}, which takes refit.gpu={refit.gpu}"
    return words


def _workers(config: RunConfig) -> Iterator[Problem]:
    """What workers on Ray cannot be given, or do."""
    refit = config.refit
    placement, tp = known_placement(refit), refit.worker_tp
    if refit.worker_gpus and placement != "ray":
        yield Problem(
            ("refit.worker_gpus", "refit.placement"),
            f"refit.worker_gpus={refit.worker_gpus} with {_placed(refit)}; GPUs are reserved by Ray: use "
            "placement=ray, or remove it (placement=process takes refit.gpu)",
        )
    if tp == 1:
        return
    if placement != "ray":
        yield Problem(
            ("refit.worker_tp", "refit.placement"),
            f"refit.worker_tp={tp} with {_placed(refit)}; only workers on Ray share a model: use "
            "placement=ray, or remove it (placement=inline has the ranks of training)",
        )
    if refit.worker_gpus not in (0, 1):
        yield Problem(
            ("refit.worker_gpus", "refit.worker_tp"),
            f"refit.worker_gpus={refit.worker_gpus} with refit.worker_tp={tp}; processes that share a model "
            "have a GPU each: use 1, or 0 for CPUs",
        )
    if refit.gradient_variance:
        yield Problem(
            ("refit.gradient_variance", "refit.worker_tp"),
            f"refit.gradient_variance=true with refit.worker_tp={tp}: gradients are measured in the re-fit's "
            "own process, which needs the whole model; use gradient_variance=false, or worker_tp=1",
        )
    for problem in tensor_problems(config, tp):
        yield Problem(("refit.worker_tp",), f"refit.worker_tp={tp} cuts the model as parallel.tp: {problem}")


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
    placement = known_placement(refit)
    word = refit.placement if refit.placement != "auto" else "auto, and refit.ray_address names no cluster"
    if placement != "ray":
        yield "refit.placement", word, ("refit.workers", "refit.quorum")
    if refit.placement in ("inline", "process", "external"):
        # With auto it decides.
        yield "refit.placement", word, ("refit.ray_address",)
    if placement in ("inline", "external"):
        yield "refit.placement", word, ("refit.worker_cpus",)
    if refit.gpu is not None and placement == "process":
        yield "refit.gpu", f"{refit.gpu}, where no threads count", ("refit.worker_cpus",)
    if refit.placement == "inline":
        yield (
            "refit.placement",
            "inline, which is done before the next step",
            ("refit.wait", "refit.deadline_s"),
        )
