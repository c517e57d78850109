"""What each of two gloo processes does for the tests of ``test_checkpoint_ranks.py``."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import torch.distributed as dist

from bdtrain.checkpoint.communicator import TorchCommunicator
from bdtrain.checkpoint.folders import choose_checkpoint
from bdtrain.checkpoint.load import TrainingState
from bdtrain.checkpoint.save import save_training_state
from bdtrain.errors import CheckpointError
from bdtrain.testing.ranks import RENDEZVOUS
from tests.unit.checkpoint.layouts import Layout, UnluckyDisk, fragments, same_bits


def main(rank, world_size, root):
    dist.init_process_group("gloo", init_method=os.environ[RENDEZVOUS], rank=rank, world_size=world_size)
    try:
        return claims(TorchCommunicator(dist.new_group()), Path(root))
    finally:
        dist.destroy_process_group()


def claims(ranks, root):
    """Facts for the tests, of this rank."""
    # A group whose rank 0 is not the world's.
    second = dist.new_group([1])
    told = {
        "gathered": ranks.gather_objects({"rank": ranks.rank, "text": "é" * (1 + 1000 * ranks.rank)}),
        "nothing": ranks.gather_objects(None),
        "broadcast": ranks.broadcast_object(["from", ranks.rank]),
        "alone": TorchCommunicator(second).broadcast_object(dist.get_rank()) if ranks.rank == 1 else None,
    }
    two = fragments(Layout(tp=2))[ranks.rank]
    told["saved"] = _save(ranks, root, 1, two, UnluckyDisk())
    refusing = UnluckyDisk(5, error=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), only="write")
    told["refused"] = _save(ranks, root, 2, two, refusing if ranks.rank == 1 else UnluckyDisk())
    told["after"] = sorted(path.name for path in root.iterdir())
    ranks.barrier()
    told["again"] = _save(ranks, root, 3, two, UnluckyDisk())
    if ranks.rank == 0:
        os.truncate(root / "step-000000003" / "rank-00001.safetensors", 40)
    ranks.barrier()
    found = choose_checkpoint(root, ranks, "run-1")
    told["found"] = [found.newest.name, [[folder.name, reason] for folder, reason in found.rejected]]
    # On as two stages.
    target = Layout(pp=2)
    live = fragments(target, blank=True)[ranks.rank]
    TrainingState.open(found.newest).load_into(live, ranks)
    told["loaded"] = all(
        same_bits(mine.tensors[kind], right.tensors[kind])
        for mine, right in zip(live, fragments(target)[ranks.rank], strict=True)
        for kind in mine.tensors
    )
    return told


def _save(ranks, root, step, owned, disk):
    try:
        saved = save_training_state(
            root,
            step=step,
            fragments=owned,
            state={"tokens": step},
            config_yaml="a: 1\n",
            tokenizer=None,
            run_uid="run-1",
            communicator=ranks,
            actions=disk,
        )
        return saved.folder.name
    except CheckpointError as error:
        return f"refused: {error}"
