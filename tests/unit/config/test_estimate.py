"""Parameters and memory by arithmetic, against published sizes, built models and sums by hand."""

from __future__ import annotations

import pytest

from bdtrain.config import ModelConfig, count_local_parameters, count_parameters, estimate_memory
from bdtrain.config.summary import format_bytes


def _by_hand_qwen3(layers: int, hidden: int, heads: int, kv: int, dim: int, ffn: int) -> int:
    query, key, value, output = (
        hidden * heads * dim,
        hidden * kv * dim,
        hidden * kv * dim,
        heads * dim * hidden,
    )
    gate = up = down = hidden * ffn
    norms = hidden + hidden + dim + dim
    return layers * (query + key + value + output + gate + up + down + norms) + hidden


def test_parameter_count_of_the_published_qwen3_sizes() -> None:
    # Qwen3-0.6B and 8B as published: 0.44 and 6.95 thousand million parameters that are not embedding.
    small = ModelConfig(
        num_layers=28, hidden_size=1024, num_heads=16, num_kv_heads=8, head_dim=128, ffn_size=3072
    )
    large = ModelConfig(
        num_layers=36, hidden_size=4096, num_heads=32, num_kv_heads=8, head_dim=128, ffn_size=12288
    )
    for model, published in ((small, 0.44e9), (large, 6.95e9)):
        count = count_parameters(model, 151936)
        assert count.layers == pytest.approx(published, rel=0.01)
        sizes = (model.num_layers, model.hidden_size, model.num_heads, model.num_kv_heads, model.head_dim)
        assert count.layers == _by_hand_qwen3(*sizes, model.ffn_size)
        assert count.embedding == 2 * 151936 * model.hidden_size


@pytest.mark.parametrize("shape", ["qwen3", "bd3lm"])
def test_parameter_count_is_that_of_the_built_model(shape: str) -> None:
    from bdtrain.model.build import build_model
    from bdtrain.testing import single_process_groups, tiny_model_config

    config = tiny_model_config(shape)
    with single_process_groups() as groups:
        model = build_model(config, pg_collection=groups, vocab_size=29, mask_id=4)
    assert count_parameters(config, 29).total == sum(parameter.numel() for parameter in model.parameters())


def test_parameter_count_pads_the_vocabulary() -> None:
    model = ModelConfig(num_layers=1, hidden_size=8, num_heads=1, vocab_multiple=16)
    assert count_parameters(model, 17).embedding == 2 * 32 * 8


SMALL = ModelConfig(
    num_layers=4, hidden_size=8, num_heads=4, num_kv_heads=2, head_dim=2, ffn_size=12, vocab_multiple=16
)
# One layer: attention 8 * (8 + 4 + 4) + 8 * 8 = 192 and feed-forward 3 * 8 * 12 = 288, together 480, which tp
# cuts; norms 8 + 8 and 2 + 2 = 20, which every rank has. 20 tokens are padded to 32 rows of 8: 256.


@pytest.mark.parametrize(
    ("tp", "pp", "expected"),
    [
        (1, 1, 4 * (480 + 20) + 256 + 8 + 256),
        (2, 1, 4 * (240 + 20) + 128 + 8 + 128),
        # Two layers a stage: the last one has the final norm beside the head, the first the embedding alone.
        (1, 2, 2 * (480 + 20) + 256 + 8),
        (2, 4, 1 * (240 + 20) + 128 + 8),
    ],
)
def test_parameters_of_the_fullest_rank(tp: int, pp: int, expected: int) -> None:
    assert count_local_parameters(SMALL, 20, tp=tp, pp=pp) == expected


def test_parameters_of_the_fullest_rank_without_a_known_vocabulary() -> None:
    assert count_local_parameters(SMALL, None, tp=1, pp=2) == 2 * (480 + 20) + 8


def test_parameters_of_a_rank_with_biases() -> None:
    model = ModelConfig(
        shape="bd3lm", num_layers=2, hidden_size=8, num_heads=4, ffn_size=32, vocab_multiple=16
    )
    # tp=2: attention 4 * 8 * 8 / 2; feed-forward 2 * 8 * 16, its first bias cut to 16, its second whole;
    # two norms of weight and bias. Head: 16 rows of 8 and their bias; final norm of weight and bias.
    layer = 128 + 256 + 16 + 8 + 2 * 16
    assert count_local_parameters(model, 20, tp=2, pp=1) == 2 * layer + 16 * 8 + 16 * 8 + 16 + 16


@pytest.mark.parametrize("shape", ["qwen3", "bd3lm"])
def test_one_rank_holds_the_whole_model(shape: str) -> None:
    model = ModelConfig(shape=shape, num_layers=3, hidden_size=16, num_heads=2)
    assert count_local_parameters(model, 100, tp=1, pp=1) == count_parameters(model, 100).total


@pytest.mark.parametrize(
    ("precision", "zero_stage", "averaged", "expected"),
    # 1000 parameters on 4 data-parallel ranks: whole 1000 or a share of 250, times the bytes of each.
    [
        ("bf16", 1, True, (2000, 4000, 250 * 16)),
        ("bf16", 2, True, (2000, 1000, 250 * 16)),
        ("bf16", 3, True, (500, 1000, 250 * 16)),
        ("bf16", 1, False, (2000, 4000, 250 * 12)),
        ("fp32", 1, True, (4000, 4000, 250 * 16)),
        ("fp32", 2, False, (4000, 1000, 250 * 12)),
        ("fp32", 3, True, (1000, 1000, 250 * 16)),
    ],
)
def test_memory_of_a_rank(
    precision: str, zero_stage: int, averaged: bool, expected: tuple[int, int, int]
) -> None:
    memory = estimate_memory(1000, precision=precision, zero_stage=zero_stage, dp=4, averaged=averaged)
    assert (memory.weights_bytes, memory.gradients_bytes, memory.optimizer_bytes) == expected
    assert memory.total_bytes == sum(expected)


def test_a_share_that_does_not_come_out_even_is_rounded_up() -> None:
    assert estimate_memory(10, precision="bf16", zero_stage=3, dp=4, averaged=False).weights_bytes == 3 * 2


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1.00 KiB"),
        (3 * 2**19, "1.50 MiB"),
        (80 * 2**30, "80.00 GiB"),
    ],
)
def test_sizes_are_shown_in_the_largest_unit_they_fill(number: int, text: str) -> None:
    assert format_bytes(number) == text
