"""The environment of a process that works beside a trainer and is no rank of it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

RANK_VARIABLES = frozenset(
    {
        *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "CROSS_RANK", "CROSS_SIZE"),
        *("GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE"),
    }
)
"""What ``torchrun`` and ``deepspeed`` tell a rank."""

LAUNCHER_PREFIXES = ("MASTER_", "SLURM_", "PMI_", "PMIX_", "OMPI_", "TORCHELASTIC_")
"""What these, ``mpirun`` and ``srun`` call the rest."""


def child_environment(
    environment: Mapping[str, str], settings: Mapping[str, str] | None = None, *, gpus: bool = False
) -> dict[str, str]:
    """The environment of a trainer without what makes its reader a rank.

    The child finds this package where its parent did.

    Args:
        environment: of the trainer.
        settings: more variables.
        gpus: leave it the GPUs that the trainer sees.
    """
    kept = {
        name: value
        for name, value in environment.items()
        if name not in RANK_VARIABLES and not name.startswith(LAUNCHER_PREFIXES)
    }
    root = str(Path(__file__).resolve().parents[2])
    path = [root, *filter(None, [environment.get("PYTHONPATH")])]
    hidden = {} if gpus else {"CUDA_VISIBLE_DEVICES": ""}
    return {**kept, "PYTHONPATH": os.pathsep.join(path), **hidden, **(settings or {})}
