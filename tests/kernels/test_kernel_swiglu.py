"""SwiGLU: torch's form against float64, and what it keeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bdtrain_kernels import BackendUnavailableError, KernelShapeError
from bdtrain_kernels.swiglu import reference_swiglu, swiglu

# silu and the product are rounded each.
ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("shape", [(5, 3, 48), (1, 2), (7, 194)])
def test_torchs_form_is_the_definition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (3 * draw(*shape, dtype=dtype)).requires_grad_()
    grad = draw(*shape[:-1], shape[-1] // 2, dtype=dtype, seed=1)
    wide = x.detach().double().requires_grad_()
    out, wanted = swiglu(x), reference_swiglu(wide)
    assert out.dtype == dtype
    assert error(out, wanted) < ROUNDING[dtype]
    out.backward(grad)
    wanted.backward(grad.double())
    assert error(x.grad, wide.grad) < 2 * ROUNDING[dtype]


def test_the_definition_by_hand() -> None:
    # The logistic function of ln 3 is 3 / 4.
    x = torch.tensor([0.0, torch.tensor(3.0, dtype=torch.float64).log(), 7.0, 2.0], dtype=torch.float64)
    assert reference_swiglu(x).tolist() == pytest.approx([0, 1.5 * x[1].item()])


def test_gradcheck_of_torchs_form() -> None:
    assert torch.autograd.gradcheck(swiglu, (draw(4, 10, dtype=torch.float64).requires_grad_(),))


def test_a_second_derivative_is_refused() -> None:
    x = draw(4, 10).requires_grad_()
    (first,) = torch.autograd.grad(swiglu(x, backend="torch").square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.square().sum().backward()


def test_a_view_of_a_wider_tensor_is_taken_as_it_is() -> None:
    wide = draw(6, 20)
    assert torch.equal(swiglu(wide[:, 4:16]), swiglu(wide[:, 4:16].contiguous()))


def test_large_gates_neither_overflow_nor_lose_their_gradient() -> None:
    x = torch.tensor([[-200.0, 200.0, 0.5, 0.5]], requires_grad=True)
    swiglu(x).sum().backward()
    assert x.grad.tolist() == [[0.0, 0.5, 0.0, 200.0]]


def test_only_the_input_is_kept() -> None:
    x = draw(4, 12).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        swiglu(x)
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(KernelShapeError, match="must be even"):
        swiglu(torch.zeros(3, 5))
    with pytest.raises(BackendUnavailableError, match="computes in float32"):
        swiglu(torch.zeros(3, 4, dtype=torch.float64), backend="triton")
    with pytest.raises(BackendUnavailableError, match="does not exist here"):
        swiglu(torch.zeros(3, 4), backend="fast")
