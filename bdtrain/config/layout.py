"""How a run is cut over its ranks: what divides what, and the numbers that follow from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bdtrain.config.estimate import known_vocab_size, padded_vocab_size
from bdtrain.config.problems import config_error, divisors_text
from bdtrain.config.schema import RunConfig
from bdtrain.errors import ConfigError


@dataclass(frozen=True)
class Layout:
    """A run on a number of ranks.

    Attributes:
        world_size: ranks in all, tp x pp x dp; tp is fastest, then dp, then pp.
        tp: ranks that share each layer.
        pp: stages that share the layers.
        dp: data-parallel ranks; the tp x pp ranks behind one of them read the same rows.
        micro_batch_size: rows of a forward pass on one data-parallel rank.
        micro_batches: forward passes of a step on one data-parallel rank.
    """

    world_size: int
    tp: int
    pp: int
    dp: int
    micro_batch_size: int
    micro_batches: int


def resolve_layout(config: RunConfig, world_size: int) -> Layout:
    """Cut a run over its ranks.

    Args:
        config: the run.
        world_size: processes of the job.

    Raises:
        ConfigError: listing everything that does not divide or does not go together. With a vocabulary that
            comes from the corpus, its division by tp is left to the builder of the model.
    """
    problems = list(_problems(config, world_size))
    if problems:
        raise config_error(problems)
    tp, pp = config.parallel.tp, config.parallel.pp
    dp = world_size // (tp * pp)
    micro_batch_size = resolve_micro_batch_size(config, dp)
    micro_batches = config.train.global_batch_size // dp // micro_batch_size
    return Layout(world_size, tp, pp, dp, micro_batch_size, micro_batches)


def resolve_micro_batch_size(config: RunConfig, dp: int) -> int:
    """Rows of a forward pass: ``train.micro_batch_size``, or all rows of a data-parallel rank.

    Args:
        config: the run.
        dp: data-parallel ranks.

    Raises:
        ConfigError: if the rows cannot be cut so.
    """
    problems = list(_batch_problems(config, dp))
    if problems:
        raise config_error(problems)
    return config.train.micro_batch_size or config.train.global_batch_size // dp


def _problems(config: RunConfig, world_size: int) -> Iterator[str]:
    if world_size < 1:
        raise ConfigError(f"world_size={world_size}; it must be at least 1")
    tp, pp = config.parallel.tp, config.parallel.pp
    yield from tensor_problems(config, tp)
    seq_len = config.data.seq_len
    if config.parallel.sequence_parallel and seq_len % tp:
        yield (
            f"tp={tp} does not divide seq_len={seq_len}, which sequence parallelism splits; choose tp from "
            f"{divisors_text(seq_len, smallest=True)} (data.seq_len), or parallel.sequence_parallel=false"
        )
    if config.model.num_layers % pp:
        yield (
            f"pp={pp} does not divide num_layers={config.model.num_layers}; choose pp from "
            f"{divisors_text(config.model.num_layers)} (model.num_layers)"
        )
    if config.parallel.zero_stage == 3 and pp > 1:
        yield (
            f"parallel.zero_stage=3 with parallel.pp={pp}; stage 3 gathers weights in the order of one "
            f"forward and one backward pass, a pipeline interleaves them: choose zero_stage 1 or 2, or pp=1"
        )
    if world_size % (tp * pp):
        low = world_size // (tp * pp) * tp * pp
        some = f"{low} or {low + tp * pp}" if low else f"{tp * pp}"
        yield (
            f"world_size={world_size} is not a multiple of tp*pp={tp * pp} (parallel.tp={tp}, "
            f"parallel.pp={pp}); start {some} processes, or choose tp*pp from {divisors_text(world_size)}"
        )
    else:
        yield from _batch_problems(config, world_size // (tp * pp))


def tensor_problems(config: RunConfig, tp: int) -> Iterator[str]:
    """What tensor parallelism cannot cut.

    Args:
        config: with the model.
        tp: ranks that share each layer.
    """
    model = config.model
    for name in ("num_heads", "num_kv_heads", "ffn_size"):
        size = getattr(model, name)
        if size % tp:
            choices = divisors_text(size, smallest=True)
            yield f"tp={tp} does not divide {name}={size}; choose tp from {choices} (model.{name})"
    vocab_size = known_vocab_size(config)
    padded = padded_vocab_size(model, vocab_size) if vocab_size is not None else 0
    if padded % tp:
        choices = divisors_text(padded, smallest=True)
        yield (
            f"tp={tp} does not divide the padded vocabulary of {padded}; choose tp from {choices}, or make "
            f"model.vocab_multiple={model.vocab_multiple} a multiple of {tp}"
        )


def _batch_problems(config: RunConfig, dp: int) -> Iterator[str]:
    rows, micro = config.train.global_batch_size, config.train.micro_batch_size
    if rows % dp:
        yield (
            f"dp={dp} does not divide global_batch_size={rows}; choose dp from {divisors_text(rows)}, or "
            f"{rows // dp * dp + dp} rows (train.global_batch_size)"
        )
    elif micro is not None and (rows // dp) % micro:
        yield (
            f"micro_batch_size={micro} does not divide the {rows // dp} rows of a data-parallel rank "
            f"(global_batch_size={rows} / dp={dp}); choose it from {divisors_text(rows // dp)}, or leave it "
            f"out (train.micro_batch_size)"
        )
