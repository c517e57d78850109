"""block_attention on a GPU: correctness in bfloat16, speed beside its baselines, shapes of the programs."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from cpu_attention import Layout
from gpu_timing import Clock
from torch import Tensor

from bdtrain_kernels import block_attention, dense_mask, prepare
from bdtrain_kernels.block_attention.reference import reference_attention

BACKWARD_PRODUCTS = 2.5
"""Products of a backward pass per product of the forward pass that cannot be avoided: 5 against 2."""


@dataclass(frozen=True)
class Case:
    """One shape."""

    seq: int
    block_size: int
    head_dim: int
    batch: int = 4
    heads: int = 16
    kv_heads: int = 16
    copies: int = 1
    documents: int = 1

    def pairs(self, layout: Layout) -> int:
        """Pairs of query and key that see each other, over the batch, per head."""
        own = (layout.block_end - layout.block_start).long().sum()
        past = (layout.block_start - layout.doc_start).long().sum()
        clean = (layout.block_end - layout.doc_start).long().sum()
        return int(self.copies * (own + past) + clean)

    def teraflop(self, layout: Layout) -> float:
        """Useful operations of a forward pass, 10^12."""
        return 4 * self.head_dim * self.heads * self.pairs(layout) / 1e12


def make_layout(case: Case, device: str) -> Layout:
    """Equal documents, as ``case`` has them."""
    length = -(-case.seq // case.documents)
    position = torch.arange(case.seq, device=device, dtype=torch.int32).repeat(case.batch, 1)
    doc_start = position // length * length
    doc_end = (doc_start + length).clamp(max=case.seq)
    start = doc_start + (position - doc_start) // case.block_size * case.block_size
    end = torch.minimum(start + case.block_size, doc_end)
    return Layout(start, end, doc_start, doc_end, case.block_size, case.documents == 1)


def make_inputs(case: Case, device: str, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    """q, k, v with gradients, and the gradient of the output, strided as the model has them."""
    generator = torch.Generator(device).manual_seed(seed)
    rows = (case.copies + 1) * case.seq

    def tensor(heads: int) -> Tensor:
        x = torch.randn(rows, case.batch, heads, case.head_dim, device=device, generator=generator)
        return x.to(dtype).permute(1, 2, 0, 3)

    q, k, v = (tensor(heads).requires_grad_() for heads in (case.heads, case.kv_heads, case.kv_heads))
    return q, k, v, tensor(case.heads)


CORRECTNESS = (
    *(Case(seq, 16, 64, batch=1, heads=4, kv_heads=2) for seq in (64, 256, 1000)),
    *(Case(seq, 16, 128, batch=1, heads=4, kv_heads=4) for seq in (64, 256, 1000)),
    Case(1000, 1, 64, batch=1, heads=2, kv_heads=1),
    Case(1000, 7, 128, batch=1, heads=2, kv_heads=2, documents=3),
    Case(1000, 1000, 64, batch=1, heads=2, kv_heads=2),
    Case(512, 16, 128, batch=2, heads=4, kv_heads=1, copies=2),
    Case(512, 4, 96, batch=1, heads=2, kv_heads=2, copies=4, documents=5),
    Case(1000, 128, 32, batch=1, heads=2, kv_heads=2),
)


def check_correctness(
    device: str, dtype: torch.dtype, cases: tuple[Case, ...], backends: tuple[str, ...]
) -> list[dict[str, Any]]:
    """Relative errors of output and gradients against float64, and whether two runs are bit-equal."""
    rows: list[dict[str, Any]] = []
    for number, case in enumerate(cases):
        layout = make_layout(case, device)
        q, k, v, grad = make_inputs(case, device, dtype, number)
        doubles = [x.detach().double().requires_grad_() for x in (q, k, v)]
        expected = reference_attention(*doubles, dense_mask(layout, noisy_copies=case.copies, clean=True))
        exact = (expected, *torch.autograd.grad(expected, doubles, grad.double()))
        for backend in backends:
            row: dict[str, Any] = {"case": _name(case), "backend": backend}
            rows.append(row)
            try:
                runs = []
                for _ in range(2):
                    out = block_attention(q, k, v, layout, noisy_copies=case.copies, backend=backend)
                    runs.append((out.detach(), *torch.autograd.grad(out, (q, k, v), grad)))
            except Exception as error:  # the row is the report of it
                row["failed"] = _short(error)
                continue
            errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(runs[0], exact, strict=True)]
            limits = (8e-3, 1.5e-2, 1.5e-2, 1.5e-2)
            row |= dict(zip(("out", "dq", "dk", "dv"), errors, strict=True))
            row["bit-equal"] = all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
            row["within"] = all(error <= limit for error, limit in zip(errors, limits, strict=True))
    return rows


def measure_case(
    clock: Clock, case: Case, peak_tflops: float, sides: tuple[str, ...]
) -> list[dict[str, Any]]:
    """Forward and backward of every side, in one process, with rotating inputs; ours is the first side."""
    layout = make_layout(case, clock.device)
    useful = case.teraflop(layout)
    sets = [make_inputs(case, clock.device, torch.bfloat16, seed) for seed in range(3)]
    rows: list[dict[str, Any]] = []
    for side in sides:
        row: dict[str, Any] = {"case": _name(case), "side": side}
        rows.append(row)
        try:
            attention, tensors, teraflop = _side(side, case, layout, sets, useful)
            row |= _measure_side(clock, attention, tensors, teraflop, peak_tflops)
        except Exception as error:  # the row is the report of it; the other sides have something to say
            row["failed"] = _short(error)
    for row in rows:
        for part in ("forward ms", "backward ms"):
            if part in row and part in rows[0]:
                row[f"{part} / ours"] = row[part] / rows[0][part]
    return rows


def _measure_side(
    clock: Clock,
    attention: Callable[..., Tensor],
    tensors: list[tuple[Tensor, ...]],
    teraflop: float,
    peak_tflops: float,
) -> dict[str, Any]:
    begun = time.perf_counter()
    attention(*tensors[0][:3])
    first = time.perf_counter() - begun
    forward = clock.milliseconds([lambda x=x: attention(*x[:3]) for x in _detached(tensors)])
    outputs = [attention(*x[:3]) for x in tensors]
    backward = clock.milliseconds(
        [
            lambda x=x, out=out: torch.autograd.grad(out, x[:3], x[3], retain_graph=True)
            for x, out in zip(tensors, outputs, strict=True)
        ]
    )
    return {
        "forward ms": forward[0],
        "quartiles": f"{forward[1]:.3f} to {forward[2]:.3f}",
        "TFLOP/s": teraflop / forward[0] * 1e3,
        "floor / forward": teraflop / peak_tflops * 1e3 / forward[0],
        "backward ms": backward[0],
        "backward quartiles": f"{backward[1]:.3f} to {backward[2]:.3f}",
        "backward TFLOP/s": BACKWARD_PRODUCTS * teraflop / backward[0] * 1e3,
        "s of the first call": first,
    }


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " ").replace("|", "/")[:120]


def _side(
    side: str, case: Case, layout: Layout, sets: list[tuple[Tensor, ...]], useful: float
) -> tuple[Callable[..., Tensor], list[tuple[Tensor, ...]], float]:
    """The attention of a side, its inputs and its useful operations."""
    if side == "causal SDPA over L":
        rows = slice(0, case.seq)
        cut = [tuple(x[:, :, rows].detach().requires_grad_(x.requires_grad) for x in one) for one in sets]
        causal = 4 * case.head_dim * case.heads * case.batch * case.seq * (case.seq + 1) / 2 / 1e12
        return (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)), cut, causal
    if side == "SDPA, dense mask":
        mask = dense_mask(layout, noisy_copies=case.copies, clean=True)
        mask = mask[:1] if layout.single_document else mask
        return (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)), sets, useful
    prepared = prepare(layout, noisy_copies=case.copies, backend=side)
    return (lambda q, k, v: block_attention(q, k, v, prepared, noisy_copies=case.copies)), sets, useful


def _detached(tensors: list[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    return [tuple(x.detach() for x in one) for one in tensors]


def _name(case: Case) -> str:
    text = f"L {case.seq}, L' {case.block_size}, D {case.head_dim}, B {case.batch}, H {case.heads}"
    text += f"/{case.kv_heads}" if case.kv_heads != case.heads else ""
    text += f", C {case.copies}" if case.copies != 1 else ""
    return text + (f", {case.documents} documents" if case.documents != 1 else "")


SWEEP = {
    ("forward", 64): ((128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3), (128, 64, 4, 2)),
    ("forward", 128): ((128, 64, 8, 3), (128, 64, 8, 2), (128, 128, 8, 2), (64, 64, 4, 3), (128, 64, 4, 2)),
    ("backward_rows", 64): ((128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 3), (128, 128, 8, 2)),
    ("backward_rows", 128): ((128, 64, 8, 2), (64, 64, 4, 2), (64, 128, 8, 2), (128, 32, 8, 3)),
    ("backward_keys", 64): (
        (64, 128, 8, 2),
        (64, 64, 4, 2),
        (32, 128, 8, 3),
        (128, 64, 8, 2),
        (128, 128, 8, 1),
    ),
    ("backward_keys", 128): (
        (32, 128, 8, 3),
        (64, 128, 8, 2),
        (64, 64, 8, 2),
        (32, 64, 4, 3),
        (64, 128, 8, 1),
    ),
}
"""(rows, keys, warps, stages) tried for each kernel and head size."""


@contextmanager
def _shape(kernel: str, shape: tuple[int, int, int, int]) -> Iterator[None]:
    """One kernel with another shape, the others as chosen."""
    from bdtrain_kernels.block_attention import triton_backend

    chosen = triton_backend.choose_tiles

    def choose(head_dim: int, itemsize: int, shared_kib: int) -> triton_backend.Tiles:
        tiles = chosen(head_dim, itemsize, shared_kib)
        return replace(tiles, **{kernel: triton_backend.Tile(*shape)})

    triton_backend.choose_tiles = choose
    try:
        yield
    finally:
        triton_backend.choose_tiles = chosen


def sweep(clock: Clock, *, seq: int, block_size: int, head_dims: tuple[int, ...]) -> list[dict[str, Any]]:
    """Every kernel in every shape; a shape that does not compile or fit is a row that says so."""
    rows = []
    for (kernel, head_dim), shapes in SWEEP.items():
        if head_dim not in head_dims:
            continue
        case = Case(seq, block_size, head_dim)
        layout = make_layout(case, clock.device)
        prepared = prepare(layout, noisy_copies=1, backend="triton")
        q, k, v, grad = make_inputs(case, clock.device, torch.bfloat16, 0)
        for shape in shapes:
            row: dict[str, Any] = {"kernel": kernel, "D": head_dim, "rows, keys, warps, stages": str(shape)}
            try:
                with _shape(kernel, shape):
                    row["ms (whole forward or backward)"] = _time_pass(
                        clock, kernel, (q, k, v, grad), prepared
                    )
            except Exception as error:  # the row is the report of it
                row["failed"] = _short(error)
            rows.append(row)
    return rows


def _time_pass(clock: Clock, kernel: str, tensors: tuple[Tensor, ...], prepared: Any) -> float:
    q, k, v, grad = tensors
    if kernel == "forward":
        with torch.no_grad():
            return clock.milliseconds([lambda: block_attention(q, k, v, prepared, noisy_copies=1)])[0]
    out = block_attention(q, k, v, prepared, noisy_copies=1)
    return clock.milliseconds([lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)])[0]


def compile_ahead(head_dims: tuple[int, ...], workers: int) -> float:
    """Compile all shapes of the sweep side by side into Triton's cache on disk; seconds."""
    begun = time.perf_counter()
    jobs = [(kernel, head_dim, shape) for (kernel, head_dim), shapes in SWEEP.items() for shape in shapes]
    jobs = [job for job in jobs if job[1] in head_dims]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        list(pool.map(_compile_one, jobs))
    return time.perf_counter() - begun


def _compile_one(job: tuple[str, int, tuple[int, int, int, int]]) -> None:
    """One small forward and backward in a process of its own; a failure shows in the sweep itself."""
    kernel, head_dim, shape = job
    case = Case(256, 16, head_dim, batch=2, heads=16)
    q, k, v, grad = make_inputs(case, "cuda", torch.bfloat16, 0)
    try:
        with _shape(kernel, shape):
            prepared = prepare(make_layout(case, "cuda"), noisy_copies=1, backend="triton")
            out = block_attention(q, k, v, prepared, noisy_copies=1)
            torch.autograd.grad(out, (q, k, v), grad)
    except Exception as error:
        print(f"{job}: {type(error).__name__}")
