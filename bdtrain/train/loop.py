"""The loop around the training step: data, learning rate, validation, samples, metrics, final weights."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bdtrain.checkpoint.weights import save_model
from bdtrain.config import RunConfig, dump_resolved
from bdtrain.data.build import build_loader, build_source
from bdtrain.data.loader import Loader
from bdtrain.errors import ConfigError, NonFiniteError
from bdtrain.model.build import build_model
from bdtrain.model.transformer import TwoStreamTransformer
from bdtrain.model.weights import full_state
from bdtrain.parallel.engine import Engine, deepspeed_settings
from bdtrain.parallel.groups import Launch, init_groups, prepare_deepspeed
from bdtrain.parallel.mpu import MegatronGrid
from bdtrain.tracking.console import Console, format_count, format_seconds
from bdtrain.tracking.jsonl import JsonlWriter
from bdtrain.train.folder import check_run_folder, claim_run_folder
from bdtrain.train.optim import AveragedAdamW, learning_rate, parameter_groups
from bdtrain.train.step import StepResult, train_step
from bdtrain.validation.evaluate import Evaluator, build_objective, training_plan
from bdtrain.validation.generation import RunSampler, tokenizer_path
from bdtrain.validation.likelihood import Likelihood


@dataclass(frozen=True)
class RunSummary:
    """What a finished run reports.

    Attributes:
        steps: batches taken.
        tokens: counted tokens trained on.
        before: likelihood before the first step, None without ``validation.at_start``.
        after: likelihood after the last one; of the averaged weights where an average is kept.
        tokens_per_second: counted tokens per second of training, evaluation left out.
        train_seconds: wall time of training, evaluation left out.
        wall_seconds: wall time from the first line to the last.
        checkpoint: folder of the final weights, None without ``checkpoint.save_final``.
    """

    steps: int
    tokens: int
    before: Likelihood | None
    after: Likelihood
    tokens_per_second: float
    train_seconds: float
    wall_seconds: float
    checkpoint: Path | None


def run_training(config: RunConfig, launch: Launch, *, console: Console) -> RunSummary:
    """Train as the configuration says.

    Args:
        config: a validated configuration.
        launch: who this process is.
        console: where progress goes.

    Raises:
        ConfigError: if the run's folder holds another run.
        DataError: if the corpus cannot be read.
        NonFiniteError: after ``train.max_nonfinite_steps`` skipped steps in a row.
    """
    started = time.monotonic()
    check_run_folder(Path(config.run.folder))
    device = prepare_machine(config, launch)
    loader = build_loader(
        config.data,
        split="train",
        seed=config.run.seed,
        global_batch_size=config.train.global_batch_size,
        dp_rank=0,
        dp_size=1,
    )
    config = with_vocabulary(config, loader)
    console.line(
        f"{config.diffusion.algo}, block size {config.diffusion.block_size}, {config.train.steps} steps of "
        f"{format_count(config.tokens_per_step)} tokens; "
        f"{format_count(loader.epoch_samples * config.data.seq_len)} tokens an epoch "
        f"from {source_name(config)}"
    )
    with loader:
        valid = build_source(config.data, split="valid", seed=config.run.seed)
        evaluator = Evaluator(config, valid, device=device)
        sampler = RunSampler(config, loader.tokenizer_info)
        groups = init_groups(launch)
        model = build_model(
            config.model,
            pg_collection=groups,
            mask_id=loader.tokenizer_info.mask_id,
            seed=config.run.seed,
            device=device,
        )
        console.line(f"{format_count(sum(p.numel() for p in model.parameters()))} parameters")
        engine = build_engine(config, model)
        try:
            # Last, so that a run that could not start leaves no folder behind.
            folder = claim_run_folder(config)
            with JsonlWriter(folder / "metrics.jsonl") as metrics:
                trainer = _Trainer(
                    config, engine, loader, evaluator, sampler, metrics, groups.dp, device, console, folder
                )
                return trainer.run(started)
        finally:
            engine.close()


def prepare_machine(config: RunConfig, launch: Launch) -> torch.device:
    """Threads, accelerator and the libraries' switches.

    Returns:
        The device of this process.
    """
    if torch.cuda.is_available():
        if config.train.num_threads is not None:
            raise ConfigError(
                "train.num_threads is for CPUs, and this machine trains on a GPU; leave it out (null), or "
                "hide the GPU with CUDA_VISIBLE_DEVICES="
            )
        device = torch.device("cuda", launch.local_rank)
    else:
        device = torch.device("cpu")
        share = max(1, len(os.sched_getaffinity(0)) // launch.world_size)
        torch.set_num_threads(config.train.num_threads or int(os.environ.get("OMP_NUM_THREADS", share)))
    prepare_deepspeed()
    return device


def source_name(config: RunConfig) -> str:
    """What to call the training data."""
    return "synthetic data" if config.data.kind == "synthetic" else str(config.data.path)


def with_vocabulary(config: RunConfig, loader: Loader) -> RunConfig:
    """The configuration with the vocabulary of the data, where it left it open.

    Raises:
        ConfigError: if it names another one.
    """
    found = loader.tokenizer_info.vocab_size
    wanted = config.model.vocab_size
    if wanted is not None and wanted != found:
        raise ConfigError(
            f"model.vocab_size={wanted}, but {source_name(config)} has {found} ids; "
            "leave model.vocab_size out, or choose the corpus that was made with the right tokenizer"
        )
    return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": found})})


def build_engine(config: RunConfig, model: TwoStreamTransformer) -> Engine:
    """Optimizer and DeepSpeed engine for a model."""
    optim, train = config.optim, config.train
    optimizer = AveragedAdamW(
        parameter_groups(model, weight_decay=optim.weight_decay),
        ema_decay=optim.ema_decay,
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.epsilon,
        weight_decay=optim.weight_decay,
    )
    settings = deepspeed_settings(
        micro_batch_size=train.micro_batch_size,
        data_parallel=1,
        zero_stage=train.zero_stage,
        grad_clip_norm=optim.grad_clip_norm or 0.0,
    )
    return Engine(model, optimizer, settings=settings, grid=MegatronGrid())


class _Trainer:
    """State of the loop: the cursor, counters and clocks."""

    def __init__(
        self,
        config: RunConfig,
        engine: Engine,
        loader: Loader,
        evaluator: Evaluator,
        sampler: RunSampler,
        metrics: JsonlWriter,
        data_parallel_group: Any,
        device: torch.device,
        console: Console,
        folder: Path,
    ) -> None:
        self.config, self.engine, self.loader, self.device = config, engine, loader, device
        self.evaluator, self.sampler, self.metrics = evaluator, sampler, metrics
        self.data_parallel_group = data_parallel_group
        self.console, self.folder = console, folder
        self.plan = training_plan(config)
        self.objective = build_objective(config, loader.tokenizer_info, self.plan)
        # The cursor is one integer: rows taken. Steps and epochs follow from it.
        self.samples = self.applied = self.skipped = self.skipped_in_a_row = self.tokens = 0
        self.train_seconds = 0.0

    def run(self, started: float) -> RunSummary:
        """Every step of the run, with validation before, in between and after."""
        config = self.config
        steps, every = config.train.steps, config.validation.every_steps
        before = self.validate(0) if config.validation.at_start else None
        window = _Window()
        for step in range(steps):
            clock = time.monotonic()
            lr = self.learning_rate()
            result = self.one_step(step, lr)
            seconds = time.monotonic() - clock
            self.train_seconds += seconds
            window.add(result, seconds)
            if (step + 1) % config.train.log_every_steps == 0 or step + 1 == steps:
                self.report(step + 1, lr, window)
                window = _Window()
            if every and (step + 1) % every == 0 and step + 1 < steps:
                self.validate(step + 1)
        # Saved first: nothing that goes wrong afterwards may cost the weights.
        checkpoint = self.save() if config.checkpoint.save_final else None
        after = self.validate(steps)
        return RunSummary(
            steps=steps,
            tokens=self.tokens,
            before=before,
            after=after,
            tokens_per_second=self.tokens / max(self.train_seconds, 1e-9),
            train_seconds=self.train_seconds,
            wall_seconds=time.monotonic() - started,
            checkpoint=checkpoint,
        )

    def one_step(self, step: int, lr: float) -> StepResult:
        """Take the batch at the cursor, train on it, move the cursor."""
        config = self.config
        result = train_step(
            self.engine,
            self.objective,
            self.loader.batch(self.samples),
            seed=config.run.seed,
            step=step,
            lr=lr,
            global_batch_size=config.train.global_batch_size,
            micro_batch_size=config.train.micro_batch_size,
            noise_copies=config.diffusion.noise_copies,
            data_parallel_group=self.data_parallel_group,
            device=self.device,
        )
        self.samples += config.train.global_batch_size
        self.tokens += result.counted_tokens
        self.applied += result.applied
        self.skipped += not result.applied
        self.skipped_in_a_row = 0 if result.applied else self.skipped_in_a_row + 1
        if not result.applied:
            self.console.line(f"step {step + 1}: loss or gradient is not finite, the update was skipped")
        if self.skipped_in_a_row >= config.train.max_nonfinite_steps:
            raise NonFiniteError(
                f"{self.skipped_in_a_row} steps in a row were not finite, the last one step {step + 1} "
                f"(loss {result.loss}); lower optim.lr (now {config.optim.lr:g}), lengthen "
                f"optim.warmup_steps (now {config.optim.warmup_steps}), or look at rows "
                f"{self.samples - config.train.global_batch_size} to {self.samples - 1} of the data"
            )
        return result

    def learning_rate(self) -> float:
        """Learning rate of the next update; skipped steps do not advance it."""
        optim = self.config.optim
        return learning_rate(
            self.applied,
            peak=optim.lr,
            schedule=optim.schedule,
            warmup_steps=optim.warmup_steps,
            decay_steps=optim.decay_steps or 0,
            total_steps=self.config.train.steps,
            min_ratio=optim.min_lr_ratio,
        )

    def report(self, step: int, lr: float, window: _Window) -> None:
        """The progress line and the metrics of the steps since the last one."""
        steps = self.config.train.steps
        seconds_per_step = window.seconds / window.steps
        tokens_per_second = window.tokens / max(window.seconds, 1e-9)
        self.console.progress(
            step=step,
            steps=steps,
            loss=window.loss,
            lr=lr,
            tokens_per_second=tokens_per_second,
            seconds_left=(steps - step) * seconds_per_step,
        )
        self.metrics.write(
            step,
            {
                "train/loss": window.loss,
                "train/masked_share": window.masked_share,
                "train/grad_norm": window.grad_norm,
                "train/lr": lr,
                "train/skipped_steps": self.skipped,
                "train/counted_tokens": window.tokens / window.steps,
                "train/samples": self.samples,
                "train/tokens": self.tokens,
                "train/epoch": self.samples / self.loader.epoch_samples,
                "train/tokens_per_second": tokens_per_second,
                "train/step_seconds": seconds_per_step,
                "train/cpu_seconds": time.process_time(),
            },
        )

    def validate(self, step: int) -> Likelihood:
        """Likelihood and a sample, with the averaged weights where there are any."""
        with self.engine.averaged_weights() as averaged:
            likelihood = self.evaluator.likelihood(self.engine.module)
            sample = self.sampler.sample(self.engine.module, step)
        name = "averaged weights, " if averaged else ""
        self.console.line(
            f"valid at step {step} ({name}{format_seconds(likelihood.seconds)}): {likelihood.describe()}"
        )
        values: dict[str, float | None] = {
            "valid/nelbo": likelihood.nelbo,
            "valid/nelbo_noise_error": likelihood.nelbo_noise_error,
            "valid/nelbo_text_error": likelihood.nelbo_text_error,
            "valid/ppl": likelihood.ppl,
            "valid/bpb": likelihood.bpb,
            "valid/tokens": likelihood.tokens,
            "valid/seconds": likelihood.seconds,
        }
        self.metrics.write(step, {k: v for k, v in values.items() if v is not None})
        if sample is not None:
            with (self.folder / "samples.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **sample.to_dict()}, ensure_ascii=False) + "\n")
        return likelihood

    def save(self) -> Path:
        """Write the weights that were evaluated last."""
        folder = self.folder / "checkpoint"
        facts = {
            "step": self.config.train.steps,
            "applied_steps": self.applied,
            "samples": self.samples,
            "tokens": self.tokens,
            "averaged": self.config.optim.ema_decay is not None and self.applied > 0,
            "starts_with_bos": self.sampler.starts_with_bos,
            "tokenizer": self.loader.tokenizer_info.to_dict(),
            "data_fingerprint": dict(self.loader.fingerprint),
            "noise_plan": None if self.plan is None else self.plan.to_dict(),
        }
        with self.engine.averaged_weights():
            save_model(
                folder,
                full_state(self.engine.module),
                config_yaml=dump_resolved(self.config),
                facts=facts,
                tokenizer=tokenizer_path(self.config),
            )
        return folder


class _Window:
    """The steps since the last progress line. Means are over the applied ones: a skipped step has no loss."""

    def __init__(self) -> None:
        self.steps, self.tokens, self.seconds = 0, 0, 0.0
        self._applied: list[StepResult] = []

    def add(self, result: StepResult, seconds: float) -> None:
        self.steps += 1
        self.tokens += result.counted_tokens
        self.seconds += seconds
        if result.applied:
            self._applied.append(result)

    @property
    def loss(self) -> float:
        return self._mean([result.loss for result in self._applied])

    @property
    def masked_share(self) -> float:
        return self._mean([result.masked_share for result in self._applied])

    @property
    def grad_norm(self) -> float:
        return self._mean([result.grad_norm for result in self._applied])

    @staticmethod
    def _mean(values: list[float]) -> float:
        return sum(values) / len(values) if values else math.nan
