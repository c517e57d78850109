"""Workers of one process or of several, without Ray: started, fed and replaced whole."""

import os
import socket
import time
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest

from bdtrain.diffusion.variance import BlockRecords
from bdtrain.errors import RefitError
from bdtrain.parallel.launch_environment import Launch
from bdtrain.refit import ray_group, ray_pool
from bdtrain.refit.outcome import RaySettings, ShardQueue
from bdtrain.refit.ray_group import ShardActor, make_launches, numeric_host
from bdtrain.refit.ray_pool import RaySession, WorkerPool

NEVER = object()
"""An answer that does not come."""


def shard_records(shard):
    rows = np.arange(4 * shard, 4 * shard + 4)
    return BlockRecords(rows, np.full(4, 4), 1 + rows % 4, rows + 0.5)


class ActorDiedError(Exception):
    """As Ray names it."""


class Call:
    """What a call of an actor returns at once."""

    def __init__(self, number, actor, value):
        self.number, self.actor, self.value = number, actor, value


class FakeRay:
    """Ray whose actors answer at once, as ``answer(actor, method, arguments)`` says."""

    def __init__(self, answer=None):
        self.answer = answer or (lambda actor, method, arguments: None)
        self.actors, self.calls, self.rooms, self.removed = [], [], [], []
        strategies = SimpleNamespace(
            PlacementGroupSchedulingStrategy=lambda placement_group, placement_group_bundle_index: (
                placement_group,
                placement_group_bundle_index,
            )
        )
        self.util = SimpleNamespace(
            placement_group=self._room,
            remove_placement_group=self.removed.append,
            scheduling_strategies=strategies,
        )

    def _room(self, bundles, strategy):
        self.rooms.append((bundles, strategy))
        return f"room {len(self.rooms) - 1}"

    def remote(self, kind):
        assert kind is ShardActor
        return SimpleNamespace(options=lambda **how: SimpleNamespace(remote=lambda: self._actor(how)))

    def _actor(self, how):
        actor = SimpleNamespace(number=len(self.actors), options=how, killed=False, launch=None)
        for method in ("place", "load", "measure"):
            setattr(actor, method, SimpleNamespace(remote=self._caller(actor, method)))
        self.actors.append(actor)
        return actor

    def _caller(self, actor, method):
        def call(*arguments):
            if method == "load":
                actor.launch = arguments[3]
            self.calls.append((actor.number, method, arguments))
            value = self.answer(actor, method, arguments)
            if value is None:
                value = self._done(actor, method, arguments)
            return Call(len(self.calls), actor, value)

        return call

    def _done(self, actor, method, arguments):
        if method == "place":
            meeting = ("10.0.0.1", 4000) if arguments[3] else ("", 0)
            return ("node", 100 + actor.number, meeting), "", ""
        if method == "load":
            return None, "", ""
        first = actor.launch is None or actor.launch.rank == 0
        return {4: shard_records(arguments[0]).to_arrays()} if first else None, "", ""

    def wait(self, calls, num_returns, timeout):
        done = [call for call in calls if call.value is not NEVER and not call.actor.killed]
        done = sorted(done, key=lambda call: call.number)[:num_returns]
        if len(done) < num_returns:
            time.sleep(min(timeout, 0.01))
        return done, [call for call in calls if call not in done]

    def get(self, call, timeout):
        if isinstance(call.value, Exception):
            raise call.value
        return call.value

    def kill(self, actor, no_restart):
        actor.killed = True

    def cluster_resources(self):
        return {"CPU": 3.0}

    def available_resources(self):
        return {"CPU": 1.0}

    def asked(self, method):
        """(Actor, arguments) of the calls of a method."""
        return [(number, arguments) for number, name, arguments in self.calls if name == method]


