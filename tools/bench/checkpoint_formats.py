"""Ways to save the state of training, measured on the same state: ours and those of the libraries.

Two gloo ranks (dp 2, ZeRO 1) hold a model's float32 master weights, two moments and average, filled with
numbers that say where they belong. Each candidate saves, then loads into the same layout; at last one process
loads what two have saved. Every load is compared with the numbers. Files are deleted as soon as possible.

save        wall seconds until the library returns, on the slowest rank
on disk     the same with fsync of every file of it: what a checkpoint costs that survives a power failure
memory      growth of VmHWM (peak resident size) during the call, on the rank where it is largest. Mapped
            files count, processes that a library forks do not.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import io
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

SIZES = {
    "tiny": {"layers": 2, "hidden": 32, "heads": 4, "vocabulary": 64},
    "30M": {"layers": 8, "hidden": 512, "heads": 8, "vocabulary": 4096},
    "100M": {"layers": 12, "hidden": 768, "heads": 12, "vocabulary": 8192},
}
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


def build(size: dict[str, int], *, universal: bool = False) -> Bench:
    """A model under the engine, state made and filled."""
    from bdtrain.checkpoint.communicator import TorchCommunicator
    from bdtrain.config import load_config
    from bdtrain.config.layout import resolve_layout
    from bdtrain.model.build import build_model
    from bdtrain.parallel.groups import init_groups, read_launch
    from bdtrain.train import setup

    launch = read_launch(os.environ)
    config = load_config(
        [],
        [
            "run.name=checkpoint_formats",
            "data.kind=synthetic",
            f"data.synthetic_vocab_size={size['vocabulary']}",
            "data.seq_len=64",
            "diffusion.block_size=4",
            f"model.num_layers={size['layers']}",
            f"model.hidden_size={size['hidden']}",
            f"model.num_heads={size['heads']}",
            f"model.vocab_size={size['vocabulary']}",
            "optim.ema_decay=0.999",
            "train.steps=1",
            f"train.global_batch_size={launch.world_size}",
        ],
    ).config
    setup.prepare_machine(config, launch)
    groups = init_groups(launch)
    model = build_model(config.model, pg_collection=groups, mask_id=4, seed=1)
    original = setup.deepspeed_settings
    extra = {"checkpoint": {"load_universal": True}} if universal else {}
    with mock.patch.object(setup, "deepspeed_settings", lambda **given: {**original(**given), **extra}):
        engine = setup.build_engine(config, resolve_layout(config, launch.world_size), model)
    bench = Bench(engine, [], TorchCommunicator())
    bench.fill()
    return bench


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


def measured(bench: Bench, action: Callable[[], None]) -> dict[str, float]:
    """Wall and CPU seconds and growth of the peak resident size of a call by all ranks, the worst of them."""
    # What the allocator keeps for later would hide what the call needs.
    ctypes.CDLL(None).malloc_trim(0)
    bench.communicator.barrier()
    # "5" sets the recorded peak back to what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    before, cpu, wall = _status("VmHWM"), time.process_time(), time.monotonic()
    with contextlib.redirect_stdout(io.StringIO()):
        action()
    own = {"seconds": time.monotonic() - wall, "cpu": time.process_time() - cpu}
    own["memory"] = (_status("VmHWM") - before) * 1024
    ranks = bench.communicator.gather_objects(own)
    return {name: max(rank[name] for rank in ranks) for name in own}


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])
    raise KeyError(name)


def sync_files(bench: Bench, folder: Path) -> float:
    """Seconds that rank 0 waits until every file is on disk."""
    started = time.monotonic()
    if bench.first:
        for path in [folder, *folder.rglob("*")]:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    bench.communicator.barrier()
    return time.monotonic() - started


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def save_and_load(
    rank: int,
    world_size: int,
    size: dict[str, int],
    names: Sequence[str],
    repeats: int,
    root: str,
    keep: bool,
) -> dict[str, list[dict[str, Any]]]:
    """Saves and loads of the candidates in turns, by the ranks of one layout; see ``run_ranks``."""
    _prepare()
    bench = build(size)
    records: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(repeats + 1):
        for name in names:
            folder, candidate = Path(root) / name.replace(" ", "_").replace(",", ""), make_format(name)
            bench.fill()
            saved = measured(bench, lambda: candidate.save(bench, folder))  # noqa: B023
            record: dict[str, Any] = {f"save {key}": value for key, value in saved.items()}
            record["fsync seconds"] = sync_files(bench, folder)
            record["bytes"] = folder_bytes(folder)
            # Universal files are read by an engine that was told so; one process does it below.
            if name != "deepspeed universal":
                bench.clear()
                loaded = measured(bench, lambda: candidate.load(bench, folder))  # noqa: B023
                record |= {f"load {key}": value for key, value in loaded.items()}
                record["wrong"] = bench.wrong()
            bench.communicator.barrier()
            if bench.first and not (keep and number == repeats):
                shutil.rmtree(folder)
            bench.communicator.barrier()
            # The first round imports libraries and starts helpers; the kept one is only there to be loaded.
            if number > 0:
                records[name].append(record)
    return records


def load_elsewhere(
    rank: int, world_size: int, size: dict[str, int], name: str, repeats: int, root: str
) -> list[dict[str, Any]]:
    """Loads by one process of what other ranks saved; see ``run_ranks``."""
    _prepare()
    bench = build(size, universal=name == "deepspeed universal")
    folder, candidate, records = Path(root) / name.replace(" ", "_").replace(",", ""), make_format(name), []
    for _ in range(repeats):
        bench.clear()
        record: dict[str, Any] = dict(measured(bench, lambda: candidate.load(bench, folder)))
        record["wrong"] = bench.wrong()
        records.append(record)
    return records


def _prepare() -> None:
    import torch

    from bdtrain.parallel.libraries import prepare_libraries

    prepare_libraries()
    torch.set_num_threads(1)


def measure(size: str, names: Sequence[str], repeats: int, root: Path) -> dict[str, Any]:
    """All candidates at one size.

    Returns:
        Records by candidate, of the same layout and of two ranks to one.
    """
    from bdtrain.testing import run_ranks

    here = Path(__file__).resolve()
    shape, target = SIZES[size], f"{here}:save_and_load"
    same = run_ranks(target, 2, shape, list(names), repeats, root, False, timeout_s=1800)[0]
    elsewhere: dict[str, Any] = {}
    for name in names:
        if name == "deepspeed":
            elsewhere[name] = "refused: another number of ranks"
            continue
        run_ranks(target, 2, shape, [name], 0, root, True, timeout_s=900)
        try:
            elsewhere[name] = run_ranks(
                f"{here}:load_elsewhere", 1, shape, name, repeats, root, timeout_s=900
            )[0]
        finally:
            for left in root.iterdir():
                shutil.rmtree(left)
    return {"same": same, "elsewhere": elsewhere}


def report(size: str, result: dict[str, Any]) -> None:
    """Print a table of medians, with the range in brackets."""

    def middle(records: list[dict[str, Any]], *keys: str, scale: float = 1.0) -> str:
        values = [sum(r[key] for key in keys) / scale for r in records if all(key in r for key in keys)]
        return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})" if values else "-"

    print(f"\n{size}, medians (smallest to largest); GB is 1e9 bytes")
    print(
        f"| {'candidate':<19} | save s | save CPU s | on disk s | GB | save memory GB | load s "
        "| load memory GB | 2 -> 1 load s | memory GB | wrong |"
    )
    print("|---" * 11 + "|")
    for name, records in result["same"].items():
        away = result["elsewhere"].get(name)
        known = isinstance(away, list)
        wrong = {kind for r in [*records, *(away if known else [])] for kind in r.get("wrong", [])}
        cells = [
            middle(records, "save seconds"),
            middle(records, "save cpu"),
            middle(records, "save seconds", "fsync seconds"),
            f"{records[0]['bytes'] / 1e9:.3f}",
            middle(records, "save memory", scale=1e9),
            middle(records, "load seconds"),
            middle(records, "load memory", scale=1e9),
            middle(away, "seconds") if known else str(away),
            middle(away, "memory", scale=1e9) if known else "-",
            ", ".join(sorted(wrong)) or "nothing",
        ]
        print(f"| {name:<19} | " + " | ".join(cells) + " |")


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=["30M", "100M"], choices=tuple(SIZES))
    parser.add_argument("--candidates", nargs="+", default=list(CANDIDATES), choices=CANDIDATES)
    parser.add_argument("--repeats", type=int, default=3, help="saves and loads each (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder if left out")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    os.environ.update(OMP_WAIT_POLICY="passive", OMP_NUM_THREADS="1")
    results = {}
    for size in options.sizes:
        with tempfile.TemporaryDirectory(prefix="bdtrain-bench-", dir=options.folder) as folder:
            results[size] = measure(size, options.candidates, options.repeats, Path(folder))
        report(size, results[size])
    if options.json is not None:
        facts = {"python": platform.python_version(), "machine": platform.machine(), "results": results}
        options.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
