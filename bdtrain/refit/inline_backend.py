"""The re-fit on the training ranks, between two steps: the oracle of the others."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from bdtrain.config import RunConfig
from bdtrain.data.loader import ValidationSet
from bdtrain.data.source import Source
from bdtrain.diffusion.build import build_objective
from bdtrain.diffusion.plan import NoisePlan, evaluation_plan
from bdtrain.diffusion.variance import BlockRecords
from bdtrain.errors import BdtrainError, RankError, RefitError
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
        RankError: as ``measure_together``.
        OSError: if the disk refuses, on rank 0.
    """
    started = time.monotonic()
    request = make_request(
        config, snapshot="", rows=source.num_samples, block_sizes=(current.block_size,), device=device.type
    )
    groups = model.pg_collection

    def measure() -> dict[int, BlockRecords]:
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
        return records

    records = measure_together(
        measure,
        batch_sequences=request.batch_sequences,
        ranks=groups.tp.size() * groups.pp.size() * groups.dp.size(),
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


def measure_together(
    measure: Callable[[], dict[int, BlockRecords]], *, batch_sequences: int, ranks: int
) -> dict[int, BlockRecords]:
    """A pass in which all ranks take part. What it took on this rank is free again when it fails.

    Args:
        measure: does it; an error of ours that it raises is the same on every rank.
        batch_sequences: rows of a forward pass.
        ranks: that take part.

    Raises:
        RefitError: on a single rank, for whatever went wrong: it costs the re-fit alone.
        RankError: on one of several, for want of memory or of the disk: the others are in a collective that
            it will not come to.
    """
    try:
        return measure()
    except BdtrainError:
        raise
    except Exception as error:
        memory = is_out_of_memory(error)
        if ranks > 1 and not memory and not isinstance(error, OSError):
            raise  # it ends the run as in a step: with the traceback, or because a peer is gone
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no words'}"
    # Out here nothing refers to the frames of the pass, nor to the tensors in them.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    advice = (
        f"; lower refit.batch_sequences (now {batch_sequences}), or measure elsewhere "
        "(refit.placement=process or ray)"
        if memory
        else ""
    )
    what = "ran out of memory" if memory else "failed"
    if ranks == 1:
        raise RefitError(f"the pass of the re-fit {what} ({reason}){advice}")
    raise RankError(
        f"this rank {what} in the pass of a re-fit on the training ranks ({reason}), and the others wait for "
        f"it; the run ends here and goes on from its last checkpoint{advice}"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of the machine or of a GPU, was not enough."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    # What PyTorch says of a CPU's.
    words = ("not enough memory", "can't allocate memory", "out of memory")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
