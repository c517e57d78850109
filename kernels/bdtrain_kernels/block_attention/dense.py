"""Dense backend: torch's scaled_dot_product_attention, one call per stream, masks built once per layout.

The noisy rows of a copy see that copy and the clean stream; clean rows see the clean stream alone. Asking
them apart leaves out the quarter of the score matrix that no clean row ever sees (1.2 to 1.3 times faster
than one call over both; kernels/bench/cpu_attention.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bdtrain_kernels.block_attention.reference import Layout, visible_parts


@dataclass(frozen=True)
class DenseMasks:
    """Masks of one layout.

    Attributes:
        noisy: noisy rows to the keys of their own copy, then (with a clean stream) to clean keys, bool
            [batch or 1, 1, seq, seq or 2 * seq]; None when every key is seen, or without noisy rows.
        clean: clean rows to clean keys, bool [batch or 1, 1, seq, seq]; None when every key is seen, or when
            ``causal``.
        causal: clean rows see themselves and what comes before: the plain causal triangle.
    """

    noisy: Tensor | None
    clean: Tensor | None
    causal: bool


def mask_free(layout: Layout, *, noisy_copies: int, clean: bool) -> bool:
    """Whether attention is one call without a mask: all keys seen (MDLM), or all before (autoregression).

    Known on the host: nothing is read from the device.
    """
    if not layout.single_document or (clean and noisy_copies):
        return False
    if clean:
        return layout.block_size == 1 or layout.block_size >= layout.block_start.shape[1]
    return layout.block_size >= layout.block_start.shape[1]


def build_masks(layout: Layout, *, noisy_copies: int, clean: bool) -> DenseMasks:
    """Masks for ``dense_attention``, without those that the layout makes needless.

    Args:
        layout: blocks and documents.
        noisy_copies: noisy streams.
        clean: whether the clean stream is there.

    Returns:
        The masks, on the layout's device.
    """
    seq = layout.block_start.shape[1]
    one_block = layout.single_document and layout.block_size >= seq
    causal = layout.single_document and layout.block_size == 1
    need_noisy = noisy_copies > 0 and not (one_block and not clean)
    need_clean = clean and not one_block and not causal
    if not need_noisy and not need_clean:
        return DenseMasks(noisy=None, clean=None, causal=causal)
    same_block, past, upto = visible_parts(_first_row(layout) if layout.single_document else layout)
    noisy = torch.cat((same_block, past), dim=-1) if clean else same_block
    return DenseMasks(
        noisy=noisy.unsqueeze(1) if need_noisy else None,
        clean=upto.unsqueeze(1) if need_clean else None,
        causal=causal,
    )


@dataclass(frozen=True)
class _Row:
    block_start: Tensor
    block_end: Tensor
    doc_start: Tensor
    doc_end: Tensor
    block_size: int
    single_document: bool


def _first_row(layout: Layout) -> _Row:
    """One row stands for all where every row has the same blocks: masks of batch 1."""
    return _Row(
        layout.block_start[:1],
        layout.block_end[:1],
        layout.doc_start[:1],
        layout.doc_end[:1],
        layout.block_size,
        layout.single_document,
    )


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    masks: DenseMasks,
    *,
    noisy_copies: int,
    clean: bool,
    queries: str,
    scale: float | None,
) -> Tensor:
    """Attention of all streams with boolean masks.

    Args:
        q: [batch, heads, rows, head_dim].
        k: [batch, kv_heads, streams * seq, head_dim].
        v: like ``k``.
        masks: from ``build_masks``.
        noisy_copies: noisy streams.
        clean: whether the clean stream is there.
        queries: "all" or "noisy".
        scale: factor of the scores; None is head_dim ** -0.5.

    Returns:
        [batch, heads, rows, head_dim].
    """
    group = q.shape[1] // k.shape[1]
    masked = (noisy_copies > 0 and masks.noisy is not None) or (clean and masks.clean is not None)
    shared = group > 1 and not masked
    if group > 1 and masked:
        # Repeated here, not by enable_gqa: with a mask that flag leaves only the unfused path on CUDA.
        k = k.repeat_interleave(group, dim=1)
        v = v.repeat_interleave(group, dim=1)
    seq = k.shape[2] // (noisy_copies + int(clean))
    own = slice(noisy_copies * seq, None)
    outputs = []
    for copy in range(noisy_copies):
        rows = slice(copy * seq, (copy + 1) * seq)
        if not clean:
            keys, values = k[:, :, rows], v[:, :, rows]
        elif noisy_copies == 1:
            keys, values = k, v
        else:
            keys = torch.cat((k[:, :, rows], k[:, :, own]), dim=2)
            values = torch.cat((v[:, :, rows], v[:, :, own]), dim=2)
        outputs.append(
            F.scaled_dot_product_attention(
                q[:, :, rows], keys, values, attn_mask=masks.noisy, scale=scale, enable_gqa=shared
            )
        )
    if clean and queries == "all":
        outputs.append(
            F.scaled_dot_product_attention(
                q[:, :, own],
                k[:, :, own],
                v[:, :, own],
                attn_mask=masks.clean,
                is_causal=masks.causal,
                scale=scale,
                enable_gqa=shared,
            )
        )
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
