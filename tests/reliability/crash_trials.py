"""One of two ranks dies at the n-th action of a save, for every n; ranks that hold no model.

``python crash_trials.py ROOT RANK whole|half`` forks the two ranks of each trial from a process that
has imported torch, and prints one JSON line a trial. The trials go on in one folder, as attempts of one run
would.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from bdtrain.checkpoint.communicator import TorchCommunicator
from bdtrain.checkpoint.files import FileActions
from bdtrain.checkpoint.folders import choose_checkpoint, clean_leftovers, find_checkpoints
from bdtrain.checkpoint.load import TrainingState
from bdtrain.checkpoint.save import save_training_state
from tests.unit.checkpoint.layouts import KINDS, PARAMETERS, Layout, fragments, same_bits, serial

LIMIT = 200


class DeadlyDisk(FileActions):
    """The disk; the process is killed at one of the actions.

    Args:
        at: number of the action, from 0; None for never.
        half: write half of the bytes of a deadly write first.
    """

    def __init__(self, at: int | None = None, *, half: bool = False) -> None:
        self._at, self._half = at, half
        self.log: list[str] = []

    def _next(self, kind: str) -> bool:
        self.log.append(kind)
        return self._at == len(self.log) - 1

    def make_folder(self, path: Path) -> None:
        if self._next("make"):
            die("make")
        super().make_folder(path)

    def write(self, file: BinaryIO, data: bytes | memoryview) -> None:
        if self._next("write"):
            if self._half:
                super().write(file, data[: len(data) // 2])
                file.flush()
            die("write")
        super().write(file, data)

    def fsync(self, path: Path) -> None:
        if self._next("fsync"):
            die("fsync")
        super().fsync(path)

    def rename(self, source: Path, target: Path) -> None:
        if self._next("rename"):
            die("rename")
        super().rename(source, target)

    def remove(self, path: Path) -> None:
        if self._next("remove"):
            die("remove")
        super().remove(path)


def die(action: str) -> None:
    """Say at which action, then leave as ``kill -9`` would have it."""
    Path(os.environ["CRASH_NOTE"]).write_text(action)
    os.kill(os.getpid(), signal.SIGKILL)


def expected(name: str, kind: str, step: int) -> torch.Tensor:
    """What a parameter holds at a step."""
    return serial(name, kind) + step


def save(root: Path, step: int, ranks: TorchCommunicator, disk: FileActions) -> None:
    """Save a step, then acknowledge it."""
    owned = fragments(Layout(tp=2))[ranks.rank]
    for fragment in owned:
        for tensor in fragment.tensors.values():
            tensor += step
    save_training_state(
        root,
        step=step,
        fragments=owned,
        state={"tokens": 100 * step},
        config_yaml="a: 1\n",
        tokenizer=None,
        run_uid="run-1",
        communicator=ranks,
        actions=disk,
    )
    with (root.parent / f"acknowledged-{ranks.rank}").open("a") as file:
        file.write(f"{step}\n")


def be_rank(rank: int, trial: Path, root: Path, disk: FileActions) -> int:
    """One rank of a trial: find the newest checkpoint, save twice, the second time with the deadly disk."""
    dist.init_process_group("gloo", init_method=f"file://{trial / 'meeting'}", rank=rank, world_size=2)
    ranks = TorchCommunicator()
    newest = choose_checkpoint(root, ranks, "run-1").newest
    step = 0 if newest is None else int(newest.name.removeprefix("step-"))
    if rank == 0:
        clean_leftovers(root)
    ranks.barrier()
    save(root, step + 1, ranks, DeadlyDisk())
    (trial / f"good-{rank}").write_text(str(step + 1))
    try:
        save(root, step + 2, ranks, disk)
    except Exception as error:
        (trial / f"survivor-{rank}").write_text(f"{type(error).__name__}: {error}")
        return 1
    (trial / f"log-{rank}").write_text(json.dumps(disk.log if isinstance(disk, DeadlyDisk) else []))
    return 0


def run_trial(root: Path, trial: Path, rank: int, at: int, *, half: bool) -> dict[str, Any]:
    """Two ranks, of which one dies at an action; what is on the disk afterwards."""
    trial.mkdir(parents=True)
    root.mkdir(exist_ok=True)
    pids = {}
    for number in range(2):
        pid = os.fork()
        if pid == 0:
            code = 99
            try:
                os.environ["CRASH_NOTE"] = str(trial / f"died-{number}")
                signal.alarm(60)
                disk = DeadlyDisk(at if number == rank else None, half=half)
                code = be_rank(number, trial, root, disk)
            finally:
                os._exit(code)
        pids[pid] = number
    codes = [0, 0]
    for _ in range(2):
        pid, status = os.wait()
        codes[pids[pid]] = os.waitstatus_to_exitcode(status)
    found = find_checkpoints(root, run_uid="run-1")
    notes = {path.name: path.read_text() for path in trial.iterdir() if path.name != "meeting"}
    acknowledged = [
        int(text) for path in root.parent.glob("acknowledged-*") for text in path.read_text().split()
    ]
    assert found.newest is not None
    newest = int(found.newest.name.removeprefix("step-"))
    return {
        "at": at,
        "half": half,
        "codes": codes,
        "action": notes.get(f"died-{rank}"),
        "survivor": notes.get(f"survivor-{1 - rank}"),
        "good": int(notes["good-0"]),
        "acknowledged": max(acknowledged),
        "newest": newest,
        "rejected": [reason for _, reason in found.rejected],
        "wrong": wrong(found.newest, newest),
        "left": sorted(path.name for path in root.iterdir() if not path.name.startswith("step-")),
    }


def wrong(folder: Path, step: int) -> list[str]:
    """What a checkpoint does not hold as it was saved: by safetensors' own reader, and by ours."""
    found = []
    for rank, owned in enumerate(fragments(Layout(tp=2))):
        raw = load_file(folder / f"rank-{rank:05d}.safetensors")
        tensors = Counter(tuple((tensor).view(torch.int32).tolist()) for tensor in raw.values())
        wanted = Counter(
            tuple((tensor + step).view(torch.int32).tolist())
            for fragment in owned
            if fragment.partition_dim is not None or rank == 0
            for tensor in fragment.tensors.values()
        )
        if tensors != wanted:
            found.append(f"rank {rank}: the file does not hold the bits that were saved")
    opened = TrainingState.open(folder)
    for name in PARAMETERS:
        for kind in KINDS:
            if not same_bits(opened.full_tensor(name, kind), expected(name, kind, step)):
                found.append(f"{name} {kind} is read as something else")
    if opened.state != {"tokens": 100 * step}:
        found.append(f"state {opened.state}")
    return found


def main(root: Path, rank: int, *, half: bool) -> None:
    """A trial for each action, until one goes through."""
    for at in range(LIMIT):
        result = run_trial(root / "checkpoints", root / f"trial-{at}", rank, at, half=half)
        print(json.dumps(result), flush=True)
        if result["codes"] == [0, 0]:
            return


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), half=sys.argv[3] == "half")
