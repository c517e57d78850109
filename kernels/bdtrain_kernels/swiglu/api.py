"""The one public function: which form runs."""

from __future__ import annotations

import torch
from torch import Tensor

from bdtrain_kernels.dispatch import announce, check_backend, triton_missing
from bdtrain_kernels.errors import KernelShapeError
from bdtrain_kernels.swiglu.reference import reference_swiglu
from bdtrain_kernels.swiglu.torch_form import torch_swiglu

KERNEL = "swiglu"


def swiglu(x: Tensor, *, backend: str = "auto") -> Tensor:
    """silu(gate) * up in one pass; backward makes everything again from ``x``, the only tensor it keeps.

    Args:
        x: result of the first projection, [..., 2 ffn]: the gate, then what it opens.
        backend: "triton", "torch" (any device), "reference" (float64, slow), or "auto": triton where it runs
            on a GPU, else torch.

    Returns:
        [..., ffn] in the dtype of ``x``, contiguous.

    Raises:
        KernelShapeError: if the last axis is odd.
        BackendUnavailableError: if the backend is not there or cannot run this case.

    Source: arXiv 2002.05202, equation 6, without biases.
    """
    if x.dim() == 0 or x.shape[-1] % 2:
        raise KernelShapeError(f"x {tuple(x.shape)}; its last axis holds gate and value, so it must be even")
    missing = _triton_reason(x)
    check_backend(KERNEL, backend, {"triton": missing, "torch": "", "reference": ""})
    if backend == "auto":
        backend = "triton" if x.is_cuda and not missing else "torch"
        announce(KERNEL, backend, f"auto: {x.device.type}" + (f", no Triton: {missing}" if missing else ""))
    else:
        announce(KERNEL, backend, "forced")
    if backend == "triton":
        # Registers operators and needs triton, so not before someone asks for it.
        from bdtrain_kernels.swiglu.triton_backend import swiglu_op

        activated: Tensor = swiglu_op(x)
    elif backend == "reference":
        activated = reference_swiglu(x).to(x.dtype)
    else:
        activated = torch_swiglu(x)
    return activated


def _triton_reason(x: Tensor) -> str:
    """Why the Triton form cannot run, or ""."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it computes in float32, the tensors are {x.dtype}"
    return triton_missing(x.device)
