"""A re-fit from a snapshot to a schedule: measure, judge, publish.

1. The snapshot is read and compared with its manifest; what it says of the run decides everything else.
2. Its blocks are measured in shards: in this process, or by tasks on Ray.
3. Every plan is judged from the same records; the decision and the whole search are written.

Nothing here knows the trainer. It may be started by one, by an operator or by a watcher, on any machine that
sees the run's folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from bdtrain.checkpoint.weights import SavedModel, open_model
from bdtrain.config import DataConfig, RunConfig
from bdtrain.data.source import Source
from bdtrain.diffusion.plan import NoisePlan
from bdtrain.diffusion.variance import BlockRecords
from bdtrain.errors import RefitError
from bdtrain.files import write_atomic
from bdtrain.refit.candidates import SearchSettings
from bdtrain.refit.request import RefitRequest, make_request
from bdtrain.refit.schedule_file import (
    REPORT_FILE,
    Decision,
    Schedule,
    plan_digest,
    write_schedule,
)
from bdtrain.refit.search import SearchResult, search
from bdtrain.refit.snapshot import data_section, snapshot_digest
from bdtrain.validation.held_out import Trained, check_tokenizer, open_split

LOCK_FILE = ".lock"
REPORT_FORMAT = "bdtrain-refit-report/1"

Measure = Callable[[RefitRequest], tuple[dict[int, BlockRecords], dict[str, Any]]]
"""From a request to records by block size, and what is to be said of the measurement in the report."""


@dataclass(frozen=True)
class Refit:
    """A finished re-fit.

    Attributes:
        schedule: what was decided.
        results: the search, by block size.
        folder: where both were written.
        seconds: wall time by part.
    """

    schedule: Schedule
    results: Mapping[int, SearchResult]
    folder: Path
    seconds: Mapping[str, float]

    def describe(self) -> str:
        """One line."""
        parts = [
            f"block size {size}: {result.reason} [{result.blocks} blocks, {result.sequences} rows]"
            for size, result in self.results.items()
        ]
        return f"re-fit at step {self.schedule.snapshot_step}: " + "; ".join(parts)


def run_refit(
    snapshot: Path,
    folder: Path,
    *,
    measure: Measure,
    config: RunConfig | None = None,
    block_sizes: tuple[int, ...] = (),
    device: str = "cpu",
    data_path: str | None = None,
) -> Refit:
    """Re-fit from a snapshot.

    Args:
        snapshot: its folder; a model folder or a training checkpoint serves as well.
        folder: where the results go; made if it is not there.
        measure: does the measurement.
        config: with the settings of the re-fit; the snapshot's own if None.
        block_sizes: schedules to make; the run's own if empty.
        device: where blocks are measured.
        data_path: corpus in place of the run's.

    Raises:
        RefitError: if another re-fit is at work in that folder, or the run has begun anew since, or too
            little could be measured.
        CheckpointError: if the snapshot is damaged.
        DataError: if the held-out text cannot be read.
    """
    started = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    with only_one(folder) as lock:
        saved = open_model(snapshot)
        digest = snapshot_digest(snapshot)
        config = config or saved.config
        current = plan_in_use(saved)
        section = data_section(saved.config, data_path)
        rows = open_rows(saved, section).num_samples
        request = make_request(
            config,
            snapshot=str(snapshot.resolve()),
            rows=rows,
            block_sizes=block_sizes or (current.block_size,),
            device=device,
            # Whole: workers of a cluster have working folders of their own.
            data_path=None if section.path is None else str(Path(section.path).resolve()),
        )
        opened = time.monotonic()
        records, said = measure(request)
        measured = time.monotonic()
        results = judge(records, current, config)
        _check_same(snapshot, digest)
        check_held(folder, lock)
        seconds = {
            "open": opened - started,
            "measure": measured - opened,
            "search": time.monotonic() - measured,
        }
        schedule = make_schedule(
            results,
            current,
            run_uid=str(saved.facts.get("run_uid", "")),
            step=int(saved.facts["step"]),
            digest=digest,
            version=int(saved.facts.get("refit", {}).get("version", 0)) + 1,
        )
        report = publish(folder, schedule, results, request=request, seconds=seconds, measurement=said)
        if config.refit.gradient_variance:

            def gradients() -> dict[str, Any]:
                found = _report_gradients(request, results)
                check_held(folder, lock)
                return found

            add_gradients(folder, report, gradients)
    return Refit(schedule, results, folder, seconds)


def _check_same(snapshot: Path, digest: str) -> None:
    """Refuse to publish over another attempt's results: the run may have come to this step again meanwhile.

    Raises:
        RefitError: if there is another snapshot in this one's place.
    """
    with contextlib.suppress(OSError):
        if snapshot_digest(snapshot) != digest:
            raise RefitError(f"{snapshot} is another one than was measured; nothing was written")


def check_held(folder: Path, lock: IO[str]) -> None:
    """Refuse to write into a folder that has taken the place of the one which was locked.

    A re-fit may outlive a trainer that was killed, and the run may have begun anew since: its re-fits were
    given another name (``snapshot.set_aside``), and the lock went with them.

    Args:
        folder: where the results go.
        lock: from ``only_one``.

    Raises:
        RefitError: if the lock of that folder is another one, or there is none.
    """
    there = None
    with contextlib.suppress(FileNotFoundError):
        there = os.stat(folder / LOCK_FILE)
    if there is None or not os.path.samestat(there, os.fstat(lock.fileno())):
        raise RefitError(
            f"{folder} is another one than this re-fit began in: the run has begun anew since, and "
            "nothing was written"
        )


def _report_gradients(request: RefitRequest, results: Mapping[int, SearchResult]) -> dict[str, Any]:
    """The report on gradients, made in this process."""
    from bdtrain.refit.worker import RefitWorker

    return RefitWorker(request).report_gradients(results)


def open_rows(saved: SavedModel, section: DataConfig) -> Source:
    """Held-out rows of the model's tokenizer.

    Raises:
        TokenizerError: if the corpus was made with another one.
    """
    held_out = open_split(section, split="valid", seed=saved.config.run.seed)
    tokenizer = str(saved.facts["tokenizer"]["sha256"])
    check_tokenizer(held_out, Trained(str(saved.folder), tokenizer, saved.tokenizer))
    return held_out.source


def plan_in_use(saved: SavedModel) -> NoisePlan:
    """The noise plan that a snapshot was trained with.

    Raises:
        RefitError: if it was trained without noise.
    """
    record = saved.facts.get("noise_plan")
    if not isinstance(record, Mapping):
        raise RefitError(
            f"{saved.folder} was trained with algo={saved.config.diffusion.algo}, which draws no noise; "
            "there is nothing to fit"
        )
    return NoisePlan.from_dict(record)


def search_settings(config: RunConfig) -> SearchSettings:
    """Rules of the search, from a run's configuration; ``clip`` where it makes no re-fits itself."""
    refit = config.refit
    return SearchSettings(
        mode="clip" if refit.mode == "off" else refit.mode,
        widths=refit.widths,
        start_step=refit.start_step,
        criterion=refit.criterion,
        min_gain=refit.min_gain,
        adopt=refit.adopt,
        bootstrap_draws=refit.bootstrap_draws,
        uniform_share=refit.uniform_share,
        seed=config.run.seed,
    )


