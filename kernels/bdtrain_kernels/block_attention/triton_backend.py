"""Triton backend: launches the kernels, as two operators that torch sees as one node each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bdtrain_kernels.block_attention import triton_gradients, triton_kernels
from bdtrain_kernels.block_attention.support import KERNEL, backend_reasons
from bdtrain_kernels.compile_cases import CompileCase
from bdtrain_kernels.dispatch import shared_memory_kib
from bdtrain_kernels.errors import BackendUnavailableError, KernelShapeError

LOG2E = 1.0 / math.log(2.0)


@dataclass(frozen=True)
class Tile:
    """Shape of one kernel's program.

    Attributes:
        rows: rows of a tile.
        keys: keys of a tile.
        warps: warps of a program.
        stages: stages of the software pipeline.
    """

    rows: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tiles:
    """Shapes of the three kernels.

    Attributes:
        forward: of ``forward``.
        backward_rows: of ``backward_rows``.
        backward_keys: of ``backward_keys``.
    """

    forward: Tile
    backward_rows: Tile
    backward_keys: Tile


def choose_tiles(head_dim: int, itemsize: int, shared_kib: int) -> Tiles:
    """Shapes for a head size and a device, from the register and spill counts of compiled code.

    Args:
        head_dim: channels of a head.
        itemsize: bytes of a channel.
        shared_kib: shared memory that one program may have, KiB.
    """
    big = shared_kib >= 160  # A100, H100 and up; consumer GPUs have 99 KiB
    if itemsize == 4:  # products of float32 are not for speed: small tiles fit everywhere
        side = 32 if head_dim <= 128 else 16
        return Tiles(Tile(side, side, 4, 1), Tile(side, side, 4, 1), Tile(side, side, 4, 1))
    if head_dim <= 64:
        stages = 3 if big else 2
        return Tiles(Tile(128, 64, 8, stages), Tile(128, 64, 8, stages), Tile(64, 128, 8, 2))
    if head_dim <= 128:
        if big:
            return Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(32, 128, 8, 3))
        return Tiles(Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(32, 64, 4, 2))
    if big:
        return Tiles(Tile(128, 32, 8, 2), Tile(128, 32, 8, 1), Tile(16, 64, 8, 1))
    return Tiles(Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1))


def triton_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    vectors: tuple[Tensor, Tensor, Tensor, Tensor],
    *,
    noisy_copies: int,
    clean: bool,
    queries: str,
    scale: float | None,
    tile: int | None,
) -> Tensor:
    """Attention of all streams by the Triton kernels.

    Args:
        q: [batch, heads, rows, head_dim], any strides with the last axis contiguous.
        k: [batch, kv_heads, streams * seq, head_dim], likewise.
        v: like ``k``.
        vectors: block_start, block_end, doc_start, doc_end, int32 [batch, seq] contiguous; each grows along
            a row.
        noisy_copies: noisy streams.
        clean: whether the clean stream is there.
        queries: "all" or "noisy".
        scale: factor of the scores, above 0; None is head_dim ** -0.5.
        tile: rows and keys of every tile, a power of 2 of at least 16; None chooses.

    Returns:
        [batch, heads, rows, head_dim], in the memory order of ``v``.

    Raises:
        KernelShapeError: if the scale is not above 0.
        BackendUnavailableError: if head_dim or the type of the numbers is not one the kernels have.
    """
    refused = backend_reasons(q.device, head_dim=q.shape[3], dtype=q.dtype)["triton"]
    if refused:  # a layout that was prepared without knowing these
        raise BackendUnavailableError(f"{KERNEL}: backend='triton' cannot run this case: {refused}")
    factor = q.shape[3] ** -0.5 if scale is None else scale
    if factor <= 0:
        raise KernelShapeError(f"scale={factor}; backend 'triton' takes scales above 0; use backend='dense'")
    clean_rows = clean and queries == "all"
    out, _ = torch.ops.bdtrain_kernels.block_attention(
        q, k, v, *vectors, noisy_copies, clean, clean_rows, factor, tile or 0
    )
    return out


@torch.library.custom_op("bdtrain_kernels::block_attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_start: Tensor,
    block_end: Tensor,
    doc_start: Tensor,
    doc_end: Tensor,
    copies: int,
    clean: bool,
    clean_rows: bool,
    scale: float,
    tile: int,
) -> tuple[Tensor, Tensor]:
    """Output, and LSE [batch, heads, rows] in powers of 2."""
    q, k, v = (_with_plain_rows(x) for x in (q, k, v))
    batch, heads = q.shape[:2]
    seq = block_start.shape[1]
    row_streams = copies + int(clean_rows)
    out, lse = _empty_results(q, v)
    shape = _tiles(q, tile).forward
    grid = (batch * heads * row_streams * _tile_count(seq, shape.rows),)
    if grid[0]:
        triton_kernels.forward[grid](
            q, k, v, out, lse, block_start, block_end, doc_start,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], block_start.stride(0),
            heads, heads // k.shape[1], copies, row_streams, seq, scale * LOG2E,
            CLEAN=clean, **_constants(q), BLOCK_M=shape.rows, BLOCK_N=shape.keys,
            num_warps=shape.warps, num_stages=shape.stages,
        )  # fmt: skip
    return out, lse


@_forward.register_fake
def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _empty_results(q, v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *vectors, copies, clean, clean_rows, scale, tile = inputs
    ctx.save_for_backward(q, k, v, *output, *vectors)
    ctx.case = (copies, clean, clean_rows, scale, tile)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 9
    if grad is None:
        return None, None, None, *nothing
    grads = torch.ops.bdtrain_kernels.block_attention_backward(grad, *ctx.saved_tensors, *ctx.case)
    return *grads, *nothing


_forward.register_autograd(_differentiate, setup_context=_save)


@torch.library.custom_op("bdtrain_kernels::block_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    block_start: Tensor,
    block_end: Tensor,
    doc_start: Tensor,
    doc_end: Tensor,
    copies: int,
    clean: bool,
    clean_rows: bool,
    scale: float,
    tile: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, each in the memory order of its input."""
    grad, q, k, v = (_with_plain_rows(x) for x in (grad, q, k, v))
    batch, heads, total_rows, _ = q.shape
    kv_heads, seq = k.shape[1], block_start.shape[1]
    row_streams = copies + int(clean_rows)
    grad_q, grad_k, grad_v = _empty_gradients(q, k, v)
    if q.numel() == 0:
        return grad_q.zero_(), grad_k.zero_(), grad_v.zero_()
    delta = torch.empty_like(lse)
    tiles = _tiles(q, tile)
    constants = _constants(q)
    channels = {"D": constants["D"], "PAD": constants["PAD"]}
    triton_gradients.sum_products[(batch * heads * _tile_count(total_rows, tiles.forward.rows),)](
        out, grad, delta, *out.stride()[:3], *grad.stride()[:3], heads, total_rows,
        **channels, BLOCK_M=tiles.forward.rows, num_warps=4,
    )  # fmt: skip
    inputs = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3])
    case = (block_start.stride(0), heads, heads // kv_heads, copies, row_streams, seq, scale * LOG2E, scale)
    shape = tiles.backward_rows
    triton_gradients.backward_rows[(batch * heads * row_streams * _tile_count(seq, shape.rows),)](
        q, k, v, grad, lse, delta, grad_q, block_start, block_end, doc_start,
        *inputs, *grad_q.stride()[:3], *case,
        CLEAN=clean, **constants, BLOCK_M=shape.rows, BLOCK_N=shape.keys,
        num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip
    shape = tiles.backward_keys
    for clean_keys, streams in ((True, int(clean)), (False, copies)):
        if streams == 0:
            continue
        triton_gradients.backward_keys[(batch * kv_heads * streams * _tile_count(seq, shape.keys),)](
            q, k, v, grad, lse, delta, grad_k, grad_v, block_start, block_end, doc_end,
            *inputs, *grad_k.stride()[:3], *grad_v.stride()[:3], *case,
            CLEAN_KEYS=clean_keys, **constants, BLOCK_M=shape.rows, BLOCK_N=shape.keys,
            num_warps=shape.warps, num_stages=shape.stages,
        )  # fmt: skip
    return grad_q, grad_k, grad_v


@_backward.register_fake
def _backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_gradients(q, k, v)


def _empty_results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output in the memory order of the values, which it is a mixture of; LSE."""
    return _empty(q.shape, v), q.new_empty(q.shape[:3], dtype=torch.float32)


def _empty_gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(q.shape, q), _empty(k.shape, k), _empty(v.shape, v)


def _empty(shape: torch.Size, like: Tensor) -> Tensor:
    """Dense memory, channels last as the kernels write them, the other axes in the order of another tensor's.

    ``empty_like`` forgets the order of a view with holes, and an expanded axis has no place in an order.
    """
    strides = like.stride()
    order = (*sorted(range(3), key=lambda axis: strides[axis], reverse=True), 3)
    inverse = [order.index(axis) for axis in range(4)]
    return like.new_empty([shape[axis] for axis in order]).permute(inverse)


def _with_plain_rows(x: Tensor) -> Tensor:
    """The kernels read channels side by side; an expanded gradient (of ``sum()``) is not."""
    return x if x.stride(3) == 1 else x.contiguous()


def _constants(q: Tensor) -> dict[str, Any]:
    head_dim = q.shape[3]
    exact = q.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return {
        "D": head_dim,
        "PAD": 1 << (head_dim - 1).bit_length(),
        "PRECISION": "ieee" if exact else "tf32",
    }


def _tiles(q: Tensor, tile: int) -> Tiles:
    if tile:
        shape = Tile(tile, tile, 4, 1)
        return Tiles(shape, shape, shape)
    return choose_tiles(q.shape[3], q.element_size(), shared_memory_kib(q.device))


def _tile_count(tokens: int, tile: int) -> int:
    return -(-tokens // tile)


def compile_cases(shared_kib: int) -> list[CompileCase]:
    """What the tests compile for devices that are not at hand: bfloat16, the head sizes models use.

    Args:
        shared_kib: shared memory of a program on the device.
    """
    cases = []
    for head_dim in (64, 128):
        tiles = choose_tiles(head_dim, 2, shared_kib)
        constants: dict[str, Any] = {"D": head_dim, "PAD": head_dim, "PRECISION": "tf32"}
        for kernel, tile, more in (
            (triton_kernels.forward, tiles.forward, {"CLEAN": True}),
            (triton_gradients.backward_rows, tiles.backward_rows, {"CLEAN": True}),
            (triton_gradients.backward_keys, tiles.backward_keys, {"CLEAN_KEYS": True}),
            (triton_gradients.backward_keys, tiles.backward_keys, {"CLEAN_KEYS": False}),
        ):
            everything = {**constants, **more, "BLOCK_M": tile.rows, "BLOCK_N": tile.keys}
            kind = "" if "CLEAN_KEYS" not in more else " clean" if more["CLEAN_KEYS"] else " noisy"
            cases.append(_compile_case(f"{kernel.__name__}{kind} D={head_dim}", kernel, everything, tile))
    return cases


def _compile_case(name: str, kernel: Any, constants: dict[str, Any], tile: Tile) -> CompileCase:
    floats = {"LSE": "*fp32", "DELTA": "*fp32", "scale": "fp32", "scale2": "fp32"}
    numbers = [argument for argument in kernel.arg_names if argument not in constants]
    types = {
        argument: floats.get(argument)
        or ("*i32" if argument.startswith(("BLOCK_", "DOC_")) else "*bf16" if argument.isupper() else "i32")
        for argument in numbers
    }
    runtime = {"heads", "group", "copies", "row_streams", "seq", *floats} - {"LSE", "DELTA"}
    return CompileCase(
        name=name,
        kernel=kernel,
        types=types,
        constants=constants,
        num_warps=tile.warps,
        num_stages=tile.stages,
        tensor_cores=True,
        # A few bytes outside the loops. (256 channels are right, not fast: their accumulators alone are more
        # than the registers of two warp groups, and take the assembler minutes.)
        max_spill_bytes=64,
        aligned=frozenset(numbers) - runtime,
    )
