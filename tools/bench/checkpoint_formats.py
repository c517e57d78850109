"""Ways to save the state of training, measured on the same state: ours and those of the libraries.

Two gloo ranks (dp 2, ZeRO 1) hold a model's float32 master weights, two moments and average, filled with
numbers that say where they belong. Each candidate saves, then loads into the same layout; at last one process
loads what two have saved. Every load is compared with the numbers. Files are deleted as soon as possible.
What is compared is in ``checkpoint_candidates.py``.

save        wall seconds until the library returns, on the slowest rank
on disk     the same with fsync of every file of it: what a checkpoint costs that survives a power failure
memory      growth of VmHWM (peak resident size) during the call, on the rank where it is largest. Mapped
            files count, processes that a library forks do not.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import io
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.bench.checkpoint_candidates import CANDIDATES, Bench, make_format

SIZES = {
    "tiny": {"layers": 2, "hidden": 32, "heads": 4, "vocabulary": 64},
    "30M": {"layers": 8, "hidden": 512, "heads": 8, "vocabulary": 4096},
    "100M": {"layers": 12, "hidden": 768, "heads": 12, "vocabulary": 8192},
}


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
