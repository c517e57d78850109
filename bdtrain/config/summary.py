"""What ``--check`` prints: the size of a run, its cut over the ranks, and the memory that takes."""

from __future__ import annotations

from bdtrain.config.estimate import (
    count_local_parameters,
    count_parameters,
    estimate_memory,
    known_vocab_size,
)
from bdtrain.config.layout import Layout
from bdtrain.config.loader import config_sha256
from bdtrain.config.schema import RunConfig


def summarise(config: RunConfig) -> str:
    """A few lines on the size of a run, by arithmetic."""
    model, data, train, diffusion = config.model, config.data, config.train, config.diffusion
    vocab = known_vocab_size(config)
    layers = count_parameters(model, vocab or 1).layers
    if vocab:
        size = (
            f"{count_parameters(model, vocab).total:,} parameters, {layers:,} of them not embedding or head"
        )
    else:
        size = f"{layers:,} parameters, plus embedding and head of the corpus' vocabulary"
    blocks = f", blocks of {diffusion.block_size} tokens" if diffusion.algo == "block_diffusion" else ""
    rows = f"{train.global_batch_size} rows x {data.seq_len} tokens"
    return "\n".join(
        [
            f"configuration is valid: {config.run.name}  (sha256 {config_sha256(config)[:12]})",
            f"  objective  {diffusion.algo}{blocks}",
            f"  model      {model.shape}, {model.num_layers} layers x {model.hidden_size} channels: {size}",
            f"  step       {rows} = {config.tokens_per_step:,} tokens",
            f"  run        {train.steps:,} steps = {config.tokens_per_step * train.steps:,} tokens, into "
            f"{config.run.folder}",
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
            f"  memory     {format_bytes(memory.total_bytes)} on the fullest rank ({held}), and activations",
            f"             {config.train.precision} weights {format_bytes(memory.weights_bytes)}, gradients "
            f"{format_bytes(memory.gradients_bytes)}, {state} {format_bytes(memory.optimizer_bytes)}",
        ]
    )


def format_bytes(number: int) -> str:
    """A size in the largest binary unit that it fills."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if number >= 1024**power:
            return f"{number / 1024**power:,.2f} {unit}"
    return f"{number} bytes"


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"