class Measurement:
    """A pool over a fake Ray."""

    def __init__(self, answer=None, *, shards=4, device="cpu", **settings):
        self.ray, self.lines, self.looks = FakeRay(answer), [], count()
        request = SimpleNamespace(
            shards=shards, threads=2, device=device, to_dict=lambda: {"some": "request"}
        )
        self.settings = RaySettings(**settings)
        self.queue = ShardQueue(shards, self.settings.retries)
        session = RaySession(self.ray, lambda: None, lambda: next(self.looks), "10.0.0.9")
        self.pool = WorkerPool(session, request, self.settings, "a:B", self.queue, self.lines.append)

    def run(self, *, seconds=20.0, quorum=1.0):
        self.pool.measure(time.monotonic() + seconds, "too late", quorum)
        self.pool.end()
        return self

    def check(self, shards):
        assert sorted(self.queue.records) == list(shards)
        for shard, records in self.queue.records.items():
            np.testing.assert_array_equal(records[4].nll, shard_records(shard).nll)
        assert all(actor.killed for actor in self.ray.actors)


def test_a_worker_of_one_process_is_placed_by_ray_alone():
    done = Measurement(num_workers=2, cpus_per_worker=3.0)
    done.run().check(range(4))
    ray = done.ray
    assert not ray.rooms and len(ray.actors) == 2
    for actor in ray.actors:
        assert actor.options == {"num_cpus": 3.0, "num_gpus": 0.0, "max_restarts": 0, "max_task_retries": 0}
    # It has no others to meet.
    assert [arguments for _, arguments in ray.asked("place")] == [(2, False, "10.0.0.9", False)] * 2
    assert [arguments[3] for _, arguments in ray.asked("load")] == [None, None]
    assert {number for number, _ in ray.asked("measure")} == {0, 1}


def test_processes_that_share_a_model_are_placed_at_once_and_all_measure_each_shard():
    done = Measurement(num_workers=2, tp=3, cpus_per_worker=2.0, gpus_per_worker=1.0, device="cuda")
    done.run().check(range(4))
    ray = done.ray
    bundles = [{"CPU": 2.0, "GPU": 1.0}] * 3
    assert ray.rooms == [(bundles, "PACK")] * 2 and sorted(ray.removed) == ["room 0", "room 1"]
    places = [actor.options["scheduling_strategy"] for actor in ray.actors]
    assert places == [(room, rank) for room in ("room 0", "room 1") for rank in range(3)]
    assert [arguments for _, arguments in ray.asked("place")] == [
        (2, True, "10.0.0.9", rank == 0) for _ in range(2) for rank in range(3)
    ]
    for number, arguments in ray.asked("load"):
        assert arguments[:3] == ("a:B", {"some": "request"}, 2)
        launch = arguments[3]
        assert (launch.rank, launch.world_size) == (number % 3, 3)
        assert (launch.master_addr, launch.master_port) == ("10.0.0.1", 4000)
    for shard in range(4):
        numbers = sorted(number for number, arguments in ray.asked("measure") if arguments == (shard,))
        assert numbers in ([0, 1, 2], [3, 4, 5])
    # Sockets are looked at when the first process listens, and when all have met.
    assert next(done.looks) == 4


def test_gpus_are_hidden_from_workers_that_measure_on_cpus():
    done = Measurement(gpus_per_worker=1.0).run()
    assert [arguments[1] for _, arguments in done.ray.asked("place")] == [False]


def fault(number, method, value, shard=None):
    """An answer of one actor at one place."""

    def answer(actor, asked, arguments):
        if actor.number == number and asked == method and shard in (None, arguments[0]):
            return value
        return None

    return answer


@pytest.mark.parametrize("method", ["place", "load", "measure"])
@pytest.mark.parametrize("member", [0, 1, 2])
def test_the_death_of_one_process_replaces_all_of_its_worker_in_the_same_room(method, member):
    died = fault(member, method, ActorDiedError("a page of text"))
    done = Measurement(died, tp=3, num_workers=1)
    done.run().check(range(4))
    assert len(done.ray.actors) == 6 and len(done.ray.rooms) == 1 and done.ray.removed == ["room 0"]
    assert [actor.options["scheduling_strategy"][1] for actor in done.ray.actors] == [0, 1, 2] * 2
    (line,) = [line for line in done.lines if "attempt 1" in line]
    assert line.endswith("the worker died (ActorDiedError)") and "page" not in line
    assert ("shard 0" in line) == (method == "measure")


