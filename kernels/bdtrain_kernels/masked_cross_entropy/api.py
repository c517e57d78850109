"""The two public functions: which rows, which ids, how many rows at a time, by which backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from bdtrain_kernels.dispatch import announce, check_backend, triton_missing
from bdtrain_kernels.errors import KernelShapeError
from bdtrain_kernels.masked_cross_entropy.functions import CrossEntropy, RowStatistics
from bdtrain_kernels.masked_cross_entropy.plan import Plan

KERNEL = "masked_cross_entropy"

CPU_CHUNK_BYTES = 4 << 20
"""Logits made at a time on a CPU: what a core's cache nearly holds, since they are read several times."""

DEVICE_CHUNK_BYTES = 256 << 20
"""Logits made at a time on a GPU. The gradient of the weight is read and written in float32 once a chunk:
8 bytes per number of the weight against 2 operations per row. An H200 does about 180 operations (bfloat16) in
the time of one byte, so below some 700 rows a chunk waits for memory; 256 MiB are 880 rows of 152,064 logits
in bfloat16, and 0.2% of such a card's memory."""

LEAST_CHUNK_ROWS = 64
"""However large the vocabulary is: with fewer rows even a CPU waits for the weight and its gradient. 64 rows
of logits are as large as a weight of 64 columns, so no vocabulary makes them the largest tensor: rows alone
are cut. A cut of the vocabulary would need its products twice, or the logits of all its parts, for the
gradients."""

TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def masked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    excluded: Tensor | Sequence[int] | None,
    vocab_size: int,
    row_weights: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
    chunk_rows: int | None = None,
) -> Tensor:
    """Negative log-likelihood of each given row: output head and cross-entropy, a chunk of rows at a time.

    The logits of a chunk are all that ever exists of them, forward and backward, so memory does not grow with
    rows times vocabulary.

    Args:
        hidden: hidden states of the rows that are predicted (the masked ones), [rows, hidden]; 0 rows are
            fine. The same on every rank of ``group``.
        weight: output embedding, [padded vocab, hidden]; with ``group`` this rank's part, where rank r holds
            the ids from r * len(weight) on.
        bias: [padded vocab] or None, cut like ``weight``.
        targets: ids to predict, int64 [rows], in [0, vocab_size). The nll of an excluded id is +inf.
        excluded: ids in [0, vocab_size) that are never predicted (the mask token's), int64 [ids] or a
            list; None for none. Ids of other ranks are no matter.
        vocab_size: ids from here on are padding: never predicted, gradient 0.
        row_weights: what the caller will multiply the rows with before summing, float [rows], up to one
            common factor; no gradient flows to it and the returned nll is not multiplied. When the gradient
            that arrives is that, the head is not computed a second time in backward (one number is then read
            on the host); any other gradient is right too, at the cost of one more product.
        group: ranks that share the vocabulary in equal parts; None where one process holds it. All of them
            must call with the same rows. The gradient of ``hidden`` is summed over them.
        backend: "auto", "chunked" (torch, any device) or "triton"; "auto" takes triton on CUDA.
        chunk_rows: rows at a time; None keeps a chunk's logits at about 4 MiB on a CPU, 256 MiB elsewhere,
            but never takes fewer than 64 rows.

    Returns:
        nll in nats, [rows], float32 (float64 for float64 inputs), the same on every rank of ``group``.

    Raises:
        KernelShapeError: if the shapes, dtypes or ids do not fit each other.
        BackendUnavailableError: if the backend does not exist or cannot run this case.
    """
    _check_head(hidden, weight, bias)
    if targets.shape != hidden.shape[:1] or (row_weights is not None and row_weights.shape != targets.shape):
        found = None if row_weights is None else tuple(row_weights.shape)
        raise KernelShapeError(
            f"targets {tuple(targets.shape)}, row_weights {found}; "
            f"hidden has {hidden.shape[0]} rows, give one each"
        )
    plan = _plan(weight, excluded, vocab_size, group, backend, chunk_rows)
    _check_ids("targets", targets, vocab_size)
    detached = None if row_weights is None else row_weights.detach()
    with_gradient = _with_gradient(hidden, weight, bias)
    return CrossEntropy.apply(hidden, weight, bias, targets, detached, plan, with_gradient)


