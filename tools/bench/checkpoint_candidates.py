"""The ways to save the state of training that ``checkpoint_formats.py`` measures, and the state they save."""

from __future__ import annotations

import contextlib
import hashlib
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

CANDIDATES = (
    "ours",
    "ours, no digests",
    "torch dcp",
    "megatron torch_dist",
    "deepspeed",
    "deepspeed universal",
)
KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")


@dataclass
class Bench:
    """A rank with a filled engine.

    Attributes:
        engine: ours.
        fragments: its live views.
        communicator: all ranks.
        numbers: what belongs into the fragments, once made.
    """

    engine: Any
    fragments: list[Any]
    communicator: Any
    numbers: dict[str, Any] = field(default_factory=dict)

    @property
    def first(self) -> bool:
        """Whether this is rank 0."""
        return bool(self.communicator.rank == 0)

    def fill(self) -> None:
        """Write the numbers."""
        self.refresh()
        for fragment, kind, view in self._views():
            view.copy_(self._expected(fragment, kind))

    def refresh(self) -> None:
        """Look for the tensors again: a load of DeepSpeed's replaces them."""
        optimizer = self.engine._engine.optimizer
        # It links the state to the parameters at the first step only, and its gathering functions need that.
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
        self.fragments = self.engine.fragments()

    def clear(self) -> None:
        """Write zeros."""
        for _, _, view in self._views():
            view.zero_()

    def wrong(self) -> list[str]:
        """Kinds that are not as they were saved."""
        self.refresh()
        return sorted({kind for f, kind, view in self._views() if not view.equal(self._expected(f, kind))})

    def _expected(self, fragment: Any, kind: str) -> Any:
        key = f"{kind}/{fragment.name}"
        if key not in self.numbers:
            self.numbers[key] = _numbers(fragment, kind)
        return self.numbers[key]

    def _views(self) -> Iterator[tuple[Any, str, Any]]:
        for fragment in self.fragments:
            for kind in KINDS:
                yield fragment, kind, fragment.tensors[kind]


def _numbers(fragment: Any, kind: str) -> Any:
    """What belongs into a fragment: differs by kind, parameter and position."""
    import torch

    start = zlib.crc32(f"{kind}/{fragment.name}".encode())
    positions = torch.arange(fragment.start, fragment.start + fragment.count)
    # Whole numbers below 2^24 are exact in float32; neighbours are far apart.
    return positions.mul_(9_999_991).add_(start).remainder_(2**24).float()


class Format:
    """A way to save and load; all ranks call both."""

    def save(self, bench: Bench, folder: Path) -> None:
        """Write into a folder that is not there."""
        raise NotImplementedError

    def load(self, bench: Bench, folder: Path) -> None:
        """Overwrite the live state."""
        raise NotImplementedError


class Ours(Format):
    """``bdtrain.checkpoint``; without digests also without fsync, which the harness does then."""

    def __init__(self, *, digests: bool = True) -> None:
        self._digests = digests

    @contextlib.contextmanager
    def _without(self) -> Iterator[Any]:
        from bdtrain.checkpoint import files

        class Lazy(files.FileActions):
            def fsync(self, path: Path) -> None:
                pass

        class NoDigest:
            def update(self, data: Any) -> None:
                pass

            def hexdigest(self) -> str:
                return "0" * 64

        if self._digests:
            yield files.DISK
        else:
            fake = mock.Mock(wraps=hashlib)
            fake.sha256 = NoDigest
            with mock.patch.object(files, "hashlib", fake):
                yield Lazy()

    def save(self, bench: Bench, folder: Path) -> None:
        """Write into the folder."""
        from bdtrain.checkpoint.save import save_training_state

        with self._without() as actions:
            save_training_state(
                folder,
                step=1,
                fragments=bench.fragments,
                state={"step": 1},
                config_yaml="",
                tokenizer=None,
                run_uid="bench",
                communicator=bench.communicator,
                actions=actions,
            )

    def load(self, bench: Bench, folder: Path) -> None:
        """Read from the folder."""
        from bdtrain.checkpoint.folders import choose_checkpoint
        from bdtrain.checkpoint.load import TrainingState

        found: Path | None = folder / "step-000000001"
        if self._digests:
            # Every byte is compared with the manifest first, as a run that starts again does it.
            found = choose_checkpoint(folder, bench.communicator, "bench").newest
        assert found is not None
        TrainingState.open(found).load_into(bench.fragments, bench.communicator)


