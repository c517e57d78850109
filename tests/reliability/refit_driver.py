"""A process that measures shards on Ray with a worker that can be told to fail.

``python refit_driver.py PLAN.json``: a list of measurements, one after another; what each came to is written
beside it. The worker's numbers are arithmetic of the shard's, so that a test can tell them without it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bdtrain.diffusion.variance import BlockRecords
from bdtrain.errors import BdtrainError, report_failure

BLOCKS = 5
BLOCK_SIZES = (2, 4)


@dataclass(frozen=True)
class FakeRequest:
    """What is measured.

    Attributes:
        shards: number of them.
        notes: folder where workers leave what they see.
        faults: by shard: ``raise``, ``die``, ``die once``, ``stop``; a worker of two processes knows ``die
            once``, of its second one, and ``hold``, until there is a file ``go``.
        wait_s: seconds that a shard takes.
    """

    shards: int
    notes: str
    faults: dict[str, str] = field(default_factory=dict)
    wait_s: float = 0.0
    threads: int | None = 1
    device: str = "cpu"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class FakeWorker:
    """Returns numbers without a model, and fails as the request says."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.request = request
        self.notes = Path(request["notes"])
        seen = {name: os.environ.get(name) for name in ("RANK", "MASTER_ADDR", "SLURM_PROCID")}
        seen |= {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")}
        token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
        seen["modes"] = [oct(path.stat().st_mode & 0o777) for path in (token, token.parent)]
        (self.notes / f"worker-{os.getpid()}.json").write_text(json.dumps(seen))

    def measure(self, shard: int) -> dict[int, BlockRecords]:
        fault = self.request["faults"].get(str(shard))
        with (self.notes / f"shard-{shard}").open("a") as file:
            file.write(f"{os.getpid()}\n")
        if fault == "raise":
            raise ValueError(f"nothing to see in {shard}")
        attempts = (self.notes / f"shard-{shard}").read_text().splitlines()
        if fault == "die" or (fault == "die once" and len(attempts) == 1):
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(self.request["wait_s"])
        return {size: shard_records(shard, size) for size in BLOCK_SIZES}


class SharedWorker:
    """A worker of two processes or more that really meet: each has some of the numbers, gloo adds them up."""

    def __init__(self, request: dict[str, Any], launch: Any, listener: int | None) -> None:
        import torch.distributed as dist

        from bdtrain.parallel.groups import init_process_group, private_store

        self.request, self.launch, self.dist = request, launch, dist
        init_process_group(launch, store=private_store(launch, listener))

    def measure(self, shard: int) -> dict[int, BlockRecords]:
        import torch

        path = Path(self.request["notes"]) / f"shard-{shard}-{self.launch.rank}"
        with path.open("a") as file:
            file.write(f"{os.getpid()}\n")
        fault = self.request["faults"].get(str(shard))
        if fault == "die once" and self.launch.rank == 1 and len(path.read_text().splitlines()) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        while fault == "hold" and not path.with_name("go").exists():
            time.sleep(0.02)
        records = {}
        for size in BLOCK_SIZES:
            whole = shard_records(shard, size)
            mine = np.arange(BLOCKS) % self.launch.world_size == self.launch.rank
            losses = torch.from_numpy(np.where(mine, whole.nll, 0.0))
            self.dist.all_reduce(losses)
            records[size] = BlockRecords(whole.sequence, whole.maskable, whole.masked, losses.numpy())
        return records


def shard_records(shard: int, block_size: int) -> BlockRecords:
    """What a worker returns for a shard."""
    rows = np.arange(shard * BLOCKS, (shard + 1) * BLOCKS)
    return BlockRecords(
        rows, np.full(BLOCKS, block_size), 1 + rows % block_size, np.sqrt(rows + 1.0) / block_size
    )


def main(plan: Path) -> int:
    from bdtrain.refit.outcome import RaySettings
    from bdtrain.refit.ray_backend import measure_on_ray

    start_s = 0.0
    for number, job in enumerate(json.loads(plan.read_text())):
        begin = time.monotonic()
        result = plan.with_name(f"result-{number}")
        request = FakeRequest(notes=str(plan.parent), **job["request"])
        deadline_s = job.get("deadline_s") or 1.5 * start_s + job["seconds_to_measure"]
        try:
            outcome = measure_on_ray(
                request,
                RaySettings(**job.get("settings", {})),
                deadline_s=deadline_s,
                quorum=job["quorum"],
                log=lambda line: print(line, flush=True),
                worker=f"refit_driver:{job.get('worker', 'FakeWorker')}",
            )
        except BdtrainError as error:
            return report_failure(error)
        start_s = outcome.seconds["start_s"]
        np.savez(
            result.with_suffix(".npz"),
            **{
                f"{shard} {size} {name}": column
                for shard, by_size in outcome.records.items()
                for size, records in by_size.items()
                for name, column in records.to_arrays().items()
            },
        )
        facts = {
            "failures": dict(outcome.failures),
            "seconds": dict(outcome.seconds),
            "complete_share": outcome.complete_share,
            "deadline_s": deadline_s,
            "wall_s": time.monotonic() - begin,
        }
        result.with_suffix(".json").write_text(json.dumps(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
