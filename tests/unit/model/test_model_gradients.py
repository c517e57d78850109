"""Gradients of 16-bit parameters: of one micro-batch, and of the sum over many."""

import pytest
import torch

from bdtrain.model.embedding import _Lookup
from bdtrain.model.gradients import partial_gradient_parameters
from bdtrain.model.norm import LayerNorm, RMSNorm
from bdtrain.model.transformer import assemble_streams
from bdtrain_kernels import masked_cross_entropy

ROUNDING = 2.0**-8
"""Largest relative rounding of a bfloat16 number."""


def relative(found, wanted):
    """Relative L2 difference."""
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


def losses(build, make_case, shape, *, plain=False):
    """A bfloat16 model and its 64 losses, one function each."""
    model = build(shape, dtype=torch.bfloat16)
    if plain:
        for parameter in model.parameters():
            parameter.grad_dtype = torch.bfloat16
    cases = [make_case(seed=seed) for seed in range(64)]

    def loss(case):
        tokens = assemble_streams(case.xt, case.x0)
        view = model(tokens, case.layout, noisy_copies=1, clean=True, rows=case.masked)
        return view.nll(case.targets[case.masked]).sum()

    return model, [lambda case=case: loss(case) for case in cases]


def accumulated_errors(build, make_case, shape, *, plain=False):
    """Error of each .grad after 64 backward passes against a float64 sum of the 64 gradients."""
    model, steps = losses(build, make_case, shape, plain=plain)
    wanted = {name: 0.0 for name, _ in model.named_parameters()}
    for step in steps:
        step().backward()
        for name, parameter in model.named_parameters():
            wanted[name] = wanted[name] + parameter.grad.double()
            parameter.grad = None
    for step in steps:
        step().backward()
    return {name: relative(p.grad, wanted[name]) for name, p in model.named_parameters()}


@pytest.mark.parametrize("shape", ["qwen3", "bd3lm"])
def test_64_gradients_of_bfloat16_parameters_add_up_with_float32_rounding(build, make_case, shape):
    errors = accumulated_errors(build, make_case, shape)
    assert max(errors.values()) < 64 * 2.0**-24, errors


def test_without_the_float32_sum_the_same_gradients_lose_digits(build, make_case):
    errors = accumulated_errors(build, make_case, "qwen3", plain=True)
    assert min(errors.values()) > 2.0**-10, errors


@pytest.mark.parametrize(
    ("dtype", "wanted"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)]
)
def test_gradients_keep_at_least_the_parameters_precision(build, make_case, dtype, wanted):
    case = make_case()
    model = build(dtype=dtype)
    tokens = assemble_streams(case.xt, case.x0)
    view = model(tokens, case.layout, noisy_copies=1, clean=True, rows=case.masked)
    view.nll(case.targets[case.masked]).sum().backward()
    assert {parameter.grad.dtype for parameter in model.parameters()} == {wanted}


def test_norms_of_queries_and_keys_are_partial_on_any_number_of_ranks(build):
    model = build()
    marked = {id(parameter) for parameter in partial_gradient_parameters(model)}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in marked}
    kinds = ("q_layernorm", "k_layernorm")
    layers = range(len(model.decoder.layers))
    assert names == {f"decoder.layers.{n}.self_attention.{kind}.weight" for n in layers for kind in kinds}


def test_a_model_without_norms_of_queries_and_keys_has_no_partial_gradient(build):
    assert partial_gradient_parameters(build("bd3lm")) == []


