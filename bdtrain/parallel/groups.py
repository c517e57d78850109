"""Process groups: torch.distributed, Megatron's grid over it, and what DeepSpeed must know before it starts.

Megatron's globals are set and read here, once; everything else gets a ``ProcessGroupCollection`` as an
argument.
"""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from bdtrain.errors import ConfigError
from bdtrain.parallel.cpu import install_cpu_shim

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection


@dataclass(frozen=True)
class Launch:
    """Who this process is, as the launcher said it in the environment.

    Attributes:
        rank: number of this process, 0 to world_size - 1.
        local_rank: number of this process on its machine.
        world_size: processes in the run.
    """

    rank: int
    local_rank: int
    world_size: int


def read_launch(environment: Mapping[str, str]) -> Launch:
    """Read RANK, LOCAL_RANK and WORLD_SIZE; a process started by hand is a world of one.

    Raises:
        ConfigError: if only some of them are set, or one is not a number.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    found = {name: environment[name] for name in names if name in environment}
    if not found:
        return Launch(rank=0, local_rank=0, world_size=1)
    if "RANK" not in found or "WORLD_SIZE" not in found:
        missing = sorted({"RANK", "WORLD_SIZE"} - set(found))
        raise ConfigError(
            f"the environment sets {sorted(found)} but not {missing}; start the run with `deepspeed` or "
            "`torchrun`, which set all of them, or unset them to run one process"
        )
    try:
        rank, world = int(found["RANK"]), int(found["WORLD_SIZE"])
        return Launch(rank=rank, local_rank=int(found.get("LOCAL_RANK", rank)), world_size=world)
    except ValueError as error:
        raise ConfigError(f"RANK, LOCAL_RANK and WORLD_SIZE must be whole numbers; found {found}") from error


def prepare_deepspeed() -> None:
    """Choose DeepSpeed's accelerator and switch off its shared-memory op. Call before it is initialised."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed.ops
    import deepspeed.utils.logging

    # On a CPU DeepSpeed runs the compiler to see which of its ops could be built, then builds one in every
    # process for a collective that training never calls: 26 s idle, minutes under load, and a killed build
    # leaves a lock on which later runs wait for ever. The answer is given before the question: none.
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__ = defaultdict(bool)
    deepspeed.utils.logging.logger.addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a line of DeepSpeed's log says something: our AdamW is torch's, and was tested with ZeRO."""
    return "untested optimizer" not in record.getMessage()


def init_process_group(launch: Launch, *, timeout_s: float = 1800.0) -> None:
    """Start torch.distributed: NCCL on GPUs, gloo on CPUs. A world of one needs no port.

    Args:
        launch: who this process is.
        timeout_s: how long a collective may wait for the others, seconds.
    """
    if dist.is_initialized():
        return
    # DeepSpeed reads them again, and wants them even in a world of one.
    said = {"RANK": launch.rank, "WORLD_SIZE": launch.world_size, "LOCAL_RANK": launch.local_rank}
    os.environ.update({name: str(value) for name, value in said.items()})
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(launch.local_rank)
    timeout = timedelta(seconds=timeout_s)
    backend = "nccl" if cuda else "gloo"
    if launch.world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(backend, rank=launch.rank, world_size=launch.world_size, timeout=timeout)


def init_groups(launch: Launch | None = None) -> ProcessGroupCollection:
    """Start torch.distributed and Megatron's grid.

    Returns:
        The groups of this process (tp, pp, cp, dp, dp_cp, embd, pos_embd, mp, ...), each of size 1 in a world
        of one.
    """
    install_cpu_shim()
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    init_process_group(launch or Launch(0, 0, 1))
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    return ProcessGroupCollection.use_mpu_process_groups()


def destroy_groups() -> None:
    """Undo ``init_groups``."""
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
