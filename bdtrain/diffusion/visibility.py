"""Which position may see which: blocks, documents and the two streams, as four integers per token.

Everything the attention needs to know is monotone in the position, so no mask is ever stored. For a token of
the row,

    noisy query:  noisy keys [block_start, block_end) of its own copy, clean keys [doc_start, block_start)
    clean query:  clean keys [doc_start, block_end), never a noisy key

which is the mask M_BD / M_OBC / M_BC of arXiv 2503.09573 (section on the vectorised training pass) cut at
document bounds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bdtrain.errors import ShapeError

PAD_DOCUMENT = -1
"""Document number of padding: a document of its own, never masked, drawn or counted."""


@dataclass(frozen=True)
class BlockLayout:
    """Blocks and documents of a batch of rows.

    Attributes:
        block_start: first position of the token's block, int32 [batch, seq].
        block_end: one past the last position of the token's block, int32 [batch, seq].
        doc_start: first position of the token's document fragment, int32 [batch, seq].
        doc_end: one past the last position of the fragment, int32 [batch, seq].
        block_size: tokens of a full block; a fragment's last block may be shorter.
        single_document: known on the host: every row is one document of full blocks (the last one of the row
            may be short), so that ``block_start == position // block_size * block_size``. Kernels may then
            take analytic paths.
    """

    block_start: Tensor
    block_end: Tensor
    doc_start: Tensor
    doc_end: Tensor
    block_size: int
    single_document: bool

    @property
    def shape(self) -> tuple[int, int]:
        """(batch, seq)."""
        return self.block_start.shape[0], self.block_start.shape[1]

    def to(self, device: torch.device | str) -> BlockLayout:
        """The same layout with its vectors on ``device``."""
        return replace(
            self,
            block_start=self.block_start.to(device),
            block_end=self.block_end.to(device),
            doc_start=self.doc_start.to(device),
            doc_end=self.doc_end.to(device),
        )

    def rows(self, index: slice | Tensor) -> BlockLayout:
        """The layout of some rows of the batch."""
        return replace(
            self,
            block_start=self.block_start[index],
            block_end=self.block_end[index],
            doc_start=self.doc_start[index],
            doc_end=self.doc_end[index],
        )


def build_layout(documents: Tensor, block_size: int, *, isolate: bool) -> BlockLayout:
    """Cut each row into blocks.

    Args:
        documents: document number of each token, int32 [batch, seq]; a fragment is a maximal run of equal
            numbers. Padding carries ``PAD_DOCUMENT``.
        block_size: tokens per block, at least 1; a fragment shorter than that is one short block.
        isolate: blocks restart at the first token of each fragment and nothing is seen across fragments.
            Otherwise (the paper's packing) a row is one document and blocks start at the row.

    Returns:
        The layout, on the device of ``documents``.

    Raises:
        ShapeError: if ``documents`` is not [batch, seq] or ``block_size`` is below 1.
    """
    if documents.dim() != 2:
        raise ShapeError(f"documents has shape {tuple(documents.shape)}; it must be [batch, seq]")
    if block_size < 1:
        raise ShapeError(f"block_size={block_size}; it must be at least 1")
    batch, seq = documents.shape
    position = torch.arange(seq, device=documents.device, dtype=torch.int32).expand(batch, seq)
    if not isolate:
        start = position.div(block_size, rounding_mode="floor") * block_size
        zero = torch.zeros_like(position)
        return BlockLayout(
            block_start=start.contiguous(),
            block_end=(start + block_size).clamp(max=seq).contiguous(),
            doc_start=zero,
            doc_end=torch.full_like(zero, seq),
            block_size=block_size,
            single_document=True,
        )
    doc_start, doc_end = _fragment_bounds(documents, position)
    block_start = doc_start + (position - doc_start).div(block_size, rounding_mode="floor") * block_size
    return BlockLayout(
        block_start=block_start,
        block_end=torch.minimum(block_start + block_size, doc_end),
        doc_start=doc_start,
        doc_end=doc_end,
        block_size=block_size,
        single_document=False,
    )


def _fragment_bounds(documents: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """First and one-past-last position of the run of equal numbers that each token belongs to."""
    batch, seq = documents.shape
    changes = documents[:, 1:] != documents[:, :-1]
    edge = torch.ones(batch, 1, dtype=torch.bool, device=documents.device)
    first = torch.cat((edge, changes), dim=1)
    last = torch.cat((changes, edge), dim=1)
    start = torch.where(first, position, torch.zeros_like(position)).cummax(dim=1).values
    # The nearest end to the right: a running minimum from the right.
    end = torch.where(last, position + 1, torch.full_like(position, seq))
    end = end.flip(1).cummin(dim=1).values.flip(1)
    return start.to(torch.int32).contiguous(), end.to(torch.int32).contiguous()
