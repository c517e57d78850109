"""Process groups: torch.distributed, Megatron's grid over it, and what DeepSpeed must know before it starts.

Megatron's globals are set and read here and in ``mpu.py``; everything else gets a ``ProcessGroupCollection``
as an argument.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections import defaultdict
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from bdtrain.parallel.cpu import install_cpu_shim
from bdtrain.parallel.launch_environment import RENDEZVOUS, Launch, read_launch, torch_environment
from bdtrain.parallel.network import INTERFACES, LOOPBACK, name_interface

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection


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


def private_store(launch: Launch, listener: int | None) -> dist.TCPStore:
    """A store where the ranks of a launch meet; torch's own would listen on all addresses of its machine.

    Args:
        launch: who this process is.
        listener: on rank 0 a socket that listens at the launch's address, which the store takes over; None on
            the others.

    Returns:
        The store, for ``init_groups``; every rank makes its own.
    """
    assert launch.master_addr is not None and launch.master_port is not None
    return dist.TCPStore(
        launch.master_addr,
        launch.master_port,
        launch.world_size,
        is_master=listener is not None,
        master_listen_fd=listener,
    )


def init_process_group(launch: Launch, *, timeout_s: float = 1800.0, store: dist.Store | None = None) -> None:
    """Start torch.distributed: NCCL on GPUs, gloo on CPUs. A world of one needs no port.

    Args:
        launch: who this process is.
        timeout_s: how long a collective may wait for the others, seconds.
        store: where the ranks meet, in place of the launch's address.
    """
    if dist.is_initialized():
        return
    cuda = torch.cuda.is_available()
    # A scheduler may show each task its own GPU alone: the number of a device, not of a process.
    local = launch.local_rank % torch.cuda.device_count() if cuda else launch.local_rank
    # Whatever launched this process: torch and DeepSpeed read the names of torchrun, even in a world of one.
    os.environ.update(torch_environment(dataclasses.replace(launch, local_rank=local)))
    # DeepSpeed takes it as a device too, and insists that OpenMPI's name says the same.
    if "OMPI_COMM_WORLD_LOCAL_RANK" in os.environ:
        os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] = str(local)
    if cuda:
        torch.cuda.set_device(local)
    timeout = timedelta(seconds=timeout_s)
    backend = "nccl" if cuda else "gloo"
    # Tests meet through a file: ports of one machine are few and may be taken.
    rendezvous = os.environ.get(RENDEZVOUS)
    if store is not None:
        dist.init_process_group(
            backend, store=store, rank=launch.rank, world_size=launch.world_size, timeout=timeout
        )
    elif launch.world_size > 1 and rendezvous:
        dist.init_process_group(
            backend,
            init_method=rendezvous,
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=timeout,
        )
    elif launch.world_size == 1:
        if INTERFACES[0] not in os.environ:
            # gloo listens for each group, even of one, and nobody else has business there.
            name_interface(os.environ, LOOPBACK)
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(backend, rank=launch.rank, world_size=launch.world_size, timeout=timeout)


def init_groups(
    launch: Launch | None = None, *, tp: int = 1, pp: int = 1, store: dist.Store | None = None
) -> ProcessGroupCollection:
    """Start torch.distributed and Megatron's grid.

    Ranks count tensor-parallel first, then data-parallel, then pipeline stages, so that the ranks which talk
    most sit closest.

    Args:
        launch: who this process is; a world of one if None.
        tp: ranks that share each layer.
        pp: pipeline stages.
        store: where the ranks meet, in place of the launch's address.

    Returns:
        The groups of this process (tp, pp, cp, dp, dp_cp, embd, pos_embd, mp, ...), each of size 1 in a world
        of one.
    """
    install_cpu_shim()
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    init_process_group(launch or read_launch({}), store=store)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp
        )
    return ProcessGroupCollection.use_mpu_process_groups()


def host_group() -> dist.ProcessGroup | None:
    """All ranks, with tensors on the CPU: for small values and for what is written to disk.

    Returns:
        None where the default group is of that kind already. Every rank must call it.
    """
    return dist.new_group(backend="gloo") if dist.get_backend() == "nccl" else None


def destroy_groups(*, failed: bool = False) -> None:
    """Undo ``init_groups``.

    Args:
        failed: this rank leaves because of an error, and its peers may be waiting for it.
    """
    from megatron.core import parallel_state

    if failed and dist.is_initialized() and dist.get_backend() == "nccl":
        return  # an orderly end waits for the peers; the end of the process does not
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
