"""The re-fit on the training ranks, between two steps: the oracle of the others."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from bdtrain.config import RunConfig
from bdtrain.data.loader import ValidationSet
from bdtrain.data.source import Source
from bdtrain.diffusion.build import build_objective
from bdtrain.diffusion.plan import NoisePlan, evaluation_plan
from bdtrain.model.transformer import TwoStreamTransformer
from bdtrain.refit.gradients import report_gradients
from bdtrain.refit.job import judge, make_schedule, publish
from bdtrain.refit.measure import measure_blocks
from bdtrain.refit.request import make_request


def refit_inline(
    model: TwoStreamTransformer,
    config: RunConfig,
    source: Source,
    current: NoisePlan,
    *,
    folder: Path,
    run_uid: str,
    step: int,
    version: int,
    device: torch.device,
    first: bool,
) -> None:
    """Measure on all ranks and publish on the first.

    Args:
        model: this rank's part, with the weights to judge by.
        config: of the run.
        source: its held-out rows.
        current: the plan in use.
        folder: where the results go.
        run_uid: of the run.
        step: batches taken.
        version: of the schedule.
        device: where the model is.
        first: whether this is rank 0.

    Raises:
        BdtrainError: if too little could be measured, or a loss is not finite; on rank 0 also for the search.
        OSError: if the disk refuses, on rank 0.
    """
    started = time.monotonic()
    request = make_request(
        config, snapshot="", rows=source.num_samples, block_sizes=(current.block_size,), device=device.type
    )
    records = {}
    for size, rows in zip(request.block_sizes, request.sequences, strict=True):
        settings = config.diffusion.model_copy(update={"block_size": size})
        records[size] = measure_blocks(
            model,
            build_objective(settings, config.data, source.tokenizer_info, evaluation_plan(size)),
            ValidationSet(source, max_sequences=rows),
            batch_size=request.batch_sequences,
            seed=request.seed,
            device=device,
        )
    if not first:
        return
    measured = time.monotonic()
    results = judge(records, current, config)
    searched = time.monotonic()
    seconds = {"open": 0.0, "measure": measured - started, "search": searched - measured}
    gradients = None
    if config.refit.gradient_variance:
        # This rank alone, without collectives: the others wait at the next one.
        gradients = report_gradients(
            model,
            config.diffusion,
            config.data,
            source,
            results,
            batch_size=request.batch_sequences,
            seed=request.seed,
            device=device,
        )
        seconds["gradients"] = time.monotonic() - searched
    schedule = make_schedule(results, current, run_uid=run_uid, step=step, digest="", version=version)
    publish(
        folder,
        schedule,
        results,
        request=request,
        seconds=seconds,
        measurement={"backend": "inline"},
        gradients=gradients,
    )
