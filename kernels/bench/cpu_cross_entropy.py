"""CPU time, or peak memory, of the output head with its loss, forward and backward, against the plain form.

Prints a Markdown table; ``--json FILE`` keeps every number. CPU time, interleaved; the order turns
round every other repetition. With ``--memory`` each line is a process of its own, whose largest resident set
is compared with the one before the first logit.

    OMP_WAIT_POLICY=passive python kernels/bench/cpu_cross_entropy.py --threads 2 --json out.json
    OMP_WAIT_POLICY=passive python kernels/bench/cpu_cross_entropy.py --memory --threads 1 \
        --vocab 152064 --hidden 64 --rows 4096 16384 65536 --plain-rows 1024 2048
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bdtrain_kernels import masked_cross_entropy

MASK_ID = 4


def make_tensors(rows: int, hidden: int, vocab: int) -> dict[str, Tensor]:
    """Random inputs of one size."""
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden": torch.randn(rows, hidden, generator=generator).requires_grad_(),
        "weight": torch.randn(vocab, hidden, generator=generator).mul_(0.02).requires_grad_(),
        "targets": torch.randint(MASK_ID + 1, vocab, (rows,), generator=generator),
        "row_weights": torch.rand(rows, generator=generator),
    }


def plain(tensors: dict[str, Tensor]) -> Tensor:
    """The weighted sum, by way of all logits."""
    weight = tensors["weight"]
    hide = torch.zeros(weight.shape[0]).index_fill_(0, torch.tensor([MASK_ID]), -torch.inf)
    logits = F.linear(tensors["hidden"], weight, hide)
    return (F.cross_entropy(logits, tensors["targets"], reduction="none") * tensors["row_weights"]).sum()


def chunked(tensors: dict[str, Tensor], *, announce: bool, chunk_rows: int | None) -> Tensor:
    """The weighted sum, a chunk of rows at a time."""
    row_weights = tensors["row_weights"]
    nll = masked_cross_entropy(
        tensors["hidden"],
        tensors["weight"],
        None,
        tensors["targets"],
        excluded=torch.tensor([MASK_ID]),
        vocab_size=tensors["weight"].shape[0],
        row_weights=row_weights if announce else None,
        chunk_rows=chunk_rows,
    )
    return (nll * row_weights).sum()


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that any operator returns, in bytes."""

    def __init__(self) -> None:
        """Nothing seen yet."""
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and look at its results."""
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, Tensor):
                self.bytes = max(self.bytes, x.numel() * x.element_size())
        return result


def measure_memory(method: str, rows: int, hidden: int, vocab: int, threads: int) -> dict[str, Any]:
    """Peak memory of one loss with its gradients; to be called once per process.

    Returns:
        Seconds of CPU time; bytes: resident before, largest resident set, gradients kept, largest tensor.
    """
    torch.set_num_threads(threads)
    warm = make_tensors(8, hidden, 256)  # torch imports and sets up much at the first call
    with LargestTensor():
        (plain(warm) + chunked(warm, announce=True, chunk_rows=None)).backward()
    tensors = make_tensors(rows, hidden, vocab)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    with LargestTensor() as seen:
        if method == "plain":
            loss = plain(tensors)
        else:
            loss = chunked(tensors, announce=method == "weights announced", chunk_rows=None)
        loss.backward()
    seconds = time.process_time() - start
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kept = sum(x.grad.numel() * 4 for x in tensors.values() if x.grad is not None)
    return {
        "method": method,
        "rows": rows,
        "loss": loss.item(),
        "cpu_s": seconds,
        "before_bytes": before * 1024,
        "peak_bytes": after * 1024,
        "gradient_bytes": kept,
        "largest_tensor_bytes": seen.bytes,
        "all_logits_bytes": rows * vocab * 4,
    }


def report_memory(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One process per line of the table."""
    cases = [("plain", rows) for rows in args.plain_rows]
    cases += [
        (method, rows) for method in ("weights announced", "computed again in backward") for rows in args.rows
    ]
    print(f"torch {torch.__version__}, {args.threads} thread(s), hidden {args.hidden}, ", end="")
    print(f"vocabulary {args.vocab}, float32, MB of 10^6 bytes\n")
    print(
        "| method | rows | all logits | before | peak | peak - before | gradients | largest tensor | CPU s |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    found = []
    for method, rows in cases:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            told = pool.apply(measure_memory, (method, rows, args.hidden, args.vocab, args.threads))
        found.append(told)
        sizes = [
            told["all_logits_bytes"],
            told["before_bytes"],
            told["peak_bytes"],
            told["peak_bytes"] - told["before_bytes"],
            told["gradient_bytes"],
            told["largest_tensor_bytes"],
        ]
        columns = " | ".join(f"{size / 1e6:,.0f}" for size in sizes)
        print(f"| {method} | {rows} | {columns} | {told['cpu_s']:.1f} |", flush=True)
    return found


def report_time(args: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Medians of interleaved repetitions."""
    tensors = make_tensors(args.rows[0], args.hidden, args.vocab)
    methods: dict[str, Callable[[], Tensor]] = {
        "plain: F.linear + F.cross_entropy": functools.partial(plain, tensors)
    }
    for n in args.chunk_rows:
        for announce, name in ((True, "weights announced"), (False, "computed again in backward")):
            methods[f"{name}, {n} rows"] = functools.partial(
                chunked, tensors, announce=announce, chunk_rows=n
            )
    times: dict[str, dict[str, list[float]]] = {name: {"forward": [], "backward": []} for name in methods}
    for repeat in range(args.repeats + 1):
        for name in methods if repeat % 2 else reversed(list(methods)):
            start = time.process_time()
            loss = methods[name]()
            middle = time.process_time()
            torch.autograd.grad(loss, (tensors["hidden"], tensors["weight"]))
            end = time.process_time()
            if repeat:  # the first one warms up
                times[name]["forward"].append((middle - start) * 1e3)
                times[name]["backward"].append((end - middle) * 1e3)
    print(
        f"torch {torch.__version__}, {args.threads} thread(s), rows {args.rows[0]}, hidden {args.hidden}, ",
        end="",
    )
    print(f"vocabulary {args.vocab}, CPU ms, medians of {args.repeats}\n")
    print("| method | forward | backward | sum | quartiles | plain / this |")
    print("| --- | --- | --- | --- | --- | --- |")
    base = None
    for name, both in times.items():
        forward, backward = (statistics.median(both[part]) for part in ("forward", "backward"))
        sums = [a + b for a, b in zip(both["forward"], both["backward"], strict=True)]
        total = statistics.median(sums)
        base = total if base is None else base
        low, _, high = statistics.quantiles(sums, n=4)
        print(
            f"| {name} | {forward:.2f} | {backward:.2f} | {total:.2f} | {low:.2f} to {high:.2f} "
            f"| {base / total:.2f} |"
        )
    return times


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--rows", type=int, nargs="+", default=[512], help="several only with --memory")
    parser.add_argument("--plain-rows", type=int, nargs="*", default=[], help="--memory: of the plain form")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--chunk-rows", type=int, nargs="+", default=[32, 64, 128, 256, 512])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not args.memory and (len(args.rows) > 1 or args.plain_rows):
        parser.error("--plain-rows and several --rows belong to --memory; add it, or give one number of rows")
    torch.set_num_threads(args.threads)
    found = {"memory": report_memory(args)} if args.memory else {"times": report_time(args)}
    if args.json:
        versions = {"torch": torch.__version__, "python": platform.python_version()}
        told = {"command": " ".join(sys.argv), **versions, "threads": args.threads, **found}
        args.json.write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