def _stretch(fragment: Any, kind: str) -> Any:
    """A view that tells torch.distributed.checkpoint which flat range of a parameter it is."""
    import math

    import torch
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
    from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

    view = fragment.tensors[kind].detach()
    chunk = ChunkStorageMetadata(torch.Size([fragment.start]), torch.Size([fragment.count]))
    data = TensorWriteData(
        chunk=chunk,
        properties=TensorProperties.create_from_tensor(view),
        size=torch.Size([math.prod(fragment.full_shape)]),
    )
    # The library asks for these by name, of an instance of Tensor, and compares the whole size.
    view.size = lambda: data.size
    view.__create_write_items__ = lambda fqn, value: [
        WriteItem(index=MetadataIndex(fqn, chunk.offsets), type=WriteItemType.SHARD, tensor_data=data)
    ]
    view.__create_chunk_list__ = lambda: [chunk]
    view.__get_tensor_shard__ = lambda index: fragment.tensors[kind].detach()
    return view


class TorchDcp(Format):
    """``torch.distributed.checkpoint`` of the same stretches."""

    @staticmethod
    def _state(bench: Bench) -> dict[str, Any]:
        return {f"{kind}/{f.name}": _stretch(f, kind) for f in bench.fragments for kind in KINDS}

    def save(self, bench: Bench, folder: Path) -> None:
        """Write into the folder."""
        import torch.distributed.checkpoint as dcp

        dcp.save(self._state(bench), storage_writer=dcp.FileSystemWriter(folder, sync_files=True))

    def load(self, bench: Bench, folder: Path) -> None:
        """Read from the folder."""
        import torch.distributed.checkpoint as dcp

        dcp.load(self._state(bench), storage_reader=dcp.FileSystemReader(folder))


class MegatronTorchDist(Format):
    """Megatron's ``dist_checkpointing``: whole parameters, gathered over dp, each written by one rank."""

    @staticmethod
    def _state(bench: Bench) -> dict[str, Any]:
        import torch
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
        from megatron.core.dist_checkpointing import ShardedTensor

        state = {}
        for name, parameter in bench.engine.module.named_parameters():
            for kind in KINDS:
                if kind == "master":
                    value = safe_get_full_fp32_param(parameter)
                else:
                    value = safe_get_full_optimizer_state(parameter, kind)
                key, rank = f"{kind}/{name}", bench.communicator.rank
                value = torch.as_tensor(value).view(parameter.shape)
                state[key] = ShardedTensor.from_rank_offsets(key, value, replica_id=rank)
        return state

    def save(self, bench: Bench, folder: Path) -> None:
        """Write into the folder."""
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.strategies.fully_parallel import (
            FullyParallelSaveStrategyWrapper,
        )
        from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

        if bench.first:
            folder.mkdir()
        bench.communicator.barrier()
        strategy = TorchDistSaveShardedStrategy("torch_dist", 1)
        dist_checkpointing.save(
            self._state(bench), str(folder), FullyParallelSaveStrategyWrapper(strategy, None)
        )

    def load(self, bench: Bench, folder: Path) -> None:
        """Read from the folder."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state
        from megatron.core import dist_checkpointing

        loaded = dist_checkpointing.load(self._state(bench), str(folder))
        for name, parameter in bench.engine.module.named_parameters():
            safe_set_full_fp32_param(parameter, loaded[f"master/{name}"])
            for kind in KINDS[1:]:
                safe_set_full_optimizer_state(parameter, loaded[f"{kind}/{name}"], kind)


class DeepSpeed(Format):
    """DeepSpeed's own files; with ``universal`` converted after the save."""

    def __init__(self, *, universal: bool = False) -> None:
        self._universal = universal

    def save(self, bench: Bench, folder: Path) -> None:
        """Write into the folder."""
        if not getattr(bench.engine.module, "_bench_hook", False):
            # Megatron's layers keep an ``_extra_state`` of None, on which the converter fails.
            bench.engine.module.register_state_dict_post_hook(_drop_nothing)
            bench.engine.module._bench_hook = True
        info = {"universal_checkpoint_version": 0.4, "original_vocab_size": 0}
        if bench.first:
            folder.mkdir()
        bench.communicator.barrier()
        bench.engine._engine.save_checkpoint(
            str(folder), tag="step", client_state={"universal_checkpoint_info": info, "iteration": 1}
        )
        bench.communicator.barrier()
        if self._universal and bench.first:
            command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
            command += ["--input_folder", str(folder / "step"), "--output_folder", str(folder / "universal")]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(done.stdout[-2000:] + done.stderr[-4000:])
        bench.communicator.barrier()

    def load(self, bench: Bench, folder: Path) -> None:
        """Read from the folder."""
        path, _ = bench.engine._engine.load_checkpoint(
            str(folder), tag="universal" if self._universal else "step", load_module_strict=False
        )
        assert path is not None


def _drop_nothing(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in [name for name, value in state.items() if value is None]:
        del state[name]


def make_format(name: str) -> Format:
    """The candidate of a name."""
    made: dict[str, Callable[[], Format]] = {
        "ours": Ours,
        "ours, no digests": lambda: Ours(digests=False),
        "torch dcp": TorchDcp,
        "megatron torch_dist": MegatronTorchDist,
        "deepspeed": DeepSpeed,
        "deepspeed universal": lambda: DeepSpeed(universal=True),
    }
    return made[name]()
