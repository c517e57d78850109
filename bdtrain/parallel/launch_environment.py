"""Who a process is: one mapping from what each launcher sets in the environment.

Standard library only, so that a launcher's mistake is found before torch is imported. Looked at in this
order; the first that speaks counts:

1. RANK and WORLD_SIZE: ``torchrun``, ``deepspeed``, or set by hand; inside a Slurm step too
   (``srun torchrun``).
2. OMPI_COMM_WORLD_*: OpenMPI's ``mpirun``. Before Slurm, since inside an allocation it starts its daemons by
   ``srun``.
3. SLURM_* of a task that ``srun`` started. A shell in an allocation (``salloc``, a batch script) is no such
   task: what is started there by hand is a world of one.
4. Nothing: ``python``, a world of one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from bdtrain.errors import ConfigError

DEFAULT_PORT = 29500
"""Where ranks meet when nobody named a port; torch's and DeepSpeed's default too."""

RENDEZVOUS = "BDTRAIN_RENDEZVOUS"
"""Where ranks meet (``file:///path``) in place of MASTER_ADDR and MASTER_PORT; for tests on one machine."""

FIRST_SLURM_PORT, SLURM_PORTS = 20000, 10000
"""Ports for Slurm jobs: above common services, below the range that Linux hands out itself (from 32768)."""

FIRST_SPECIAL_STEP = 0xFFFFFFF0
"""Slurm numbers the batch script, the interactive shell and its own helpers from here on."""


@dataclass(frozen=True)
class Launch:
    """Who this process is, as the launcher said it in the environment.

    Attributes:
        rank: number of this process, 0 to world_size - 1.
        local_rank: number of this process on its machine.
        world_size: processes in the run.
        local_world_size: processes of the run on this machine.
        master_addr: host of rank 0, where the ranks meet; None for a world of one that was given none.
        master_port: port there; the same on every rank.
        launcher: python, torchrun, deepspeed, environment (set by hand), openmpi or srun.
    """

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int = 1
    master_addr: str | None = None
    master_port: int | None = None
    launcher: str = "python"


def read_launch(environment: Mapping[str, str]) -> Launch:
    """Read who this process is; one that was started by hand is a world of one.

    Raises:
        ConfigError: if the environment contradicts itself or leaves something out: every problem of the
            launcher that speaks.
    """
    # An empty variable is how some job scripts unset one.
    found = {name: value.strip() for name, value in environment.items() if value.strip()}
    if {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & set(found):
        return _from_torch(found)
    if {"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"} & set(found):
        return _from_openmpi(found)
    if _is_slurm_task(found):
        return _from_slurm(found)
    return Launch(rank=0, local_rank=0, world_size=1)


def torch_environment(launch: Launch) -> dict[str, str]:
    """The variables that torch.distributed and DeepSpeed read, whoever started the process."""
    said = {
        "RANK": launch.rank,
        "WORLD_SIZE": launch.world_size,
        "LOCAL_RANK": launch.local_rank,
        "LOCAL_WORLD_SIZE": launch.local_world_size,
        "MASTER_ADDR": launch.master_addr,
        "MASTER_PORT": launch.master_port,
    }
    return {name: str(value) for name, value in said.items() if value is not None}


def first_host(nodelist: str) -> str:
    """First host of a Slurm node list: ``node[07-09,12],gpu1`` is ``node07``.

    Raises:
        ConfigError: if it is no node list.
    """
    # A comma between brackets separates numbers, one outside separates hosts.
    match = re.match(r"(?:[^,\[\]\s]|\[[^\[\]\s]+\])+(?=,|$)", nodelist)
    host = re.sub(r"\[([^,\-\]]*)[^\]]*\]", r"\1", match.group()) if match else ""
    if not host:
        raise ConfigError(
            f"the node list {nodelist!r} of Slurm cannot be read; set MASTER_ADDR to the host of rank 0"
        )
    return host


class _Reader:
    """Whole numbers of an environment, with the problems met on the way."""

    def __init__(self, found: Mapping[str, str]) -> None:
        self.found = found
        self.problems: list[str] = []

    def number(self, name: str, default: int) -> int:
        text = self.found.get(name)
        if text is None:
            return default
        if not re.fullmatch(r"-?[0-9]+", text):
            self.problems.append(f"{name}={text!r}; it must be a whole number")
            return default
        return int(text)

    def require(self, names: tuple[str, ...], remedy: str) -> None:
        missing = [name for name in names if name not in self.found]
        if missing:
            given = sorted(set(names) - set(missing))
            self.problems.append(
                f"the environment sets {', '.join(given) or 'no rank'} but not {', '.join(missing)}; {remedy}"
            )

    def raise_problems(self) -> None:
        if self.problems:
            raise ConfigError("\n".join(self.problems))


def _from_torch(found: Mapping[str, str]) -> Launch:
    reader = _Reader(found)
    named = tuple(name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name in found)
    if not {"RANK", "WORLD_SIZE"} <= set(named):
        missing = sorted({"RANK", "WORLD_SIZE"} - set(named))
        reader.problems.append(
            f"the environment sets {', '.join(named)} but not {', '.join(missing)}; start the run with "
            "`deepspeed`, `torchrun` or `srun`, which say all of them, or unset them to run one process"
        )
    reader.raise_problems()
    if "TORCHELASTIC_RUN_ID" in found:
        launcher = "torchrun"
    else:
        launcher = "deepspeed" if {"LOCAL_SIZE", "CROSS_SIZE"} <= set(found) else "environment"
    rank, world = reader.number("RANK", 0), reader.number("WORLD_SIZE", 1)
    # DeepSpeed's name for it is LOCAL_SIZE. Without either the run is taken to be on one machine.
    size_name = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in found else "LOCAL_SIZE"
    local_world = reader.number(size_name, world)
    local_rank = reader.number("LOCAL_RANK", rank % local_world if local_world > 0 else rank)
    if launcher == "environment":
        _refuse_stale_world(reader, world)
    return _checked(
        reader,
        launcher,
        ranks={"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": local_rank, size_name: local_world},
        address=found.get("MASTER_ADDR"),
        port=DEFAULT_PORT,
    )


def _from_openmpi(found: Mapping[str, str]) -> Launch:
    reader = _Reader(found)
    names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    rank, size, local_rank, local_size = (f"OMPI_COMM_WORLD_{name}" for name in names)
    reader.require((rank, size), "start the run with `mpirun`, which sets both, or unset them")
    world = reader.number(size, 1)
    return _checked(
        reader,
        "openmpi",
        ranks={
            rank: (number := reader.number(rank, 0)),
            size: world,
            local_rank: reader.number(local_rank, number),
            local_size: reader.number(local_size, world),
        },
        address=found.get("MASTER_ADDR"),
        port=DEFAULT_PORT,
    )


def _is_slurm_task(found: Mapping[str, str]) -> bool:
    """Whether ``srun`` started this process, rather than a shell inside an allocation."""
    step = found.get("SLURM_STEP_ID", "")
    return step.isdigit() and int(step) < FIRST_SPECIAL_STEP and "SLURM_PROCID" in found


def _from_slurm(found: Mapping[str, str]) -> Launch:
    reader = _Reader(found)
    # The step may have fewer tasks than the job; older versions have only the second name.
    size = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in found else "SLURM_NTASKS"
    reader.require(("SLURM_PROCID", size), "start the run with `srun`, which sets both")
    world = reader.number(size, 1)
    rank = reader.number("SLURM_PROCID", 0)
    address = found.get("MASTER_ADDR")
    port = DEFAULT_PORT
    if world > 1:
        nodes = found.get("SLURM_STEP_NODELIST") or found.get("SLURM_JOB_NODELIST")
        address = address or (first_host(nodes) if nodes else None)
        # Two steps of one job may run at the same time on the same host.
        job, step = reader.number("SLURM_JOB_ID", 0), reader.number("SLURM_STEP_ID", 0)
        port = FIRST_SLURM_PORT + (job * 31 + step) % SLURM_PORTS
    local_rank = reader.number("SLURM_LOCALID", rank)
    return _checked(
        reader,
        "srun",
        ranks={
            "SLURM_PROCID": rank,
            size: world,
            "SLURM_LOCALID": local_rank,
            "tasks of this node": _slurm_local_world(reader, world, local_rank),
        },
        address=address,
        port=port,
    )


def _slurm_local_world(reader: _Reader, world: int, local_rank: int) -> int:
    """Tasks of the step on this node, from ``4(x2),3`` and the node's number in the step."""
    text = reader.found.get("SLURM_STEP_TASKS_PER_NODE", "")
    tasks: list[int] = []
    for count, times in re.findall(r"([0-9]+)(?:\(x([0-9]+)\))?(?=,|$)", text):
        tasks += [int(count)] * int(times or 1)
    node = reader.number("SLURM_NODEID", 0)
    if sum(tasks) == world and 0 <= node < len(tasks):
        return tasks[node]
    # Not said: an even spread, rounded up, with room for this rank. (The job's own SLURM_TASKS_PER_NODE is
    # not that of the step.)
    nodes = max(1, reader.number("SLURM_STEP_NUM_NODES", reader.number("SLURM_NNODES", 1)))
    return max(-(-world // nodes), local_rank + 1)


def _refuse_stale_world(reader: _Reader, world: int) -> None:
    """Refuse a WORLD_SIZE left over in the shell that hides the tasks which were really started.

    Every task would take itself for the same rank of a smaller run, and all would write the same files.
    """
    if _is_slurm_task(reader.found):
        size = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in reader.found else "SLURM_NTASKS"
    else:
        size = "OMPI_COMM_WORLD_SIZE"
    tasks = reader.number(size, 1)
    if tasks > world:
        reader.problems.append(
            f"WORLD_SIZE={world} but {size}={tasks} processes were started; unset RANK, LOCAL_RANK and "
            "WORLD_SIZE, the launcher says who each process is"
        )


def _checked(
    reader: _Reader, launcher: str, *, ranks: Mapping[str, int], address: str | None, port: int
) -> Launch:
    """The launch, when its numbers go together.

    Args:
        reader: of the environment, with the problems so far.
        launcher: who speaks.
        ranks: name and value of rank, world size, local rank and local world size, in this order.
        address: where the ranks meet, if known.
        port: for ranks that were given none.
    """
    (rank_name, rank), (world_name, world), (local_name, local_rank), (size_name, local_world) = ranks.items()
    port = reader.number("MASTER_PORT", port)
    # A number that could not be read would only cause more problems below.
    reader.raise_problems()
    if world < 1:
        reader.problems.append(f"{world_name}={world}; it must be at least 1")
    elif not 0 <= rank < world:
        reader.problems.append(f"{rank_name}={rank} is not in 0 to {world_name}-1={world - 1}")
    if not 1 <= local_world <= max(world, 1):
        reader.problems.append(f"{size_name}={local_world} is not in 1 to {world_name}={world}")
    elif not 0 <= local_rank < local_world:
        reader.problems.append(f"{local_name}={local_rank} is not in 0 to {size_name}-1={local_world - 1}")
    if not 1 <= port <= 65535:
        reader.problems.append(f"MASTER_PORT={port}; choose a port from 1 to 65535")
    if world > 1 and not address and RENDEZVOUS not in reader.found:
        reader.problems.append(
            f"{world_name}={world} without MASTER_ADDR; set it to the host of rank 0, the same on every rank"
        )
    if reader.problems:
        remedy = "start all ranks with one launcher (deepspeed, torchrun, srun), or unset these variables"
        raise ConfigError("\n".join([*reader.problems, remedy]))
    meets = address is not None
    return Launch(rank, local_rank, world, local_world, address, port if meets else None, launcher)
