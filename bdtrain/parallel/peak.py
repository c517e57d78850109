"""Peak arithmetic rates of known accelerators, for the utilisation that a run reports."""

from __future__ import annotations

import re

import torch

# Dense bf16 TFLOP/s of the data sheets, without sparsity. Longer names first: the first match counts.
_BF16 = (
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("GH200", 989.0),
    ("H200", 989.0),
    ("H100", 989.0),
    ("H800", 989.0),
    ("B200", 2250.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("L40S", 362.0),
    ("L4", 121.0),
    ("A10", 125.0),
    ("A10G", 70.0),
)


def peak_tflops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Dense bf16 peak of a GPU by its name.

    Args:
        device: of the run.
        dtype: of the weights.

    Returns:
        TFLOP/s; None for a CPU, an unknown GPU, or a run that does not compute in bf16.
    """
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    # Whole words: an A1000 is no A100.
    return next((peak for known, peak in _BF16 if re.search(rf"(?<!\w){known}(?!\w)", name)), None)
