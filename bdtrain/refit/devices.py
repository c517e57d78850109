"""GPUs that training leaves to a re-fit in a process beside it: which they are, and that they are free.

They have the numbers by which the launcher counts: places among the GPUs that the ranks see, whether
``CUDA_VISIBLE_DEVICES`` has numbers or names. The deepspeed launcher shows its ranks those alone that they
use, by the machine's numbers; there a re-fit's GPUs have the machine's numbers, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from bdtrain.config import RunConfig
from bdtrain.config.refit_rules import known_placement
from bdtrain.errors import ConfigError
from bdtrain.parallel.launch_environment import Launch

VISIBLE = "CUDA_VISIBLE_DEVICES"

DRIVER = Path("/proc/driver/nvidia/gpus")
"""Where the driver lists the GPUs of the machine, one folder each."""


def check_devices(
    config: RunConfig, launch: Launch, environment: Mapping[str, str], *, count: int, driver: Path = DRIVER
) -> None:
    """Refuse GPUs for re-fits that are not there, or that training uses.

    Args:
        config: of the run.
        launch: who this process is; only ranks of rank 0's machine can tell.
        environment: of the trainer.
        count: GPUs that it sees.
        driver: folder of the driver.

    Raises:
        ConfigError: naming the GPUs.
    """
    devices, ranks = config.refit.devices, launch.local_world_size
    wanted = config.refit.mode != "off" and known_placement(config.refit) == "process"
    if not devices or not wanted or launch.rank >= ranks:
        return
    shown = _shown(environment)
    there: int | None = count
    trained = [number for number in devices if number < min(ranks, count)]
    free = "start fewer ranks than it has GPUs, and choose from the last ones"
    if _is_deepspeed(environment) and shown is not None:
        there = len(list(driver.iterdir())) if driver.is_dir() else None
        trained = [number for number in devices if str(number) in shown]
        free = "leave it out of what deepspeed is given (--include, --num_gpus)"
    missing = [] if there is None else [number for number in devices if number >= there]
    told = f"refit.devices={list(devices)}"
    if missing:
        seen = environment.get(VISIBLE, "not set")
        raise ConfigError(
            f"{told}: rank 0's machine has {there} GPUs for this run, counted from 0, and GPU "
            f"{_join(missing)} is none of them ({VISIBLE}={seen}); choose others, or another refit.placement"
        )
    if trained:
        raise ConfigError(
            f"{told}: training uses GPU {_join(trained)}, with {ranks} rank{'s' * (ranks > 1)} on rank 0's "
            f"machine; {free}, or choose another refit.placement"
        )


def visible_devices(devices: Sequence[int], environment: Mapping[str, str]) -> str:
    """``CUDA_VISIBLE_DEVICES`` for a process that is to see some GPUs alone.

    Args:
        devices: as ``refit.devices``, checked.
        environment: of the trainer.
    """
    shown = _shown(environment)
    if shown is None or _is_deepspeed(environment):
        return ",".join(map(str, devices))
    return ",".join(shown[number] for number in devices if number < len(shown))


def _shown(environment: Mapping[str, str]) -> list[str] | None:
    """GPUs that a process sees, by number or name; None where it sees all."""
    text = environment.get(VISIBLE)
    return None if text is None else [entry for part in text.split(",") if (entry := part.strip())]


def _is_deepspeed(environment: Mapping[str, str]) -> bool:
    """Whether the deepspeed launcher started this process, and chose the GPUs that it sees."""
    return {"LOCAL_SIZE", "CROSS_SIZE"} <= set(environment) and "TORCHELASTIC_RUN_ID" not in environment


def _join(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
