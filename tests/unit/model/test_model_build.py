"""From the configuration to a model: refusals, marks, sizes."""

import pytest
import torch

from bdtrain.errors import ConfigError
from bdtrain.model.config import build_transformer_config
from bdtrain.testing import tiny_model_config


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"head_dim": 7}, {}, "choose an even model.head_dim"),
        ({"num_kv_heads": 3}, {}, "num_kv_heads=3 does not divide num_heads=4"),
        ({"shape": "bd3lm", "num_kv_heads": 2}, {}, "a key head per query head"),
        ({}, {"mask_id": 29}, "mask_id=29 is outside the vocabulary of 29"),
        ({}, {"tensor_parallel": 4}, "choose tp from 1, 2"),
        ({"vocab_multiple": 1}, {"tensor_parallel": 2}, "make vocab_multiple a multiple of 2"),
        ({}, {"sequence_parallel": True}, "tp=1 would ignore it"),
        ({}, {"recompute": "some"}, "choose none or core_attn or full"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_what_to_do(changes, arguments, message):
    section = tiny_model_config().model_copy(update=changes)
    with pytest.raises(ConfigError, match=message):
        build_transformer_config(section, **{"vocab_size": 29, "mask_id": 4, **arguments})


def test_a_vocabulary_of_unknown_size_is_refused(groups):
    from bdtrain.model.build import build_model

    with pytest.raises(ConfigError, match="size of the vocabulary is unknown"):
        build_model(tiny_model_config(vocab_size=None), pg_collection=groups, mask_id=4)


def test_the_vocabulary_is_padded_by_the_configuration(build):
    model = build(vocab_size=29, vocab_multiple=16)
    assert model.embedding.weight.shape == (32, 32)
    assert model.output_layer.weight.shape == (32, 32)
    assert model.config.vocab_size == 29


@pytest.mark.parametrize("shape", ["qwen3", "bd3lm"])
def test_every_split_parameter_is_marked_and_every_other_is_not(build, shape):
    split = {
        name for name, p in build(shape).named_parameters() if getattr(p, "tensor_model_parallel", False)
    }
    whole = {name for name, _ in build(shape).named_parameters()} - split
    assert all("layernorm" in name or name.endswith("linear_fc2.bias") for name in whole), whole
    assert any("linear_qkv" in name for name in split)


@pytest.mark.parametrize("shape", ["qwen3", "bd3lm"])
def test_biases_stand_where_the_shape_has_them(build, shape):
    names = {name.split(".")[-2] for name, _ in build(shape).named_parameters() if name.endswith(".bias")}
    wanted = {
        "input_layernorm",
        "pre_mlp_layernorm",
        "linear_fc1",
        "linear_fc2",
        "final_layernorm",
        "output_layer",
    }
    assert names == (wanted if shape == "bd3lm" else set())


def test_bfloat16_parameters_run_and_give_a_float32_loss(build, make_case):
    from bdtrain.model.transformer import assemble_streams

    case = make_case()
    model = build(dtype=torch.bfloat16)
    tokens = assemble_streams(case.xt, case.x0)
    view = model(tokens, case.layout, noisy_copies=1, clean=True, rows=case.masked)
    loss = view.nll(case.x0[:, None][case.masked])
    loss.sum().backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss).all()
    exact = build(dtype=torch.float64)
    wanted = exact(tokens, case.layout, noisy_copies=1, clean=True, rows=case.masked).nll(
        case.x0[:, None][case.masked]
    )
    assert (loss.double() - wanted).abs().max() < 0.5


def test_untrained_loss_is_near_the_logarithm_of_the_vocabulary(build, make_case):
    """The quickstart's width and deviation: within 3% of ln V before training."""
    from bdtrain.diffusion.visibility import build_layout
    from bdtrain.model.transformer import assemble_streams

    model = build(
        hidden_size=192,
        num_heads=6,
        num_kv_heads=6,
        head_dim=32,
        ffn_size=512,
        vocab_size=2048,
        vocab_multiple=128,
        init_std=0.02,
        dtype=torch.float32,
        jitter=False,
    )
    x0 = torch.randint(6, 2048, (2, 64), generator=torch.Generator().manual_seed(0))
    layout = build_layout(torch.zeros(2, 64, dtype=torch.int32), 16, isolate=True)
    tokens = assemble_streams(torch.full_like(x0, 4)[:, None], x0)
    rows = torch.ones(2, 1, 64, dtype=torch.bool)
    loss = model(tokens, layout, noisy_copies=1, clean=True, rows=rows).nll(x0.flatten()).mean().item()
    assert loss == pytest.approx(torch.tensor(2047.0).log().item(), rel=0.03)


@pytest.mark.parametrize("shape", ["qwen3", "bd3lm"])
def test_the_parameter_estimate_of_the_configuration_is_exact(build, shape):
    from bdtrain.config.estimate import count_parameters

    model = build(shape, num_layers=3)
    estimate = count_parameters(tiny_model_config(shape, num_layers=3), vocab_size=29)
    assert estimate.total == sum(parameter.numel() for parameter in model.parameters())
    vocabulary = sum(
        p.numel() for name, p in model.named_parameters() if name.startswith(("embedding", "output"))
    )
    assert estimate.embedding == vocabulary


def test_the_small_preset_has_the_size_of_the_papers_model():
    """12 layers of 768 channels, and 50258 tokens (GPT-2's and [MASK]) embedded once: 110M class."""
    from bdtrain.config.estimate import count_parameters

    section = tiny_model_config(
        num_layers=12, hidden_size=768, num_heads=12, num_kv_heads=12, head_dim=64, ffn_size=None
    )
    count = count_parameters(section, vocab_size=50258)
    assert 80e6 < count.layers < 90e6
    assert 115e6 < count.layers + count.embedding / 2 < 130e6


@pytest.mark.parametrize("shape", ["qwen3", "bd3lm"])
def test_no_module_hands_out_a_parameter(build, make_case, shape):
    """ZeRO stage 3 would leave it gathered, with values that go stale."""
    from bdtrain.model.transformer import assemble_streams

    model, case, handed_out = build(shape), make_case(), []

    def look(name, output):
        outputs = output if isinstance(output, tuple) else (output,)
        handed_out.extend(name for value in outputs if isinstance(value, torch.nn.Parameter))

    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, __, output, name=name: look(name, output))
    tokens = assemble_streams(case.xt, case.x0)
    model(tokens, case.layout, noisy_copies=1, clean=True, rows=case.masked).logits()
    assert handed_out == []
