"""The re-fit on the training ranks, between two steps: the oracle of the others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

from bdtrain.checkpoint.communicator import Communicator
from bdtrain.config import RunConfig
from bdtrain.data.loader import ValidationSet
from bdtrain.data.source import Row, Source
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
    communicator: Communicator,
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
        communicator: all ranks.

    Raises:
        RefitError: if a row cannot be read, too little could be measured, or a loss is not finite: on every
            rank. For the search and the disk on rank 0 alone, which no collective waits for then.
        RankError: as ``measure_together``.
    """
    started = time.monotonic()
    request = make_request(
        config, snapshot="", rows=source.num_samples, block_sizes=(current.block_size,), device=device.type
    )
    numbers = {
        number for rows in request.sequences for number in ValidationSet(source, max_sequences=rows).numbers
    }
    read = read_together(lambda: RowsInMemory(source, sorted(numbers)), communicator)

    def measure() -> dict[int, BlockRecords]:
        records = {}
        for size, rows in zip(request.block_sizes, request.sequences, strict=True):
            settings = config.diffusion.model_copy(update={"block_size": size})
            records[size] = measure_blocks(
                model,
                build_objective(settings, config.data, source.tokenizer_info, evaluation_plan(size)),
                ValidationSet(read, max_sequences=rows),
                batch_size=request.batch_sequences,
                seed=request.seed,
                device=device,
            )
        return records

    records = measure_together(
        measure, batch_sequences=request.batch_sequences, ranks=communicator.world_size
    )
    if communicator.rank != 0:
        return
    measured = time.monotonic()
    try:
        results = judge(records, current, config)
        seconds = {"open": 0.0, "measure": measured - started, "search": time.monotonic() - measured}
        schedule = make_schedule(results, current, run_uid=run_uid, step=step, digest="", version=version)
        said = {"backend": "inline"}
        report = publish(folder, schedule, results, request=request, seconds=seconds, measurement=said)
    except RefitError:
        raise
    except Exception as error:
        # On this rank alone, and without collectives: the run goes on with the plan it has.
        what = "its result could not be written" if isinstance(error, OSError) else "the search failed"
        raise RefitError(f"{what} ({_words(error)})") from error
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


class RowsInMemory:
    """Rows of a source that were read already: no disk can refuse one to a single rank during a pass.

    Args:
        source: of the rows.
        numbers: of those that will be asked for.
    """

    def __init__(self, source: Source, numbers: Iterable[int]) -> None:
        self.seq_len, self.num_samples = source.seq_len, source.num_samples
        self.tokenizer_info, self.byte_lengths = source.tokenizer_info, source.byte_lengths
        self.fingerprint = source.fingerprint
        self._source = source
        # Copied: a row may be a view of a file.
        self._rows = {number: np.array(source.row(number)) for number in numbers}

    def sample(self, position: int) -> Row:
        """The source's."""
        return self._source.sample(position)

    def row(self, number: int) -> Row:
        """A row that was read."""
        return self._rows[number]


def read_together(read: Callable[[], Source], communicator: Communicator) -> Source:
    """Let each rank read for itself, and go on only if none of them met a problem.

    Args:
        read: does it.
        communicator: all ranks.

    Raises:
        RefitError: the same on every rank, with what the first of those that failed met.
    """
    found, problem = None, ""
    try:
        found = read()
    except Exception as error:
        problem = _words(error)
    problems = [(rank, text) for rank, text in enumerate(communicator.gather_objects(problem)) if text]
    if found is None or problems:
        rank, text = problems[0]
        others = f", as {len(problems) - 1} others" if problems[1:] else ""
        raise RefitError(f"rank {rank} could not read the held-out rows of the re-fit{others} ({text})")
    return found


def measure_together(
    measure: Callable[[], dict[int, BlockRecords]], *, batch_sequences: int, ranks: int
) -> dict[int, BlockRecords]:
    """A pass in which all ranks take part. What it took on this rank is free again when it fails.

    Args:
        measure: does it; an error of ours that it raises is the same on every rank, since it reads no disk.
        batch_sequences: rows of a forward pass.
        ranks: that take part.

    Raises:
        RefitError: on a single rank, for whatever went wrong, and on all for an error of ours: it costs the
            re-fit alone.
        RankError: on one of several, for want of memory or of the disk: the others are in a collective that
            it will not come to.
    """
    try:
        return measure()
    except BdtrainError as error:
        # Not a DataError: of several ranks that is what one of them met alone, and the run's end.
        raise RefitError(str(error)) from error
    except Exception as error:
        memory = is_out_of_memory(error)
        if ranks > 1 and not memory and not isinstance(error, OSError):
            raise  # it ends the run as in a step: with the traceback, or because a peer is gone
        reason = _words(error)
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
    # What PyTorch says of a CPU's; what CUDA's libraries (CUBLAS_STATUS_ALLOC_FAILED), and newer ones, say.
    words = (
        "not enough memory",
        "can't allocate memory",
        "out of memory",
        "alloc_failed",
        "allocation_failed",
    )
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


def _words(error: Exception) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no words'}"