@pytest.mark.parametrize("norm", [RMSNorm, LayerNorm])
def test_a_bfloat16_norm_rounds_its_results_and_nothing_on_the_way(build, norm):
    low, exact = (norm(build(dtype=dtype).config, 768, 1e-6) for dtype in (torch.bfloat16, torch.float64))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        low.weight.copy_(1 + 0.2 * torch.randn(768, generator=generator))
    exact.load_state_dict(low.state_dict())
    x = (3 * torch.randn(4096, 768, generator=generator)).bfloat16().requires_grad_()
    wide = x.detach().double().requires_grad_()
    # With a mean, as the gradients of a bias have: that is what a 16-bit sum cannot hold.
    grad = (torch.randn(4096, 768, generator=generator) + 0.3).bfloat16()
    ours, wanted = low(x), exact(wide)
    ours.backward(grad)
    wanted.backward(grad.double())
    assert ours.dtype == torch.bfloat16
    assert relative(ours, wanted) < ROUNDING
    assert relative(x.grad, wide.grad) < ROUNDING
    for parameter, reference in zip(low.parameters(), exact.parameters(), strict=True):
        assert relative(parameter.grad, reference.grad) < ROUNDING


@pytest.mark.parametrize("shared", [False, True])
def test_thousands_of_masked_rows_leave_the_embeddings_gradient_exact(shared):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 64, generator=generator).bfloat16().requires_grad_()
    weight.grad_dtype = torch.float32
    index = torch.randint(0, 32, (64, 64), generator=generator)
    index[:32] = 4
    mine = torch.rand(64, 64, generator=generator) < 0.7 if shared else None
    grad = (torch.randn(64, 64, 64, generator=generator) + 0.3).bfloat16()
    found = _Lookup.apply(weight, index, mine)
    found.backward(grad)
    kept = torch.ones(64, 64, 1) if mine is None else mine.unsqueeze(-1)
    assert found.equal(weight.detach()[index] * kept)
    wanted = torch.zeros(32, 64, dtype=torch.float64)
    wanted.index_add_(0, index.flatten(), (grad.double() * kept).flatten(0, 1))
    assert relative(weight.grad, wanted) < 1e-6


@pytest.mark.parametrize("announced", [True, False])
def test_the_heads_gradient_of_one_micro_batch_is_as_good_as_bfloat16(announced):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2000, 64, generator=generator).bfloat16().requires_grad_()
    weight = (0.1 * torch.randn(512, 64, generator=generator)).bfloat16().requires_grad_()
    bias = torch.zeros(512).bfloat16().requires_grad_()
    targets = torch.randint(5, 500, (2000,), generator=generator)
    row_weights = torch.rand(2000, generator=generator)
    answers = []
    for dtype in (torch.bfloat16, torch.float64):
        given = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight, bias)]
        announce = row_weights if announced and dtype == torch.bfloat16 else None
        nll = masked_cross_entropy(
            *given, targets, excluded=[4], vocab_size=500, row_weights=announce, chunk_rows=64
        )
        (nll * row_weights).sum().backward()
        answers.append([x.grad for x in given])
    for found, wanted in zip(*answers, strict=True):
        assert relative(found, wanted) < ROUNDING


def test_two_uses_of_the_fused_projection_round_like_one(build):
    """The last layer multiplies by the whole weight and by a slice of it."""
    generator = torch.Generator().manual_seed(0)
    attention = build(dtype=torch.bfloat16).decoder.layers[-1].self_attention
    linear = attention.linear_qkv
    rows = torch.randn(512, 2, 32, generator=generator).bfloat16()
    fused, rest = linear(rows, query_rows=256)
    fused_grad, rest_grad = (
        (torch.randn(x.shape, generator=generator) + 0.3).bfloat16() for x in (fused, rest)
    )
    torch.autograd.backward((fused, rest), (fused_grad, rest_grad))
    padded = torch.zeros(256, 2, *fused.shape[2:], dtype=torch.float64).unflatten(-1, (2, 4, 8))
    padded[..., 2:, :] = rest_grad.double().unflatten(-1, (2, 2, 8))
    whole = torch.cat((fused_grad.double(), padded.flatten(2)))
    wanted = torch.einsum("sbo,sbi->oi", whole, rows.double())
    assert relative(linear.weight.grad, wanted) < ROUNDING
