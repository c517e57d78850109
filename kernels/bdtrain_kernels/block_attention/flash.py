"""Flash backend: library kernels that know no block mask, over the rectangles of the tree.

Autoregression and MDLM without documents are one call, causal or over everything. Block diffusion is the cut
of ``tiling``: unmasked rectangles go to the library's forward, their outputs are merged by LSE, and its
backward gets the merged output and LSE, which makes each rectangle's share of the gradients right (see
``pieces``). The small masked squares on the diagonal are explicit products in float32.

Library kernels in the order of choice: flash-attn where it is installed (CUDA), torch's own flash operator
(CUDA), torch's flash operator for CPUs. Half-precision numbers stay as they are; sums are float32.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bdtrain_kernels.block_attention.dense import mask_free
from bdtrain_kernels.block_attention.packing import memory_order, pack, unpack
from bdtrain_kernels.block_attention.pieces import LN2, merge_
from bdtrain_kernels.block_attention.reference import Layout
from bdtrain_kernels.block_attention.support import KERNEL, backend_reasons
from bdtrain_kernels.block_attention.tiling import Tiling, build_tiling
from bdtrain_kernels.block_attention.tree import Case, Level, OwnTile, tree_pieces
from bdtrain_kernels.errors import BackendUnavailableError

GPU_TILE = 128
"""Tokens of a tile on a GPU, rounded up to whole blocks: what the library's kernels take at a time."""


@dataclass(frozen=True)
class FlashPlan:
    """What one layout needs.

    Attributes:
        causal: one call is enough: True causal, False over all keys; None when it takes the tree.
        tiling: the cut, where it takes the tree.
    """

    causal: bool | None
    tiling: Tiling | None


