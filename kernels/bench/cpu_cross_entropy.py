"""CPU time of the output head with its loss, forward and backward, against the plain form.

Prints a Markdown table; ``--json FILE`` keeps every number. CPU time, interleaved; the order turns
round every other repetition.

    OMP_WAIT_POLICY=passive python kernels/bench/cpu_cross_entropy.py --threads 2 --json out.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor

from bdtrain_kernels import masked_cross_entropy

MASK_ID = 4


def losses(args: argparse.Namespace, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A closure per method that gives the weighted sum."""
    hidden, weight, targets, row_weights = (
        tensors[x] for x in ("hidden", "weight", "targets", "row_weights")
    )
    excluded = torch.tensor([MASK_ID])
    hide = torch.zeros(args.vocab).index_fill_(0, excluded, -torch.inf)

    def plain() -> Tensor:
        nll = F.cross_entropy(F.linear(hidden, weight, hide), targets, reduction="none")
        return (nll * row_weights).sum()

    def chunked(announce: bool, chunk_rows: int) -> Tensor:
        nll = masked_cross_entropy(
            hidden,
            weight,
            None,
            targets,
            excluded=excluded,
            vocab_size=args.vocab,
            row_weights=row_weights if announce else None,
            chunk_rows=chunk_rows,
        )
        return (nll * row_weights).sum()

    methods = {"plain: F.linear + F.cross_entropy": plain}
    for chunk_rows in args.chunk_rows:
        methods[f"weights announced, {chunk_rows} rows"] = lambda n=chunk_rows: chunked(True, n)
        methods[f"computed again in backward, {chunk_rows} rows"] = lambda n=chunk_rows: chunked(False, n)
    return methods


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--chunk-rows", type=int, nargs="+", default=[32, 64, 128, 256, 512])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(1)
    tensors = {
        "hidden": torch.randn(args.rows, args.hidden, generator=generator).requires_grad_(),
        "weight": (torch.randn(args.vocab, args.hidden, generator=generator) * 0.02).requires_grad_(),
        "targets": torch.randint(MASK_ID + 1, args.vocab, (args.rows,), generator=generator),
        "row_weights": torch.rand(args.rows, generator=generator),
    }
    methods = losses(args, tensors)
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
        f"torch {torch.__version__}, {args.threads} thread(s), rows {args.rows}, hidden {args.hidden}, ",
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
    if args.json:
        versions = {"torch": torch.__version__, "python": platform.python_version()}
        args.json.write_text(
            json.dumps(
                {"command": " ".join(sys.argv), **versions, "threads": args.threads, "times": times}, indent=1
            )
        )


if __name__ == "__main__":
    main()
