"""The rooms import only upwards; and the checker that says so finds planted faults."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.import_layers import KERNELS, UPWARD, check_tree, imports_of


def plant(root: Path, path: str, text: str) -> list[str]:
    """Breaches of a tree with one file."""
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return check_tree(root)


def test_the_repository_keeps_its_layers(repository: Path) -> None:
    breaches = check_tree(repository)
    assert not breaches, "\n" + "\n".join(breaches)


def test_every_folder_of_the_framework_is_a_room(repository: Path) -> None:
    folders = {p.name for p in (repository / "bdtrain").iterdir() if p.is_dir() and p.name != "__pycache__"}
    modules = {p.stem for p in (repository / "bdtrain").glob("*.py")} - {"__init__"}
    assert folders | modules <= set(UPWARD)


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("bdtrain/diffusion/a.py", "import torch.distributed as dist", "may not import torch.distributed"),
        ("bdtrain/diffusion/a.py", "from torch import distributed", "may not import torch.distributed"),
        ("bdtrain/diffusion/a.py", "def f():\n    import megatron.core", "may not import megatron"),
        (
            "bdtrain/diffusion/a.py",
            "from bdtrain.model import x",
            "bdtrain.diffusion may not import bdtrain.model",
        ),
        (
            "bdtrain/diffusion/a.py",
            "from bdtrain import data",
            "bdtrain.diffusion may not import bdtrain.data",
        ),
        (
            "bdtrain/diffusion/a.py",
            "from ..config import x",
            "bdtrain.diffusion may not import bdtrain.config",
        ),
        ("bdtrain/diffusion/objectives/a.py", "from ...train import x", "may not import bdtrain.train"),
        ("bdtrain/diffusion/a.py", f"import {KERNELS}", f"may not import {KERNELS}"),
        ("bdtrain/config/a.py", "import torch", "bdtrain.config may not import torch"),
        ("bdtrain/config/a.py", "def f():\n    from torch import nn", "bdtrain.config may not import torch"),
        ("bdtrain/errors.py", "from bdtrain.config import x", "bdtrain.errors may not import bdtrain.config"),
        ("bdtrain/data/a.py", "from bdtrain.diffusion import plan", "may not import bdtrain.diffusion.plan"),
        ("bdtrain/data/a.py", "from bdtrain.model.head import x", "may not import bdtrain.model.head"),
        ("bdtrain/model/a.py", "import deepspeed", "bdtrain.model may not import deepspeed"),
        ("bdtrain/model/a.py", "import torch.distributed", "may not import torch.distributed"),
        ("bdtrain/model/a.py", "from bdtrain.parallel import x", "may not import bdtrain.parallel"),
        ("bdtrain/parallel/a.py", "from bdtrain.data import x", "may not import bdtrain.data"),
        (
            "bdtrain/tracking/a.py",
            "def f():\n    import mlflow",
            "is imported in bdtrain/tracking/mlflow.py only",
        ),
        ("bdtrain/tracking/mlflow.py", "import mlflow", "imported inside functions"),
        ("bdtrain/checkpoint/a.py", "from bdtrain.validation import x", "may not import bdtrain.validation"),
        (
            "bdtrain/refit/worker.py",
            "def f():\n    import ray",
            "is imported in bdtrain/refit/ray_backend.py only",
        ),
        ("bdtrain/train/a.py", "def f():\n    import ray.util", "bdtrain.train may not import ray"),
        (
            "bdtrain/train/a.py",
            "from bdtrain.refit import ray_backend",
            "may not import bdtrain.refit.ray_backend",
        ),
        ("bdtrain/train/a.py", "from bdtrain.testing import x", "may not import bdtrain.testing"),
        ("bdtrain/model/a.py", "try:\n    import triton\nexcept ImportError:\n    pass", "inside functions"),
        ("bdtrain/model/a.py", "class A:\n    import flash_attn", "inside functions"),
        (f"kernels/{KERNELS}/dispatch.py", "import triton", "inside functions"),
        (f"kernels/{KERNELS}/a/reference.py", "import flash_attn", "inside functions"),
        (f"kernels/{KERNELS}/a.py", "from bdtrain.errors import x", "may not import bdtrain"),
        (f"kernels/{KERNELS}/a.py", "def f():\n    import bdtrain", "may not import bdtrain"),
        ("bdtrain/attic/a.py", "from bdtrain.config import x", "is no room"),
        ("bdtrain/__init__.py", "from bdtrain.config import x", "bdtrain itself imports nothing"),
        ("bdtrain/train/a.py", "from tools import x", "scripts are for the shell"),
    ],
)
def test_a_planted_fault_is_found(tmp_path: Path, path: str, text: str, expected: str) -> None:
    breaches = plant(tmp_path, path, text)
    assert len(breaches) == 1, breaches
    assert breaches[0].startswith(f"{path}:")
    assert expected in breaches[0]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (
            "bdtrain/diffusion/a.py",
            "import torch\nfrom torch import nn\nfrom bdtrain.errors import ShapeError",
        ),
        ("bdtrain/diffusion/objectives/a.py", "from ..plan import x\nfrom bdtrain.diffusion.keyed import y"),
        ("bdtrain/data/a.py", "import numpy, torch\nfrom bdtrain.diffusion.keyed import x"),
        ("bdtrain/data/a.py", "from bdtrain.diffusion import keyed"),
        (
            "bdtrain/model/a.py",
            f"import megatron.core\nfrom {KERNELS} import x\nfrom bdtrain.diffusion.plan import y",
        ),
        ("bdtrain/refit/ray_backend.py", "import ray"),
        ("bdtrain/tracking/mlflow.py", "def f():\n    import mlflow"),
        ("bdtrain/model/a.py", "def f():\n    import triton"),
        ("bdtrain/testing/a.py", "from bdtrain.train.step import x"),
        (f"kernels/{KERNELS}/block_attention/triton_forward.py", "import triton\nimport torch"),
        (f"kernels/{KERNELS}/block_attention/a.py", "from ..dispatch import x\nimport bdtrain_kernels"),
        ("bdtrain/train/a.py", "text = 'import ray'\n# import ray"),
    ],
)
def test_a_right_import_is_let_through(tmp_path: Path, path: str, text: str) -> None:
    assert plant(tmp_path, path, text) == []


def test_the_line_of_a_breach_is_right() -> None:
    text = "import a\n\n\ndef f():\n    from b import c, d\n"
    assert [(i.name, i.line, i.top_level) for i in imports_of(text, "p")] == [
        ("a", 1, True),
        ("b.c", 5, False),
        ("b.d", 5, False),
    ]


def test_diffusion_imports_where_only_torch_is_installed(repository: Path) -> None:
    heavy = [
        "megatron",
        "deepspeed",
        "ray",
        "mlflow",
        "triton",
        "pydantic",
        "omegaconf",
        "transformers",
        "webdataset",
    ]
    code = (
        "import sys, pkgutil, importlib\n"
        # torch itself looks for triton; only what comes after it counts.
        "import torch\n"
        f"for name in {heavy!r}: sys.modules[name] = None\n"
        "import bdtrain.diffusion\n"
        "for found in pkgutil.walk_packages(bdtrain.diffusion.__path__, 'bdtrain.diffusion.'):\n"
        "    importlib.import_module(found.name)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
