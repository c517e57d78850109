"""What all tests share: one thread per process, no GPU unless asked for, the folder of golden numbers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before torch is imported anywhere: two cores shared by several processes are slower with spinning threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# DeepSpeed compiles nothing: no test may wait for a compiler.
os.environ.setdefault("DS_BUILD_OPS", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import torch  # reads the settings above

# Before triton is imported anywhere: what it decorates is interpreted from then on or never. Only tests that
# name the triton backend meet it; compile checks run in processes of their own without it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def triton_interpreter() -> None:
    """For tests that run Triton kernels: the interpreter, where there is no GPU, at a bearable speed."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        # Here: most tests do without importing triton.
        from bdtrain.testing.interpreter import quicken_interpreter

        quicken_interpreter()


@pytest.fixture
def interpreted(triton_interpreter: None) -> None:
    """For tests that run Triton kernels on tensors of a CPU; on a GPU they have twins there."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton kernels are compiled for the GPU here")


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of the golden vectors of the published implementation."""
    return ROOT / "tests" / "golden"


# Folders whose tests start processes of their own, which often wait: of each folder one test at a time.
SEVERAL_PROCESSES = ("distributed", "e2e", "reliability")


# First: pytest-xdist reads the groups in a hook of the same name.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests of a GPU and long ones unless ``-m`` names them; say what may run at once.

    With ``-n 2 --dist loadgroup`` a worker takes a whole file at a time, so that what a file sets up once is
    set up once, or a whole folder of tests that start processes.
    """
    wanted = config.getoption("-m") or ""
    left_out = [mark for mark in ("gpu", "soak") if mark not in wanted]
    kept, deselected = [], []
    for item in items:
        (deselected if any(item.get_closest_marker(mark) for mark in left_out) else kept).append(item)
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = kept
    for item in items:
        folder, *rest = item.path.relative_to(ROOT / "tests").parts
        group = folder if folder in SEVERAL_PROCESSES else "/".join([folder, *rest])
        item.add_marker(pytest.mark.xdist_group(group))
