"""Which backend runs: forced by name or chosen, refused when absent, said once.

A forced backend is never replaced by another one: a run that asked for a kernel and silently got a slower
one would report wrong speeds.
"""

from __future__ import annotations

import functools
import logging

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
    logging.getLogger(LOGGER_NAME).info("%s: backend %s (%s)", kernel, backend, reason)
