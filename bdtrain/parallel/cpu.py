"""What megatron-core 0.16 to 0.19 needs on a machine without CUDA; the only file that patches Megatron.

Megatron names the current CUDA device in its gathers, receive buffers and random-state handling, and writes
``device="cuda"`` in three places of its schedules. Nothing here is installed where CUDA is present, so the
code that trains on GPUs is the library's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def install_cpu_shim() -> bool:
    """Let Megatron's layers and schedules run on the CPU. May be called again; no effect with CUDA.

    Returns:
        Whether the shim is in place.
    """
    if torch.cuda.is_available():
        return False
    from megatron.core.tensor_parallel import random as megatron_random

    if getattr(torch.cuda.current_device, "_bdtrain_cpu", False):
        return True

    def current_device() -> torch.device:
        return torch.device("cpu")

    current_device._bdtrain_cpu = True  # type: ignore[attr-defined]

    class CpuRngStatesTracker(megatron_random.CudaRNGStatesTracker):  # type: ignore[misc]
        """CPU generator states under Megatron's names; without dropout nothing is drawn from them."""

        def add(self, name: str, seed: int) -> None:
            """Register a named state."""
            if seed in self.seeds_ or name in self.states_:
                raise RuntimeError(f"random state {name!r} (seed {seed}) exists already")
            self._is_initialized = True
            self.seeds_.add(seed)
            keep = torch.get_rng_state()
            torch.manual_seed(seed)
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(keep)

    def get_state(device: Any = "cpu", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    # Gathers, receive buffers and the sequence-parallel buffer ask for the current device; saves synchronise.
    torch.cuda.current_device = current_device  # type: ignore[assignment]
    torch.cuda.synchronize = lambda device=None: None
    # Recomputation stores the CUDA random state even where nothing is random.
    megatron_random._get_cuda_rng_state = get_state
    megatron_random._set_cuda_rng_state = set_state
    megatron_random._CUDA_RNG_STATE_TRACKER = CpuRngStatesTracker()
    megatron_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
    return True


class _TorchWithoutCuda:
    """torch, for a module that writes ``device="cuda"`` into ``torch.zeros``."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return torch.zeros(*args, **kwargs)


@contextmanager
def schedule_device_context() -> Iterator[None]:
    """What to wrap around a call of a Megatron schedule; does nothing where CUDA is present.

    The schedules' own name ``torch`` is exchanged for the time of the call. (A ``TorchFunctionMode`` would
    see every operation of the model: 10 ms in a step of 9000.)
    """
    if torch.cuda.is_available():
        yield
        return
    from megatron.core.pipeline_parallel import schedules

    schedules.torch = _TorchWithoutCuda()
    try:
        yield
    finally:
        schedules.torch = torch
