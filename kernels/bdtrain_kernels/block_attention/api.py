"""The one public function, and the preparation that all layers of a forward share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bdtrain_kernels.block_attention.cost import dense_cost, tree_cost
from bdtrain_kernels.block_attention.dense import DenseMasks, build_masks, dense_attention
from bdtrain_kernels.block_attention.reference import Layout, check_streams
from bdtrain_kernels.block_attention.tiling import Tiling, build_tiling
from bdtrain_kernels.block_attention.tree import tree_attention
from bdtrain_kernels.dispatch import announce, check_backend
from bdtrain_kernels.errors import KernelShapeError

KERNEL = "block_attention"


@dataclass(frozen=True)
class PreparedLayout:
    """A layout with the masks or tiles of one backend; made by ``prepare``, used by every layer of a forward.

    Attributes:
        batch: rows of the batch.
        seq: tokens of a stream.
        noisy_copies: noisy streams it was made for.
        clean: whether it was made for a clean stream.
        backend: the backend that will run.
        masks: of the dense backend, else None.
        tiling: of the tree backend, else None.
    """

    batch: int
    seq: int
    noisy_copies: int
    clean: bool
    backend: str
    masks: DenseMasks | None
    tiling: Tiling | None


def prepare(
    layout: Layout, *, noisy_copies: int, clean: bool = True, backend: str = "auto", tile: int | None = None
) -> PreparedLayout:
    """Choose the backend and build its masks or tiles, once for all layers.

    Args:
        layout: blocks and documents of the batch, on the device of the tensors to come.
        noisy_copies: noisy streams C, 0 or more.
        clean: whether the clean stream follows them.
        backend: "auto", "dense" (any device) or "tree" (CPU).
        tile: tokens of a tile of the tree; None chooses.

    Returns:
        What ``block_attention`` takes in place of the layout.

    Raises:
        BackendUnavailableError: if the backend does not exist or cannot run this case.
        KernelShapeError: if no stream is left, or the tree is forced on blocks that it cannot cut.
    """
    check_streams(noisy_copies=noisy_copies, clean=clean, queries="all")
    batch, seq = layout.block_start.shape
    on_cpu = layout.block_start.device.type == "cpu"
    available = {
        "dense": "",
        "tree": "" if on_cpu else f"it runs on a CPU, the layout is on {layout.block_start.device}",
    }
    check_backend(KERNEL, backend, available)
    tiling: Tiling | None = None
    if backend == "tree":
        announce(KERNEL, "tree", "forced")
        tiling = build_tiling(layout, tile)
    elif backend == "auto":
        tiling, reason = _auto(layout, on_cpu=on_cpu, noisy_copies=noisy_copies, clean=clean, tile=tile)
        announce(KERNEL, "dense" if tiling is None else "tree", reason)
    else:
        announce(KERNEL, "dense", "forced")
    masks = build_masks(layout, noisy_copies=noisy_copies, clean=clean) if tiling is None else None
    return PreparedLayout(
        batch=batch,
        seq=seq,
        noisy_copies=noisy_copies,
        clean=clean,
        backend="dense" if tiling is None else "tree",
        masks=masks,
        tiling=tiling,
    )


def _auto(
    layout: Layout, *, on_cpu: bool, noisy_copies: int, clean: bool, tile: int | None
) -> tuple[Tiling | None, str]:
    """The tiling if the tree is the faster one, and why."""
    if not on_cpu:
        return None, f"auto: {layout.block_start.device.type}"
    if not clean or noisy_copies == 0:
        return None, "auto: one kind of stream"
    try:
        tiling = build_tiling(layout, tile)
    except KernelShapeError:
        return None, "auto: CPU, blocks that the tree cannot cut"
    if tree_cost(tiling, noisy_copies) < dense_cost(layout, noisy_copies):
        return tiling, "auto: CPU, estimated the faster one"
    return None, "auto: CPU, estimated the faster one"


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
        backend: "auto", "dense" or "tree"; with a prepared layout "auto" or the backend it was prepared for.

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
        prepared = prepare(layout, noisy_copies=noisy_copies, clean=clean, backend=backend)
    _check_shapes(q, k, v, prepared, queries)
    if prepared.tiling is not None:
        return tree_attention(
            q, k, v, prepared.tiling, noisy_copies=noisy_copies, clean=clean, queries=queries, scale=scale
        )
    if prepared.masks is None:  # only a PreparedLayout built by hand
        raise KernelShapeError("a PreparedLayout without masks and tiles; make it with prepare()")
    return dense_attention(
        q, k, v, prepared.masks, noisy_copies=noisy_copies, clean=clean, queries=queries, scale=scale
    )


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
