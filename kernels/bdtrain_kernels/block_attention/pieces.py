"""One rectangle of the tree: softmax over some of a row's keys, mergeable, with a backward by merged output.

A piece gives its own normalised output and the log of its sum (LSE); two pieces merge by the LSE alone.
Backward needs no gradient of the LSE: with the merged LSE, P = 2 ** (score - LSE) is already the probability
over all keys, and delta = sum(grad_out * merged out) is the term that the softmax of the whole row asks for.
Each piece then gives its share of the gradients, and shares add up.

Scores and LSE are kept in powers of 2 (the factor log2(e) is in the packed queries): torch's exp goes to a
vector library that takes 30 times longer on the large negative scores of hidden keys, its exp2 does not
(0.41 against 11.7 ms for a million).

Two engines: explicit matrix products, which keep the probabilities of small pieces and are faster there, and
torch's CPU flash operator, which keeps nothing, for pieces with many keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

FLASH_KEYS = 256
"""From this many keys a piece goes to the flash operator: probabilities kept stay O(seq), and the operator
is as fast."""

CHUNK_NUMBERS = 1 << 20
"""Scores made at a time, so that they are used again from cache and stay under malloc's threshold for fresh
pages."""

LN2 = math.log(2.0)

Saved = list[tuple[Tensor, Tensor]]
"""(unnormalised probabilities, row maximum) of each chunk; empty for a flash piece."""


def forward_piece(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    heads: int,
    hide: Callable[[Tensor, int], None] | None,
    keep: bool,
    into: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Saved]:
    """Attention of ``n`` groups of rows to their keys.

    Args:
        q: queries times the scale and log2(e), [n, rows, head_dim]; n = heads * runs, head first.
        k: keys, [n, keys, head_dim].
        v: values, [n, keys, head_dim].
        heads: key heads among n; chunks are cut between heads.
        hide: adds the mask in place to scores [heads of the chunk * runs, rows, keys], given the heads of
            the chunk; None when all keys are seen.
        keep: whether backward will follow.
        into: output and LSE to write instead of new ones.

    Returns:
        Output [n, rows, head_dim], LSE in powers of 2 [n, rows] and what backward needs.
    """
    if hide is None and k.shape[1] >= FLASH_KEYS:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), 0.0, False, scale=LN2
        )
        out, lse = out.squeeze(1), lse.squeeze(1).to(q.dtype).div_(LN2)
        return (out, lse, []) if into is None else (into[0].copy_(out), into[1].copy_(lse), [])
    out, lse = (q.new_empty(q.shape), q.new_empty(q.shape[:2])) if into is None else into
    saved: Saved = []
    for chunk, chunk_heads in _chunks(q.shape[0], heads, q.shape[1] * k.shape[1]):
        scores = torch.bmm(q[chunk], k[chunk].transpose(1, 2))
        if hide is not None:
            hide(scores, chunk_heads)
        shift = scores.amax(dim=-1, keepdim=True)
        scores.sub_(shift).exp2_()
        total = scores.sum(dim=-1, keepdim=True)
        torch.bmm(scores, v[chunk], out=out[chunk])
        out[chunk].div_(total)
        lse[chunk] = total.log2_().add_(shift).squeeze(-1)
        if keep:
            saved.append((scores, shift))
    return out, lse, saved


def backward_piece(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    delta: Tensor,
    saved: Saved,
    *,
    heads: int,
    into: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one piece.

    Args:
        grad: gradient of the merged output, [n, rows, head_dim].
        q: as in forward.
        k: as in forward.
        v: as in forward.
        out: merged output, [n, rows, head_dim].
        lse: merged LSE, [n, rows].
        delta: sum of grad * out, [n, rows].
        saved: from forward.
        heads: as in forward.
        into: gradients to write instead of new ones, each where not None.

    Returns:
        Gradients of the natural scores times k, of the same times q, and of v: the caller owes the scale to
        the first and ln(2) to the second.
    """
    if not saved:
        four = [x.unsqueeze(1) for x in (grad, q, k, v, out)]
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *four, (lse.unsqueeze(1) * LN2), 0.0, False, scale=LN2
        )
        grad_q, grad_k, grad_v = (x.squeeze(1) for x in gradients)
        made = (grad_q.div_(LN2), grad_k.div_(LN2), grad_v)
        return _three(x if y is None else y.copy_(x) for x, y in zip(made, into, strict=True))
    grad_q, grad_k, grad_v = _three(
        x.new_empty(x.shape) if y is None else y for x, y in zip((q, k, v), into, strict=True)
    )
    chunks = _chunks(q.shape[0], heads, q.shape[1] * k.shape[1])
    for (chunk, _), (weights, shift) in zip(chunks, saved, strict=True):
        # weights = 2 ** (score - shift): the factor that makes them probabilities goes to the narrower side.
        factor = torch.exp2(shift - lse[chunk].unsqueeze(-1))
        grad_rows = grad[chunk] * factor
        torch.bmm(weights.transpose(1, 2), grad_rows, out=grad_v[chunk])
        grad_scores = torch.bmm(grad_rows, v[chunk].transpose(1, 2))
        grad_scores.sub_(delta[chunk].unsqueeze(-1) * factor).mul_(weights)
        torch.bmm(grad_scores, k[chunk], out=grad_q[chunk])
        torch.bmm(grad_scores.transpose(1, 2), q[chunk], out=grad_k[chunk])
    return grad_q, grad_k, grad_v


def merge_(out: Tensor, lse: Tensor, piece_out: Tensor, piece_lse: Tensor) -> None:
    """Merge a piece into a running output [n, rows, head_dim] and LSE [n, rows], in place."""
    out.lerp_(piece_out, torch.sigmoid((piece_lse - lse) * LN2).unsqueeze(-1))
    lse.copy_(torch.logaddexp2(lse, piece_lse))


def _three(tensors: Iterable[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    first, second, third = tensors
    return first, second, third


def _chunks(n: int, heads: int, numbers: int) -> list[tuple[slice, int]]:
    """Slices of n = heads * runs between heads, of ``CHUNK_NUMBERS`` scores or one head, and their heads."""
    runs = n // heads
    step = max(1, CHUNK_NUMBERS // max(1, runs * numbers))
    return [
        (slice(head * runs, min(head + step, heads) * runs), min(step, heads - head))
        for head in range(0, heads, step)
    ]
