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
from bdtrain.errors import BdtrainError, RefitError
from bdtrain.model.transformer import TwoStreamTransformer
from bdtrain.refit.gradients import report_gradients
from bdtrain.refit.job import add_gradients, judge, make_schedule, publish
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
    try:
        results = judge(records, current, config)
        seconds = {"open": 0.0, "measure": measured - started, "search": time.monotonic() - measured}
        schedule = make_schedule(results, current, run_uid=run_uid, step=step, digest="", version=version)
        said = {"backend": "inline"}
        report = publish(folder, schedule, results, request=request, seconds=seconds, measurement=said)
    except (BdtrainError, OSError):
        raise
    except Exception as error:
        # On this rank alone, and without collectives: the run goes on with the plan it has.
        raise RefitError(f"the search failed ({type(error).__name__}: {error})") from error
    if config.refit.gradient_variance:
        # The others wait at the next collective meanwhile.
        add_gradients(
            folder,
            report,
            lambda: report_gradients(
                model,
                config.diffusion,
                config.data,
                source,
                results,
                batch_size=request.batch_sequences,
                seed=request.seed,
                device=device,
            ),
        )
