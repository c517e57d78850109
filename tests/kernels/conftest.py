"""Triton kernels are tested under Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def _interpreter(triton_interpreter: None) -> None:
    """For every test of this folder."""
