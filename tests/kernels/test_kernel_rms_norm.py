"""RMS norm: both forms against float64, and what they keep."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bdtrain_kernels import BackendUnavailableError, KernelShapeError
from bdtrain_kernels.rms_norm import reference_rms_norm, rms_norm

ROUNDING = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("backend", ["torch", "library"])
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("shape", [(600, 3, 48), (1, 2), (7,)])
def test_both_forms_round_their_results_and_nothing_on_the_way(
    shape: tuple[int, ...], dtype: torch.dtype, backend: str
) -> None:
    x = (3 * draw(*shape)).to(dtype).requires_grad_()
    weight = (1 + 0.3 * draw(shape[-1], seed=1)).to(dtype).requires_grad_()
    # With a mean, which a sum in 16 bits could not hold.
    grad = (0.3 + draw(*shape, seed=2)).to(dtype)
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    out, wanted = rms_norm(x, weight, eps=1e-6, backend=backend), reference_rms_norm(*exact, eps=1e-6)
    assert out.dtype == dtype
    assert error(out, wanted) < ROUNDING[dtype]
    found = torch.autograd.grad(out, (x, weight), grad)
    for ours, reference in zip(found, torch.autograd.grad(wanted, exact, grad.double()), strict=True):
        assert ours.dtype == dtype
        assert error(ours, reference) < 3 * ROUNDING[dtype]


def test_the_definition_by_hand() -> None:
    x = torch.tensor([1.0, 7.0], dtype=torch.float64)
    assert reference_rms_norm(x, torch.tensor([1.0, 2.0]), eps=0).tolist() == pytest.approx([0.2, 2.8])


def test_gradcheck_of_the_cpu_form() -> None:
    given = (draw(3, 2, 5).requires_grad_(), draw(5, seed=1).requires_grad_())
    assert torch.autograd.gradcheck(lambda *xs: rms_norm(*xs, eps=1e-3), given)


def test_a_second_derivative_of_the_cpu_form_is_refused() -> None:
    x, weight = draw(3, 2, 5).requires_grad_(), draw(5, seed=1).requires_grad_()
    out = rms_norm(x, weight, eps=1e-3, backend="torch")
    first = torch.autograd.grad(out.square().sum(), (x, weight), create_graph=True)
    for gradient in first:
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.square().sum().backward(retain_graph=True)


def test_a_cpu_keeps_the_input_and_a_number_per_row() -> None:
    x, weight = draw(4, 3, 8).bfloat16().requires_grad_(), torch.ones(8).bfloat16().requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rms_norm(x, weight, eps=1e-6)
    given = {x.data_ptr(), weight.data_ptr()}
    assert [t.numel() for t in kept if t.data_ptr() not in given] == [12]


def test_what_does_not_fit_is_refused() -> None:
    x = torch.zeros(3, 8)
    with pytest.raises(KernelShapeError, match="the last axis of x"):
        rms_norm(x, torch.ones(7), eps=1e-6)
    with pytest.raises(KernelShapeError, match="the dtype"):
        rms_norm(x, torch.ones(8, dtype=torch.float64), eps=1e-6)
    with pytest.raises(BackendUnavailableError, match="does not exist here"):
        rms_norm(x, torch.ones(8), eps=1e-6, backend="triton")
