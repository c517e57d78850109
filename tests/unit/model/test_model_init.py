"""Initial weights are a function of seed and name; every layout cuts its parts from the same tensors."""

import math

import pytest
import torch
from megatron.core.tensor_parallel.layers import _initialize_affine_weight_cpu

from bdtrain.model.init import (
    draw_parameter,
    full_shape,
    global_parameters,
    join_shards,
    rename_layer,
    take_shard,
)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(build):
    first, again, other = (dict(build(seed=s, jitter=False).named_parameters()) for s in (1, 1, 2))
    for name, parameter in first.items():
        assert parameter.equal(again[name])
        assert parameter.equal(other[name]) == ("layernorm" in name), name


def test_layers_do_not_repeat_each_other(build):
    model = build(jitter=False)
    a, b = (layer.self_attention.linear_qkv.weight for layer in model.decoder.layers)
    assert not a.equal(b)


def test_weights_do_not_depend_on_what_else_is_built(build):
    short, long = build(num_layers=1, jitter=False), build(num_layers=3, jitter=False)
    wanted = dict(long.named_parameters())
    for name, parameter in short.named_parameters():
        if not name.endswith(("linear_proj.weight", "linear_fc2.weight")):  # their scale knows the depth
            assert parameter.equal(wanted[name]), name


def test_standard_deviations_are_the_configured_ones(build):
    model = build(
        hidden_size=64, num_heads=8, num_kv_heads=8, ffn_size=256, num_layers=8, vocab_size=500, jitter=False
    )
    for name, parameter in model.named_parameters():
        if "layernorm" in name:
            assert (parameter == 1).all()
            continue
        residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
        wanted = 0.2 / math.sqrt(16) if residual else 0.2
        error = wanted / math.sqrt(2 * parameter.numel())
        assert parameter.std().item() == pytest.approx(wanted, abs=5 * error), name


def test_biases_start_at_zero(build):
    biases = [p for name, p in build("bd3lm", jitter=False).named_parameters() if name.endswith("bias")]
    assert len(biases) == 2 * 4 + 2
    assert all((bias == 0).all() for bias in biases)


@pytest.mark.parametrize("shape", ["qwen3", "bd3lm"])
def test_parts_of_simulated_ranks_are_megatrons_own_cut_of_the_serial_tensor(build, shape):
    model = build(shape, num_kv_heads=4, jitter=False)
    for name, parameter in global_parameters(model):
        full = draw_parameter(name, full_shape(parameter, 1), model.config, seed=7)
        parts = [take_shard(full, parameter, rank, 2) for rank in range(2)]
        if not getattr(parameter, "tensor_model_parallel", False):
            assert all(part.equal(full) for part in parts)
            continue
        assert join_shards(parts, parameter).equal(full)
        if full.dim() == 1:
            continue
        dim, stride = parameter.partition_dim, parameter.partition_stride
        for rank in range(2):
            theirs = torch.empty_like(parts[rank])
            _initialize_affine_weight_cpu(
                theirs,
                *full.shape,
                full.shape[dim] // 2,
                dim,
                lambda w, full=full: w.copy_(full),
                stride=stride,
                rank=rank,
                world_size=2,
            )
            assert parts[rank].equal(theirs), name


def test_a_rank_holds_whole_query_groups_and_matching_gate_and_up_rows(build):
    model = build()
    parameters = dict(model.named_parameters())
    qkv = parameters["decoder.layers.0.self_attention.linear_qkv.weight"]
    groups = qkv.view(2, 4, 8, 32)  # 2 groups of 2 queries, key, value
    assert take_shard(qkv, qkv, 1, 2).equal(groups[1].flatten(0, 1))
    fc1 = parameters["decoder.layers.0.mlp.linear_fc1.weight"]
    gate, up = fc1.chunk(2)
    assert take_shard(fc1, fc1, 1, 2).equal(torch.cat((gate[32:], up[32:])))


def test_a_later_stage_names_its_layers_by_their_place_in_the_whole_model():
    assert (
        rename_layer("decoder.layers.0.mlp.linear_fc1.weight", 6) == "decoder.layers.6.mlp.linear_fc1.weight"
    )
    assert rename_layer("output_layer.weight", 6) == "output_layer.weight"
