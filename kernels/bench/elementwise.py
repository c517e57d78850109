"""Time and kept memory of what runs between matrix products: norms, rotation, gated activation.

Prints a Markdown table; ``--json FILE`` keeps every number. CPU time on a CPU, device time by events on a
GPU; interleaved; the order turns round every other repetition. "kept" is what autograd holds after forward
beside inputs and parameters.

    OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1 python kernels/bench/elementwise.py
    python kernels/bench/elementwise.py --device cuda --dtype bfloat16 --seq 8192 --batch 4
        --hidden 4096 --groups 8 --heads-per-group 4 --head-dim 128 --ffn 11264 --compiled
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor

from bdtrain_kernels.rms_norm import rms_norm
from bdtrain_kernels.rotary import rotate_heads
from bdtrain_kernels.swiglu import swiglu

EPS = 1e-6
Method = Callable[[], Tensor]


def rotation(args: argparse.Namespace, draw: Callable[..., Tensor]) -> tuple[dict[str, Method], list[Tensor]]:
    """Queries of a fused projection, to attention's order."""
    groups, heads, dim = args.groups, args.heads_per_group, args.head_dim
    fused = draw(args.seq, args.batch, groups, (heads + 2) * dim)
    x = fused[..., : heads * dim].unflatten(-1, (heads, dim)).detach().requires_grad_()
    weight = draw(dim).requires_grad_()
    angle = torch.arange(args.seq, device=x.device)[:, None, None] * 1e4 ** (
        -torch.arange(dim // 2, device=x.device) / (dim // 2)
    )
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)

    def plain() -> Tensor:
        normed = F.rms_norm(x.flatten(2, 3), (dim,), weight, EPS)
        halves = torch.cat((-normed[..., dim // 2 :], normed[..., : dim // 2]), -1)
        turned = normed * torch.cat((cos, cos), -1).unsqueeze(2) + halves * torch.cat(
            (sin, sin), -1
        ).unsqueeze(2)
        return turned.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)

    methods = {
        "plain: norm, rotation by concatenation, transposition": plain,
        "norm, then rotation": lambda: rotate_heads(rms_norm(x.flatten(2, 3), weight, eps=EPS), cos, sin),
        "one pass, torch": lambda: rotate_heads(x, cos, sin, weight, eps=EPS, backend="torch"),
    }
    if x.is_cuda:
        methods["one pass, triton"] = lambda: rotate_heads(x, cos, sin, weight, eps=EPS, backend="triton")
    return methods, [x, weight]


def activation(
    args: argparse.Namespace, draw: Callable[..., Tensor]
) -> tuple[dict[str, Method], list[Tensor]]:
    """Result of the first projection to input of the second."""
    x = draw(args.seq, args.batch, 2 * args.ffn).requires_grad_()

    def plain(x: Tensor = x) -> Tensor:
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * (up + 0.0)  # the offset as megatron-core adds it

    methods: dict[str, Method] = {
        "plain, with megatron-core's offset": plain,
        "one pass, torch": lambda: swiglu(x, backend="torch"),
    }
    if args.compiled:
        compiled = torch.compile(plain)
        start = time.perf_counter()
        compiled(x).sum().backward()
        print(f"torch.compile: first step {time.perf_counter() - start:.1f} s", file=sys.stderr)
        methods["torch.compile, as megatron-core's fused form"] = lambda: compiled(x)
    if x.is_cuda:
        methods["one pass, triton"] = lambda: swiglu(x, backend="triton")
    return methods, [x]


def norm(args: argparse.Namespace, draw: Callable[..., Tensor]) -> tuple[dict[str, Method], list[Tensor]]:
    """Hidden states."""
    x, weight = draw(args.seq, args.batch, args.hidden).requires_grad_(), draw(args.hidden).requires_grad_()
    methods = {
        f"{name}: {words}": lambda name=name: rms_norm(x, weight, eps=EPS, backend=name)
        for name, words in (("library", "F.rms_norm"), ("torch", "few passes"))
    }
    return methods, [x, weight]


def measure(
    methods: dict[str, Method], leaves: list[Tensor], repeats: int
) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of every repetition: method -> "forward", "backward" -> numbers."""
    times: dict[str, dict[str, list[float]]] = {name: {"forward": [], "backward": []} for name in methods}
    grad = torch.randn_like(next(iter(methods.values()))())
    for repeat in range(repeats + 2):
        for name in methods if repeat % 2 else reversed(list(methods)):
            marks = [_mark(grad.is_cuda)]
            out = methods[name]()
            marks.append(_mark(grad.is_cuda))
            torch.autograd.grad(out, leaves, grad)
            marks.append(_mark(grad.is_cuda))
            if repeat > 1:  # the first ones warm up
                times[name]["forward"].append(_between(marks[0], marks[1]))
                times[name]["backward"].append(_between(marks[1], marks[2]))
    return times


def _mark(cuda: bool) -> float | torch.cuda.Event:
    if not cuda:
        return time.process_time()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(first: float | torch.cuda.Event, second: float | torch.cuda.Event) -> float:
    if isinstance(first, torch.cuda.Event):
        torch.cuda.synchronize()
        return first.elapsed_time(second)
    return (second - first) * 1e3


def kept_bytes(method: Method, leaves: list[Tensor]) -> int:
    """Memory that autograd holds after forward, beside the leaves; each storage once."""
    held: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        # Held, so that no later tensor takes its address.
        held.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = method()
    given = {leaf.untyped_storage().data_ptr() for leaf in leaves}
    total = sum(t.untyped_storage().nbytes() for at, t in held.items() if at not in given)
    del out
    return total


def main() -> None:
    """Measure, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument(
        "--seq", type=int, default=1024, help="rows of the sequence axis, all streams together"
    )
    for name, size in (
        ("batch", 4),
        ("hidden", 512),
        ("groups", 4),
        ("heads-per-group", 2),
        ("head-dim", 64),
    ):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--ffn", type=int, default=1536)
    parser.add_argument("--compiled", action="store_true", help="measure torch.compile of SwiGLU, too")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(args.device, getattr(torch, args.dtype))

    unit = "CPU ms" if args.device == "cpu" else "ms"
    print(
        f"torch {torch.__version__}, {args.device}, {args.dtype}, {args.threads} thread(s), {unit}, ", end=""
    )
    print(
        f"medians of {args.repeats}\n\n| kernel | method | forward | backward | sum | quartiles | kept MiB |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    results = {}
    for kernel, build in (("rotate_heads", rotation), ("swiglu", activation), ("rms_norm", norm)):
        methods, leaves = build(args, draw)
        results[kernel] = measure(methods, leaves, args.repeats)
        for name, both in results[kernel].items():
            forward, backward = (statistics.median(both[part]) for part in ("forward", "backward"))
            sums = [a + b for a, b in zip(both["forward"], both["backward"], strict=True)]
            low, middle, high = statistics.quantiles(sums, n=4)
            print(
                f"| {kernel} | {name} | {forward:.2f} | {backward:.2f} | {middle:.2f} "
                f"| {low:.2f} to {high:.2f} | {kept_bytes(methods[name], leaves) / 2**20:.2f} |"
            )
    if args.json:
        versions = {"torch": torch.__version__, "python": platform.python_version()}
        command = {"command": " ".join(sys.argv), **versions}
        args.json.write_text(json.dumps({**command, "times": results}, indent=1))


if __name__ == "__main__":
    main()
