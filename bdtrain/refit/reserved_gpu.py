"""The GPU that training leaves to a re-fit in a process beside it: which it is, and that it is free.

It has the number by which the launcher counts: its place among the GPUs that the ranks see, whether
``CUDA_VISIBLE_DEVICES`` has numbers or names. The deepspeed launcher shows its ranks those alone that they
use, by the machine's numbers; there a re-fit's GPU has the machine's number, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bdtrain.config import RunConfig
from bdtrain.config.refit_rules import known_placement
from bdtrain.errors import ConfigError
from bdtrain.parallel.launch_environment import Launch

VISIBLE = "CUDA_VISIBLE_DEVICES"

DRIVER = Path("/proc/driver/nvidia/gpus")
"""Where the driver lists the GPUs of the machine, one folder each."""


def check_reserved(
    config: RunConfig, launch: Launch, environment: Mapping[str, str], *, count: int, driver: Path = DRIVER
) -> None:
    """Refuse a GPU for re-fits that is not there, or that training uses.

    Args:
        config: of the run.
        launch: who this process is; only ranks of rank 0's machine can tell.
        environment: of the trainer.
        count: GPUs that it sees.
        driver: folder of the driver.

    Raises:
        ConfigError: naming the GPU.
    """
    gpu, ranks = config.refit.gpu, launch.local_world_size
    wanted = config.refit.mode != "off" and known_placement(config.refit) == "process"
    if gpu is None or not wanted or launch.rank >= ranks:
        return
    shown = _shown(environment)
    there: int | None = count
    trained = gpu < min(ranks, count)
    free = "start fewer ranks than it has GPUs, and choose from the last ones"
    if _is_deepspeed(environment) and shown is not None:
        there = len(list(driver.iterdir())) if driver.is_dir() else None
        trained = str(gpu) in shown
        free = "leave it out of what deepspeed is given (--include, --num_gpus)"
    if there is not None and gpu >= there:
        seen = environment.get(VISIBLE, "not set")
        raise ConfigError(
            f"refit.gpu={gpu}: rank 0's machine has {there} GPUs for this run, counted from 0, and GPU {gpu} "
            f"is none of them ({VISIBLE}={seen}); choose another, or another refit.placement"
        )
    if trained:
        raise ConfigError(
            f"refit.gpu={gpu}: training uses GPU {gpu}, with {ranks} rank{'s' * (ranks > 1)} on rank 0's "
            f"machine; {free}, or choose another refit.placement"
        )


def visible_gpu(gpu: int, environment: Mapping[str, str]) -> str:
    """``CUDA_VISIBLE_DEVICES`` for a process that is to see one GPU alone.

    Args:
        gpu: as ``refit.gpu``, checked.
        environment: of the trainer.

    Returns:
        Its number or name; empty, so that the process sees none, where it is not among the visible ones.
    """
    shown = _shown(environment)
    if shown is None or _is_deepspeed(environment):
        return str(gpu)
    return shown[gpu] if gpu < len(shown) else ""


def _shown(environment: Mapping[str, str]) -> list[str] | None:
    """GPUs that a process sees, by number or name; None where it sees all."""
    text = environment.get(VISIBLE)
    return None if text is None else [entry for part in text.split(",") if (entry := part.strip())]


def _is_deepspeed(environment: Mapping[str, str]) -> bool:
    """Whether the deepspeed launcher started this process, and chose the GPUs that it sees."""
    return {"LOCAL_SIZE", "CROSS_SIZE"} <= set(environment) and "TORCHELASTIC_RUN_ID" not in environment
