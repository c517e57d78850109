"""Which backend runs: forced by name or chosen, refused when absent, said once.

A forced backend is never replaced by another one: a run that asked for a kernel and silently got a slower
one would report wrong speeds.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import device as Device
from torch.cuda import get_device_capability

from bdtrain_kernels.errors import BackendUnavailableError

LOGGER_NAME = "bdtrain_kernels"


def check_backend(kernel: str, backend: str, available: dict[str, str]) -> None:
    """Refuse a backend name that cannot be used here.

    Args:
        kernel: name of the kernel, for the message.
        backend: name asked for; "auto" is always accepted.
        available: usable backend name -> "" or the reason why it cannot run this case.

    Raises:
        BackendUnavailableError: if the name is unknown or its case is not supported.
    """
    if backend == "auto":
        return
    if backend not in available:
        usable = ", ".join(sorted(name for name, reason in available.items() if not reason))
        raise BackendUnavailableError(
            f"{kernel}: backend={backend!r} does not exist here; choose from auto, {usable}"
        )
    if available[backend]:
        usable = ", ".join(sorted(name for name, reason in available.items() if not reason))
        raise BackendUnavailableError(
            f"{kernel}: backend={backend!r} cannot run this case: {available[backend]}; "
            f"choose from auto, {usable}"
        )


# "Once" needs a memory that outlives the call; the cache of a function without result is the smallest one,
# and nothing but the log depends on it.
@functools.cache
def announce(kernel: str, backend: str, reason: str) -> None:
    """Log which backend a kernel took; each (kernel, backend, reason) once per process.

    Args:
        kernel: name of the kernel.
        backend: the backend that runs.
        reason: why: "forced", or what the choice was made from.
    """
    choice = {"kernel": kernel, "backend": backend, "reason": reason}
    logging.getLogger(LOGGER_NAME).info("%s: backend %s (%s)", kernel, backend, reason, extra=choice)


@contextmanager
def choices_heard(tell: Callable[[str, str, str], None]) -> Iterator[None]:
    """Hear of every choice from here on, those made before in this process too when they are made again.

    Args:
        tell: called with kernel, backend and reason, once for each.
    """

    class _Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            try:
                tell(record.kernel, record.backend, record.reason)  # type: ignore[attr-defined]
            except Exception:  # a full disk under the listener's file is no reason to stop a kernel
                self.handleError(record)

    logger, listener = logging.getLogger(LOGGER_NAME), _Listener()
    level = logger.level
    announce.cache_clear()
    logger.addHandler(listener)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(listener)
        logger.setLevel(level)


FIRST_CAPABILITY = (8, 0)
"""Oldest CUDA device that the Triton kernels are compiled for in the tests: Ampere."""


def triton_missing(device: Device) -> str:
    """Why Triton cannot run on tensors of a device.

    Args:
        device: where the tensors are.

    Returns:
        "" when it can, else the reason. On a CPU it can only under its interpreter (``TRITON_INTERPRET=1``
        in the environment before triton is imported), which is for tests: thousands of times slower.
    """
    if not _triton_installed():
        return "triton is not installed; install bdtrain[gpu]"
    if device.type == "cuda":
        found = get_device_capability(device)
        if found >= FIRST_CAPABILITY:
            return ""
        return f"the GPU has compute capability {found[0]}.{found[1]}; {FIRST_CAPABILITY[0]}.0 is the oldest"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    return f"it needs a CUDA device, the tensors are on {device}"


@functools.cache  # asked for at every call of every layer; looking for a package reads the disk
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


SHARED_KIB = {(8, 0): 163, (8, 6): 99, (8, 7): 163, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}
"""Shared memory that one program may have, KiB, by compute capability (CUDA programming guide)."""


def shared_memory_kib(device: Device) -> int:
    """Shared memory that one program may have on a device.

    Args:
        device: a CUDA device; a CPU counts as Hopper, so that interpreted kernels have its shapes.

    Returns:
        KiB; the least of all known ones for a device that is not in ``SHARED_KIB``.
    """
    capability = get_device_capability(device) if device.type == "cuda" else (9, 0)
    return SHARED_KIB.get(capability, min(SHARED_KIB.values()))
