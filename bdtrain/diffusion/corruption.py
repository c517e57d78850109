"""From clean tokens to noised ones: masks token by token, masks by count, uniform replacement.

Nothing here draws: uniforms come from ``keyed.py``, chances and counts from ``levels.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bdtrain.diffusion.visibility import BlockLayout
from bdtrain.errors import ShapeError


def mask_tokens(
    x0: Tensor, move_chance: Tensor, uniforms: Tensor, *, mask_id: int, maskable: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mask each token independently with its own chance.

    Args:
        x0: clean token ids, int64 [..., seq].
        move_chance: 1 - alpha_t, float64 in [0, 1], broadcasts with ``uniforms``; constant inside a block in
            training, but any chance per token is right.
        uniforms: keyed draws in [0, 1), float64 [..., seq]; the same on every tp and pp rank.
        mask_id: id of [MASK].
        maskable: bool, broadcasts with ``uniforms``; where False the token stays (padding, BOS). None: every
            token.

    Returns:
        xt int64 and masked bool, both of the broadcast shape.

    Source: the forward process q(xt | x0) of arXiv 2503.09573, section 3.
    """
    # Strictly below: a chance of 0 never masks, a chance of 1 always does.
    masked = uniforms < move_chance
    if maskable is not None:
        masked = masked & maskable
    return torch.where(masked, mask_id, x0), masked


def mask_count(
    x0: Tensor, count: Tensor, uniforms: Tensor, layout: BlockLayout, *, mask_id: int, maskable: Tensor
) -> tuple[Tensor, Tensor]:
    """Mask in each block the ``count`` maskable tokens with the smallest uniforms: a uniformly chosen subset.

    Args:
        x0: clean token ids, int64, broadcasts with ``uniforms``.
        count: tokens to mask in the token's block, int64 [batch, copies, seq], constant inside a block, at
            most the number of its maskable tokens.
        uniforms: keyed draws in [0, 1), float64 [batch, copies, seq].
        layout: blocks of the rows.
        mask_id: id of [MASK].
        maskable: bool [batch, seq].

    Returns:
        xt int64 and masked bool, both [batch, copies, seq].
    """
    masked = (rank_in_block(uniforms, layout, maskable) < count) & maskable[:, None]
    return torch.where(masked, mask_id, x0), masked


def replace_uniformly(
    x0: Tensor, move_chance: Tensor, uniforms: Tensor, choices: Tensor, *, vocab_size: int, mask_id: int
) -> tuple[Tensor, Tensor]:
    """Uniform corruption: a token stays with 1 - move_chance, else is drawn from all ordinary tokens.

    Args:
        x0: clean token ids, int64 [..., seq].
        move_chance: chance of a redraw, in [0, 1], broadcasts with ``uniforms``.
        uniforms: keyed draws in [0, 1), float64: who is redrawn.
        choices: other keyed draws in [0, 1), float64, same shape: what is drawn.
        vocab_size: V, [MASK] included.
        mask_id: id of [MASK], which is never drawn.

    Returns:
        xt int64 and redrawn bool, both of the broadcast shape.

    Source: the uniform transition of D3PM, arXiv 2107.03006.
    """
    if not 0 <= mask_id < vocab_size or vocab_size < 2:
        raise ShapeError(
            f"mask_id={mask_id}, vocab_size={vocab_size}; the mask id must be inside the vocabulary"
        )
    redrawn = uniforms < move_chance
    drawn = (choices * (vocab_size - 1)).to(torch.int64).clamp(max=vocab_size - 2)
    drawn = drawn + (drawn >= mask_id)
    return torch.where(redrawn, drawn, x0), redrawn


def rank_in_block(uniforms: Tensor, layout: BlockLayout, maskable: Tensor) -> Tensor:
    """Rank of each token's uniform in its block, from 0; unmaskable tokens come last.

    Args:
        uniforms: in [0, 1), float64 [batch, copies, seq].
        layout: blocks of the rows.
        maskable: bool [batch, seq].

    Returns:
        int64 [batch, copies, seq].
    """
    # One sort per row: blocks are contiguous, so sorting by (block, uniform) keeps each block in its own
    # place.
    block = layout.block_start[:, None].to(torch.float64) * 2.0
    ordering = torch.where(maskable[:, None], uniforms, 1.0) + block
    order = ordering.argsort(dim=-1, stable=True)
    position = torch.arange(uniforms.shape[-1], device=uniforms.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(-1, order, position)
    return rank - layout.block_start[:, None]


def block_sum(values: Tensor, layout: BlockLayout) -> Tensor:
    """Sum of ``values`` over each token's block.

    Args:
        values: [batch, copies, seq] or [batch, seq]; integers are summed exactly.
        layout: blocks of the rows.

    Returns:
        The sums at every token of the block, in the shape of ``values`` (int64 for integers and bools).
    """
    start, end = layout.block_start.to(torch.int64), layout.block_end.to(torch.int64)
    if values.dim() == 3:
        start, end = start[:, None].expand(values.shape), end[:, None].expand(values.shape)
    running = torch.nn.functional.pad(values.cumsum(dim=-1), (1, 0))
    return running.gather(-1, end) - running.gather(-1, start)


def spread_from_block_start(values: Tensor, layout: BlockLayout) -> Tensor:
    """The value at the first token of each token's block, [batch, copies, seq] -> same shape."""
    start = layout.block_start.to(torch.int64)[:, None].expand(values.shape)
    return values.gather(-1, start)
