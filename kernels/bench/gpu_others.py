"""Head and loss, decoding and the elementwise kernels on a GPU, beside their plain forms."""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable
from typing import Any

import elementwise
import torch
import torch.nn.functional as F
from gpu_timing import Clock
from torch import Tensor

from bdtrain_kernels import cache_attention, masked_cross_entropy


def measure_loss(
    clock: Clock, *, rows: int, hidden: int, vocab: int, dtype: torch.dtype, backends: tuple[str, ...]
) -> list[dict[str, Any]]:
    """Forward and backward of head and loss, and the memory it takes for a moment, against all logits."""
    device = clock.device
    states = torch.randn(rows, hidden, device=device, dtype=dtype).mul_(0.5).requires_grad_()
    head = torch.randn(vocab, hidden, device=device, dtype=dtype).mul_(hidden**-0.5).requires_grad_()
    targets = torch.randint(1, vocab, (rows,), device=device)
    weights = torch.rand(rows, device=device)

    def plain() -> Tensor:
        logits = F.linear(states, head).float()
        logits[:, 0] = -torch.inf
        return F.cross_entropy(logits, targets, reduction="none")

    def ours(backend: str) -> Tensor:
        return masked_cross_entropy(
            states,
            head,
            None,
            targets,
            excluded=[0],
            vocab_size=vocab,
            row_weights=weights,
            backend=backend,
        )

    sides: dict[str, Callable[[], Tensor]] = {"all logits": plain}
    sides |= {f"ours, {name}": functools.partial(ours, name) for name in backends}

    def whole(loss: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad((loss() * weights).sum() / rows, (states, head))

    found: list[dict[str, Any]] = []
    exact: Tensor | None = None
    for name, loss in sides.items():
        row: dict[str, Any] = {"rows, hidden, vocabulary": f"{rows}, {hidden}, {vocab}", "side": name}
        found.append(row)
        try:
            values = loss().detach().double()
            step = functools.partial(whole, loss)
            middle, low, high = clock.milliseconds([step])
            row |= {
                "forward + backward ms": middle,
                "quartiles": f"{low:.3f} to {high:.3f}",
                "TFLOP/s": 6 * rows * hidden * vocab / middle / 1e9,
                "most memory, GiB": _peak_gib(step, device),
            }
            exact = values if exact is None else exact
            row["difference of the mean nll"] = float((values - exact).mean())
        except torch.OutOfMemoryError:
            row["failed"] = "out of memory"
    return found


def _peak_gib(step: Callable[[], Any], device: str) -> float | None:
    if device != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def measure_decoding(
    clock: Clock, *, batch: int, keys: tuple[int, ...], rows: tuple[int, ...], copy_tb_per_s: float
) -> list[dict[str, Any]]:
    """A block's queries against the cache: milliseconds, and the share of the time that reading it takes."""
    heads, kv_heads, head_dim = 32, 8, 128
    dtype = torch.bfloat16
    found = []
    for length in keys:
        k, v = (
            torch.randn(batch, kv_heads, length, head_dim, device=clock.device, dtype=dtype) for _ in "kv"
        )
        for block in rows:
            q = torch.randn(batch, heads, block, head_dim, device=clock.device, dtype=dtype)
            middle, low, high = clock.milliseconds([functools.partial(cache_attention, q, k, v)])
            floor = 2 * k.numel() * k.element_size() / copy_tb_per_s / 1e9
            found.append(
                {
                    "batch": batch,
                    "cache": length,
                    "queries": block,
                    "ms": middle,
                    "quartiles": f"{low:.4f} to {high:.4f}",
                    "reading the cache / ms": floor / middle,
                }
            )
    return found


def measure_elementwise(device: str, *, trial: bool) -> list[dict[str, Any]]:
    """Norm and rotation of heads, SwiGLU, RMSNorm; the same code as ``elementwise.py``."""
    sizes = argparse.Namespace(
        seq=64 if trial else 8192,
        batch=1 if trial else 4,
        hidden=64 if trial else 4096,
        groups=2 if trial else 8,
        heads_per_group=2 if trial else 4,
        head_dim=16 if trial else 128,
        ffn=96 if trial else 11264,
        compiled=not trial,
    )
    generator = torch.Generator().manual_seed(1)
    dtype = torch.float32 if trial else torch.bfloat16

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    found = []
    builders = {
        "rotate_heads": elementwise.rotation,
        "swiglu": elementwise.activation,
        "rms_norm": elementwise.norm,
    }
    for kernel, build in builders.items():
        methods, leaves = build(sizes, draw)
        times = elementwise.measure(methods, leaves, 3 if trial else 20)
        for name, both in times.items():
            kept = elementwise.kept_bytes(methods[name], leaves) / 2**20
            middle = {part: statistics.median(values) for part, values in both.items()}
            found.append(
                {
                    "kernel": kernel,
                    "method": name,
                    "forward ms": middle["forward"],
                    "backward ms": middle["backward"],
                    "kept MiB": kept,
                }
            )
        del methods, leaves
    return found
