"""What ``--check`` prints: the size of a run, its cut over the ranks, and the memory and time that takes."""

from __future__ import annotations

from bdtrain.config.activations import estimate_activations
from bdtrain.config.estimate import (
    FP32_BYTES,
    checkpoint_bytes,
    count_local_parameters,
    count_parameters,
    counted_attention,
    estimate_memory,
    estimate_step_operations,
    known_vocab_size,
)
from bdtrain.config.layout import Layout
from bdtrain.config.loader import config_sha256
from bdtrain.config.schema import RunConfig

ACHIEVED_TFLOPS = (100, 200, 400)
"""Rates of one rank that a plan shows the time for: what an accelerator reaches is found by running."""

UPDATE_FLOATS = 2
"""float32 numbers that an update needs for a moment per parameter of a rank's share (see the engine)."""


def summarise(config: RunConfig) -> str:
    """A few lines on the size of a run, by arithmetic."""
    model, data, train = config.model, config.data, config.train
    vocab = known_vocab_size(config)
    count = count_parameters(model, vocab or 1)
    tokens = config.tokens_per_step * train.steps
    ratio = ""
    if vocab:
        size = f"{count.total:,} parameters, {count.layers:,} of them not embedding or head"
        ratio = f" ({tokens / count.total:,.1f} per parameter)"
    else:
        size = f"{count.layers:,} parameters, plus embedding and head of the corpus' vocabulary"
    rows = f"{train.global_batch_size} rows x {data.seq_len} tokens"
    return "\n".join(
        [
            f"configuration is valid: {config.run.name}  (sha256 {config_sha256(config)[:12]})",
            f"  objective  {describe_objective(config)}",
            f"  model      {model.shape}, {model.num_layers} layers x {model.hidden_size} channels: {size}",
            f"  step       {rows} = {config.tokens_per_step:,} tokens",
            f"  run        {train.steps:,} steps = {tokens:,} tokens{ratio}, into {config.run.folder}",
            f"  disk       {_disk(config, count.total if vocab else count.layers)}",
        ]
    )


def summarise_layout(config: RunConfig, layout: Layout) -> str:
    """A few lines on the cut of a run over its ranks and the memory of the fullest one, by arithmetic."""
    vocab = known_vocab_size(config)
    parameters = count_local_parameters(config.model, vocab, tp=layout.tp, pp=layout.pp)
    averaged = config.optim.ema_decay is not None
    memory = estimate_memory(
        parameters,
        precision=config.train.precision,
        zero_stage=config.parallel.zero_stage,
        dp=layout.dp,
        averaged=averaged,
    )
    state = "optimizer (fp32 weights, moments, average)" if averaged else "optimizer (fp32 weights, moments)"
    grid = f"tp {layout.tp} x pp {layout.pp} x dp {layout.dp}, ZeRO {config.parallel.zero_stage}"
    grid += ", sequence parallel" if config.parallel.sequence_parallel else ""
    held = f"{parameters:,} parameters" + ("" if vocab else " without embedding and head")
    return "\n".join(
        [
            f"  layout     {_count(layout.world_size, 'rank')} = {grid}",
            f"  cut        {_count(layout.micro_batches, 'micro-batch', 'micro-batches')} of "
            f"{_count(layout.micro_batch_size, 'row')} per step on each data-parallel rank",
            f"  memory     {format_bytes(memory.total_bytes)} on the fullest rank ({held}) at all times:",
            f"             {config.train.precision} weights {format_bytes(memory.weights_bytes)}, gradients "
            f"{format_bytes(memory.gradients_bytes)}, {state} {format_bytes(memory.optimizer_bytes)}",
            *_peak(config, layout, memory.total_bytes, parameters),
        ]
    )


def summarise_time(config: RunConfig, layout: Layout) -> str:
    """Lines on the operations of a run and the time they take at some rates of a rank."""
    step = estimate_step_operations(config)
    total = step.total * config.train.steps
    vocab = "" if known_vocab_size(config) else " without the head"
    share = f"{step.attention / step.total:.0%}"
    lines = [
        f"  compute    {total:.2e} operations{vocab}, {share} of them {counted_attention(config)} attention"
    ]
    seconds = [total / (layout.world_size * rate * 1e12) for rate in ACHIEVED_TFLOPS]
    # A run this short is no run for an accelerator.
    if seconds[0] >= 60:
        times = (f"{format_duration(s)} at {rate}" for s, rate in zip(seconds, ACHIEVED_TFLOPS, strict=True))
        lines.append(f"  time       {', '.join(times)} TFLOP/s a rank; validation and saves on top")
    return "\n".join(lines)


def describe_objective(config: RunConfig) -> str:
    """Objective, block size and noise in words; a clip range parts the losses of training and validation."""
    diffusion, plan = config.diffusion, config.diffusion.plan
    words = f"{diffusion.algo}, block size {diffusion.block_size}"
    if diffusion.algo == "ar":
        return words
    if plan.clip_range is not None:
        beta, omega = plan.clip_range
        words += (
            f", clip range [{beta:g}, {omega:g}] (of the training loss; validation takes the whole range)"
        )
    if diffusion.schedule != "linear":
        words += f", {diffusion.schedule} schedule"
    return words if plan.kind == "count" else f"{words}, {plan.kind} masks"


def format_bytes(number: int) -> str:
    """A size in the largest binary unit that it fills."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if number >= 1024**power:
            return f"{number / 1024**power:,.2f} {unit}"
    return f"{number} bytes"


def format_duration(seconds: float) -> str:
    """A time in the largest unit of which it has at least two."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} seconds"


def _peak(config: RunConfig, layout: Layout, kept: int, parameters: int) -> list[str]:
    """Lines on the fullest moment of the fullest rank."""
    parts = estimate_activations(config, layout)
    update = -(-parameters // layout.dp) * UPDATE_FLOATS * FP32_BYTES
    moment = "in backward" if parts.total_bytes >= update else "in the update"
    without = "communication buffers, libraries, fragmentation"
    head = f", head and loss {format_bytes(parts.head_bytes)}" if parts.head_bytes else ""
    if known_vocab_size(config) is None:
        without = f"embedding and head, {without}"
    return [
        f"  peak       {format_bytes(kept + max(parts.total_bytes, update))} {moment}, an estimate for "
        f"{counted_attention(config)} attention; activations of",
        f"             layers {format_bytes(parts.layers_bytes)} "
        f"({_count(parts.micro_batches, 'micro-batch', 'micro-batches')}, recompute {config.train.recompute})"
        f"{head}",
        f"             left out: {without}",
    ]


def _disk(config: RunConfig, parameters: int) -> str:
    """What the checkpoints take, the one that is being written included."""
    whole = known_vocab_size(config) is not None
    size = checkpoint_bytes(parameters, averaged=config.optim.ema_decay is not None)
    text = f"{format_bytes(size)} a checkpoint{'' if whole else ' without embedding and head'}"
    checkpoint = config.checkpoint
    if not checkpoint.every_steps:
        return f"{text}, written at the end and on SIGTERM" if checkpoint.save_final else text
    at_once = checkpoint.keep_last + 1
    text += (
        f" every {checkpoint.every_steps:,} steps, {format_bytes(at_once * size)} while {at_once} are there"
    )
    if checkpoint.keep_every_tokens is not None:
        kept = config.tokens_per_step * config.train.steps // checkpoint.keep_every_tokens
        text += f", {format_bytes(kept * size)} for the {kept} kept for good"
    return text


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"
