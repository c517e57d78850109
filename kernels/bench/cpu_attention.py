"""CPU time of block_attention's backends, forward and backward, interleaved in one process.

Prints a Markdown table; ``--json FILE`` keeps every number. CPU time of the process (not wall time), so that
a shared machine disturbs little; the order of the methods turns round every other repetition.

    OMP_WAIT_POLICY=passive python kernels/bench/cpu_attention.py --threads 1 --json out.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor

from bdtrain_kernels import block_attention, dense_mask, prepare


@dataclass(frozen=True)
class Layout:
    """Blocks and documents of a batch, built position by position."""

    block_start: Tensor
    block_end: Tensor
    doc_start: Tensor
    doc_end: Tensor
    block_size: int
    single_document: bool


@dataclass(frozen=True)
class Case:
    """One row of the table; ``documents`` per row of the batch, 0 for one document without isolation."""

    seq: int
    block_size: int = 16
    batch: int = 4
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 32
    copies: int = 1
    clean: bool = True
    queries: str = "all"
    documents: int = 0

    @property
    def name(self) -> str:
        """Short text of what is not the default."""
        parts = [f"seq {self.seq}", f"L' {self.block_size}"]
        parts += [f"D {self.head_dim}"] if self.head_dim != 32 else []
        parts += [f"kv {self.kv_heads}"] if self.kv_heads != self.heads else []
        parts += [f"C {self.copies}"] if self.copies != 1 else []
        parts += ["no clean"] if not self.clean else []
        parts += ["noisy rows only"] if self.queries == "noisy" else []
        parts += [f"{self.documents} documents"] if self.documents else []
        return ", ".join(parts)


CASES = (
    *(Case(seq) for seq in (64, 96, 128, 192, 256, 512, 1024)),
    *(Case(seq, documents=3) for seq in (128, 256, 512, 1024)),
    Case(256, documents=24),
    Case(256, block_size=4),
    Case(256, block_size=64),
    Case(256, block_size=128),
    Case(256, queries="noisy"),
    Case(256, copies=2),
    Case(256, copies=4),
    Case(256, kv_heads=2),
    *(Case(seq, head_dim=64) for seq in (96, 128, 192, 256, 512, 1024, 2048)),
    Case(300),
    Case(256, block_size=1, copies=0),
    Case(1024, block_size=1, copies=0),
    Case(256, block_size=1, copies=0, documents=3),
    Case(256, block_size=256, clean=False, documents=3),
)


def make_layout(case: Case, generator: torch.Generator) -> Layout:
    """Rows cut at random places into ``documents`` documents."""
    rows: list[list[tuple[int, int, int, int]]] = []
    for _ in range(case.batch):
        cuts = torch.randperm(case.seq - 1, generator=generator)[: max(0, case.documents - 1)] + 1
        bounds = [0, *sorted(cuts.tolist()), case.seq]
        tokens = []
        for begin, end in pairwise(bounds):
            for position in range(begin, end):
                start = begin + (position - begin) // case.block_size * case.block_size
                tokens.append((start, min(start + case.block_size, end), begin, end))
        rows.append(tokens)
    vectors = torch.tensor(rows, dtype=torch.int32)
    return Layout(*vectors.unbind(-1), block_size=case.block_size, single_document=case.documents == 0)


def methods(case: Case, layout: Layout) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Name -> attention; all are prepared beforehand, as for a layer of a deep model."""
    streams = {"noisy_copies": case.copies, "clean": case.clean}
    mask = dense_mask(layout, **streams, queries=case.queries)
    mask = mask[:1] if layout.single_document else mask
    group = case.heads // case.kv_heads

    def one_call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(group, dim=1) if group > 1 else x for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    result: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"one masked call": one_call}
    prepared = {"dense": prepare(layout, **streams, backend="dense")}
    for tile in (16, 32, 64):
        if tile % case.block_size == 0 and tile <= case.seq:
            prepared[f"tree {tile}"] = prepare(layout, **streams, backend="tree", tile=tile)
    prepared["tree"] = prepare(layout, **streams, backend="tree")
    prepared["flash"] = prepare(layout, **streams, backend="flash")
    prepared["auto"] = prepare(layout, **streams)
    for name, ready in prepared.items():
        name = f"auto: {ready.backend}" if name == "auto" else name
        result[name] = lambda q, k, v, ready=ready: block_attention(
            q, k, v, ready, **streams, queries=case.queries
        )
    return result


def measure(case: Case, repeats: int, seed: int) -> dict[str, dict[str, list[float]]]:
    """CPU milliseconds of forward and backward of every method, ``repeats`` of each."""
    generator = torch.Generator().manual_seed(seed)
    layout = make_layout(case, generator)
    keys = (case.copies + int(case.clean)) * case.seq
    rows = case.copies * case.seq if case.queries == "noisy" else keys
    q, grad = (
        torch.randn(case.batch, case.heads, rows, case.head_dim, generator=generator) for _ in range(2)
    )
    k, v = (
        torch.randn(case.batch, case.kv_heads, keys, case.head_dim, generator=generator) for _ in range(2)
    )
    for x in (q, k, v):
        x.requires_grad_()
    calls = methods(case, layout)
    times: dict[str, dict[str, list[float]]] = {name: {"forward": [], "backward": []} for name in calls}
    for repeat in range(repeats + 1):
        for name in calls if repeat % 2 else reversed(list(calls)):
            start = time.process_time()
            out = calls[name](q, k, v)
            middle = time.process_time()
            torch.autograd.grad(out, (q, k, v), grad)
            end = time.process_time()
            if repeat:  # the first one warms up
                times[name]["forward"].append((middle - start) * 1e3)
                times[name]["backward"].append((end - middle) * 1e3)
    start = time.process_time()
    for _ in range(repeats):
        prepare(layout, noisy_copies=case.copies, clean=case.clean, backend="tree")
    times["tree: prepare, once a batch"] = {
        "forward": [(time.process_time() - start) * 1e3 / repeats],
        "backward": [0.0],
    }
    return times


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    record = {
        "command": " ".join(sys.argv),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": args.threads,
        "cases": {},
    }
    print(f"torch {torch.__version__}, {args.threads} thread(s), CPU ms, medians of {args.repeats}\n")
    print("| case | method | forward | backward | sum | quartiles | one masked call / this |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for case in CASES:
        if args.only not in case.name:
            continue
        times = measure(case, args.repeats, args.seed)
        record["cases"][case.name] = times
        base = None
        for name, both in times.items():
            forward, backward = (statistics.median(both[part]) for part in ("forward", "backward"))
            sums = [a + b for a, b in zip(both["forward"], both["backward"], strict=True)]
            total = statistics.median(sums)
            base = total if base is None else base
            low, _, high = statistics.quantiles(sums, n=4) if len(sums) > 1 else (total, total, total)
            ratio = "" if "prepare" in name else f"{base / total:.2f}"
            print(
                f"| {case.name} | {name} | {forward:.2f} | {backward:.2f} | {total:.2f} "
                f"| {low:.2f} to {high:.2f} | {ratio} |",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
