"""Which backend can run what, said before anything is computed."""

from __future__ import annotations

import torch

from bdtrain_kernels.dispatch import check_backend, triton_missing

KERNEL = "block_attention"

TRITON_HEAD_DIMS = (16, 256)
"""Smallest and largest head_dim: tensor cores want 16, and beyond 256 a tile does not fit a program."""

FLASH_HEAD_DIM = 256

TRITON_TYPES = (torch.float32, torch.float16, torch.bfloat16)


def backend_reasons(
    device: torch.device, *, head_dim: int | None = None, dtype: torch.dtype | None = None
) -> dict[str, str]:
    """Every backend, and why it cannot run here.

    Args:
        device: of the tensors.
        head_dim: channels of a head, where known.
        dtype: of the tensors, where known.

    Returns:
        Name -> "" where it can run, else the reason.
    """
    on_cpu, on_cuda = device.type == "cpu", device.type == "cuda"
    need_cuda = "" if on_cuda or on_cpu else f"it needs CUDA or a CPU, the tensors are on {device}"
    return {
        "dense": "",
        "tree": "" if on_cpu else f"it runs on a CPU, the tensors are on {device}",
        "triton": triton_missing(device) or _triton_refuses(head_dim, dtype),
        "flash": need_cuda or (_flash_refuses(head_dim, dtype) if on_cuda else ""),
        "flex": need_cuda,
    }


def check_attention_backend(
    backend: str, device: torch.device, *, head_dim: int | None = None, dtype: torch.dtype | None = None
) -> None:
    """Refuse a backend that cannot train here, before there is anything to lose.

    Args:
        backend: a name, or "auto".
        device: where the model will be.
        head_dim: channels of a head.
        dtype: of the activations.

    Raises:
        BackendUnavailableError: if the backend does not exist or cannot run this case.
    """
    reasons = backend_reasons(device, head_dim=head_dim, dtype=dtype)
    if device.type == "cpu":
        reasons["flex"] = "torch's FlexAttention has no backward on a CPU"
    check_backend(KERNEL, backend, reasons)


def _triton_refuses(head_dim: int | None, dtype: torch.dtype | None) -> str:
    smallest, largest = TRITON_HEAD_DIMS
    if head_dim is not None and (not smallest <= head_dim <= largest or head_dim % 8):
        return f"head_dim={head_dim}; its kernels take multiples of 8 from {smallest} to {largest}"
    if dtype is not None and dtype not in TRITON_TYPES:
        return f"the tensors are {dtype}; its kernels take float32, float16 and bfloat16"
    return ""


def _flash_refuses(head_dim: int | None, dtype: torch.dtype | None) -> str:
    """On a GPU."""
    if dtype is not None and dtype not in (torch.float16, torch.bfloat16):
        return f"the tensors are {dtype}; its kernels take float16 and bfloat16 on a GPU"
    if head_dim is not None and (head_dim > FLASH_HEAD_DIM or head_dim % 8):
        return f"head_dim={head_dim}; its kernels take multiples of 8 up to {FLASH_HEAD_DIM}"
    return ""
