"""The Triton form of SwiGLU, under the interpreter on a CPU, on the device where there is one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bdtrain_kernels.swiglu import reference_swiglu, swiglu
from tests.kernels.kernel_cases import DEVICE, DTYPES

ROUNDING = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.to(DEVICE, dtype)


def error(found: Tensor, expected: Tensor) -> float:
    return ((found.double().cpu() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 3, 48), (1, 2), (7, 194), (3, 2 * 1024), (2, 2 * 1025)])
def test_the_triton_form_rounds_its_results_and_nothing_on_the_way(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = (3 * draw(*shape, dtype=dtype)).requires_grad_()
    grad = draw(*shape[:-1], shape[-1] // 2, dtype=dtype, seed=1)
    wide = x.detach().double().cpu().requires_grad_()
    out, wanted = swiglu(x, backend="triton"), reference_swiglu(wide)
    assert out.dtype == dtype
    assert error(out, wanted) < ROUNDING[dtype]
    out.backward(grad)
    wanted.backward(grad.double().cpu())
    assert error(x.grad, wide.grad) < 2 * ROUNDING[dtype]


def test_views_and_expanded_gradients_are_taken_as_they_are() -> None:
    wide = draw(6, 20).requires_grad_()
    part = wide[:, 4:16]
    out = swiglu(part, backend="triton")
    assert torch.equal(out, swiglu(part.contiguous(), backend="triton"))
    (found,) = torch.autograd.grad(out.sum(), wide)
    copy = wide.detach().double().cpu().requires_grad_()
    (wanted,) = torch.autograd.grad(reference_swiglu(copy[:, 4:16]).sum(), copy)
    assert error(found, wanted) < 1e-6


def test_large_gates_neither_overflow_nor_lose_their_gradient() -> None:
    x = torch.tensor([[-200.0, 200.0, 0.5, 0.5]], device=DEVICE, requires_grad=True)
    swiglu(x, backend="triton").sum().backward()
    assert x.grad.tolist() == [[0.0, 0.5, 0.0, 200.0]]


def test_no_rows_give_no_result() -> None:
    x = draw(0, 8).requires_grad_()
    out = swiglu(x, backend="triton")
    out.sum().backward()
    assert (out.shape, x.grad.shape) == ((0, 4), (0, 8))


def test_only_the_input_is_kept_and_backward_has_the_same_bits() -> None:
    x = draw(4, 12).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = swiglu(x, backend="triton")
    assert {t.data_ptr() for t in kept} == {x.data_ptr()}
    grads = [torch.autograd.grad(out.square().sum(), x, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*grads)


def test_the_operator_is_one_that_compilers_understand() -> None:
    from bdtrain_kernels.swiglu.triton_backend import swiglu_op

    torch.library.opcheck(swiglu_op, (draw(3, 2, 12).requires_grad_(),))
