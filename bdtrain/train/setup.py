"""What a run works with, built in the order in which mistakes are cheapest to find."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bdtrain.checkpoint.communicator import Communicator
from bdtrain.checkpoint.weights import open_model
from bdtrain.config import RunConfig
from bdtrain.config.layout import Layout
from bdtrain.config.summary import describe_objective
from bdtrain.data import order
from bdtrain.data.build import build_loader
from bdtrain.data.loader import Loader
from bdtrain.data.source import check_fingerprint
from bdtrain.diffusion import keyed
from bdtrain.diffusion.build import build_objective, training_plan
from bdtrain.diffusion.objectives.base import Objective
from bdtrain.diffusion.plan import NoisePlan
from bdtrain.errors import CheckpointError, ConfigError, DataError, TokenizerError
from bdtrain.model.build import DTYPES, build_model
from bdtrain.model.flops import count_step_flops
from bdtrain.model.init import global_parameters
from bdtrain.model.transformer import TwoStreamTransformer
from bdtrain.model.weights import load_full_state
from bdtrain.parallel.engine import Engine, deepspeed_settings
from bdtrain.parallel.groups import Launch, prepare_deepspeed
from bdtrain.parallel.mpu import MegatronGrid
from bdtrain.parallel.peak import peak_tflops
from bdtrain.tracking.console import Console, format_count
from bdtrain.train.optim import AveragedAdamW, parameter_groups
from bdtrain.train.step import StepResult
from bdtrain.validation.evaluate import Evaluator, build_evaluators
from bdtrain.validation.generation import RunSampler


@dataclass(frozen=True)
class Parts:
    """What the loop uses.

    Attributes:
        engine: model and optimizer.
        loader: this rank's rows.
        objective: what is minimised.
        plan: noise plan of training; None for AR.
        evaluators: each measures the model on one held-out set; the run's own rows first.
        sampler: writes a sample.
        communicator: all ranks, for small values.
        console: prints on the first rank.
        device: of this rank.
        peak_tflops: of one device in the precision of the run; None where it is not known.
        step_flops: operations that the model needed for a step, on all ranks together.
    """

    engine: Engine
    loader: Loader
    objective: Objective
    plan: NoisePlan | None
    evaluators: tuple[Evaluator, ...]
    sampler: RunSampler
    communicator: Communicator
    console: Console
    device: torch.device
    peak_tflops: float | None
    step_flops: Callable[[StepResult], float]

    @staticmethod
    def algorithms() -> dict[str, str]:
        """Names of the procedures that a resumed run must share."""
        return {"noise": keyed.ALGORITHM, "order": order.ALGORITHM, "init": "bdtrain/init/1"}


def build_parts(
    config: RunConfig,
    layout: Layout,
    groups: Any,
    communicator: Communicator,
    *,
    known: dict[str, Any] | None,
    device: torch.device,
    console: Console,
    stack: ExitStack,
    begun: bool = False,
) -> tuple[RunConfig, Parts]:
    """Data first, then the model, then the engine.

    Args:
        config: the run.
        layout: how it is cut over the ranks.
        groups: Megatron's process groups.
        communicator: all ranks.
        known: what identifies the data of a run that is continued; None for a new one.
        device: of this rank.
        console: prints on the first rank.
        stack: closes what was opened.
        begun: whether the run has checkpoints, so that its first weights do not matter.

    Returns:
        The configuration with the vocabulary of the data, and the parts.

    Raises:
        ConfigError: if model and data do not fit each other or the layout.
        DataError: if the data cannot be read, or are not those that the run began with.
    """
    loader = open_data(config, groups, known=known, stack=stack)
    config = with_vocabulary(config, loader)
    epoch_tokens = format_count(loader.epoch_samples * config.data.seq_len)
    console.line(
        f"{describe_objective(config)}, {config.train.steps} steps of "
        f"{format_count(config.tokens_per_step)} tokens; {epoch_tokens} tokens an epoch "
        f"from {source_name(config)}"
    )
    evaluators = build_evaluators(config, device=device, micro_batch_size=layout.micro_batch_size)
    sampler = RunSampler(config, loader.tokenizer_info)
    plan = training_plan(config.diffusion)
    objective = build_objective(config.diffusion, config.data, loader.tokenizer_info, plan)
    model = build_rank_model(config, groups, mask_id=loader.tokenizer_info.mask_id, device=device)
    if config.train.init_from is not None and not begun:
        load_first_weights(model, Path(config.train.init_from), loader, console)
    check_group_rules(config, model, communicator)
    counts = communicator.gather_objects(own_parameters(model) if groups.dp.rank() == 0 else 0)
    console.line(f"{format_count(sum(counts))} parameters on {describe_layout(config, layout)}")
    engine = build_engine(config, layout, model)
    stack.callback(engine.close)
    return config, Parts(
        engine=engine,
        loader=loader,
        objective=objective,
        plan=plan,
        evaluators=evaluators,
        sampler=sampler,
        communicator=communicator,
        console=console,
        device=device,
        peak_tflops=config.train.peak_tflops or peak_tflops(device, DTYPES[config.train.precision]),
        step_flops=step_flops(config, engine.module.config),
    )


def open_data(config: RunConfig, groups: Any, *, known: dict[str, Any] | None, stack: ExitStack) -> Loader:
    """This rank's rows of the training data.

    Args:
        config: the run.
        groups: Megatron's process groups.
        known: as in ``build_parts``.
        stack: closes the loader.

    Raises:
        DataError: if the data cannot be read, or are not those that the run began with.
    """
    loader = stack.enter_context(
        build_loader(
            config.data,
            split="train",
            seed=config.run.seed,
            global_batch_size=config.train.global_batch_size,
            dp_rank=groups.dp.rank(),
            dp_size=groups.dp.size(),
        )
    )
    if known is not None:
        try:
            check_same_data(known, loader)
        except DataError as error:
            error.everywhere = True
            raise
    return loader


def build_rank_model(
    config: RunConfig, groups: Any, *, mask_id: int, device: torch.device
) -> TwoStreamTransformer:
    """This rank's part of the model, with its first weights."""
    return build_model(
        config.model,
        pg_collection=groups,
        mask_id=mask_id,
        seed=config.run.seed,
        dtype=DTYPES[config.train.precision],
        device=device,
        recompute=config.train.recompute,
        sequence_parallel=config.parallel.sequence_parallel,
    )


