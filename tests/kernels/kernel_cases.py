"""Layouts built token by token, and the mask by four nested loops: independent of both packages under
test."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Where the Triton kernels are tested: on a CPU they run under their interpreter."""

DTYPES = (torch.float32, torch.float16, *((torch.bfloat16,) if DEVICE.type == "cuda" else ()))
"""Types that Triton is right in: its interpreter multiplies bfloat16 as integers."""


@dataclass(frozen=True)
class HandLayout:
    """Blocks and documents of a batch."""

    block_start: Tensor
    block_end: Tensor
    doc_start: Tensor
    doc_end: Tensor
    block_size: int
    single_document: bool


def hand_layout(documents: list[list[int]], block_size: int, *, single_document: bool = False) -> HandLayout:
    """Rows given as lists of document lengths."""
    rows = []
    for lengths in documents:
        tokens, begin = [], 0
        for length in lengths:
            for block in range(0, length, block_size):
                last = min(block + block_size, length)
                tokens += [(begin + block, begin + last, begin, begin + length)] * (last - block)
            begin += length
        rows.append(tokens)
    vectors = torch.tensor(rows, dtype=torch.int32)
    return HandLayout(*vectors.unbind(-1), block_size=block_size, single_document=single_document)


def row_layout(batch: int, seq: int, block_size: int) -> HandLayout:
    """Every row one document."""
    return hand_layout([[seq]] * batch, block_size, single_document=True)


DOCUMENTS = {
    "equal": lambda seq: [[seq // 2, seq - seq // 2]] * 2,
    "ragged": lambda seq: [[5, seq // 3, seq - 5 - seq // 3], [seq - 3, 3]],
    "single tokens": lambda seq: [[1] * 7 + [seq - 7], [seq - 8] + [1] * 8],
}


def mask_by_loops(layout: HandLayout, *, copies: int, clean: bool, queries: str) -> Tensor:
    """bool [batch, rows, keys] from block and document numbers, one pair at a time."""
    batch, seq = layout.block_start.shape
    streams = [*range(copies), *(["clean"] if clean else [])]
    asking = streams[:copies] if queries == "noisy" else streams
    mask = torch.zeros(batch, len(asking) * seq, len(streams) * seq, dtype=torch.bool)
    for b in range(batch):
        block = layout.block_start[b].tolist()
        document = layout.doc_start[b].tolist()
        for i, asker in enumerate(asking):
            for j, seen in enumerate(streams):
                for q in range(seq):
                    for k in range(seq):
                        same = document[q] == document[k]
                        if seen == "clean":
                            sees = block[k] <= block[q] if asker == "clean" else block[k] < block[q]
                        else:
                            sees = asker == seen and block[k] == block[q]
                        mask[b, i * seq + q, j * seq + k] = same and sees
    return mask


def inputs(
    layout: HandLayout,
    *,
    copies: int,
    clean: bool,
    queries: str,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 16,
    seed: int = 0,
    sequence_first: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, grad_out; ``sequence_first`` makes them views of [tokens, batch, heads, head_dim]."""
    generator = torch.Generator().manual_seed(seed)
    batch, seq = layout.block_start.shape
    keys = (copies + int(clean)) * seq
    rows = copies * seq if queries == "noisy" else keys

    def tensor(number_of_heads: int, tokens: int) -> Tensor:
        if sequence_first:
            x = torch.randn(tokens, batch, number_of_heads, 2 * head_dim, generator=generator)
            return x[..., :head_dim].permute(1, 2, 0, 3)
        return torch.randn(batch, number_of_heads, tokens, head_dim, generator=generator)

    q, k, v, grad = (
        tensor(heads[0], rows),
        tensor(heads[1], keys),
        tensor(heads[1], keys),
        tensor(heads[0], rows),
    )
    for x in (q, k, v):
        x.requires_grad_()
    return q, k, v, grad


def relative_error(found: Tensor, expected: Tensor, least: float = 0.0) -> float:
    """||found - expected|| / ||expected||, NaN if a number is.

    Args:
        found: any float type, on any device.
        expected: float64.
        least: size to measure by where ``expected`` is smaller: a gradient that must be 0 (a row that sees
            one key) is a difference of numbers of that size.
    """
    size = max(expected.norm().item(), least)
    return (found.to(expected.device).double() - expected).norm().item() / (size if size > 1e-6 else 1.0)