class Engine(Protocol):
    """A library's attention over [n, 1, rows, head_dim], unmasked; LSE in nats, float32 [n, 1, rows]."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Output and LSE."""

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v, given the output and LSE over all keys, not only these."""


def plan_flash(layout: Layout, *, noisy_copies: int, clean: bool, tile: int | None) -> FlashPlan:
    """How ``flash_attention`` will go about a layout.

    Args:
        layout: blocks and documents.
        noisy_copies: noisy streams.
        clean: whether the clean stream is there.
        tile: tokens of a tile; None chooses.

    Raises:
        KernelShapeError: if the blocks do not lie as the tree can cut them.
    """
    if mask_free(layout, noisy_copies=noisy_copies, clean=clean):
        return FlashPlan(causal=clean and layout.block_size == 1, tiling=None)
    if tile is None and layout.block_start.device.type == "cuda":
        tile = -(-GPU_TILE // layout.block_size) * layout.block_size
    return FlashPlan(causal=None, tiling=build_tiling(layout, tile))


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: FlashPlan,
    *,
    noisy_copies: int,
    clean: bool,
    queries: str,
    scale: float | None,
) -> Tensor:
    """Attention of all streams by a library's kernels.

    Args:
        q: [batch, heads, rows, head_dim], any strides.
        k: [batch, kv_heads, streams * seq, head_dim], any strides.
        v: like ``k``.
        plan: from ``plan_flash``.
        noisy_copies: noisy streams.
        clean: whether the clean stream is there.
        queries: "all" or "noisy".
        scale: factor of the scores; None is head_dim ** -0.5.

    Returns:
        [batch, heads, rows, head_dim].

    Raises:
        BackendUnavailableError: if the library has no kernel for the type of the numbers.
    """
    engine = choose_engine(q)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    if plan.tiling is None:
        return _one_call(q, k, v, streams=noisy_copies + int(clean), causal=bool(plan.causal), scale=factor)
    case = Case(
        tiling=plan.tiling,
        copies=noisy_copies,
        clean=clean,
        clean_rows=clean and queries == "all",
        kv_heads=k.shape[1],
        group=q.shape[1] // k.shape[1],
        scale=factor,
        dtype=q.dtype,
    )
    return _FlashTree.apply(q, k, v, case, engine)


def choose_engine(q: Tensor) -> Engine:
    """The library for a tensor's device and type.

    Raises:
        BackendUnavailableError: if there is none.
    """
    if q.device.type == "cpu":
        return CpuEngine()
    refused = backend_reasons(q.device, head_dim=q.shape[3], dtype=q.dtype)["flash"]
    if refused:
        raise BackendUnavailableError(f"{KERNEL}: backend='flash' cannot run this case: {refused}")
    return FlashAttnEngine() if _flash_attn_installed() else TorchEngine()


@functools.cache  # asked for in every layer; looking for a package reads the disk
def _flash_attn_installed() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def _one_call(q: Tensor, k: Tensor, v: Tensor, *, streams: int, causal: bool, scale: float) -> Tensor:
    if q.device.type == "cuda" and _flash_attn_installed():
        from flash_attn import flash_attn_func

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            four = [x.transpose(1, 2) for x in (q, k, v)]
            out: Tensor = flash_attn_func(*four, softmax_scale=scale, causal=causal, deterministic=True)
            return out.transpose(1, 2)
    else:

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            shared = q.shape[1] != k.shape[1]
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=shared)

    parts = [x.chunk(streams, dim=2) for x in (q, k, v)]  # MDLM's copies do not see each other
    outputs = [call(*part) for part in zip(*parts, strict=True)]
    return outputs[0] if streams == 1 else torch.cat(outputs, dim=2)


class CpuEngine:
    """torch's flash operator for CPUs."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """See ``Engine``."""
        call = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = call(q, k, v, 0.0, False, scale=scale)
        return out, lse

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See ``Engine``."""
        call = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        grad_q, grad_k, grad_v = call(grad, q, k, v, out, lse, 0.0, False, scale=scale)
        return grad_q, grad_k, grad_v


class TorchEngine:
    """torch's flash operator for CUDA, which is a copy of flash-attn."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """See ``Engine``."""
        call = torch.ops.aten._scaled_dot_product_flash_attention
        out, lse = call(q, k, v, 0.0, False, False, scale=scale)[:2]
        return out, lse

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See ``Engine``."""
        call = torch.ops.aten._scaled_dot_product_flash_attention_backward
        no_seed = torch.empty(2, dtype=torch.uint64, device=q.device)  # read only with dropout
        none = torch.empty(0, dtype=torch.uint64, device=q.device)
        sizes = (None, None, q.shape[2], k.shape[2], 0.0, False)
        grad_q, grad_k, grad_v = call(grad, q, k, v, out, lse, *sizes, no_seed, none, scale=scale)
        return grad_q, grad_k, grad_v


class FlashAttnEngine:
    """flash-attn 2, by the pair of functions under its autograd function."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """See ``Engine``."""
        from flash_attn.flash_attn_interface import _flash_attn_forward

        out, lse = _flash_attn_forward(
            *(x.transpose(1, 2) for x in (q, k, v)),
            dropout_p=0.0,
            softmax_scale=scale,
            causal=False,
            window_size_left=-1,
            window_size_right=-1,
            softcap=0.0,
            alibi_slopes=None,
            return_softmax=False,
        )[:2]
        return out.transpose(1, 2), lse

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See ``Engine``."""
        from flash_attn.flash_attn_interface import _flash_attn_backward

        grad, q, k, v, out = (x.transpose(1, 2) for x in (grad, q, k, v, out))
        grads = [torch.empty_like(x) for x in (q, k, v)]
        _flash_attn_backward(
            grad,
            q,
            k,
            v,
            out,
            lse,
            *grads,
            dropout_p=0.0,
            softmax_scale=scale,
            causal=False,
            window_size_left=-1,
            window_size_right=-1,
            softcap=0.0,
            alibi_slopes=None,
            deterministic=True,
        )
        grad_q, grad_k, grad_v = (x.transpose(1, 2) for x in grads)
        return grad_q, grad_k, grad_v


