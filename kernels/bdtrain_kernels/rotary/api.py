"""The one public function: which form runs."""

from __future__ import annotations

import torch
from torch import Tensor

from bdtrain_kernels.dispatch import announce, check_backend, triton_missing
from bdtrain_kernels.errors import KernelShapeError
from bdtrain_kernels.rotary.reference import reference_rotation
from bdtrain_kernels.rotary.torch_form import torch_rotation

KERNEL = "rotate_heads"
LARGEST_HEAD_DIM = 256


def rotate_heads(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """Normalise each head, if there is a weight, and turn it by its position.

    One pass forward and one backward. Kept for backward are ``x`` as it is given (a view of the fused
    projection, no copy), the table, and a number per head and row in the torch form; without a weight only
    the table. The gradient of the weight is summed in a fixed order.

    Args:
        x: queries or keys, [seq, batch, heads, head_dim], or [seq, batch, groups, heads per group, head_dim]
            as they lie in the fused projection; any strides; head_dim is even.
        cos: cosines of the angles, [seq, batch or 1, head_dim / 2]; no gradient flows to it.
        sin: sines, like ``cos``.
        weight: of the RMS norm over head_dim, [head_dim]; None for the rotation alone.
        eps: added to the mean square; above 0.
        backend: "triton", "torch" (any device), "reference" (float64, slow), or "auto": triton where it runs
            on a GPU, else torch.

    Returns:
        [seq, batch, heads, head_dim] in the dtype of ``x``; in memory the axes lie as [batch, heads, seq,
        head_dim], the order attention reads.

    Raises:
        KernelShapeError: if the shapes do not fit each other.
        BackendUnavailableError: if the backend is not there or cannot run this case.

    Source: arXiv 2104.09864 (RoFormer), equation 34, with the pairs split by halves.
    """
    _check(x, cos, sin, weight, eps)
    missing = _triton_reason(x)
    check_backend(KERNEL, backend, {"triton": missing, "torch": "", "reference": ""})
    if backend == "auto":
        backend = "triton" if x.is_cuda and not missing else "torch"
        announce(KERNEL, backend, f"auto: {x.device.type}" + (f", no Triton: {missing}" if missing else ""))
    else:
        announce(KERNEL, backend, "forced")
    grouped = x if x.dim() == 5 else x.unsqueeze(3)
    if backend == "triton":
        # Registers operators and needs triton, so not before someone asks for it.
        from bdtrain_kernels.rotary.triton_backend import rotate_heads_op

        rotated: Tensor = rotate_heads_op(grouped, cos, sin, weight, eps)
    elif backend == "reference":
        rotated = _by_heads(reference_rotation(grouped, cos, sin, weight, eps=eps).to(x.dtype))
    else:
        rotated = torch_rotation(grouped, cos, sin, weight, eps)
    return rotated


def _by_heads(x: Tensor) -> Tensor:
    return x.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)


def _triton_reason(x: Tensor) -> str:
    """Why the Triton form cannot run, or ""."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it computes in float32, the tensors are {x.dtype}"
    if x.shape[-1] > LARGEST_HEAD_DIM:
        return f"head_dim is {x.shape[-1]}, the largest is {LARGEST_HEAD_DIM}"
    return triton_missing(x.device)


def _check(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float) -> None:
    if x.dim() not in (4, 5) or x.shape[-1] % 2:
        raise KernelShapeError(
            f"x {tuple(x.shape)}; it must be [seq, batch, heads, head_dim] or [seq, batch, groups, heads per "
            "group, head_dim] with an even head_dim"
        )
    seq, batch, half = x.shape[0], x.shape[1], x.shape[-1] // 2
    if cos.shape != sin.shape or tuple(cos.shape) not in ((seq, batch, half), (seq, 1, half)):
        raise KernelShapeError(
            f"cos {tuple(cos.shape)}, sin {tuple(sin.shape)}; both must be [seq, batch or 1, head_dim / 2] = "
            f"{(seq, batch, half)} or {(seq, 1, half)}"
        )
    if weight is not None and tuple(weight.shape) != (2 * half,):
        raise KernelShapeError(f"weight {tuple(weight.shape)}; it must be [head_dim] = {(2 * half,)}")
    if eps <= 0:
        raise KernelShapeError(f"eps={eps}; it must be above 0, or a row of zeros has no norm")
