"""What the heavy libraries must be told before they are imported."""

from __future__ import annotations

import logging
import os
import warnings


def prepare_libraries() -> None:
    """Settings that must be there before torch, Megatron or DeepSpeed is imported. Call once, before.

    Waiting OpenMP threads sleep instead of spinning: on cores that are shared with anything else, spinning
    makes a step several times slower. A setting of the user's stays.

    Megatron warns once for each module that could have used Transformer Engine or Apex, which bdtrain never
    needs; DeepSpeed warns of gathers that it uses itself and that torch means to rename.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Kernels then start in the order of their calls, so that tensor-parallel communication overlaps with the
    # gradients of weights as Megatron means it to.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    warnings.filterwarnings("ignore", message=".*Transformer Engine and Apex are not installed.*")
    warnings.filterwarnings(
        "ignore",
        message=".*_all_gather_base.*|.*all_gather_into_tensor.*|.*reduce_scatter_tensor.*",
        category=FutureWarning,
    )
    warnings.filterwarnings("ignore", message="Apex is not installed.*", category=UserWarning)
    warnings.filterwarnings("ignore", message="full scope is deprecated.*", category=UserWarning)
    logging.getLogger("megatron").setLevel(logging.ERROR)
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
