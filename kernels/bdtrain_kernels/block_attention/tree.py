"""Tree backend for CPUs: unmasked rectangles over the clean keys, small masked squares on the diagonal.

Work and memory follow the pairs that are visible instead of the square of all tokens: O(seq) kept for
backward. One ``autograd.Function``; see ``tiling`` for the cut and ``pieces`` for a rectangle. Rows of all
streams and of all query heads of a group stand beside each other in a tile, since they read the same clean
keys: keys are never repeated.

    own noisy tile:   per copy, noisy rows x noisy keys of the tile            (masked unless a tile is one
    block) own clean tile:   all rows x clean keys of the tile                        (the same)
    each level:       all rows of the odd runs x clean keys of the even runs   (never masked)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bdtrain_kernels.block_attention.packing import memory_order, pack, unpack
from bdtrain_kernels.block_attention.pieces import LN2, Saved, backward_piece, forward_piece, merge_
from bdtrain_kernels.block_attention.tiling import Span, Tiling


@dataclass(frozen=True)
class Case:
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
        """Streams of keys and values."""
        return self.copies + int(self.clean)

    @property
    def row_streams(self) -> int:
        """Streams that ask."""
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
        [batch, heads, rows, head_dim], in the memory order of ``q``. Inputs narrower than float32 are
        computed in float32 and rounded once.
    """
    case = Case(
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
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, case: Case, keep: bool) -> Tensor:
        # rows [kv_heads, tiles, streams, group, tile, head_dim]
        # keys [streams, kv_heads, tiles, 1, tile, head_dim]
        rows = _pack(q, case, rows=True).mul_(case.scale / LN2)
        keys, values = _pack(k, case, rows=False), _pack(v, case, rows=False)
        out = torch.empty_like(rows)
        lse = rows.new_empty(rows.shape[:-1])
        saved: list[Saved] = []
        for piece in tree_pieces(case):
            run_out, run_lse = piece.rows(out), piece.rows(lse)
            part, part_lse, kept = forward_piece(
                piece.rows(rows),
                piece.keys(keys),
                piece.keys(values),
                heads=case.kv_heads,
                hide=piece.hider(),
                keep=keep,
                into=(run_out, run_lse) if piece.first else None,
            )
            saved.append(kept)
            if not piece.first:
                merge_(run_out, run_lse, part, part_lse)
                piece.put_rows(out, run_out)
                piece.put_rows(lse, run_lse)
        if keep:
            flat = [tensor for piece_saved in saved for pair in piece_saved for tensor in pair]
            ctx.save_for_backward(rows, keys, values, out, lse, *flat)
            ctx.case = case
            ctx.saved_chunks = [len(piece_saved) for piece_saved in saved]
            ctx.like = (memory_order(q), memory_order(k), memory_order(v))
            ctx.dtypes = (q.dtype, k.dtype, v.dtype)
        return _unpack(out, case, memory_order(q), q.dtype, rows=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        case: Case = ctx.case
        rows, keys, values, out, lse, *flat = ctx.saved_tensors
        grad_out = _pack(grad, case, rows=True)
        delta = (grad_out * out).sum(dim=-1)
        grad_rows, grad_keys, grad_values = (torch.empty_like(x) for x in (rows, keys, values))
        if case.clean and not (case.clean_rows or not case.tiling.one_block):
            # The one case without a piece over the own clean tile, which is the first to write to clean keys.
            grad_keys[-1].zero_()
            grad_values[-1].zero_()
        pairs = iter(zip(flat[0::2], flat[1::2], strict=True))
        for piece, chunks in zip(tree_pieces(case), ctx.saved_chunks, strict=True):
            into = (
                piece.rows(grad_rows) if piece.first else None,
                piece.keys(grad_keys) if isinstance(piece, OwnTile) else None,
                piece.keys(grad_values) if isinstance(piece, OwnTile) else None,
            )
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
                into=into,
            )
            if into[0] is None:
                piece.add_rows(grad_rows, part[0])
            if isinstance(piece, Level):
                piece.add_keys(grad_keys, part[1])
                piece.add_keys(grad_values, part[2])
        return (
            _unpack(grad_rows.mul_(case.scale), case, ctx.like[0], ctx.dtypes[0], rows=True),
            _unpack(grad_keys.mul_(LN2), case, ctx.like[1], ctx.dtypes[1], rows=False),
            _unpack(grad_values, case, ctx.like[2], ctx.dtypes[2], rows=False),
            None,
            None,
        )


def _pack(x: Tensor, case: Case, *, rows: bool) -> Tensor:
    streams = case.row_streams if rows else case.key_streams
    return pack(
        x, case.tiling, kv_heads=case.kv_heads, streams=streams, dtype=case.dtype, stream_first=not rows
    )