def row_statistics(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    *,
    excluded: Tensor | Sequence[int] | None,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Logsumexp over the vocabulary and the logits of some ids, for losses that need more than one nll.

    Chunked and shared between ranks like ``masked_cross_entropy``, in one pass for both answers; the backward
    pass computes the chunks again. Gradients are exact in both.

    Args:
        hidden: hidden states of any rows, [rows, hidden].
        weight: as in ``masked_cross_entropy``.
        bias: as in ``masked_cross_entropy``.
        ids: int64 [rows, ids], in [0, vocab_size); 0 ids are fine, and a row may name one twice.
        excluded: as in ``masked_cross_entropy``: not part of the sum, -inf as a value.
        vocab_size: as in ``masked_cross_entropy``.
        group: as in ``masked_cross_entropy``.
        backend: as in ``masked_cross_entropy``.
        chunk_rows: as in ``masked_cross_entropy``.

    Returns:
        (logsumexp [rows], values [rows, ids]), float32 (float64 for float64 inputs), the same on every rank.

    Raises:
        KernelShapeError: if the shapes, dtypes or ids do not fit each other.
        BackendUnavailableError: if the backend does not exist or cannot run this case.
    """
    _check_head(hidden, weight, bias)
    if ids.dim() != 2 or ids.shape[0] != hidden.shape[0]:
        raise KernelShapeError(
            f"ids {tuple(ids.shape)}; hidden has {hidden.shape[0]} rows, give [{hidden.shape[0]}, ids]"
        )
    plan = _plan(weight, excluded, vocab_size, group, backend, chunk_rows)
    _check_ids("ids", ids, vocab_size)
    return RowStatistics.apply(hidden, weight, bias, ids, plan, _with_gradient(hidden, weight, bias))


def _check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise KernelShapeError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}; they must be "
            "[rows, hidden], [vocab, hidden]"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise KernelShapeError(f"bias {tuple(bias.shape)}; weight has {weight.shape[0]} rows, give one each")
    dtypes = {x.dtype for x in (hidden, weight, bias) if x is not None}
    if len(dtypes) > 1 or not hidden.is_floating_point():
        raise KernelShapeError(
            f"hidden is {hidden.dtype}, weight {weight.dtype}, bias {None if bias is None else bias.dtype}; "
            "they must be of one floating type"
        )


def _check_ids(name: str, ids: Tensor, vocab_size: int) -> None:
    """A rank that does not hold an id takes it for another rank's: a wrong one would only look cheap."""
    if ids.dtype != torch.int64:
        raise KernelShapeError(f"{name} are {ids.dtype}; they must be torch.int64")
    if not ids.numel():
        return
    if ids.device.type != "cpu":
        torch._assert_async(((ids >= 0) & (ids < vocab_size)).all())  # the host does not wait
        return
    low, high = (int(x) for x in torch.aminmax(ids))
    if low < 0 or high >= vocab_size:
        raise KernelShapeError(
            f"{name} from {low} to {high}; choose from 0 to {vocab_size - 1} (vocab_size - 1)"
        )


def _with_gradient(*inputs: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def _plan(
    weight: Tensor,
    excluded: Tensor | Sequence[int] | None,
    vocab_size: int,
    group: dist.ProcessGroup | None,
    backend: str,
    chunk_rows: int | None,
) -> Plan:
    local = weight.shape[0]
    ranks = 1 if group is None else group.size()
    if not 0 < vocab_size <= local * ranks:
        parts = "the rows of weight" if ranks == 1 else f"{ranks} ranks of {local} rows of weight"
        raise KernelShapeError(f"vocab_size={vocab_size}; choose 1 to {local * ranks}, {parts}")
    if ranks == 1 or group is None:
        group, first_id = None, 0
    else:
        first_id = group.rank() * local
    backend = _choose_backend(weight, backend)
    if chunk_rows is None:
        # From the padded part: its size, unlike the number of real ids, is the same on every rank.
        on_cpu = weight.device.type == "cpu"
        size = weight.element_size() if backend == "triton" else max(4, weight.element_size())
        chunk_rows = (CPU_CHUNK_BYTES if on_cpu else DEVICE_CHUNK_BYTES) // (local * size)
        chunk_rows = max(LEAST_CHUNK_ROWS, chunk_rows)
    elif chunk_rows < 1:
        raise KernelShapeError(f"chunk_rows={chunk_rows}; it must be at least 1")
    if excluded is not None:
        excluded = _excluded_ids(excluded, vocab_size, weight.device)
    return Plan(
        first_id=first_id,
        columns=min(max(0, vocab_size - first_id), local),
        excluded=excluded,
        group=group,
        chunk_rows=chunk_rows,
        backend=backend,
    )


def _excluded_ids(excluded: Tensor | Sequence[int], vocab_size: int, device: torch.device) -> Tensor:
    """As a tensor on ``device``; a list is checked before it goes there, so that the host need not wait."""
    if isinstance(excluded, Tensor):
        _check_ids("excluded ids", excluded, vocab_size)
        return excluded
    ids = torch.tensor(excluded, dtype=torch.int64)
    _check_ids("excluded ids", ids, vocab_size)
    return ids.to(device)


def _choose_backend(weight: Tensor, backend: str) -> str:
    reason = triton_missing(weight.device)
    if weight.dtype not in TRITON_DTYPES:
        reason = f"it takes float32, float16 and bfloat16, the tensors are {weight.dtype}"
    check_backend(KERNEL, backend, {"chunked": "", "triton": reason})
    if backend != "auto":
        announce(KERNEL, backend, "forced")
        return backend
    if weight.device.type == "cuda" and not reason:
        announce(KERNEL, "triton", "auto: CUDA")
        return "triton"
    announce(
        KERNEL, "chunked", f"auto: {weight.device.type}" if weight.device.type == "cpu" else f"auto: {reason}"
    )
    return "chunked"
