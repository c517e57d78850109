"""The definition: the mask by its rule, and attention as explicit softmax.

Streams lie along the sequence axis as noisy_1 .. noisy_C, clean, all over positions 0 .. seq - 1. With the
four integers that a layout holds per token,

    noisy query:  noisy keys [block_start, block_end) of its own copy, clean keys [doc_start, block_start)
    clean query:  clean keys [doc_start, block_end), never a noisy key

Source: the mask of the vectorised training pass of arXiv 2503.09573 (M_BD, M_OBC, M_BC), cut at document
bounds.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from bdtrain_kernels.errors import KernelShapeError

QUERIES = ("all", "noisy")


class Layout(Protocol):
    """Blocks and documents of a batch of rows, as any object with these attributes.

    Attributes:
        block_start: first position of the token's block, int32 [batch, seq].
        block_end: one past the last position of the token's block, int32 [batch, seq].
        doc_start: first position of the token's document, int32 [batch, seq].
        doc_end: one past the last position of the token's document, int32 [batch, seq].
        block_size: tokens of a full block.
        single_document: known on the host: every row is one document whose blocks are all ``block_size``
            long, except possibly the last one.
    """

    @property
    def block_start(self) -> Tensor: ...  # noqa: D102 - see Attributes
    @property
    def block_end(self) -> Tensor: ...  # noqa: D102
    @property
    def doc_start(self) -> Tensor: ...  # noqa: D102
    @property
    def doc_end(self) -> Tensor: ...  # noqa: D102
    @property
    def block_size(self) -> int: ...  # noqa: D102
    @property
    def single_document(self) -> bool: ...  # noqa: D102


def check_streams(*, noisy_copies: int, clean: bool, queries: str) -> None:
    """Refuse streams that make no forward pass.

    Args:
        noisy_copies: noisy streams, 0 or more.
        clean: whether the clean stream is there.
        queries: "all" rows ask, or the "noisy" ones only.

    Raises:
        KernelShapeError: if no stream is left to ask or to be seen.
    """
    if queries not in QUERIES:
        raise KernelShapeError(f"queries={queries!r}; choose 'all' or 'noisy'")
    if noisy_copies < 0 or (noisy_copies == 0 and not clean):
        raise KernelShapeError(
            f"noisy_copies={noisy_copies} with clean={clean} leaves no stream; "
            "give a noisy copy or the clean stream"
        )
    if noisy_copies == 0 and queries == "noisy":
        raise KernelShapeError("queries='noisy' needs noisy_copies of at least 1; use queries='all'")


def dense_mask(layout: Layout, *, noisy_copies: int, clean: bool, queries: str = "all") -> Tensor:
    """Which key each query sees, as one boolean matrix: O(rows * keys) memory, for definition and tests.

    Args:
        layout: blocks and documents, vectors of [batch, seq].
        noisy_copies: noisy streams C, 0 or more.
        clean: whether the clean stream follows them.
        queries: "all": rows of every stream; "noisy": rows of the noisy streams only.

    Returns:
        True where the query sees the key, bool [batch, 1, rows, streams * seq], streams = C + clean, rows =
        streams * seq or C * seq.

    Raises:
        KernelShapeError: if no stream is left.
    """
    check_streams(noisy_copies=noisy_copies, clean=clean, queries=queries)
    same_block, past, upto = visible_parts(layout)
    nothing = torch.zeros_like(same_block)
    rows = []
    for copy in range(noisy_copies):
        noisy_keys = [same_block if key_copy == copy else nothing for key_copy in range(noisy_copies)]
        rows.append(torch.cat([*noisy_keys, past] if clean else noisy_keys, dim=-1))
    if clean and queries == "all":
        rows.append(torch.cat([nothing] * noisy_copies + [upto], dim=-1))
    return torch.cat(rows, dim=-2).unsqueeze(1)


def visible_parts(layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """The three [seq, seq] squares that the whole mask is made of.

    Args:
        layout: blocks and documents, vectors of [batch, seq].

    Returns:
        Noisy query to noisy key of its copy, noisy query to clean key, clean query to clean key; bool
        [batch, seq, seq].
    """
    key = torch.arange(layout.block_start.shape[1], device=layout.block_start.device)
    block_start, block_end, doc_start = (
        vector.unsqueeze(-1) for vector in (layout.block_start, layout.block_end, layout.doc_start)
    )
    same_block = (key >= block_start) & (key < block_end)
    past = (key >= doc_start) & (key < block_start)
    upto = (key >= doc_start) & (key < block_end)
    return same_block, past, upto


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, scale: float | None = None
) -> Tensor:
    """Attention as explicit softmax in the dtype of its inputs (give float64 for a reference).

    Args:
        q: queries, [batch, heads, rows, head_dim].
        k: keys, [batch, kv_heads, keys, head_dim]; kv_heads divides heads, query head h reads kv head h //
            group.
        v: values, like ``k``.
        mask: True where seen, bool, broadcastable to [batch, heads, rows, keys]; every row sees at least one
            key.
        scale: factor of the scores; None is head_dim ** -0.5.

    Returns:
        [batch, heads, rows, head_dim].
    """
    group = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(group, dim=1)
    v = v.repeat_interleave(group, dim=1)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * factor
    return torch.einsum("bhqk,bhkd->bhqd", scores.masked_fill(~mask, -torch.inf).softmax(dim=-1), v)