def test_the_shard_of_a_worker_that_died_goes_to_another_one():
    died = fault(1, "measure", ActorDiedError())
    done = Measurement(died, tp=2, num_workers=2)
    done.run().check(range(4))
    tried = [number // 2 for number, arguments in done.ray.asked("measure") if arguments == (0,)]
    # Both processes of the first worker, then both of another one.
    assert tried[:2] == [0, 0] and set(tried[2:]) <= {1, 2} and len(tried) == 4


def test_an_error_of_one_process_ends_the_others_that_wait_for_it():
    def answer(actor, method, arguments):
        if method == "measure" and arguments == (0,) and actor.number < 2:
            return (None, "DataError: torn", "its traceback") if actor.number == 1 else NEVER
        return None

    done = Measurement(answer, tp=2)
    began = time.monotonic()
    done.run().check(range(4))
    assert time.monotonic() - began < 10
    assert "shard 0, attempt 1 of 3 failed: DataError: torn" in done.lines and "its traceback" in done.lines
    assert len(done.ray.actors) == 4


def test_a_process_that_only_noticed_a_death_is_not_blamed():
    def answer(actor, method, arguments):
        if method == "measure" and actor.number < 2:
            return (None, "RuntimeError: closed by peer", "") if actor.number == 0 else ActorDiedError()
        return None

    done = Measurement(answer, tp=2)
    done.run().check(range(4))
    assert "shard 0, attempt 1 of 3 failed: the worker died (ActorDiedError)" in done.lines


def test_a_worker_whose_process_stops_for_ever_costs_its_shard_and_no_more_than_the_deadline(monkeypatch):
    done = Measurement(fault(1, "measure", NEVER, shard=2), tp=2, num_workers=2)
    # A clock that goes on while nobody answers, and only then.
    now = [0.0]
    wait = done.ray.wait

    def wait_for(calls, num_returns, timeout):
        ready, rest = wait(calls, num_returns, 0.0)
        now[0] += 0.0 if ready else timeout
        return ready, rest

    monkeypatch.setattr(done.ray, "wait", wait_for)
    monkeypatch.setattr(ray_pool, "time", SimpleNamespace(monotonic=lambda: now[0]))
    done.pool.measure(1000.0, "too late", 0.75)
    done.pool.end()
    done.check([0, 1, 3])
    assert now == [1000.0] and done.queue.failures == {2: "running: too late"}
    assert sorted(done.ray.removed) == ["room 0", "room 1"]


def test_a_worker_that_cannot_be_made_gives_its_room_back():
    def answer(actor, method, arguments):
        return (None, "ConfigError: no", "") if method == "load" and actor.number % 2 else None

    done = Measurement(answer, tp=2, retries=1).run()
    assert not done.queue.records and len(done.ray.actors) == 4 and done.ray.removed == ["room 0"]
    assert set(done.queue.failures.values()) == {"waiting: no worker could be started: ConfigError: no"}


@pytest.mark.parametrize("tp", [1, 2])
def test_a_process_that_finds_no_way_to_the_others_says_why(tp):
    unreachable = (None, "OSError: [Errno 101] Network is unreachable", "its traceback")
    once = Measurement(fault(tp - 1, "place", unreachable), tp=tp, retries=1).run()
    once.check(range(4))
    assert (
        "worker not started (placing), attempt 1: OSError: [Errno 101] Network is unreachable" in once.lines
    )
    assert "its traceback" in once.lines

    def answer(actor, method, arguments):
        if method == "place":
            time.sleep(0.2)
        return unreachable if method == "place" else None

    # It is no want of room, however long it lasts.
    never = Measurement(answer, tp=tp, retries=1, placement_s=0.3).run()
    assert set(never.queue.failures.values()) == {f"waiting: no worker could be started: {unreachable[1]}"}


def test_a_single_process_is_replaced_after_two_errors_and_a_shard_given_up_after_three():
    def answer(actor, method, arguments):
        return (None, "ValueError: no", "") if method == "measure" and arguments == (1,) else None

    done = Measurement(answer, shards=2)
    done.run(quorum=0.5).check([0])
    assert done.queue.failures == {1: "ValueError: no (after 3 attempts)"}
    assert len(done.ray.actors) == 2


@pytest.mark.parametrize(
    ("tp", "said"), [(1, "one needs 2 CPUs"), (2, "2 processes at once, each of 2 CPUs")]
)
def test_a_cluster_without_room_is_told_what_a_worker_needs(tp, said):
    done = Measurement(lambda *_: NEVER, tp=tp, cpus_per_worker=2.0, placement_s=0.05)
    with pytest.raises(RefitError, match=said) as found:
        done.run()
    assert "the cluster has 3 CPUs and 0 GPUs, of them free 1 CPUs" in str(found.value)
    assert ("refit.worker_tp" in str(found.value)) == (tp > 1)
    # One of two is no worker: the other may never be placed.
    half = Measurement(fault(1, "place", NEVER), tp=2, placement_s=0.05)
    with pytest.raises(RefitError, match="no room"):
        half.run()


def test_processes_are_numbered_on_their_machines():
    assert make_launches(["a"], ("", 0)) == [None]
    assert make_launches(["a", "b", "a"], ("10.0.0.1", 5)) == [
        Launch(0, 0, 3, 2, "10.0.0.1", 5),
        Launch(1, 0, 3, 1, "10.0.0.1", 5),
        Launch(2, 1, 3, 2, "10.0.0.1", 5),
    ]


def test_the_head_is_known_by_number():
    for address, host in (("10.0.0.9:6379", "10.0.0.9"), ("[::1]:6379", "::1")):
        assert numeric_host(address) == host
    assert numeric_host("localhost:6379") in ("127.0.0.1", "::1")


def test_a_process_is_made_fit_before_it_loads_anything(monkeypatch):
    monkeypatch.setattr(os, "environ", {"RANK": "3", "CUDA_VISIBLE_DEVICES": "0", "SLURM_PROCID": "3"})
    actor = ShardActor()
    (host, pid, meeting), reason, trace = actor.place(2, False, "127.0.0.1", True)
    assert (host, pid, reason, trace) == (socket.gethostname(), os.getpid(), "", "")
    assert "RANK" not in os.environ and "SLURM_PROCID" not in os.environ
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and os.environ["OMP_NUM_THREADS"] == "2"
    with socket.create_connection(meeting, timeout=5) as found:
        assert found.getpeername()[0] == "127.0.0.1"
    actor._listener.close()
    monkeypatch.setattr(os, "environ", {"CUDA_VISIBLE_DEVICES": "0"})
    (_, _, meeting), _, _ = ShardActor().place(None, True, "127.0.0.1", False)
    assert meeting == ("", 0)
    assert os.environ.keys() == {"CUDA_VISIBLE_DEVICES", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"}
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"


@pytest.mark.parametrize("listen", [False, True])
def test_a_process_without_a_way_to_the_head_or_an_address_to_listen_at_says_so(monkeypatch, listen):
    def refuse(head):
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(os, "environ", {})
    # An address of documentation: no machine has it.
    monkeypatch.setattr(ray_group, "own_address", (lambda head: "192.0.2.9") if listen else refuse)
    place, reason, trace = ShardActor().place(1, False, "192.0.2.1", listen)
    assert place is None and "Traceback" in trace
    assert reason.startswith("OSError: ") and ("assign" if listen else "unreachable") in reason


class Given:
    """A worker that keeps what it was made from."""

    made: list = []  # noqa: RUF012 - of this test's own class

    def __init__(self, *given):
        self.made.append(given)

    def measure(self, shard):
        if shard < 0:
            raise ValueError("no such shard\nand more")
        return {4: shard_records(shard)}


def test_only_the_first_process_of_a_worker_hands_records_on(monkeypatch):
    monkeypatch.setattr(Given, "made", [])
    worker = f"{__name__}:Given"
    launches = [None, Launch(0, 0, 2, 2, "127.0.0.1", 1), Launch(1, 1, 2, 2, "127.0.0.1", 1)]
    for launch in launches:
        actor = ShardActor()
        assert actor.load(worker, {"a": 1}, None, launch) == (None, "", "")
        arrays, reason, trace = actor.measure(3)
        assert reason == trace == "" and (arrays is None) == (launch is not None and launch.rank == 1)
        arrays, reason, trace = actor.measure(-1)
        assert arrays is None and reason == "ValueError: no such shard" and "Traceback" in trace
    assert Given.made == [({"a": 1},), ({"a": 1}, launches[1], None), ({"a": 1}, launches[2], None)]
    found = ShardActor().load("bdtrain.nowhere:X", {}, None, None)
    assert found[1].startswith("ModuleNotFoundError")
