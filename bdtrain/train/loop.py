"""The loop around the training step: data, learning rate, validation, metrics, checkpoints, early stops."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bdtrain.checkpoint.export import export_weights
from bdtrain.checkpoint.folders import prune
from bdtrain.checkpoint.save import SavedCheckpoint, save_training_state
from bdtrain.config import RunConfig, dump_resolved
from bdtrain.config.layout import Layout
from bdtrain.config.schema.validation import MAIN_SET
from bdtrain.data.loader import Batch
from bdtrain.errors import CheckpointError, NonFiniteError
from bdtrain.files import append_line
from bdtrain.tracking.console import format_seconds
from bdtrain.tracking.goodput import Goodput
from bdtrain.tracking.jsonl import MetricsLog
from bdtrain.tracking.run_artifacts import manifest_digest
from bdtrain.tracking.run_files import EVALUATIONS_FILE, SAMPLES_FILE, WEIGHTS
from bdtrain.tracking.shipper import Shippers
from bdtrain.train.faults import Faults, FaultyDisk
from bdtrain.train.folder import RunFolder, on_first_rank
from bdtrain.train.optim import learning_rate
from bdtrain.train.profiling import StepProfiler, part
from bdtrain.train.progress import Progress, Window
from bdtrain.train.refit_hooks import make_refit
from bdtrain.train.setup import Parts
from bdtrain.train.signals import StopRequest
from bdtrain.train.step import StepResult, train_step
from bdtrain.validation.generation import SampledText, tokenizer_path
from bdtrain.validation.likelihood import Likelihood
from bdtrain.validation.record import evaluation_line, set_metrics

MAX_FAILED_CHECKPOINTS = 3
"""Saves in a row that may fail before the run gives up: more work at risk is no service."""


@dataclass(frozen=True)
class RunSummary:
    """What a finished run reports.

    Attributes:
        steps: batches taken.
        tokens: counted tokens trained on.
        before: likelihood before the first step, None without ``validation.at_start`` or in a resumed run.
        after: likelihood after the last one; of the averaged weights where an average is kept.
        sets: the same after the last step for each of ``validation.sets``, by name.
        tokens_per_second: counted tokens per second of training, evaluation left out.
        train_seconds: wall time of training, evaluation left out.
        wall_seconds: wall time from the first line to the last, all attempts together.
        checkpoint: folder of the final weights, None without ``checkpoint.save_final``.
        goodput: where the time went, ``Goodput.summary``.
        skipped_steps: steps that were not finite.
        attempts: starts of the run.
    """

    steps: int
    tokens: int
    before: Likelihood | None
    after: Likelihood
    sets: dict[str, Likelihood]
    tokens_per_second: float
    train_seconds: float
    wall_seconds: float
    checkpoint: Path | None
    goodput: dict[str, float]
    skipped_steps: int
    attempts: int


@dataclass(frozen=True)
class Stopped:
    """A run that was asked to stop and can be continued.

    Attributes:
        reason: what asked.
        step: batches taken.
        checkpoint: training state.
    """

    reason: str
    step: int
    checkpoint: Path


class Trainer:
    """State of the loop.

    Args:
        config: the run, its vocabulary known.
        layout: how it is cut over the ranks.
        parts: what it works with.
        folder: the claimed run folder.
        progress: where the run stands.
        metrics: the metrics file; None on all ranks but the first.
        shipper: carries metrics to MLflow; None where that is off, and on all ranks but the first.
        goodput: the clock.
        stop: asks for an early end.
        faults: of this rank.
        profiler: traces the steps that were asked for.
    """

    def __init__(
        self,
        config: RunConfig,
        layout: Layout,
        parts: Parts,
        folder: RunFolder,
        progress: Progress,
        *,
        metrics: MetricsLog | None,
        shipper: Shippers | None,
        goodput: Goodput,
        stop: StopRequest,
        faults: Faults,
        profiler: StepProfiler,
    ) -> None:
        self.config, self.layout, self.parts, self.folder = config, layout, parts, folder
        self.progress, self.metrics, self.shipper = progress, metrics, shipper
        self.goodput, self.stop, self.faults, self.profiler = goodput, stop, faults, profiler
        self.console = parts.console
        self.engine, self.loader = parts.engine, parts.loader
        self.saved: SavedCheckpoint | None = None
        self.saved_seconds = 0.0
        self.refit = make_refit(self)

    def run(self) -> RunSummary | Stopped:
        """The steps that are left, with validation before, in between and after.

        Raises:
            NonFiniteError: after ``train.max_nonfinite_steps`` skipped steps in a row.
            CheckpointError: if the last save fails, or several in a row.
            DataError: if the data are damaged.
        """
        config, progress = self.config, self.progress
        steps, every, save_every = (
            config.train.steps,
            config.validation.every_steps,
            config.checkpoint.every_steps,
        )
        before = None
        if config.validation.at_start and progress.step == 0:
            before = self.validate()[MAIN_SET]
        while progress.step < steps:
            # At the top, so that a run which was ended between save and validation makes up for it.
            if every and progress.step % every == 0 and progress.validated < progress.step:
                self.validate()
            with self.goodput.during("refit"):
                settled = self.refit.at(progress)
            if not settled:
                return self.leave()
            with self.profiler.step(progress.step + 1):
                result, lr = self.one_step()
            done = progress.step
            if done % config.train.log_every_steps == 0 or done == steps:
                self.report(lr)
            if done == steps:
                break
            if result.stop:
                return self.leave()
            self.profiler.finish_if_over()
            # Before validation, which may take longer than a launcher waits with its kill.
            if save_every and done % save_every == 0:
                self.save_or_go_on()
        # Saved first: nothing that goes wrong afterwards may cost the weights.
        weights = self.save_final() if config.checkpoint.save_final else None
        after = self.validate()
        summary = self.goodput.summary()
        return RunSummary(
            steps=progress.step,
            tokens=progress.tokens,
            before=before,
            after=after[MAIN_SET],
            sets={name: likelihood for name, likelihood in after.items() if name != MAIN_SET},
            tokens_per_second=progress.tokens / max(progress.train_seconds, 1e-9),
            train_seconds=progress.train_seconds,
            wall_seconds=summary["wall_seconds"],
            checkpoint=weights,
            goodput=summary,
            skipped_steps=progress.skipped,
            attempts=self.folder.attempt,
        )

    def one_step(self) -> tuple[StepResult, float]:
        """Take the batch at the cursor, train on it, move the cursor.

        Returns:
            What happened, the same on every rank, and the learning rate.
        """
        config, progress = self.config, self.progress
        number = progress.step + 1
        lr = self.learning_rate()
        clock = time.monotonic()
        with self.goodput.during("data_wait"), part("data wait"):
            self.faults.at("data", number)
            batch: Batch = self.loader.batch(progress.samples)
        waited = time.monotonic() - clock
        with self.goodput.during("training"), part("train step"):
            result = train_step(
                self.engine,
                self.refit.objective,
                batch,
                seed=config.run.seed,
                step=progress.step,
                lr=lr,
                global_batch_size=config.train.global_batch_size,
                micro_batch_size=self.layout.micro_batch_size,
                noise_copies=config.diffusion.noise_copies,
                device=self.parts.device,
                stop=self.stop.pending is not None,
                spoil=self.faults.at("forward", number),
            )
            self.faults.at("step", number)
        seconds = time.monotonic() - clock
        progress.take(result, config.train.global_batch_size)
        progress.train_seconds += seconds
        progress.window.add(result, seconds=seconds, data_seconds=waited, flops=self.parts.step_flops(result))
        if not result.applied:
            self.skipped(result, seconds - waited)
        return result, lr

    def skipped(self, result: StepResult, seconds: float) -> None:
        """Say that a step changed nothing; give up after too many in a row."""
        config, progress = self.config, self.progress
        self.goodput.lose(seconds)
        self.console.line(f"step {progress.step}: loss or gradient is not finite, the update was skipped")
        first = progress.samples - config.train.global_batch_size
        if self.metrics is not None:
            self.metrics.event("skipped", progress.step, loss=result.loss, rows=[first, progress.samples - 1])
        if progress.skipped_in_a_row >= config.train.max_nonfinite_steps:
            raise NonFiniteError(
                f"{progress.skipped_in_a_row} steps in a row were not finite, the last one step "
                f"{progress.step} (loss {result.loss}); lower optim.lr (now {config.optim.lr:g}), lengthen "
                f"optim.warmup_steps (now {config.optim.warmup_steps}), or look at rows {first} to "
                f"{progress.samples - 1} of the data"
            )

    def learning_rate(self) -> float:
        """Learning rate of the next update; skipped steps do not advance it."""
        optim = self.config.optim
        return learning_rate(
            self.progress.applied,
            peak=optim.lr,
            schedule=optim.schedule,
            warmup_steps=optim.warmup_steps,
            decay_steps=optim.decay_steps or 0,
            total_steps=self.config.train.steps,
            min_ratio=optim.min_lr_ratio,
        )

    def report(self, lr: float) -> None:
        """The progress line and the metrics of the steps since the last one."""
        progress, window = self.progress, self.progress.window
        progress.window = Window()
        seconds_per_step = window.seconds / window.steps
        tokens_per_second = window.tokens / max(window.seconds, 1e-9)
        tflops = window.flops / max(window.seconds, 1e-9) / self.layout.world_size / 1e12
        mfu = tflops / self.parts.peak_tflops if self.parts.peak_tflops else None
        steps = self.config.train.steps
        self.console.progress(
            step=progress.step,
            steps=steps,
            loss=window.loss,
            lr=lr,
            tokens_per_second=tokens_per_second,
            seconds_left=(steps - progress.step) * seconds_per_step,
            mfu=mfu,
        )
        values = {
            "train/loss": window.loss,
            "train/masked_share": window.masked_share,
            "train/grad_norm": window.grad_norm,
            "train/lr": lr,
            "train/counted_tokens": window.tokens / window.steps,
            "train/samples": progress.samples,
            "train/tokens": progress.tokens,
            "train/epoch": progress.samples / self.loader.epoch_samples,
            "perf/tokens_per_second": tokens_per_second,
            "perf/step_seconds": seconds_per_step,
            "perf/data_wait_seconds": window.data_seconds / window.steps,
            "perf/model_tflops_per_second": tflops,
            "perf/cpu_seconds": time.process_time(),
            "perf/checkpoint_seconds": self.saved_seconds,
            "fault/skipped_steps": progress.skipped,
            "fault/checkpoints_failed": progress.checkpoints_failed,
            "fault/restarts": self.folder.attempt - 1,
        }
        if self.config.profile.steps is not None:
            values["fault/profiles_failed"] = self.profiler.failed
        self.saved_seconds = 0.0
        self.write(values if mfu is None else {**values, "perf/mfu": mfu})

    def write(self, values: dict[str, float]) -> None:
        """Metrics of this step, to the file and on their way to MLflow."""
        if self.metrics is not None:
            trouble = self.metrics.problem
            self.metrics.write(self.progress.step, values)
            if self.metrics.problem is not None and trouble is None:
                self.console.line(f"metrics file: {self.metrics.problem}")
        news = None if self.shipper is None else self.shipper.poll()
        if news is not None:
            self.console.line(news)

    def validate(self) -> dict[str, Likelihood]:
        """Likelihood of every set and a sample, with the averaged weights where there are any.

        Every rank takes part.

        Returns:
            By name of the set; the run's own held-out rows are ``MAIN_SET``.
        """
        step = self.progress.step
        self.profiler.finish()
        self.progress.validated = step
        self.faults.at("validate", step)
        found: dict[str, Likelihood] = {}
        with self.goodput.during("validation"), self.engine.averaged_weights() as averaged:
            for evaluator in self.parts.evaluators:
                name, likelihood = evaluator.held_out.name, evaluator.likelihood(self.engine.module)
                found[name] = likelihood
                weights = "averaged weights, " if averaged else ""
                took = format_seconds(likelihood.seconds)
                self.console.line(f"{name} at step {step} ({weights}{took}): {likelihood.describe()}")
            sample = self.parts.sampler.sample(self.engine.module, step)
        self.write({metric: value for one in found.items() for metric, value in set_metrics(*one).items()})
        self.keep(found, sample, averaged=averaged)
        return found

    def keep(self, found: dict[str, Likelihood], sample: SampledText | None, *, averaged: bool) -> None:
        """Each likelihood with its manifest, and the sample; a disk that refuses is told and nothing more."""
        if self.metrics is None:
            return
        step, attempt = self.progress.step, self.folder.attempt
        try:
            lines = [
                evaluation_line(one, found[one.held_out.name], step=step, attempt=attempt, averaged=averaged)
                for one in self.parts.evaluators
            ]
            append_line(self.folder.path / EVALUATIONS_FILE, "\n".join(lines))
        except OSError as error:
            self.console.line(f"the evaluations were not written: {error.strerror or error}")
        if sample is None:
            return
        line = {"step": step, "attempt": attempt, **sample.to_dict()}
        try:
            append_line(self.folder.path / SAMPLES_FILE, json.dumps(line, ensure_ascii=False))
        except OSError as error:
            self.console.line(f"the sample was not written: {error.strerror or error}")

    def save(self) -> SavedCheckpoint:
        """Write the training state of this step; every rank takes part.

        Raises:
            CheckpointError: the same on all ranks.
        """
        config, progress = self.config, self.progress
        if self.metrics is not None:
            # A line that a checkpoint stands on must not be lost with the machine.
            self.metrics.sync()
        with self.goodput.during("checkpoint"):
            saved = save_training_state(
                self.folder.checkpoints,
                step=progress.step,
                fragments=self.engine.fragments(),
                state=self.state(),
                config_yaml=dump_resolved(config),
                tokenizer=tokenizer_path(config),
                run_uid=self.folder.run_uid,
                communicator=self.parts.communicator,
                actions=FaultyDisk(self.faults, progress.step),
            )
            self.prune(saved.folder)
        progress.checkpoints_failed_in_a_row = 0
        self.saved, self.saved_seconds = saved, self.saved_seconds + saved.seconds
        if self.metrics is not None:
            self.metrics.event(
                "checkpoint",
                progress.step,
                folder=saved.folder.name,
                bytes=saved.bytes,
                manifest_sha256=manifest_digest(saved.folder),
            )
        self.write({"ckpt/bytes": saved.bytes, "ckpt/seconds": saved.seconds})
        self.console.line(f"saved {saved.folder.name} ({saved.bytes / 1e6:.1f} MB, {saved.seconds:.1f}s)")
        return saved

    def prune(self, newest: Path) -> None:
        """Delete checkpoints that are no longer wanted; trouble with that is told and nothing more."""
        settings = self.config.checkpoint
        if self.parts.communicator.rank != 0:
            return
        try:
            prune(
                self.folder.checkpoints,
                keep_last=settings.keep_last,
                keep_every_tokens=settings.keep_every_tokens,
                trusted=newest,
            )
        except (CheckpointError, OSError) as error:
            self.console.line(f"old checkpoints were not deleted: {error}")

    def save_or_go_on(self) -> None:
        """Save; a disk that refuses does not end the run at once.

        Raises:
            CheckpointError: after ``MAX_FAILED_CHECKPOINTS`` in a row.
        """
        progress = self.progress
        self.profiler.finish()
        try:
            self.save()
        except CheckpointError as error:
            progress.checkpoints_failed += 1
            progress.checkpoints_failed_in_a_row += 1
            self.console.line(f"checkpoint failed: {error}; training goes on")
            if self.metrics is not None:
                self.metrics.event("checkpoint_failed", progress.step, reason=str(error))
            if progress.checkpoints_failed_in_a_row >= MAX_FAILED_CHECKPOINTS:
                count = progress.checkpoints_failed_in_a_row
                raise CheckpointError(
                    f"{count} checkpoints in a row could not be written, the last one: {error}"
                ) from error

    def save_final(self) -> Path:
        """Training state of the last step, and the weights by themselves."""
        saved = self.save()
        folder = self.folder.path / WEIGHTS
        with self.goodput.during("checkpoint"):
            on_first_rank(
                self.parts.communicator, lambda: export_weights(saved.folder, folder, verified=True)
            )
        return folder

    def leave(self) -> Stopped:
        """Save and end early."""
        reasons = [r for r in self.parts.communicator.gather_objects(self.stop.pending) if r is not None]
        reason = reasons[0]
        self.console.line(f"{reason}: saving step {self.progress.step} before leaving")
        self.profiler.halt()
        saved = self.save()
        # After the save: a launcher may be waiting with a kill.
        self.profiler.finish()
        return Stopped(reason=reason, step=self.progress.step, checkpoint=saved.folder)

    def state(self) -> dict[str, Any]:
        """Everything of a checkpoint that is not a tensor."""
        progress, parts = self.progress, self.parts
        return {
            "format": "bdtrain-state/1",
            "run_uid": self.folder.run_uid,
            "attempt": self.folder.attempt,
            "step": progress.step,
            "tokens": progress.tokens,
            "samples": progress.samples,
            "applied_steps": progress.applied,
            "skipped_steps": progress.skipped,
            "adam_step": progress.applied,
            "progress": progress.to_dict(),
            "lr": {"next": self.learning_rate(), "schedule": self.config.optim.schedule},
            "algo": self.config.diffusion.algo,
            **self.refit.state(),
            "curriculum_phase": 0,
            "averaged": self.config.optim.ema_decay is not None and progress.applied > 0,
            "starts_with_bos": parts.sampler.starts_with_bos,
            "tokenizer": parts.loader.tokenizer_info.to_dict(),
            "data_fingerprint": dict(parts.loader.fingerprint),
            "algorithms": parts.algorithms(),
            "layout": {
                "tp": self.layout.tp,
                "pp": self.layout.pp,
                "dp": self.layout.dp,
                "zero_stage": self.config.parallel.zero_stage,
                "precision": self.config.train.precision,
            },
            "goodput": self.goodput.to_dict(),
        }
