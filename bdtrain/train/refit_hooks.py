"""What the loop does for its re-fits: snapshots, measurements in memory, and words on the console."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bdtrain.config import dump_resolved
from bdtrain.diffusion.build import build_objective
from bdtrain.diffusion.objectives.base import Objective
from bdtrain.diffusion.plan import NoisePlan
from bdtrain.refit.backends import settle_placement, training_share
from bdtrain.refit.inline_backend import refit_inline
from bdtrain.refit.request import make_request
from bdtrain.refit.snapshot import write_snapshot
from bdtrain.tracking.console import format_seconds
from bdtrain.train.refit import RefitHooks, ScheduleRefit
from bdtrain.validation.generation import tokenizer_path

if TYPE_CHECKING:
    from bdtrain.train.loop import Trainer


def make_refit(trainer: Trainer) -> ScheduleRefit:
    """The re-fits of a run, before anything of a checkpoint is known.

    Raises:
        RefitError: if the configuration asks for what is not installed.
    """
    config, parts, folder = trainer.config, trainer.parts, trainer.folder
    placement, why = settle_placement(config, on_gpus=parts.device.type == "cuda")
    refit = config.refit
    if refit.mode != "off":
        every = "epoch" if refit.every_tokens is None else f"{refit.every_tokens:,} tokens"
        trainer.console.line(
            f"re-fit of the noise plan: {refit.mode}, every {every}, {placement} ({why}); used "
            f"{refit.lag_steps} steps later"
        )

    def snapshot() -> None:
        write_snapshot(
            folder.path,
            step=trainer.progress.step,
            fragments=trainer.engine.fragments(),
            state=trainer.state(),
            config_yaml=dump_resolved(config),
            tokenizer=tokenizer_path(config),
            run_uid=folder.run_uid,
            communicator=parts.communicator,
        )

    def measure(results: Path, version: int) -> None:
        plan = trainer.refit.plan
        assert plan is not None
        trainer.profiler.finish()
        with trainer.engine.averaged_weights():
            refit_inline(
                trainer.engine.module,
                config,
                parts.evaluators[0].held_out.source,
                plan,
                folder=results,
                run_uid=folder.run_uid,
                step=trainer.progress.step,
                version=version,
                device=torch.device(parts.device),
                communicator=parts.communicator,
            )

    def expected() -> str:
        progress = trainer.progress
        share = training_share(
            config,
            placement,
            on_gpus=parts.device.type == "cuda",
            ranks=trainer.layout.world_size,
        )
        if not progress.train_seconds or share is None:
            return ""
        request = make_request(config, snapshot="", rows=parts.evaluators[0].held_out.source.num_samples)
        # A forward pass is a third of a step.
        rate = 3 * progress.tokens / progress.train_seconds / trainer.layout.world_size * share
        seconds = request.measured_sequences * config.data.seq_len / max(rate, 1e-9)
        return f", about {format_seconds(seconds)} of measuring"

    def objective(plan: NoisePlan) -> Objective:
        return build_objective(config.diffusion, config.data, parts.loader.tokenizer_info, plan)

    def event(name: str, **facts: Any) -> None:
        if trainer.metrics is not None:
            trainer.metrics.event(name, trainer.progress.step, **facts)

    return ScheduleRefit(
        config,
        placement=placement,
        run_uid=folder.run_uid,
        communicator=parts.communicator,
        plan=parts.plan,
        objective=parts.objective,
        epoch_samples=parts.loader.epoch_samples,
        hooks=RefitHooks(
            snapshot=snapshot,
            expected=expected,
            measure=measure,
            build_objective=objective,
            tell=trainer.console.line,
            event=event,
            write=trainer.write,
            stopping=lambda: trainer.stop.pending is not None,
        ),
    )
