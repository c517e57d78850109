"""Norm and rotation of heads: torch's form against complex numbers in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bdtrain_kernels import BackendUnavailableError, KernelShapeError
from bdtrain_kernels.rotary import reference_rotation, rotate_heads
from tests.kernels.rotary_cases import CASES, HeadCase, expected_gradients

# What one rounding of the result gives, over many numbers.
ROUNDING = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}


def error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("normed", [True, False], ids=["normed", "plain"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", ROUNDING)
def test_torchs_form_rounds_its_results_and_nothing_on_the_way(
    case: HeadCase, dtype: torch.dtype, normed: bool
) -> None:
    x, cos, sin, weight, grad = case.tensors(dtype, normed=normed)
    out = rotate_heads(x, cos, sin, weight, backend="torch")
    assert out.dtype == dtype
    wanted, wanted_grads = expected_gradients(x, cos, sin, weight, grad)
    assert error(out, wanted) < ROUNDING[dtype]
    found = torch.autograd.grad(out, (x, weight) if normed else (x,), grad)
    for ours, reference in zip(found, wanted_grads, strict=True):
        assert ours.dtype == dtype
        assert error(ours, reference) < 2 * ROUNDING[dtype]


def test_the_definition_turns_pairs_by_their_angle() -> None:
    # Two pairs, at 90 and 180 degrees: (a, c) -> (-c, a) and (b, d) -> (-b, -d); mean square 30 / 4.
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
    cos, sin = torch.tensor([[[0.0, -1.0]]]), torch.tensor([[[1.0, 0.0]]])
    assert reference_rotation(x, cos, sin).flatten().tolist() == [-3, -2, 1, -4]
    weight = torch.tensor([1.0, 1.0, 2.0, 1.0])
    normed = reference_rotation(x, cos, sin, weight, eps=0.5).flatten()
    torch.testing.assert_close(normed, torch.tensor([-6, -2, 1, -4]).double() / 8**0.5)


@pytest.mark.parametrize("normed", [True, False], ids=["normed", "plain"])
def test_gradcheck_of_torchs_form(normed: bool) -> None:
    case = HeadCase("gradcheck", seq=3, batch=2, groups=2, heads=2, dim=6, table_rows=2)
    x, cos, sin, weight, _ = case.tensors(torch.float64, normed=normed)
    x = x.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *given: rotate_heads(given[0], cos, sin, *given[1:], eps=1e-3),
        (x, weight) if normed else (x,),
    )


@pytest.mark.parametrize("normed", [True, False], ids=["normed", "plain"])
def test_a_second_derivative_is_refused(normed: bool) -> None:
    x, cos, sin, weight, _ = CASES[1].tensors(torch.float64, normed=normed)
    out = rotate_heads(x, cos, sin, weight, backend="torch")
    (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.square().sum().backward()


def test_attention_gets_its_own_order_and_backward_keeps_no_copy() -> None:
    case = HeadCase("layout", seq=7, batch=2, groups=2, heads=3, dim=8)
    x, cos, sin, weight, _ = case.tensors(torch.float32, normed=True)
    given = {t.untyped_storage().data_ptr() for t in (x, cos, sin, weight)}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = rotate_heads(x, cos, sin, weight)
    assert out.permute(1, 2, 0, 3).is_contiguous()
    copies = [t for t in kept if t.untyped_storage().data_ptr() not in given]
    # 1 / rms: a number per position, row of the batch and head.
    assert [t.numel() for t in copies] == [7 * 2 * 6]
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rotate_heads(x, cos, sin)
    assert {t.untyped_storage().data_ptr() for t in kept} == {
        t.untyped_storage().data_ptr() for t in (cos, sin)
    }


def test_backward_has_the_same_bits_each_time() -> None:
    x, cos, sin, weight, grad = CASES[0].tensors(torch.float32, normed=True)
    first, second = (
        torch.autograd.grad(rotate_heads(x, cos, sin, weight), (x, weight), grad) for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


def test_the_weight_may_be_away_between_forward_and_backward() -> None:
    # As ZeRO stage 3 frees a parameter after its module's forward and gathers it again before backward.
    x, cos, sin, weight, grad = CASES[0].tensors(torch.float32, normed=True)
    wanted = torch.autograd.grad(rotate_heads(x, cos, sin, weight, backend="torch"), (x, weight), grad)
    out = rotate_heads(x, cos, sin, weight, backend="torch")
    whole = weight.data
    weight.data = torch.empty(0)
    weight.data = whole.clone()
    whole.fill_(torch.nan)
    assert all(map(torch.equal, torch.autograd.grad(out, (x, weight), grad), wanted))


def test_the_reference_is_a_backend_that_keeps_the_layout() -> None:
    x, cos, sin, weight, _ = CASES[0].tensors(torch.float32, normed=True)
    out = rotate_heads(x, cos, sin, weight, backend="reference")
    assert out.dtype == torch.float32
    assert out.stride() == rotate_heads(x, cos, sin, weight).stride()


def test_what_does_not_fit_is_refused() -> None:
    x, cos, sin, weight, _ = HeadCase("", seq=3, batch=2, groups=1, heads=2, dim=8).tensors(
        torch.float64, normed=True
    )
    with pytest.raises(KernelShapeError, match="an even head_dim"):
        rotate_heads(x[..., :7], cos, sin)
    with pytest.raises(KernelShapeError, match=r"head_dim / 2\] = \(3, 2, 4\) or \(3, 1, 4\)"):
        rotate_heads(x, cos[:2], sin[:2])
    with pytest.raises(KernelShapeError, match=r"weight \(7,\)"):
        rotate_heads(x, cos, sin, weight[:7])
    with pytest.raises(KernelShapeError, match="above 0"):
        rotate_heads(x, cos, sin, weight, eps=0)
    with pytest.raises(BackendUnavailableError, match="computes in float32"):
        rotate_heads(x, cos, sin, backend="triton")
    with pytest.raises(BackendUnavailableError, match="does not exist here"):
        rotate_heads(x, cos, sin, backend="fast")
