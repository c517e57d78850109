"""Packaging of bdtrain: two packages from two source roots.

``kernels/`` is a source root and must never become a package itself (no ``__init__.py`` there): there is a
well-used package named ``kernels`` that it would hide. ``bdtrain_kernels`` is therefore mapped with
``package_dir``.
"""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def read_version() -> str:
    """The version in ``bdtrain/__init__.py``, without importing the package."""
    text = (ROOT / "bdtrain" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if match is None:
        raise RuntimeError('bdtrain/__init__.py has no line __version__ = "..."')
    return match.group(1)


def read_readme() -> str:
    """The long description; empty where the README is not shipped."""
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.is_file() else ""


REQUIRES = [
    "torch>=2.11,<2.14",
    "deepspeed>=0.19.8,<0.20",
    "megatron-core>=0.16.1,<0.20",
    "webdataset>=1.0,<2",
    "sentencepiece>=0.2.3,<0.3",
    "numpy>=1.26",
    "pydantic>=2.10,<3",
    "omegaconf>=2.3,<3",
    "PyYAML>=6",
    "safetensors>=0.5",
    "psutil>=5.9",
    "mlflow-skinny>=3.1,<4",
    # What its sqlite store needs and it does not bring.
    "sqlalchemy>=2,<3",
    "alembic>=1.13,<2",
    "sqlparse>=0.5,<1",
]
"""What ``import bdtrain`` and a training run need. Exact versions that were tested: constraints.txt."""

HF = ["transformers>=5,<6", "tokenizers>=0.22"]
RAY = ["ray[default]>=2.54,<3"]
EXTRAS = {
    # The re-fit of noise plans in a process of its own.
    "ray": RAY,
    # The server with its web pages; clients need only what is always installed.
    "mlflow": ["mlflow>=3.1,<4"],
    # Pictures of re-fits as PNG in MLflow, TensorBoard and W&B (the extra mlflow has it, too).
    "plots": ["matplotlib>=3.8,<4"],
    # Its files, offline (tracking.wandb).
    "wandb": ["wandb>=0.18,<1"],
    # Kernels for GPUs. torch's CUDA builds bring the Triton that fits them.
    "gpu": ["triton>=3.5; platform_system == 'Linux'"],
    # Compiles for minutes; pip install --no-build-isolation 'bdtrain[flash]'.
    "flash": ["flash-attn>=2.8"],
    # Shards in object storage.
    "s3": ["boto3>=1.34"],
    # Export to and import from the transformers library.
    "hf": HF,
    # Tests, format, lint, types. Triton's interpreter and its compile tests run on a CPU.
    "dev": [
        *HF,
        *RAY,
        "hypothesis>=6.100",
        "mypy>=1.15",
        "pytest>=8",
        "pytest-xdist>=3.6",
        "ruff>=0.12",
        "triton>=3.5; platform_system == 'Linux'",
        "types-PyYAML>=6",
    ],
}

setup(
    name="bdtrain",
    version=read_version(),
    description="Pretraining of block diffusion language models on Megatron layers, DeepSpeed ZeRO and "
    "streamed text",
    long_description=read_readme(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["bdtrain", "bdtrain.*"]) + find_packages("kernels"),
    package_dir={"bdtrain_kernels": "kernels/bdtrain_kernels"},
    package_data={"bdtrain": ["py.typed"], "bdtrain_kernels": ["py.typed"]},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
)