def load_first_weights(model: TwoStreamTransformer, folder: Path, loader: Loader, console: Console) -> None:
    """Begin with the weights of another run.

    Args:
        model: this rank's part; overwritten.
        folder: model folder or checkpoint.
        loader: of the run's data, whose tokenizer the weights must know.
        console: told what was taken.

    Raises:
        CheckpointError: if the folder is damaged, or its weights are not this model's.
        TokenizerError: if they were trained with another tokenizer.
    """
    try:
        saved = open_model(folder)
        before, now = saved.facts["tokenizer"], loader.tokenizer_info.to_dict()
        if before != now:
            raise TokenizerError(
                f"train.init_from={folder} was trained with a tokenizer of {before['vocab_size']} ids "
                f"(sha256 {str(before['sha256'])[:12]}), the data have one of {now['vocab_size']} ids "
                f"(sha256 {str(now['sha256'])[:12]}); choose weights and corpus of one tokenizer"
            )
        load_full_state(model, saved.state())
    except (CheckpointError, TokenizerError) as error:
        # Every rank reads the same folder.
        error.everywhere = True
        raise
    kind = "averaged weights" if saved.facts.get("averaged") else "weights"
    console.line(f"begins with the {kind} of step {saved.facts.get('step')} of {folder}")


def step_flops(config: RunConfig, transformer: Any) -> Callable[[StepResult], float]:
    """What says how many operations the model needed for a step.

    Args:
        config: the run.
        transformer: Megatron's configuration of the model.
    """

    def count(result: StepResult) -> float:
        return float(
            count_step_flops(
                transformer,
                rows=config.train.global_batch_size,
                seq=config.data.seq_len,
                noisy_copies=config.diffusion.noise_copies if config.diffusion.algo != "ar" else 0,
                clean=config.diffusion.algo != "mdlm",
                selected=result.masked_rows,
                pairs=result.attention_pairs,
                last_layer_pairs=result.last_attention_pairs,
            ).total
        )

    return count


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
        count = torch.cuda.device_count()
        # One visible device may be the scheduler's doing: each task then sees its own.
        if 1 < count < launch.local_world_size:
            raise ConfigError(
                f"{launch.local_world_size} ranks on a machine with {count} GPUs; start at most {count} per "
                "machine, or hide the GPUs with CUDA_VISIBLE_DEVICES= to train on CPUs"
            )
        device = torch.device("cuda", launch.local_rank % count)
    else:
        device = torch.device("cpu")
        share = max(1, len(os.sched_getaffinity(0)) // launch.local_world_size)
        said = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
        default = int(said) if said.isdecimal() and int(said) else share
        torch.set_num_threads(config.train.num_threads or default)
    prepare_deepspeed()
    return device


def describe_layout(config: RunConfig, layout: Layout) -> str:
    """The layout in words."""
    ranks = f"{layout.world_size} rank" + "s" * (layout.world_size > 1)
    sequence = " with sequence parallelism" if config.parallel.sequence_parallel else ""
    return (
        f"{ranks} (tp {layout.tp}{sequence} x pp {layout.pp} x dp {layout.dp}, ZeRO "
        f"{config.parallel.zero_stage}, {config.train.precision}), {layout.micro_batches} x "
        f"{layout.micro_batch_size} rows a step each"
    )


def source_name(config: RunConfig) -> str:
    """What to call the training data."""
    return "synthetic data" if config.data.kind == "synthetic" else str(config.data.path)


def check_same_data(known: dict[str, Any], loader: Loader) -> None:
    """Refuse to continue a run on other data or with another tokenizer.

    Raises:
        TokenizerError: if the tokenizer is another one.
        DataError: if the data are others.
    """
    before, now = known["tokenizer"], loader.tokenizer_info.to_dict()
    if before != now:
        raise TokenizerError(
            f"this run began with a tokenizer of {before['vocab_size']} ids (sha256 "
            f"{str(before['sha256'])[:12]}), the data now have one of {now['vocab_size']} ids (sha256 "
            f"{str(now['sha256'])[:12]}); give the corpus it began with, or start a new run"
        )
    check_fingerprint(known["data_fingerprint"], loader.fingerprint)


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


def own_parameters(model: TwoStreamTransformer) -> int:
    """Parameters that this rank answers for: replicated ones count on the first tensor-parallel rank."""
    first = model.pg_collection.tp.rank() == 0
    split = (getattr(p, "tensor_model_parallel", False) for p in model.parameters())
    return sum(p.numel() for p, cut in zip(model.parameters(), split, strict=True) if cut or first)


def check_group_rules(config: RunConfig, model: TwoStreamTransformer, communicator: Communicator) -> None:
    """Refuse a rule of ``optim.groups`` that no parameter of the whole model matches.

    Raises:
        ConfigError: naming the rules, the same on all ranks.
    """
    names = [name for name, _ in global_parameters(model)]
    matched = communicator.gather_objects(
        [any(re.search(rule.match, name) for name in names) for rule in config.optim.groups]
    )
    useless = [
        rule.match for number, rule in enumerate(config.optim.groups) if not any(m[number] for m in matched)
    ]
    if useless:
        raise ConfigError(
            f"optim.groups: no parameter matches {', '.join(map(repr, useless))}; names look like "
            f"{', '.join(names[:3])}"
        )


def build_engine(config: RunConfig, layout: Layout, model: TwoStreamTransformer) -> Engine:
    """Optimizer and DeepSpeed engine for a model."""
    optim = config.optim
    optimizer = AveragedAdamW(
        parameter_groups(
            global_parameters(model), weight_decay=optim.weight_decay, rules=config.optim.groups
        ),
        ema_decay=optim.ema_decay,
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.epsilon,
        weight_decay=optim.weight_decay,
    )
    settings = deepspeed_settings(
        micro_batch_size=layout.micro_batch_size,
        data_parallel=layout.dp,
        zero_stage=config.parallel.zero_stage,
        grad_clip_norm=optim.grad_clip_norm or 0.0,
        dtype=DTYPES[config.train.precision],
    )
    return Engine(
        model, optimizer, settings=settings, grid=MegatronGrid(), zero_stage=config.parallel.zero_stage
    )
