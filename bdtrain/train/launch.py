"""From a validated configuration to a finished, or a resumable, run."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch

from bdtrain import __version__
from bdtrain.checkpoint.communicator import Communicator, TorchCommunicator
from bdtrain.checkpoint.folders import choose_checkpoint, clean_leftovers, list_checkpoints
from bdtrain.checkpoint.load import TrainingState
from bdtrain.config import RunConfig
from bdtrain.config.layout import Layout
from bdtrain.config.resume import changed_settings
from bdtrain.errors import BdtrainError, CheckpointError, ConfigError, NonFiniteError
from bdtrain.parallel.groups import destroy_groups, host_group, init_groups
from bdtrain.parallel.launch_environment import Launch
from bdtrain.refit.backends import settle_placement
from bdtrain.refit.reserved_gpu import check_reserved
from bdtrain.refit.snapshot import forget_later, set_aside, snapshots_folder
from bdtrain.tracking.console import Console, format_count, format_seconds
from bdtrain.tracking.goodput import Goodput
from bdtrain.tracking.jsonl import MetricsLog, attempt_spans
from bdtrain.tracking.names import run_name
from bdtrain.tracking.run_files import EXIT_FILE, METRICS_FILE, SUMMARY_FILE
from bdtrain.tracking.shipper import Shippers, make_shippers
from bdtrain.train.faults import Faults
from bdtrain.train.folder import (
    RunFolder,
    begin_attempt,
    changed_since_last,
    claim_run_folder,
    leave_unstarted,
    on_first_rank,
    write_exit,
    write_json,
)
from bdtrain.train.loop import RunSummary, Stopped, Trainer
from bdtrain.train.profiling import StepProfiler, check_ranks
from bdtrain.train.progress import Progress
from bdtrain.train.refit_state import load_history
from bdtrain.train.run_lock import RunLock
from bdtrain.train.setup import Parts, build_parts, prepare_machine
from bdtrain.train.signals import StopRequest
from bdtrain_kernels import choices_heard

SHORT_DRAIN_S = 2.0
"""Time to ship the last metrics when the launcher is waiting with a kill."""


def train_from_config(
    config: RunConfig,
    launch: Launch,
    layout: Layout,
    environment: Mapping[str, str],
    *,
    console: Console,
    stop: StopRequest,
) -> RunSummary | Stopped:
    """Train, or continue, the run that a configuration describes.

    Args:
        config: a validated configuration whose paths were checked.
        launch: which rank this process is.
        layout: of the configuration on the ranks of the launch.
        environment: of this process; may ask for faults.
        console: where progress goes.
        stop: listens already, since it must not miss what happens while libraries are imported.

    Returns:
        The summary of a finished run, which is also in ``summary.json``; or where it was asked to stop.

    Raises:
        BdtrainError: whatever stops the run, before any work is lost where that is possible.
    """
    check_ranks(config, layout.world_size)
    settle_placement(config, on_gpus=torch.cuda.is_available())
    faults = Faults.from_environment(environment, launch.rank)
    folder = Path(config.run.folder)
    lock = RunLock(folder, tell=console.line)
    goodput = Goodput()
    with ExitStack() as stack:
        device = prepare_machine(config, launch)
        groups = init_groups(launch, tp=layout.tp, pp=layout.pp)
        stack.push(_destroy)
        communicator = TorchCommunicator(host_group())
        count = torch.cuda.device_count()
        on_first_rank(communicator, lambda: check_reserved(config, launch, environment, count=count))
        if launch.rank == 0:
            stack.callback(leave_unstarted, folder)
            stack.callback(lock.release)
        claimed = claim_run_folder(config, communicator, lock)
        if claimed.note is not None:
            console.line(claimed.note)
        config, parts = build_parts(
            config,
            layout,
            groups,
            communicator,
            known=claimed.known,
            begun=communicator.broadcast_object(bool(list_checkpoints(claimed.checkpoints))),
            device=device,
            console=console,
            stack=stack,
        )
        trainer = start_attempt(
            config, layout, parts, claimed, goodput=goodput, stop=stop, faults=faults, stack=stack
        )
        return run_attempt(trainer, first=launch.rank == 0)


def _destroy(kind: type[BaseException] | None, *_: object) -> None:
    destroy_groups(failed=kind is not None)


def start_attempt(
    config: RunConfig,
    layout: Layout,
    parts: Parts,
    folder: RunFolder,
    *,
    goodput: Goodput,
    stop: StopRequest,
    faults: Faults,
    stack: ExitStack,
) -> Trainer:
    """Load the newest whole checkpoint, if there is one, and open the run's books.

    Raises:
        CheckpointError: if the checkpoint does not fit the model; nothing was written then.
    """
    communicator, console = parts.communicator, parts.console
    found = choose_checkpoint(folder.checkpoints, communicator, folder.run_uid)
    for path, reason in found.rejected:
        console.line(f"checkpoint {path.name} passed over: {reason}")
    progress = Progress()
    facts: dict[str, Any] = {}
    clock: dict[str, Any] | None = None
    saved = None
    if found.newest is not None:
        saved = open_together(found.newest, communicator)
        progress, facts = restore(saved, config, parts, communicator)
        clock = saved.state["goodput"]
        console.line(
            f"attempt {folder.attempt} continues at step {progress.step} from {found.newest.name}"
            f"{_changes(facts)}"
        )
    elif found.rejected and config.train.init_from is not None:
        raise CheckpointError(
            f"no checkpoint of this run is whole, and train.init_from={config.train.init_from} was not read "
            f"because there are some; move {folder.checkpoints} aside to begin anew from there"
        )
    elif folder.known is not None:
        facts["changed"] = changed_since_last(folder, config, communicator)
        console.line(
            f"attempt {folder.attempt} begins anew: the run has no whole checkpoint{_changes(facts)}"
        )
    # The same run would come to the same weights; a changed one would take them for its own.
    changed = config.refit.replay == "live" or bool(facts.get("changed"))
    if not changed or progress.step:
        # Read again below; here, because a history that is damaged must leave the books alone.
        load_history(config, communicator)
    metrics = open_books(
        config,
        parts,
        folder,
        goodput=goodput,
        clock=clock,
        new_from=progress.step if changed else None,
        stack=stack,
    )
    shipper = None
    if metrics is not None:
        if metrics.cut_bytes:
            console.line(f"{METRICS_FILE}: {metrics.cut_bytes} bytes of a line that a crash tore were cut")
        metrics.event("start", progress.step, **environment_facts(), world_size=layout.world_size, **facts)
        for path, reason in found.rejected:
            metrics.event("rejected_checkpoint", progress.step, folder=path.name, reason=reason)
        shipper = start_shippers(config, folder)
        for address in shipper.addresses:
            console.line(f"{address}, run {run_name(config)}")
    stack.enter_context(hear_kernels(console, metrics, progress, device=parts.device))
    profiler = StepProfiler(
        config,
        device=parts.device,
        folder=folder.path,
        attempt=folder.attempt,
        communicator=communicator,
        console=console,
        metrics=metrics,
        transformer=parts.engine.module.config,
        first_step=progress.step + 1,
    )
    stack.callback(profiler.close)
    trainer = Trainer(
        config,
        layout,
        parts,
        folder,
        progress,
        metrics=metrics,
        shipper=shipper,
        goodput=goodput,
        stop=stop,
        faults=faults,
        profiler=profiler,
    )
    stack.callback(trainer.refit.close)
    trainer.refit.read_history()
    if saved is not None:
        trainer.refit.restore(saved.state)
    return trainer


def _changes(facts: Mapping[str, Any]) -> str:
    """Settings that changed, a line each."""
    return "".join(f"\n  {key}: {before} -> {now}" for key, before, now in facts.get("changed", []))


def hear_kernels(
    console: Console, metrics: MetricsLog | None, progress: Progress, *, device: torch.device
) -> AbstractContextManager[None]:
    """Write down which form of each kernel runs, when it is chosen.

    Said on the console, too: of all kernels on a GPU, of attention alone on a CPU, where the others have one.
    """

    def tell(kernel: str, backend: str, reason: str) -> None:
        if device.type == "cuda" or kernel == "block_attention":
            console.line(f"kernel {kernel}: {backend} ({reason})")
        if metrics is not None:
            metrics.event("kernel", progress.step, kernel=kernel, backend=backend, reason=reason)

    return choices_heard(tell)


def open_books(
    config: RunConfig,
    parts: Parts,
    folder: RunFolder,
    *,
    goodput: Goodput,
    clock: dict[str, Any] | None,
    new_from: int | None,
    stack: ExitStack,
) -> MetricsLog | None:
    """Write down that the attempt begins, and open the metrics file.

    Args:
        config: the run.
        parts: whose data identify it.
        folder: of the run.
        goodput: takes the time of earlier attempts.
        clock: what the checkpoint says of that time; None without one.
        new_from: step from which the run is another one than before, so that later snapshots are not its own,
            and at 0 no re-fit is; None where it repeats itself.
        stack: closes the file.

    Returns:
        The open file on rank 0; None on the others.

    Raises:
        ConfigError: the same on all ranks, if the folder cannot be written or its metrics not be continued.
    """
    identity = {
        "tokenizer": parts.loader.tokenizer_info.to_dict(),
        "data_fingerprint": dict(parts.loader.fingerprint),
    }
    opened: list[MetricsLog] = []

    def begin() -> None:
        # The clock of rank 0 is the run's; the other ranks' say how long they are at it themselves.
        goodput.add_earlier(clock, spans=attempt_spans(folder.path / METRICS_FILE))
        # Before the configuration is replaced: an attempt that dies in between must see the change again.
        aside = set_aside(folder.path, folder.attempt) if new_from == 0 else None
        if aside is not None:
            parts.console.line(
                f"re-fits of earlier attempts are not this run's; they are in {aside.name} now"
            )
        begin_attempt(folder, config, identity)
        clean_leftovers(folder.checkpoints)
        clean_leftovers(snapshots_folder(folder.path))
        if new_from is not None:
            forget_later(folder.path, new_from)
        try:
            opened.append(stack.enter_context(MetricsLog(folder.path / METRICS_FILE, folder.attempt)))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{folder.path / METRICS_FILE} cannot be continued ({error}); mend the file, or choose "
                "another run.folder"
            ) from error

    on_first_rank(parts.communicator, begin)
    return opened[0] if opened else None


def open_together(folder: Path, communicator: Communicator) -> TrainingState:
    """Open a checkpoint on every rank, or raise the same error on all.

    Raises:
        CheckpointError: naming what any rank found.
    """
    saved, failure = None, None
    try:
        saved = TrainingState.open(folder)
    except CheckpointError as error:
        failure = str(error)
    failures = [text for text in communicator.gather_objects(failure) if text is not None]
    if failures or saved is None:
        raise CheckpointError("; ".join(dict.fromkeys(failures)))
    return saved


def start_shippers(config: RunConfig, folder: RunFolder) -> Shippers:
    """Begin to carry the run's metrics to each of ``tracking``'s writers, in processes of their own."""
    shippers = make_shippers(config, folder.path, run_uid=folder.run_uid, attempt=folder.attempt)
    shippers.start()
    return shippers


def restore(
    saved: TrainingState, config: RunConfig, parts: Parts, communicator: Communicator
) -> tuple[Progress, dict[str, Any]]:
    """Put a checkpoint into the engine.

    Returns:
        The counters, and what is to be said of it in the books.
    """
    for name, now in parts.algorithms().items():
        before = saved.state["algorithms"].get(name)
        if before != now:
            raise CheckpointError(
                f"{saved.folder} was made with {name} {before!r}, this version has {now!r}; continue with "
                "the version that made it, or start a new run"
            )
    progress = Progress.from_dict(saved.state["progress"])
    if progress.step > config.train.steps:
        raise ConfigError(
            f"{saved.folder} is past train.steps={config.train.steps}; choose at least {progress.step}, or "
            "start a new run"
        )
    report = saved.load_into(parts.engine.fragments(), communicator)
    parts.engine.adopt_state(adam_step=int(saved.state["adam_step"]))
    facts: dict[str, Any] = {
        "checkpoint": saved.folder.name,
        "layout_before": saved.state["layout"],
        "changed": [list(change) for change in changed_settings(saved.config, config)],
    }
    if report.average_started:
        parts.console.line("the checkpoint has no averaged weights: the average begins at its weights")
    if report.average_ignored:
        parts.console.line("the averaged weights of the checkpoint are left out: optim.ema_decay is null")
    return progress, facts


def run_attempt(trainer: Trainer, *, first: bool) -> RunSummary | Stopped:
    """Run, and write down how it ended.

    Args:
        trainer: ready to go.
        first: whether this is rank 0.
    """
    folder, console, metrics = trainer.folder.path, trainer.console, trainer.metrics
    step = trainer.progress.step

    def leave(
        reason: str, event: str, *, resumable: bool, exit_code: int, drain_s: float, **facts: Any
    ) -> Path | None:
        """The last words of the attempt, what matters most first; the report, if there is one."""
        if metrics is not None:
            metrics.event(event, trainer.progress.step, reason=reason, **facts)
        if first:
            try:
                write_exit(folder, reason, trainer.progress.step, resumable=resumable, exit_code=exit_code)
            except OSError as error:
                # A disk that is full to the last byte must not hide why the run ends.
                console.line(f"{EXIT_FILE} could not be written: {error.strerror or error}")
        news = None if trainer.shipper is None else trainer.shipper.close(drain_s)
        if news is not None:
            console.line(news)
        return write_report_or_say_why(folder, console) if first else None

    try:
        result = trainer.run()
    except NonFiniteError as error:
        leave("nonfinite", "failed", resumable=True, exit_code=error.exit_code, drain_s=SHORT_DRAIN_S)
        raise
    except Exception as error:
        code = error.exit_code if isinstance(error, BdtrainError) else 1
        leave("error", "failed", resumable=True, exit_code=code, drain_s=SHORT_DRAIN_S, error=str(error))
        raise
    if isinstance(result, Stopped):
        leave(result.reason, "stop", resumable=True, exit_code=0, drain_s=SHORT_DRAIN_S)
        console.line(
            f"stopped by {result.reason} at step {result.step}, saved in {result.checkpoint}; the same "
            "command continues the run"
        )
        return result
    if first:
        try:
            write_summary(folder / SUMMARY_FILE, result)
        except OSError as error:
            console.line(f"{SUMMARY_FILE} could not be written: {error.strerror or error}")
    drain_s = trainer.config.tracking.drain_timeout_s
    report = leave("finished", "end", resumable=False, exit_code=0, drain_s=drain_s)
    say_done(result, console, steps=result.steps - step)
    if report is not None:
        console.line(f"report: {report}")
    return result


def write_report_or_say_why(folder: Path, console: Console) -> Path | None:
    """The run's report. Without one the run ends as it would have: nothing fails, no other error is hidden.

    Args:
        folder: of the run.
        console: told in one line why there is none.
    """
    try:
        # Here: a package that was exchanged under a long run must not end it badly.
        from bdtrain.tracking.report import write_report

        return write_report(folder)
    except Exception as found:
        # Whatever a file of the run holds that nobody expected: the run itself is over and well.
        reason = " ".join(str(found).split()) or type(found).__name__
        console.line(f"no report could be written: {reason}")
        return None


def say_done(result: RunSummary, console: Console, *, steps: int) -> None:
    """The last lines of a finished run.

    Args:
        result: of the run.
        console: where to.
        steps: of this attempt.
    """
    console.line(f"time: {where_time_went(result.goodput)}")
    console.line(
        f"done: {format_count(result.tokens)} tokens in {format_seconds(result.train_seconds)} of training "
        f"({format_count(result.tokens_per_second)} tokens/s), {format_seconds(result.wall_seconds)} in all"
        f"{' but for the time down' if result.attempts > 1 else ''}, goodput {result.goodput['goodput']:.1%}"
        + (f", {steps} steps in this attempt" if result.attempts > 1 else "")
        + (f"; weights in {result.checkpoint}" if result.checkpoint else "")
    )


def where_time_went(goodput: Mapping[str, float]) -> str:
    """Seconds by activity in words, largest first; what took less than a second is left out."""
    names = {
        "training_seconds": "training",
        "setup_seconds": "set-up",
        "validation_seconds": "validation",
        "data_wait_seconds": "waiting for data",
        "checkpoint_seconds": "checkpoints",
        "refit_seconds": "re-fits",
        "lost_seconds": "lost to faults and skipped steps",
        "down_seconds": "down between attempts",
    }
    spent = sorted(((goodput[key], name) for key, name in names.items()), reverse=True)
    return ", ".join(f"{name} {format_seconds(seconds)}" for seconds, name in spent if seconds >= 1)


def environment_facts() -> dict[str, Any]:
    """What a reader of the books wants to know of the machine."""
    return {
        "bdtrain": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "host": platform.node(),
        "pid": os.getpid(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
    }


def write_summary(path: Path, summary: RunSummary) -> None:
    """The summary as JSON."""
    values = {
        "steps": summary.steps,
        "tokens": summary.tokens,
        "before": summary.before.to_dict() if summary.before else None,
        "after": summary.after.to_dict(),
        "sets": {name: likelihood.to_dict() for name, likelihood in summary.sets.items()},
        "tokens_per_second": summary.tokens_per_second,
        "train_seconds": summary.train_seconds,
        "wall_seconds": summary.wall_seconds,
        "checkpoint": str(summary.checkpoint) if summary.checkpoint else None,
        "skipped_steps": summary.skipped_steps,
        "attempts": summary.attempts,
        "goodput": summary.goodput,
    }
    write_json(path, values)
