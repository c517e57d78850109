"""The one public function, and the preparation that all layers of a forward share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bdtrain_kernels.block_attention.cost import dense_cost, tree_cost
from bdtrain_kernels.block_attention.dense import (
    DenseMasks,
    build_masks,
    dense_attention,
    mask_free,
)
from bdtrain_kernels.block_attention.flash import FlashPlan, flash_attention, plan_flash
from bdtrain_kernels.block_attention.flex import FlexMasks, build_flex_masks, flex_attention
from bdtrain_kernels.block_attention.reference import Layout, check_streams
from bdtrain_kernels.block_attention.support import KERNEL, backend_reasons
from bdtrain_kernels.block_attention.tiling import Tiling, build_tiling
from bdtrain_kernels.block_attention.tree import tree_attention
from bdtrain_kernels.dispatch import announce, check_backend
from bdtrain_kernels.errors import KernelShapeError


@dataclass(frozen=True)
class RowVectors:
    """What the Triton kernels read, and nothing else: no mask exists.

    Attributes:
        vectors: block_start, block_end, doc_start, doc_end, int32 [batch, seq], contiguous.
        tile: rows and keys of a tile; None chooses.
    """

    vectors: tuple[Tensor, Tensor, Tensor, Tensor]
    tile: int | None


@dataclass(frozen=True)
class PreparedLayout:
    """A layout with what one backend makes of it; made by ``prepare``, used by every layer of a forward.

    Attributes:
        batch: rows of the batch.
        seq: tokens of a stream.
        noisy_copies: noisy streams it was made for.
        clean: whether it was made for a clean stream.
        backend: the backend that will run.
        state: what the backend reads: ``DenseMasks``, ``Tiling`` of the tree, ``RowVectors`` of Triton,
            ``FlashPlan``, ``FlexMasks``.
    """

    batch: int
    seq: int
    noisy_copies: int
    clean: bool
    backend: str
    state: DenseMasks | Tiling | RowVectors | FlashPlan | FlexMasks


def prepare(
    layout: Layout,
    *,
    noisy_copies: int,
    clean: bool = True,
    backend: str = "auto",
    tile: int | None = None,
    head_dim: int | None = None,
    dtype: torch.dtype | None = None,
) -> PreparedLayout:
    """Choose the backend and build its masks or tiles, once for all layers.

    Args:
        layout: blocks and documents of the batch, on the device of the tensors to come.
        noisy_copies: noisy streams C, 0 or more.
        clean: whether the clean stream follows them.
        backend: "auto", "triton" (CUDA), "tree" (CPU), "flash" (CUDA and CPU), "flex" (CUDA; on a CPU forward
            only) or "dense" (any device). "auto" takes Triton on CUDA, where one unmasked or causal call does
            not do, and on a CPU the cheaper one of tree and dense.
        tile: tokens of a tile of the tree or of the Triton kernels; None chooses.
        head_dim: channels of a head, for the choice and for refusals; None when not known yet.
        dtype: of the tensors to come, likewise.

    Returns:
        What ``block_attention`` takes in place of the layout.

    Raises:
        BackendUnavailableError: if the backend does not exist or cannot run this case.
        KernelShapeError: if no stream is left, or the tree is forced on blocks that it cannot cut.
    """
    check_streams(noisy_copies=noisy_copies, clean=clean, queries="all")
    batch, seq = layout.block_start.shape
    device = layout.block_start.device
    reasons = backend_reasons(device, head_dim=head_dim, dtype=dtype)
    check_backend(KERNEL, backend, reasons)
    _check_tile(tile, backend)
    tiling: Tiling | None = None
    reason = "forced"
    if backend == "auto":
        backend, tiling, reason = _auto(
            layout, reasons["triton"], noisy_copies=noisy_copies, clean=clean, tile=tile
        )
    announce(KERNEL, backend, reason)
    state: DenseMasks | Tiling | RowVectors | FlashPlan | FlexMasks
    if backend == "tree":
        state = build_tiling(layout, tile) if tiling is None else tiling
    elif backend == "triton":
        vectors = (layout.block_start, layout.block_end, layout.doc_start, layout.doc_end)
        first, second, third, fourth = (vector.contiguous() for vector in vectors)
        state = RowVectors((first, second, third, fourth), tile)
    elif backend == "flex":
        state = build_flex_masks(layout, noisy_copies=noisy_copies, clean=clean)
    elif backend == "flash":
        state = plan_flash(layout, noisy_copies=noisy_copies, clean=clean, tile=tile)
    else:
        state = build_masks(layout, noisy_copies=noisy_copies, clean=clean)
    return PreparedLayout(
        batch=batch, seq=seq, noisy_copies=noisy_copies, clean=clean, backend=backend, state=state
    )


def _check_tile(tile: int | None, backend: str) -> None:
    """Refuse a tile that the backend would ignore or cannot have."""
    if tile is None:
        return
    if backend in ("dense", "flex"):
        raise KernelShapeError(f"tile={tile} with backend={backend!r}, which has no tiles; leave it out")
    if tile < 1 or (backend == "triton" and (tile < 16 or tile & (tile - 1))):
        raise KernelShapeError(
            f"tile={tile}; backend 'triton' takes powers of 2 from 16, the others 1 or more"
        )


def _auto(
    layout: Layout, no_triton: str, *, noisy_copies: int, clean: bool, tile: int | None
) -> tuple[str, Tiling | None, str]:
    """The backend, the tiling if it is the tree, and why."""
    device = layout.block_start.device
    if device.type == "cuda":
        if mask_free(layout, noisy_copies=noisy_copies, clean=clean):
            return "dense", None, "auto: CUDA, one fused call without a mask"
        if no_triton:
            return "dense", None, f"auto: CUDA, no Triton: {no_triton}"
        if tile is not None:
            _check_tile(tile, "triton")
        return "triton", None, "auto: CUDA"
    if device.type != "cpu":
        return "dense", None, f"auto: {device.type}"
    if not clean or noisy_copies == 0:
        return "dense", None, "auto: one kind of stream"
    try:
        tiling = build_tiling(layout, tile)
    except KernelShapeError:
        return "dense", None, "auto: CPU, blocks that the tree cannot cut"
    if tree_cost(tiling, noisy_copies) < dense_cost(layout, noisy_copies):
        return "tree", tiling, "auto: CPU, estimated the faster one"
    return "dense", None, "auto: CPU, estimated the faster one"


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout | PreparedLayout,
    *,
    noisy_copies: int,
    clean: bool = True,
    queries: str = "all",
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention over the streams noisy_1 .. noisy_C, clean of block diffusion.

    A noisy query sees the noisy keys of its own block and copy, and the clean keys of earlier blocks of its
    document; a clean query sees the clean keys of its own and earlier blocks (``reference.dense_mask`` is
    the definition).

    Args:
        q: queries, [batch, heads, rows, head_dim], any strides with the last axis contiguous; rows = streams
            * seq for queries="all", noisy_copies * seq for queries="noisy".
        k: keys, [batch, kv_heads, streams * seq, head_dim]; kv_heads divides heads.
        v: values, like ``k``.
        layout: blocks and documents, or what ``prepare`` made of them (do that where several layers share a
            layout).
        noisy_copies: noisy streams C, 0 or more.
        clean: whether the clean stream follows them.
        queries: "noisy" leaves out the clean rows (the last layer needs their keys and values alone).
        scale: factor of the scores; None is head_dim ** -0.5.
        backend: as in ``prepare``; with a prepared layout "auto" or the backend it was prepared for.

    Returns:
        [batch, heads, rows, head_dim].

    Raises:
        BackendUnavailableError: if the backend does not exist or cannot run this case.
        KernelShapeError: if shapes, streams and layout do not fit each other.

    Source: the vectorised training pass of arXiv 2503.09573 (mask of noisy and clean streams).
    """
    check_streams(noisy_copies=noisy_copies, clean=clean, queries=queries)
    if isinstance(layout, PreparedLayout):
        prepared = layout
        if backend not in ("auto", prepared.backend) or (prepared.noisy_copies, prepared.clean) != (
            noisy_copies,
            clean,
        ):
            raise KernelShapeError(
                f"the layout was prepared for backend={prepared.backend!r}, "
                f"noisy_copies={prepared.noisy_copies}, clean={prepared.clean} but is used with "
                f"backend={backend!r}, noisy_copies={noisy_copies}, clean={clean}; prepare it for this use"
            )
    else:
        prepared = prepare(
            layout,
            noisy_copies=noisy_copies,
            clean=clean,
            backend=backend,
            head_dim=q.shape[-1],
            dtype=q.dtype,
        )
    _check_shapes(q, k, v, prepared, queries)
    how: dict[str, Any] = {"noisy_copies": noisy_copies, "clean": clean, "queries": queries, "scale": scale}
    state = prepared.state
    if isinstance(state, RowVectors):
        # Only here, so that the package can be imported where triton is not installed.
        from bdtrain_kernels.block_attention.triton_backend import triton_attention

        return triton_attention(q, k, v, state.vectors, tile=state.tile, **how)
    if isinstance(state, Tiling):
        return tree_attention(q, k, v, state, **how)
    if isinstance(state, FlashPlan):
        return flash_attention(q, k, v, state, **how)
    if isinstance(state, FlexMasks):
        return flex_attention(q, k, v, state, **how)
    return dense_attention(q, k, v, state, **how)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, prepared: PreparedLayout, queries: str) -> None:
    batch, seq = prepared.batch, prepared.seq
    streams = prepared.noisy_copies + int(prepared.clean)
    rows = prepared.noisy_copies * seq if queries == "noisy" else streams * seq
    found = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise KernelShapeError(f"{found}; q, k, v must be [batch, heads, tokens, head_dim], k and v alike")
    if q.shape[0] != batch or k.shape[0] != batch or q.shape[2] != rows or k.shape[2] != streams * seq:
        raise KernelShapeError(
            f"{found}; a layout of [batch={batch}, seq={seq}] with noisy_copies={prepared.noisy_copies}, "
            f"clean={prepared.clean}, queries={queries!r} needs {rows} query rows and {streams * seq} keys"
        )
    if q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
        raise KernelShapeError(f"{found}; head_dim must be the same and kv_heads must divide heads")
    if not q.dtype == k.dtype == v.dtype or not torch.is_floating_point(q):
        raise KernelShapeError(
            f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; they must be of one floating type"
        )
