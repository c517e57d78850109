"""FlexAttention backend: the baseline on a GPU, and a way where Triton's own compiler does not reach.

One block mask per layout from the four vectors, which the mask function reads as captured tensors, so that a
change of documents compiles nothing again. Without the clean rows as queries, a second mask.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bdtrain_kernels.block_attention.reference import Layout
from bdtrain_kernels.errors import BackendUnavailableError

SHAPES = 256
"""Shapes, types and gradient modes that may be compiled in one process."""


@dataclass(frozen=True)
class FlexMasks:
    """Block masks of one layout.

    Attributes:
        all_rows: for queries of every stream.
        noisy_rows: for queries of the noisy streams; None without a clean stream or noisy copies.
    """

    all_rows: Any
    noisy_rows: Any


def build_flex_masks(layout: Layout, *, noisy_copies: int, clean: bool) -> FlexMasks:
    """Block masks for ``flex_attention``.

    Args:
        layout: blocks and documents.
        noisy_copies: noisy streams.
        clean: whether the clean stream is there.

    Returns:
        The masks, on the layout's device.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    batch, seq = layout.block_start.shape
    block_start, block_end, doc_start = layout.block_start, layout.block_end, layout.doc_start
    copies = noisy_copies

    def sees(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        asking, position = row // seq, row % seq
        asked, at = key // seq, key % seq
        own = (asked == asking) & (at >= block_start[b, position]) & (at < block_end[b, position])
        if not clean:
            return own
        end = torch.where(asking == copies, block_end[b, position], block_start[b, position])
        past = (asked == copies) & (at >= doc_start[b, position]) & (at < end)
        return torch.where(asking == copies, past, own | past)

    streams = noisy_copies + int(clean)
    make = functools.partial(
        create_block_mask,
        sees,
        B=1 if layout.single_document else batch,
        H=None,
        KV_LEN=streams * seq,
        device=str(block_start.device),
    )
    noisy = make(Q_LEN=noisy_copies * seq) if noisy_copies and clean else None
    return FlexMasks(all_rows=make(Q_LEN=streams * seq), noisy_rows=noisy)


def flex_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    masks: FlexMasks,
    *,
    noisy_copies: int,
    clean: bool,
    queries: str,
    scale: float | None,
) -> Tensor:
    """Attention of all streams by torch's FlexAttention, compiled on CUDA.

    Args:
        q: [batch, heads, rows, head_dim].
        k: [batch, kv_heads, streams * seq, head_dim].
        v: like ``k``.
        masks: from ``build_flex_masks``.
        noisy_copies: noisy streams.
        clean: whether the clean stream is there.
        queries: "all" or "noisy".
        scale: factor of the scores; None is head_dim ** -0.5.

    Returns:
        [batch, heads, rows, head_dim].

    Raises:
        BackendUnavailableError: on a CPU where gradients are asked for: torch has no such backward.
    """
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if q.device.type == "cpu" and needs_gradient:
        raise BackendUnavailableError(
            "block_attention: backend='flex' has no backward on a CPU; choose from auto, dense, tree"
        )
    mask = masks.noisy_rows if clean and queries == "noisy" else masks.all_rows
    shared = q.shape[1] != k.shape[1]
    if q.device.type == "cpu":
        plain: Tensor = _plain()(q, k, v, block_mask=mask, scale=scale, enable_gqa=shared)
        return plain
    from torch._dynamo import config as dynamo_config  # seconds of imports that no other backend needs

    # Past torch's own limit of 8 shapes a compiled function runs eagerly, which holds all scores.
    with dynamo_config.patch(recompile_limit=SHAPES):
        out: Tensor = _compiled()(q, k, v, block_mask=mask, scale=scale, enable_gqa=shared)
    return out


def _plain() -> Any:
    from torch.nn.attention.flex_attention import flex_attention as plain

    return plain


# Compiled once per process: the cache of a function without arguments is where the compiled form lives.
@functools.cache
def _compiled() -> Any:
    # In one graph or not at all: an error, where torch would else go on without compiling.
    return torch.compile(_plain(), dynamic=False, fullgraph=True)
