"""The cut of a run over its ranks: what follows, and what is refused."""

from __future__ import annotations

from itertools import product

import pytest

from bdtrain.config import (
    Layout,
    RunConfig,
    resolve_layout,
    resolve_micro_batch_size,
)
from bdtrain.errors import ConfigError
from tests.unit.config.helpers import load

SIZES = (
    "model.num_heads=16",
    "model.num_kv_heads=8",
    "model.hidden_size=256",
    "model.ffn_size=768",
    "model.num_layers=12",
    "train.global_batch_size=24",
)


def model_of_16_heads(*overrides: str) -> RunConfig:
    given = {text.partition("=")[0] for text in overrides}
    return load(*(text for text in SIZES if text.partition("=")[0] not in given), *overrides).config


def refused(config: RunConfig, world_size: int) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        resolve_layout(config, world_size)
    assert caught.value.exit_code == 3
    head, *lines = str(caught.value).splitlines()
    assert head.startswith(str(len(lines)))
    return [line.strip() for line in lines]


def test_one_process_takes_all_rows_at_once() -> None:
    assert resolve_layout(model_of_16_heads(), 1) == Layout(1, 1, 1, 1, micro_batch_size=24, micro_batches=1)


def test_data_parallel_ranks_are_what_tp_and_pp_leave_over() -> None:
    config = model_of_16_heads("parallel.tp=2", "parallel.pp=3", "train.micro_batch_size=2")
    layout = resolve_layout(config, 24)
    assert layout == Layout(24, tp=2, pp=3, dp=4, micro_batch_size=2, micro_batches=3)


def test_micro_batch_left_out_is_all_rows_of_a_rank() -> None:
    config = model_of_16_heads()
    assert config.train.micro_batch_size is None
    assert [resolve_micro_batch_size(config, dp) for dp in (1, 2, 24)] == [24, 12, 1]
    assert resolve_micro_batch_size(model_of_16_heads("train.micro_batch_size=3"), 4) == 3


@pytest.mark.parametrize(("micro", "dp", "named"), [(4, 4, "6 rows"), (None, 5, "dp=5"), (2, 48, "dp=48")])
def test_rows_that_cannot_be_cut_are_refused(micro: int | None, dp: int, named: str) -> None:
    config = model_of_16_heads(f"train.micro_batch_size={micro or 'null'}")
    with pytest.raises(ConfigError, match=named):
        resolve_micro_batch_size(config, dp)


@pytest.mark.parametrize(
    ("overrides", "world_size", "expected"),
    [
        ([], 0, "world_size=0; it must be at least 1"),
        (
            ["parallel.tp=2", "parallel.pp=2"],
            6,
            "world_size=6 is not a multiple of tp*pp=4 (parallel.tp=2, parallel.pp=2); start 4 or 8 "
            "processes, or choose tp*pp from 1, 2, 3, 6",
        ),
        (["parallel.tp=2"], 1, "world_size=1 is not a multiple of tp*pp=2"),
        (
            ["parallel.tp=16"],
            16,
            "tp=16 does not divide num_kv_heads=8; choose tp from 1, 2, 4, 8 (model.num_kv_heads)",
        ),
        (
            ["parallel.tp=4", "model.ffn_size=770"],
            4,
            "tp=4 does not divide ffn_size=770; choose tp from 1, 2, 5, 7, 10, 11, 14, 22, ...",
        ),
        (
            ["parallel.tp=8", "model.vocab_multiple=4", "data.synthetic_vocab_size=260"],
            8,
            "tp=8 does not divide the padded vocabulary of 260",
        ),
        (
            ["parallel.tp=8", "parallel.sequence_parallel=true", "data.seq_len=20", "diffusion.block_size=4"],
            8,
            "tp=8 does not divide seq_len=20, which sequence parallelism splits",
        ),
        (
            ["parallel.pp=5"],
            5,
            "pp=5 does not divide num_layers=12; choose pp from 1, 2, 3, 4, 6, 12 (model.num_layers)",
        ),
        (["parallel.pp=2", "parallel.zero_stage=3"], 2, "parallel.zero_stage=3 with parallel.pp=2"),
        (
            [],
            5,
            "dp=5 does not divide global_batch_size=24; choose dp from 1, 2, 3, 4, 6, 8, 12, 24, or 25 rows",
        ),
        (
            ["train.micro_batch_size=8"],
            2,
            "micro_batch_size=8 does not divide the 12 rows of a data-parallel rank (global_batch_size=24 "
            "/ dp=2); choose it from 1, 2, 3, 4, 6, 12",
        ),
    ],
)
def test_a_layout_that_cannot_be_is_refused_with_a_remedy(
    overrides: list[str], world_size: int, expected: str
) -> None:
    config = model_of_16_heads(*overrides)
    if world_size < 1:
        with pytest.raises(ConfigError, match=expected):
            resolve_layout(config, world_size)
        return
    (line,) = refused(config, world_size)
    assert line.startswith(expected)