def _unpack(x: Tensor, case: Case, order: tuple[int, ...], dtype: torch.dtype, *, rows: bool) -> Tensor:
    return unpack(x, case.tiling, order=order, dtype=dtype, stream_first=not rows)


def tree_pieces(case: Case) -> list[OwnTile | Level]:
    """Every rectangle of the call, in the order of the merge."""
    tiling = case.tiling
    pieces: list[OwnTile | Level] = []
    # A tile of one block shows its clean keys to clean rows only; otherwise the masks sort it out.
    clean_from = case.copies if tiling.one_block else 0
    if case.clean and clean_from < case.row_streams:
        pieces.append(OwnTile(case, clean_from, case.row_streams, key_stream=case.copies, first=True))
    for copy in range(case.copies):
        first = not case.clean or tiling.one_block
        pieces.append(OwnTile(case, copy, copy + 1, key_stream=copy, first=first))
    if case.clean:
        pieces.extend(Level(case, evens, odds) for evens, odds in tiling.levels)
    return pieces


@dataclass(frozen=True)
class OwnTile:
    """Rows of some streams against the keys of one stream in the same tile.

    Attributes:
        case: the call.
        begin: first row stream.
        end: one past the last row stream.
        key_stream: the stream of the keys.
        first: nothing has been written to these rows before.
    """

    case: Case
    begin: int
    end: int
    key_stream: int
    first: bool

    def hider(self) -> Callable[[Tensor, int], None] | None:
        """What hides keys of the tile from its rows, if any are hidden."""
        tiling = self.case.tiling
        mask = tiling.noisy_own if self.key_stream < self.case.copies else tiling.clean_clean
        return None if mask is None else self._hide

    def rows(self, packed: Tensor) -> Tensor:
        """A view of packed rows (or of their LSE) as [kv_heads * tiles, rows, ..]."""
        return packed[:, :, self.begin : self.end].flatten(2, 4).flatten(0, 1)

    def keys(self, packed: Tensor) -> Tensor:
        """A view of packed keys as [kv_heads * tiles, keys, head_dim]."""
        return packed[self.key_stream].flatten(2, 3).flatten(0, 1)

    def put_rows(self, packed: Tensor, values: Tensor) -> None:
        """Nothing to do: ``rows`` is a view."""

    def add_rows(self, packed: Tensor, values: Tensor) -> None:
        """Add to packed rows."""
        self.rows(packed).add_(values)

    def add_keys(self, packed: Tensor, values: Tensor) -> None:
        """Add to packed keys."""
        self.keys(packed).add_(values)

    def _hide(self, scores: Tensor, heads: int) -> None:
        """Add the mask to scores [heads * tiles, rows, keys], in place."""
        case, tiling = self.case, self.case.tiling
        by_stream = scores.view(heads, tiling.num_tiles, -1, case.group, tiling.tile, tiling.tile)
        if self.key_stream < case.copies:
            _add_mask(by_stream, tiling.noisy_own)
            return
        noisy = case.copies - self.begin  # streams of noisy rows among these
        _add_mask(by_stream[:, :, :noisy], tiling.noisy_clean)
        _add_mask(by_stream[:, :, noisy:], tiling.clean_clean)


@dataclass(frozen=True)
class Level:
    """Rows of all streams in the odd runs against the clean keys of the even runs to their left.

    Attributes:
        case: the call.
        evens: runs of the keys.
        odds: runs of the rows.
    """

    case: Case
    evens: Span
    odds: Span

    first = False

    def rows(self, packed: Tensor) -> Tensor:
        """Rows (or LSE) of the odd runs as [kv_heads * runs, rows, ..]; a copy when irregular."""
        return self.odds.take(packed.flatten(2, 4))

    def keys(self, packed: Tensor) -> Tensor:
        """Clean keys of the even runs as [kv_heads * runs, keys, head_dim]; a copy when irregular."""
        return self.evens.take(packed[-1].flatten(2, 3))

    def put_rows(self, packed: Tensor, values: Tensor) -> None:
        """Write back what ``rows`` gave."""
        self.odds.put(packed.flatten(2, 4), values)

    def add_rows(self, packed: Tensor, values: Tensor) -> None:
        """Add to packed rows."""
        self.odds.add(packed.flatten(2, 4), values)

    def add_keys(self, packed: Tensor, values: Tensor) -> None:
        """Add to packed clean keys."""
        self.evens.add(packed[-1].flatten(2, 3), values)

    def hider(self) -> None:
        """Nothing is hidden at a level."""
        return None


def _add_mask(scores: Tensor, mask: Tensor | None) -> None:
    """Add [tiles or 1, tile or 1, tile] to scores [heads, tiles, streams, group, tile, tile]."""
    if mask is not None and scores.numel():
        scores.add_(mask[:, None, None])
