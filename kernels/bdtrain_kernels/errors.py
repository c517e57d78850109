"""Errors of the kernels; both are ``ValueError``, so that callers can catch them without this package."""

from __future__ import annotations


class KernelShapeError(ValueError):
    """Tensors handed to a kernel do not fit each other or the layout."""


class BackendUnavailableError(ValueError):
    """The backend asked for does not exist here, or cannot run this case."""
