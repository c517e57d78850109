"""Triton kernels are tested under Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fast_interpreter import quicken


@pytest.fixture(scope="session", autouse=True)
def _quick_interpreter() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        quicken()