def judge(
    records: Mapping[int, BlockRecords], current: NoisePlan, config: RunConfig
) -> dict[int, SearchResult]:
    """Search for each block size.

    Args:
        records: by block size.
        current: the plan in use; for other block sizes the same plan with theirs.
        config: rules of the search.
    """
    settings = search_settings(config)
    return {size: search(found, current.with_block_size(size), settings) for size, found in records.items()}


def make_schedule(
    results: Mapping[int, SearchResult],
    current: NoisePlan,
    *,
    run_uid: str,
    step: int,
    digest: str,
    version: int,
) -> Schedule:
    """The schedule of some searches; the arguments are ``Schedule``'s."""
    return Schedule(
        run_uid=run_uid,
        snapshot_step=step,
        snapshot_sha256=digest,
        based_on=plan_digest(current),
        version=version,
        decisions={
            size: Decision(result.plan, result.adopt, result.reason) for size, result in results.items()
        },
    )


def publish(
    folder: Path,
    schedule: Schedule,
    results: Mapping[int, SearchResult],
    *,
    request: RefitRequest,
    seconds: Mapping[str, float],
    measurement: Mapping[str, Any],
) -> dict[str, Any]:
    """Write the report, then the schedule: who sees the schedule finds the report beside it.

    Args:
        folder: where to.
        schedule: what was decided.
        results: the searches, by block size.
        request: the measurement that was asked for.
        seconds: wall time by part.
        measurement: what is to be said of it.

    Returns:
        The report.

    Raises:
        OSError: if the disk refuses.
    """
    report: dict[str, Any] = {
        "format": REPORT_FORMAT,
        "run_uid": schedule.run_uid,
        "snapshot_step": schedule.snapshot_step,
        "version": schedule.version,
        "request": request.to_dict(),
        "seconds": dict(seconds),
        "measurement": dict(measurement),
        "results": {str(size): result.to_dict() for size, result in results.items()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    _write_report(folder, report)
    write_schedule(folder, schedule)
    return report


def add_gradients(folder: Path, report: dict[str, Any], make: Callable[[], Mapping[str, Any]]) -> None:
    """Add what is known of gradients to a report, once the schedule is there. Nothing is raised.

    Args:
        folder: with the report and the schedule.
        report: as it was written; changed.
        make: makes ``bdtrain.refit.gradients.report_gradients``.
    """
    started = time.monotonic()
    try:
        report["gradients"] = dict(make())
        report["seconds"]["gradients"] = time.monotonic() - started
        _write_report(folder, report)
    except Exception as error:
        # It decides nothing: whatever went wrong, memory above all, must cost neither plan nor run.
        print(f"no report on gradients: {type(error).__name__}: {error}", flush=True)


def _write_report(folder: Path, report: Mapping[str, Any]) -> None:
    text = json.dumps(report, indent=1, sort_keys=True, allow_nan=False) + "\n"
    write_atomic(folder / REPORT_FILE, text.encode())


def measure_here(request: RefitRequest) -> tuple[dict[int, BlockRecords], dict[str, Any]]:
    """Measure all shards in this process."""
    from bdtrain.refit.worker import RefitWorker

    worker = RefitWorker(request)
    loaded = time.process_time()
    shards = {shard: worker.measure(shard) for shard in range(request.shards)}
    said = {"backend": "process", "cpu_seconds": time.process_time() - loaded}
    return join_shards(request, shards), said


def join_shards(
    request: RefitRequest, shards: Mapping[int, Mapping[int, BlockRecords]]
) -> dict[int, BlockRecords]:
    """Records by block size, in the order of the shards, whatever order they came in.

    Args:
        request: the measurement.
        shards: records by shard and block size; some shards may be missing.

    Raises:
        RefitError: if a block size has none.
    """
    joined = {}
    for size in request.block_sizes:
        parts = [shards[shard][size] for shard in sorted(shards) if size in shards[shard]]
        if not parts:
            raise RefitError(f"nothing was measured for block size {size}: all of its shards failed")
        joined[size] = BlockRecords.concatenate(parts)
    return joined


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[IO[str]]:
    """Keep a second re-fit out of a folder; the lock goes with the process that holds it.

    Yields:
        The lock.

    Raises:
        RefitError: if one is at work there.
    """
    with (folder / LOCK_FILE).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RefitError(
                f"another re-fit is at work in {folder}; wait for it, or end it, and see its log.txt"
            ) from error
        yield file


def is_at_work(folder: Path) -> bool:
    """Whether a re-fit of this machine, or of another one that shares locks, is at work in a folder."""
    try:
        with only_one(folder):
            return False
    except RefitError:
        return True
    except OSError:
        return False