class _FlashTree(torch.autograd.Function):
    """The walk of the tree; LSE is kept in powers of 2, as ``merge_`` takes it."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, case: Case, engine: Engine) -> Tensor:
        rows = _pack(q, case, rows=True)
        keys, values = _pack(k, case, rows=False), _pack(v, case, rows=False)
        out = torch.empty_like(rows, dtype=_sums(q.dtype))
        lse = out.new_empty(rows.shape[:-1])
        for piece in tree_pieces(case):
            run_out, run_lse = piece.rows(out), piece.rows(lse)
            inputs = (piece.rows(rows), piece.keys(keys), piece.keys(values))
            part, part_lse = _forward_piece(engine, piece, *inputs, case)
            if piece.first:
                run_out.copy_(part)
                run_lse.copy_(part_lse)
            else:
                merge_(run_out, run_lse, part.to(out.dtype), part_lse.to(lse.dtype))
            piece.put_rows(out, run_out)
            piece.put_rows(lse, run_lse)
        out = out.to(q.dtype)
        ctx.save_for_backward(rows, keys, values, out, lse)
        ctx.case, ctx.engine = case, engine
        ctx.like = (memory_order(q), memory_order(k), memory_order(v))
        return unpack(out, case.tiling, order=ctx.like[0], dtype=q.dtype, stream_first=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        case, engine = ctx.case, ctx.engine
        rows, keys, values, out, lse = ctx.saved_tensors
        grad_out = _pack(grad, case, rows=True)
        sums = _sums(rows.dtype)
        grads = [torch.zeros_like(x, dtype=sums) for x in (rows, keys, values)]
        for piece in tree_pieces(case):
            inputs = (piece.rows(rows), piece.keys(keys), piece.keys(values))
            row_side = (piece.rows(grad_out), piece.rows(out), piece.rows(lse))
            part = _backward_piece(engine, piece, *inputs, *row_side, case)
            piece.add_rows(grads[0], part[0].to(sums))
            piece.add_keys(grads[1], part[1].to(sums))
            piece.add_keys(grads[2], part[2].to(sums))
        made = [
            unpack(x, case.tiling, order=order, dtype=rows.dtype, stream_first=number > 0)
            for number, (x, order) in enumerate(zip(grads, ctx.like, strict=True))
        ]
        return *made, None, None


def _forward_piece(
    engine: Engine, piece: OwnTile | Level, q: Tensor, k: Tensor, v: Tensor, case: Case
) -> tuple[Tensor, Tensor]:
    """Output and LSE in powers of 2."""
    hide = piece.hider()
    if hide is None:
        out, lse = engine.forward(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), case.scale)
        return out.squeeze(1), lse.squeeze(1) / LN2
    scores = _scores(q, k, case)
    hide(scores, case.kv_heads)
    shift = scores.amax(dim=-1, keepdim=True)
    weights = scores.sub_(shift).exp2_()
    total = weights.sum(dim=-1, keepdim=True)
    return torch.bmm(weights, v.to(weights.dtype)) / total, (total.log2() + shift).squeeze(-1)


def _backward_piece(
    engine: Engine,
    piece: OwnTile | Level,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    case: Case,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shares in the gradients of q, k and v."""
    hide = piece.hider()
    if hide is None:
        grad, q, k, v, out = (x.unsqueeze(1) for x in (grad, q, k, v, out))
        grad_q, grad_k, grad_v = engine.backward(grad, q, k, v, out, lse.unsqueeze(1) * LN2, case.scale)
        return grad_q.squeeze(1), grad_k.squeeze(1), grad_v.squeeze(1)
    scores = _scores(q, k, case)
    hide(scores, case.kv_heads)
    weights = scores.sub_(lse.unsqueeze(-1)).exp2_()
    grad, q, k, v, out = (x.to(weights.dtype) for x in (grad, q, k, v, out))
    grad_v = torch.bmm(weights.transpose(1, 2), grad)
    delta = (grad * out).sum(dim=-1, keepdim=True)
    grad_scores = torch.bmm(grad, v.transpose(1, 2)).sub_(delta).mul_(weights).mul_(case.scale)
    return torch.bmm(grad_scores, k), torch.bmm(grad_scores.transpose(1, 2), q), grad_v


def _scores(q: Tensor, k: Tensor, case: Case) -> Tensor:
    """Scores in powers of 2."""
    sums = _sums(q.dtype)
    return torch.bmm(q.to(sums) * (case.scale / LN2), k.to(sums).transpose(1, 2))


def _sums(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _pack(x: Tensor, case: Case, *, rows: bool) -> Tensor:
    streams = case.row_streams if rows else case.key_streams
    return pack(
        x, case.tiling, kv_heads=case.kv_heads, streams=streams, dtype=case.dtype, stream_first=not rows
    )