def test_the_heads_message_names_what_is_allowed() -> None:
    assert "tp=3 does not divide num_heads=16; choose tp from 1, 2, 4, 8, 16 (model.num_heads)" in refused(
        model_of_16_heads("parallel.tp=3"), 3
    )


def test_all_problems_of_a_layout_are_reported_together() -> None:
    config = model_of_16_heads(
        "parallel={tp: 5, pp: 7, sequence_parallel: true, zero_stage: 3}", "data.synthetic_vocab_size=128"
    )
    lines = refused(config, 36)
    named = (
        "num_heads=16",
        "num_kv_heads=8",
        "ffn_size=768",
        "vocabulary of 128",
        "seq_len=1024",
        "num_layers=12",
        "zero_stage=3",
        "world_size=36",
    )
    assert len(lines) == len(named)
    for text in named:
        assert sum(text in line for line in lines) == 1, (text, lines)
    # Both of the batch and of the model.
    assert len(refused(model_of_16_heads("parallel.pp=5"), 25)) == 2


def test_a_vocabulary_that_only_the_corpus_knows_is_left_to_the_model() -> None:
    sizes = ["parallel.tp=8", "model.vocab_multiple=1"]
    corpus = ["data.kind=corpus", "data.path=x"]
    resolve_layout(model_of_16_heads(*sizes, *corpus), 8)
    assert len(refused(model_of_16_heads(*sizes, *corpus, "model.vocab_size=257"), 8)) == 1


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_zero_stages_go_with_every_layout_but_3_with_stages(zero_stage: int) -> None:
    resolve_layout(model_of_16_heads(f"parallel.zero_stage={zero_stage}", "parallel.tp=2"), 4)
    if zero_stage < 3:
        resolve_layout(model_of_16_heads(f"parallel.zero_stage={zero_stage}", "parallel.pp=2"), 4)


def test_a_layout_is_taken_exactly_when_everything_divides() -> None:
    base = model_of_16_heads("train.micro_batch_size=2")
    for tp, pp, world in product((1, 2, 3, 4, 8), (1, 2, 3, 4, 5), (1, 2, 4, 6, 8, 12, 20, 24, 40)):
        parallel = base.parallel.model_copy(update={"tp": tp, "pp": pp})
        config = base.model_copy(update={"parallel": parallel})
        fits = (
            16 % tp == 8 % tp == 768 % tp == 256 % tp == 0
            and 12 % pp == 0
            and world % (tp * pp) == 0
            and 24 % (world // (tp * pp)) == 0
            and 24 // (world // (tp * pp)) % 2 == 0
        )
        if fits:
            layout = resolve_layout(config, world)
            assert layout.tp * layout.pp * layout.dp == world
            assert layout.dp * layout.micro_batches * layout.micro_batch_size == 24
        else:
            assert refused(config, world)
