"""The one public function: which form runs."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from bdtrain_kernels.dispatch import announce, check_backend
from bdtrain_kernels.errors import KernelShapeError
from bdtrain_kernels.rms_norm.reference import reference_rms_norm
from bdtrain_kernels.rms_norm.torch_form import torch_rms_norm

KERNEL = "rms_norm"


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, backend: str = "auto") -> Tensor:
    """RMS norm over the last axis, rounded once: x / sqrt(mean(x^2) + eps) * weight.

    Args:
        x: [..., hidden].
        weight: [hidden], of the same dtype.
        eps: added to the mean square.
        backend: "library" (torch's own, one kernel forward on CUDA), "torch" (few passes of torch's
            operators, any device), "reference" (float64, slow), or "auto": library on a GPU, torch on a CPU,
            where the library's is a chain of eight operators.

    Returns:
        The shape and dtype of ``x``.

    Raises:
        KernelShapeError: if shapes or dtypes do not fit each other.
        BackendUnavailableError: if the backend does not exist.
    """
    if x.dim() == 0 or weight.shape != x.shape[-1:] or weight.dtype != x.dtype:
        raise KernelShapeError(
            f"x {x.dtype} {tuple(x.shape)}, weight {weight.dtype} {tuple(weight.shape)}; weight must have "
            "the dtype and the last axis of x"
        )
    check_backend(KERNEL, backend, dict.fromkeys(("library", "torch", "reference"), ""))
    if backend == "auto":
        backend = "torch" if x.device.type == "cpu" else "library"
        announce(KERNEL, backend, f"auto: {x.device.type}")
    else:
        announce(KERNEL, backend, "forced")
    if backend == "library":
        normed: Tensor = F.rms_norm(x, weight.shape, weight, eps)
    elif backend == "reference":
        normed = reference_rms_norm(x, weight, eps=eps).to(x.dtype)
    else:
        normed = torch_rms_norm(x, weight, eps)
    return normed
