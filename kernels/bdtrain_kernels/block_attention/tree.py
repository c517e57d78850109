"""Tree backend for CPUs: unmasked rectangles over the clean keys, small masked squares on the diagonal.

Work and memory follow the pairs that are visible instead of the square of all tokens: O(seq) kept for backward. One
``autograd.Function``; see ``tiling`` for the cut and ``pieces`` for a rectangle. Rows of all streams and of all query
heads of a group stand beside each other in a tile, since they read the same clean keys: keys are never repeated.

    own noisy tile:   per copy, noisy rows x noisy keys of the tile            (masked unless a tile is one block)
    own clean tile:   all rows x clean keys of the tile                        (the same)
    each level:       all rows of the odd runs x clean keys of the even runs   (never masked)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bdtrain_kernels.block_attention.pieces import Saved, backward_piece, forward_piece, merge_
from bdtrain_kernels.block_attention.tiling import Tiling


@dataclass(frozen=True)
class _Case:
    """What the pieces of one call have in common.

    Attributes:
        tiling: the cut of the batch.
        copies: noisy streams.
        clean: whether the clean stream is among the keys.
        clean_rows: whether clean rows ask.
        kv_heads: key heads.
        group: query heads per key head.
        scale: factor of the scores.
        dtype: dtype of the computation.
    """

    tiling: Tiling
    copies: int
    clean: bool
    clean_rows: bool
    kv_heads: int
    group: int
    scale: float
    dtype: torch.dtype

    @property
    def key_streams(self) -> int:
        return self.copies + int(self.clean)

    @property
    def row_streams(self) -> int:
        return self.copies + int(self.clean_rows)


def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiling: Tiling,
    *,
    noisy_copies: int,
    clean: bool,
    queries: str,
    scale: float | None,
) -> Tensor:
    """Attention of all streams by the tree.

    Args:
        q: [batch, heads, rows, head_dim], any strides.
        k: [batch, kv_heads, streams * seq, head_dim], any strides.
        v: like ``k``.
        tiling: from ``build_tiling``, on the same device.
        noisy_copies: noisy streams.
        clean: whether the clean stream is there.
        queries: "all" or "noisy".
        scale: factor of the scores; None is head_dim ** -0.5.

    Returns:
        [batch, heads, rows, head_dim], in the memory order of ``q``. Inputs narrower than float32 are computed in
        float32 and rounded once.
    """
    case = _Case(
        tiling=tiling,
        copies=noisy_copies,
        clean=clean,
        clean_rows=clean and queries == "all",
        kv_heads=k.shape[1],
        group=q.shape[1] // k.shape[1],
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        dtype=torch.float64 if q.dtype == torch.float64 else torch.float32,
    )
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return _Tree.apply(q, k, v, case, keep)


class _Tree(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, case: _Case, keep: bool) -> Tensor:
        rows = _pack_rows(q, case).mul_(case.scale)  # [kv_heads, tiles, streams, group, tile, head_dim]
        keys, values = _pack_keys(k, case), _pack_keys(v, case)  # [streams, kv_heads, tiles, tile, head_dim]
        out = torch.empty_like(rows)
        lse = rows.new_empty(rows.shape[:-1])
        saved: list[Saved] = []
        for piece in _pieces(case):
            part, part_lse, kept = forward_piece(
                piece.rows(rows),
                piece.keys(keys),
                piece.keys(values),
                heads=case.kv_heads,
                hide=piece.hide,
                keep=keep,
            )
            saved.append(kept)
            run_out, run_lse = piece.rows(out), piece.rows(lse)
            if piece.first:
                run_out.copy_(part)
                run_lse.copy_(part_lse)
            else:
                merge_(run_out, run_lse, part, part_lse)
            piece.write_rows(out, run_out)
            piece.write_rows(lse, run_lse)
        if keep:
            flat = [tensor for piece_saved in saved for pair in piece_saved for tensor in pair]
            ctx.save_for_backward(rows, keys, values, out, lse, *flat)
            ctx.case = case
            ctx.saved_chunks = [len(piece_saved) for piece_saved in saved]
            ctx.like = (_memory_order(q), _memory_order(k), _memory_order(v))
            ctx.dtypes = (q.dtype, k.dtype, v.dtype)
        return _unpack_rows(out, case, _memory_order(q), q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        case: _Case = ctx.case
        rows, keys, values, out, lse, *flat = ctx.saved_tensors
        grad_out = _pack_rows(grad, case)
        delta = (grad_out * out).sum(dim=-1)
        grad_rows = torch.zeros_like(rows)
        grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
        pairs = iter(zip(flat[0::2], flat[1::2], strict=True))
        for piece, chunks in zip(_pieces(case), ctx.saved_chunks, strict=True):
            part = backward_piece(
                piece.rows(grad_out),
                piece.rows(rows),
                piece.keys(keys),
                piece.keys(values),
                piece.rows(out),
                piece.rows(lse),
                piece.rows(delta),
                [next(pairs) for _ in range(chunks)],
                heads=case.kv_heads,
            )
            piece.add_rows(grad_rows, part[0])
            piece.add_keys(grad_keys, part[1])
            piece.add_keys(grad_values, part[2])
        return (
            _unpack_rows(grad_rows.mul_(case.scale), case, ctx.like[0], ctx.dtypes[0]),
            _unpack_keys(grad_keys, case, ctx.like[1], ctx.dtypes[1]),
            _unpack_keys(grad_values, case, ctx.like[2], ctx.dtypes[2]),
            None,
            None,
        )


@dataclass(frozen=True)
class _Piece:
    """A rectangle: which rows and keys it takes, and how its results go back.

    Attributes:
        rows: packed rows (or LSE) -> [heads * runs, rows, ..].
        keys: packed keys -> [heads * runs, keys, head_dim].
        write_rows: puts what ``rows`` gave back into the packed tensor, if it was a copy.
        add_rows: adds to the packed rows.
        add_keys: adds to the packed keys.
        hide: adds the mask to scores of a number of heads; None for none.
        first: nothing has been written to these rows before.
    """

    rows: Callable[[Tensor], Tensor]
    keys: Callable[[Tensor], Tensor]
    write_rows: Callable[[Tensor, Tensor], None]
    add_rows: Callable[[Tensor, Tensor], None]
    add_keys: Callable[[Tensor, Tensor], None]
    hide: Callable[[Tensor, int], None] | None
    first: bool


def _pieces(case: _Case) -> list[_Piece]:
    """Every rectangle of the call, in the order of the merge."""
    pieces = []
    tiling = case.tiling
    # A tile of one block shows its clean keys to clean rows only; otherwise the masks sort it out.
    clean_from = case.copies if tiling.one_block else 0
    if case.clean and clean_from < case.row_streams:
        hide = _hide_clean(case, clean_from)
        pieces.append(_own_tile(slice(clean_from, case.row_streams), case.copies, hide, first=True))
    for copy in range(case.copies):
        hide = None if tiling.noisy_own is None else _hide_with(case, tiling.noisy_own)
        pieces.append(_own_tile(slice(copy, copy + 1), copy, hide, first=not case.clean or tiling.one_block))
    if case.clean:
        pieces.extend(_level(case, *runs) for runs in tiling.levels)
    return pieces


def _own_tile(streams: slice, key_stream: int, hide: Callable[[Tensor, int], None] | None, *, first: bool) -> _Piece:
    """Rows of some streams against the keys of one stream in the same tile."""

    def rows(packed: Tensor) -> Tensor:
        return packed[:, :, streams].flatten(2, 4).flatten(0, 1)

    def keys(packed: Tensor) -> Tensor:
        return packed[key_stream].flatten(0, 1)

    return _Piece(
        rows=rows,
        keys=keys,
        write_rows=lambda packed, values: None,
        add_rows=lambda packed, values: rows(packed).add_(values),
        add_keys=lambda packed, values: keys(packed).add_(values),
        hide=hide,
        first=first,
    )
