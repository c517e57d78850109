"""The processes of test_refit_groups.py: one that has imported everything forks all others."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SEQ, VOCAB = 32, 29


def make_request(folder: Path) -> Any:
    """Two block sizes in seven shards."""
    from bdtrain.refit.request import RefitRequest

    return RefitRequest(str(folder), (4, 8), (22, 10), batch_sequences=5, seed=11, threads=1)


def save_random_model(folder: Path) -> None:
    """A model folder with first weights."""
    from bdtrain.checkpoint.weights import save_model
    from bdtrain.config import RunConfig, dump_resolved
    from bdtrain.data.build import build_source
    from bdtrain.model.build import build_model
    from bdtrain.model.weights import full_state
    from bdtrain.parallel.groups import init_groups
    from bdtrain.testing import tiny_model_config

    config = RunConfig.model_validate(
        {
            "model": tiny_model_config(vocab_size=VOCAB),
            "data": {"kind": "synthetic", "seq_len": SEQ, "synthetic_vocab_size": VOCAB},
            "diffusion": {"block_size": 4},
            "train": {"steps": 1, "global_batch_size": 8},
        }
    )
    mask_id = build_source(config.data, split="valid", seed=config.run.seed).tokenizer_info.mask_id
    model = build_model(config.model, pg_collection=init_groups(), mask_id=mask_id, seed=5)
    facts = {"step": 1, "tokenizer": {"mask_id": mask_id}}
    save_model(folder, full_state(model), config_yaml=dump_resolved(config), facts=facts, tokenizer=None)


def serve(line: Any) -> None:
    """Be an actor: do what is asked until nothing more is."""
    from bdtrain.refit.ray_group import ShardActor

    actor = ShardActor()
    while (asked := line.recv()) is not None:
        line.send(getattr(actor, asked[0])(*asked[1:]))


class Worker:
    """Processes that measure together, without Ray."""

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("fork")
        self.lines, self.processes = [], []
        for _ in range(size):
            here, there = context.Pipe()
            process = context.Process(target=serve, args=(there,), daemon=True)
            process.start()
            self.lines.append(here)
            self.processes.append(process)

    def ask(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        for line, values in zip(self.lines, arguments, strict=True):
            line.send((method, *values))
        return [line.recv() for line in self.lines]

    def start(self, request: Any) -> None:
        from bdtrain.refit.ray_group import make_launches

        size = len(self.lines)
        listen = [size > 1 and rank == 0 for rank in range(size)]
        answers = self.ask("place", [(1, False, "127.0.0.1", first) for first in listen])
        for _, _, trace in answers:
            assert not trace, trace
        placed = [place for place, _, _ in answers]
        launches = make_launches([host for host, _, _ in placed], placed[0][2])
        loaded = self.ask(
            "load", [("bdtrain.refit.worker:RefitWorker", request.to_dict(), 1, one) for one in launches]
        )
        for _, _, trace in loaded:
            assert not trace, trace

    def measure(self, shard: int) -> dict[int, dict[str, list[Any]]]:
        answers = self.ask("measure", [(shard,)] * len(self.lines))
        for _, _, trace in answers:
            assert not trace, trace
        assert all(arrays is None for arrays, _, _ in answers[1:])
        return {
            size: {name: column.tolist() for name, column in arrays.items()}
            for size, arrays in answers[0][0].items()
        }

    def end(self) -> None:
        for line, process in zip(self.lines, self.processes, strict=True):
            line.send(None)
            process.join()


def measure_all(rank: int, world: int, place: str) -> dict[str, Any]:
    """Records of every shard by a process of its own and by two workers of two, and where those listen."""
    from bdtrain.parallel.libraries import prepare_libraries

    prepare_libraries()
    import bdtrain.refit.worker  # noqa: F401
    from bdtrain.refit.ray_cluster import listening_sockets

    # The other one waits for the end of the test process, and holds nothing.
    assert threading.active_count() == 2, "a fork would lose a thread"
    folder = Path(place) / "model"
    saving = multiprocessing.get_context("fork").Process(target=save_random_model, args=(folder,))
    saving.start()
    saving.join()
    assert saving.exitcode == 0
    request = make_request(folder)
    told: dict[str, Any] = {"shards": request.shards}
    single, first, second = Worker(1), Worker(2), Worker(2)
    for worker in (single, first, second):
        worker.start(request)
    shards = range(request.shards)
    told["single"] = [single.measure(shard) for shard in shards]
    told["first"] = [first.measure(shard) for shard in shards]
    # In another order: what was measured before must not show.
    told["second"] = [second.measure(shard) for shard in reversed(shards)][::-1]
    workers = (single, first, second)
    pids = [process.pid for worker in workers for process in worker.processes if process.pid]
    told["sockets"] = [[one.pid, one.host] for one in listening_sockets(pids)]
    for worker in (single, first, second):
        worker.end()
    return told
