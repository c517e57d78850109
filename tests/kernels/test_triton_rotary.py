"""The Triton form of norm and rotation, under the interpreter on a CPU, on the device where there is one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bdtrain_kernels.rotary import rotate_heads
from tests.kernels.kernel_cases import DEVICE, DTYPES
from tests.kernels.rotary_cases import CASES, HeadCase, expected_gradients

ROUNDING = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}


def run(case: HeadCase, dtype: torch.dtype, normed: bool) -> tuple[Tensor, tuple[Tensor, ...], tuple]:
    """Result, its gradients, and what went in."""
    given = case.tensors(dtype, normed=normed, device=DEVICE)
    x, cos, sin, weight, grad = given
    out = rotate_heads(x, cos, sin, weight, backend="triton")
    return out, torch.autograd.grad(out, (x, weight) if normed else (x,), grad), given


def error(found: Tensor, expected: Tensor) -> float:
    return ((found.double().cpu() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("normed", [True, False], ids=["normed", "plain"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_triton_form_rounds_its_results_and_nothing_on_the_way(
    case: HeadCase, dtype: torch.dtype, normed: bool
) -> None:
    out, found, given = run(case, dtype, normed)
    assert out.dtype == dtype
    assert out.permute(1, 2, 0, 3).is_contiguous()
    wanted, wanted_grads = expected_gradients(*given)
    assert error(out, wanted) < ROUNDING[dtype]
    for ours, reference in zip(found, wanted_grads, strict=True):
        assert ours.dtype == dtype
        assert error(ours, reference) < 2 * ROUNDING[dtype]


def test_backward_has_the_same_bits_each_time() -> None:
    first, second = (run(CASES[0], torch.float32, True) for _ in range(2))
    assert all(map(torch.equal, (first[0], *first[1]), (second[0], *second[1])))


def test_the_weight_may_be_away_between_forward_and_backward() -> None:
    # As ZeRO stage 3 frees a parameter after its module's forward and gathers it again before backward.
    x, cos, sin, weight, grad = CASES[0].tensors(torch.float32, normed=True, device=DEVICE)
    wanted = torch.autograd.grad(rotate_heads(x, cos, sin, weight, backend="triton"), (x, weight), grad)
    out = rotate_heads(x, cos, sin, weight, backend="triton")
    whole = weight.data
    weight.data = torch.empty(0, device=DEVICE)
    weight.data = whole.clone()
    whole.fill_(torch.nan)
    assert all(map(torch.equal, torch.autograd.grad(out, (x, weight), grad), wanted))


def test_no_rows_give_no_result_and_no_gradient() -> None:
    case = HeadCase("empty", seq=0, batch=2, groups=2, heads=2, dim=8)
    out, (grad_x, grad_weight), _ = run(case, torch.float32, True)
    assert (out.shape, grad_x.shape) == ((0, 2, 4, 8), (0, 2, 2, 2, 8))
    assert torch.equal(grad_weight, torch.zeros_like(grad_weight))


def test_a_gradient_without_strides_is_taken() -> None:
    x, cos, sin, weight, _ = CASES[1].tensors(torch.float32, normed=True, device=DEVICE)
    out = rotate_heads(x, cos, sin, weight, backend="triton")
    found = torch.autograd.grad(out.sum(), (x, weight))
    _, wanted = expected_gradients(x, cos, sin, weight, torch.ones_like(out))
    assert all(error(a, b) < 2e-6 for a, b in zip(found, wanted, strict=True))


def test_backward_keeps_nothing_that_was_not_given() -> None:
    for normed in (True, False):
        x, cos, sin, weight, _ = CASES[0].tensors(torch.float32, normed=normed, device=DEVICE)
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # noqa: B023
            rotate_heads(x, cos, sin, weight, backend="triton")
        wanted = {t.untyped_storage().data_ptr() for t in ((x, cos, sin, weight) if normed else (cos, sin))}
        assert {t.untyped_storage().data_ptr() for t in kept} == wanted


@pytest.mark.parametrize("which", ["cos", "sin", "both"])
def test_tables_may_be_views_with_strides_of_their_own(which: str) -> None:
    case = HeadCase("views", seq=8, batch=2, groups=1, heads=2, dim=16, table_rows=2)
    x, cos, sin, weight, grad = case.tensors(torch.float32, normed=True, device=DEVICE)

    def view(table: Tensor, *, name: str, wide: int) -> Tensor:
        if which not in (name, "both"):
            return table
        room = torch.full((*table.shape[:2], wide), torch.nan, device=DEVICE)
        room[..., : table.shape[2]] = table
        return room[..., : table.shape[2]]

    cos, sin = view(cos, name="cos", wide=16), view(sin, name="sin", wide=24)
    out = rotate_heads(x, cos, sin, weight, backend="triton")
    wanted, wanted_grads = expected_gradients(x, cos, sin, weight, grad)
    assert error(out, wanted) < ROUNDING[torch.float32]
    for ours, reference in zip(torch.autograd.grad(out, (x, weight), grad), wanted_grads, strict=True):
        assert error(ours, reference) < 2 * ROUNDING[torch.float32]


@pytest.mark.parametrize("normed", [True, False], ids=["normed", "plain"])
def test_a_second_derivative_is_refused(normed: bool) -> None:
    x, cos, sin, weight, _ = CASES[1].tensors(torch.float32, normed=normed, device=DEVICE)
    out = rotate_heads(x, cos, sin, weight, backend="triton")
    (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        first.square().sum().backward()


def test_the_operator_is_one_that_compilers_understand() -> None:
    from bdtrain_kernels.rotary.triton_backend import rotate_heads_op

    for normed in (True, False):
        case = HeadCase("op", seq=5, batch=2, groups=2, heads=2, dim=8)
        x, cos, sin, weight, _ = case.tensors(torch.float32, normed=normed, device=DEVICE)
        torch.library.opcheck(rotate_heads_op, (x.detach().requires_grad_(), cos, sin, weight, 1e-6))
