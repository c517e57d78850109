"""A worker of a measurement on Ray: one process, or several that share a model and work as one.

The processes of a worker are started, asked and ended together. The first of them opens the socket at which
they meet, on the address by which the cluster knows its machine: loopback in a local session. Ray itself
comes in as an argument.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from bdtrain.parallel.launch_environment import Launch
from bdtrain.parallel.network import name_interface, own_address
from bdtrain.refit.outcome import RaySettings, split_address
from bdtrain.refit.ray_cluster import strip_launch_environment

_REASON_LIMIT = 300


class ShardActor:
    """What runs in a process of Ray: one worker with its model, or its part of both.

    Errors come back as text, not as objects.
    """

    def __init__(self) -> None:
        self._worker: Any = None
        self._rank = 0
        self._listener: socket.socket | None = None

    def place(
        self, threads: int | None, use_gpu: bool, head: str, listen: bool
    ) -> tuple[tuple[str, int, tuple[str, int]] | None, str, str]:
        """Make the process fit for a worker, before its libraries are imported.

        Args:
            threads: of the CPU; None leaves the libraries' choice.
            use_gpu: whether it may see a GPU.
            head: numeric address of the cluster's head.
            listen: whether others that share the model meet at this process.

        Returns:
            Name of the machine, number of the process, and where the others meet (nowhere: "", 0); then a
            line and a traceback that say why it cannot be one of them, empty if it can.
        """
        strip_launch_environment(os.environ)
        if not use_gpu:
            # Ray leaves it as it found it, and the GPUs may be training.
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        if threads is not None:
            os.environ["OMP_NUM_THREADS"] = str(threads)
        meeting = ("", 0)
        try:
            # Alone, too: gloo listens for each process group, even of one.
            address = own_address(head)
            name_interface(os.environ, address)
            if listen:
                family = socket.AF_INET6 if ":" in address else socket.AF_INET
                self._listener = socket.create_server((address, 0), family=family)
                meeting = address, self._listener.getsockname()[1]
        except Exception as error:
            return None, describe_error(error), traceback.format_exc()
        return (socket.gethostname(), os.getpid(), meeting), "", ""

    def load(
        self, worker: str, request: dict[str, Any], threads: int | None, launch: Launch | None
    ) -> tuple[None, str, str]:
        """Make the worker.

        Args:
            worker: import path of its class.
            request: what it is made from.
            threads: of the CPU.
            launch: who this process is among those that share the model; None for a model of its own.

        Returns:
            Nothing, then a line and a traceback that say why it cannot be made, empty if it was.
        """
        try:
            module, _, name = worker.partition(":")
            found = getattr(importlib.import_module(module), name)
            # Ray's own libraries may have imported torch before OMP_NUM_THREADS was set.
            if threads is not None and "torch" in sys.modules:
                sys.modules["torch"].set_num_threads(threads)
            if launch is None:
                self._worker = found(request)
            else:
                self._rank = launch.rank
                listener = None if self._listener is None else self._listener.detach()
                self._worker = found(request, launch, listener)
        except Exception as error:
            return None, describe_error(error), traceback.format_exc()
        return None, "", ""

    def measure(self, shard: int) -> tuple[dict[int, dict[str, Any]] | None, str, str]:
        """Measure a shard.

        Returns:
            Arrays of its records by block size, of the first process alone, then a line and a traceback that
            say why there are none, empty if there are.
        """
        try:
            records = self._worker.measure(shard)
            arrays = {size: one.to_arrays() for size, one in records.items()}
        except Exception as error:
            return None, describe_error(error), traceback.format_exc()
        # The others have the same.
        return arrays if self._rank == 0 else None, "", ""


def describe_error(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}{': ' + lines[0] if lines else ''}"[:_REASON_LIMIT]


def numeric_host(address: str) -> str:
    """Numeric address of the host of ``host:port``, whose name only this machine may know."""
    found = split_address(address)
    assert found is not None, address
    return str(socket.getaddrinfo(*found, type=socket.SOCK_STREAM)[0][4][0])


class WorkerGroup:
    """The processes of one worker. What is asked goes to all; the answer is there when all have given theirs.

    Args:
        ray: the library.
        settings: how many processes, and what each of them takes.
        head: numeric address of the cluster's head.

    Attributes:
        step: ``empty``, ``placing``, ``loading``, ``measuring`` or ``idle``.
        pending: the calls that are not answered yet, with the number of the process that each is for.
        shard: that it measures.
        failures: in a row, of starting or of measuring.
        where: machines and processes.
    """

    def __init__(self, ray: Any, settings: RaySettings, head: str) -> None:
        self._ray, self._settings, self._head = ray, settings, head
        self._actor_class = ray.remote(ShardActor)
        self._actors: list[Any] = []
        self._answers: dict[int, Any] = {}
        self._room: Any = None
        self.step, self.shard, self.failures, self.where = "empty", -1, 0, ""
        self.pending: dict[Any, int] = {}

    @property
    def size(self) -> int:
        """Processes."""
        return self._settings.tp

    def start(self, threads: int | None, use_gpu: bool) -> None:
        """Ask Ray for the processes, all or none of them, and prepare them.

        Args:
            threads: as in ``ShardActor.place``.
            use_gpu: as in ``ShardActor.place``.
        """
        self._actors = [self._make_actor(rank) for rank in range(self.size)]
        listen = [self.size > 1 and rank == 0 for rank in range(self.size)]
        self._ask("placing", "place", [(threads, use_gpu, self._head, first) for first in listen])

    def load(self, worker: str, request: dict[str, Any], threads: int | None, placed: Sequence[Any]) -> None:
        """Make the worker in all processes.

        Args:
            worker: import path of its class.
            request: what it is made from.
            threads: as in ``ShardActor.load``.
            placed: what ``start`` came to.
        """
        hosts = [f"process {pid} on {host}" for host, pid, _ in placed]
        self.where = ", ".join(hosts)
        launches = make_launches([host for host, _, _ in placed], placed[0][2])
        self._ask("loading", "load", [(worker, request, threads, launch) for launch in launches])

    def measure(self, shard: int) -> None:
        """Measure a shard."""
        self.shard = shard
        self._ask("measuring", "measure", [(shard,)] * self.size)

    def take(self, call: Any, value: Any) -> list[Any] | None:
        """Take an answer.

        Returns:
            All of them by the number of the process, once they are there; None before.
        """
        self._answers[self.pending.pop(call)] = value
        if self.pending:
            return None
        return [self._answers[rank] for rank in range(self.size)]

    def end(self) -> None:
        """End the processes, whatever they are at; their room stays for others in their place."""
        for actor in self._actors:
            with contextlib.suppress(Exception):
                self._ray.kill(actor, no_restart=True)
        self._actors, self.pending, self._answers = [], {}, {}
        self.step = "empty"

    def leave(self) -> None:
        """End the processes and give their room back."""
        self.end()
        if self._room is not None:
            with contextlib.suppress(Exception):
                self._ray.util.remove_placement_group(self._room)
        self._room = None

    def _make_actor(self, rank: int) -> Any:
        settings = self._settings
        options: dict[str, Any] = {
            "num_cpus": settings.cpus_per_worker,
            "num_gpus": settings.gpus_per_worker,
            "max_restarts": 0,
            "max_task_retries": 0,
        }
        if self.size > 1:
            util = self._ray.util
            if self._room is None:
                each = {"CPU": settings.cpus_per_worker, "GPU": settings.gpus_per_worker}
                each = {name: count for name, count in each.items() if count}
                # On one machine if there is one with room: they exchange activations at every layer.
                self._room = util.placement_group([dict(each) for _ in range(self.size)], strategy="PACK")
            options["scheduling_strategy"] = util.scheduling_strategies.PlacementGroupSchedulingStrategy(
                placement_group=self._room, placement_group_bundle_index=rank
            )
        return self._actor_class.options(**options).remote()

    def _ask(self, step: str, method: str, arguments: Sequence[tuple[Any, ...]]) -> None:
        self.step, self._answers = step, {}
        self.pending = {
            getattr(actor, method).remote(*values): rank
            for rank, (actor, values) in enumerate(zip(self._actors, arguments, strict=True))
        }


def make_launches(hosts: Sequence[str], meeting: tuple[str, int]) -> list[Launch | None]:
    """Who each process of a worker is among them.

    Args:
        hosts: machine of each process.
        meeting: address and port at which they meet.

    Returns:
        By the number of the process; None for one that is alone.
    """
    if len(hosts) == 1:
        return [None]
    return [
        Launch(
            rank=rank,
            local_rank=hosts[:rank].count(host),
            world_size=len(hosts),
            local_world_size=hosts.count(host),
            master_addr=meeting[0],
            master_port=meeting[1],
        )
        for rank, host in enumerate(hosts)
    ]
