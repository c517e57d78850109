"""The draw of a batch: strata, then per block a time or a count, then which tokens are masked.

Everything is a pure function of the noise key, the rows' positions in the data and in the global batch, and
the layout: a rank, a micro-batch or a restarted worker that holds some of the rows draws for them what every
other one would.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bdtrain.diffusion.corruption import block_sum, mask_count, mask_tokens, spread_from_block_start
from bdtrain.diffusion.keyed import NoiseKey, Purpose, permute, uniform_pair, uniforms
from bdtrain.diffusion.plan import NoisePlan
from bdtrain.diffusion.tables import PlanTables
from bdtrain.diffusion.visibility import BlockLayout
from bdtrain.errors import ShapeError

EVALUATION_GROUP = 64
"""Consecutive sequences that share strata in evaluation and re-fit, where batches must not matter."""

# Draw numbers of a token's key. 0 and 1 come from one Philox call.
TOKEN_DRAW = 0
BLOCK_DRAW = 1
RESAMPLE_DRAW = 2


@dataclass(frozen=True)
class Noise:
    """What was drawn for a batch; everything per block is stored per token and constant inside the block.

    Attributes:
        xt: noised tokens, int64 [batch, copies, seq].
        masked: bool [batch, copies, seq].
        weight: weight of the token's cross-entropy, float32 [batch, copies, seq]; 0 where not masked.
        level: the move_chance drawn (bernoulli), or the share k / n (count), float32 [batch, copies, seq].
        maskable_in_block: n, int64 [batch, seq].
        unresampled_blocks: blocks that took the plan without its resampling, because no count fits; int64
            scalar.
    """

    xt: Tensor
    masked: Tensor
    weight: Tensor
    level: Tensor
    maskable_in_block: Tensor
    unresampled_blocks: Tensor


def draw_noise(
    x0: Tensor,
    layout: BlockLayout,
    maskable: Tensor,
    plan: NoisePlan,
    tables: PlanTables,
    *,
    mask_id: int,
    key: NoiseKey,
    sample_index: Tensor,
    batch_index: Tensor,
    global_batch: int,
    copies: int,
) -> Noise:
    """Noise a batch as ``plan`` says.

    Args:
        x0: clean token ids, int64 [batch, seq].
        layout: blocks of the rows, with the plan's block size.
        maskable: bool [batch, seq]; False at padding and at a BOS that begins a fragment.
        plan: the noise plan.
        tables: its compiled tables, on the device of ``x0``.
        mask_id: id of [MASK].
        key: seed, purpose and step.
        sample_index: global position of each row in the data, int64 [batch].
        batch_index: index of each row in the global batch, int64 [batch].
        global_batch: rows of the global batch.
        copies: noise copies per row.

    Returns:
        The noise; the same bits for any split of the global batch.

    Raises:
        ShapeError: if shapes or block sizes do not agree.
    """
    if x0.shape != layout.shape or maskable.shape != x0.shape or layout.block_size != plan.block_size:
        raise ShapeError(
            f"x0 {tuple(x0.shape)}, layout {layout.shape} and maskable {tuple(maskable.shape)} must agree "
            f"and so must layout.block_size={layout.block_size} and plan.block_size={plan.block_size}"
        )
    token_u, block_u = keyed_uniforms(
        layout,
        key,
        sample_index=sample_index,
        batch_index=batch_index,
        global_batch=global_batch,
        copies=copies,
        strata=plan.strata,
    )
    n = block_sum(maskable, layout)
    starts = layout.block_start == torch.arange(x0.shape[1], device=x0.device)
    unresampled = (starts & (n > 0) & ~tables.resampled[n]).sum() * copies
    tokens = x0[:, None]
    if plan.kind == "count" or plan.full_masking:
        count, weight = tables.draw(block_u, n[:, None])
        xt, masked = mask_count(tokens, count, token_u, layout, mask_id=mask_id, maskable=maskable)
        level = count / n[:, None].clamp(min=1)
    else:
        t, level, weight = draw_times(plan, block_u)
        xt, masked = mask_tokens(tokens, level, token_u, mask_id=mask_id, maskable=maskable[:, None])
        if plan.resample:
            choice = _resample_uniforms(layout, key, sample_index, copies)
            count = _conditioned_counts(plan, t, n[:, None].expand_as(t), choice, layout)
            some_xt, some = mask_count(tokens, count, token_u, layout, mask_id=mask_id, maskable=maskable)
            obeys = tables.resampled[n][:, None]
            xt, masked = torch.where(obeys, some_xt, xt), torch.where(obeys, some, masked)
    return Noise(
        xt=xt,
        masked=masked,
        weight=torch.where(masked, weight, 0.0).to(torch.float32),
        level=level.to(torch.float32),
        maskable_in_block=n,
        unresampled_blocks=unresampled,
    )


def draw_times(plan: NoisePlan, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Times of a ``bernoulli`` plan from uniforms.

    Args:
        plan: the plan; its clip range is not (1, 1).
        u: float64 in [0, 1), any shape.

    Returns:
        t, move_chance and the weight of a masked token, float64 in the shape of ``u``. The weight may be
        infinite at t = 0, where nothing is masked.
    """
    low, high = plan.interval
    t = low + (high - low) * u
    schedule = plan.noise_schedule
    if plan.weighting == "flat":
        weight = torch.ones_like(t)
    else:
        weight = schedule.loss_weight(t) * (high - low if plan.weighting == "elbo" else 1.0)
    return t, schedule.move_chance(t), weight


def keyed_uniforms(
    layout: BlockLayout,
    key: NoiseKey,
    *,
    sample_index: Tensor,
    batch_index: Tensor,
    global_batch: int,
    copies: int,
    strata: str,
) -> tuple[Tensor, Tensor]:
    """One uniform per token and one, stratified, per block.

    A block's slot is its first position // block_size. In each row and copy the first block that starts in a
    slot owns the slot's stratum pi / N of N = global_batch * copies * slots, with pi from a keyed permutation
    (evaluation and re-fit: of the 64 * slots blocks of a group of sequences, each copy for itself, so that
    replicates are independent). A second, ragged block of the same slot has a keyed draw of its own over
    [0, 1).

    Args:
        layout: blocks of the rows.
        key: seed, purpose and step.
        sample_index: int64 [batch].
        batch_index: int64 [batch].
        global_batch: rows of the global batch.
        copies: noise copies per row.
        strata: ``permuted``, ``reference_grid`` (pi in row-major order) or ``independent``.

    Returns:
        Uniform per token, and uniform per block stored per token; float64 [batch, copies, seq] each, in [0,
        1).
    """
    _, seq = layout.shape
    device = layout.block_start.device
    copy = torch.arange(copies, device=device)[None, :, None]
    token = torch.arange(seq, device=device)[None, None]
    token_u, jitter = uniform_pair(key, sample_index[:, None, None], copy, token, TOKEN_DRAW)
    jitter = spread_from_block_start(jitter, layout)
    if strata == "independent":
        return token_u, jitter
    slots = -(-seq // layout.block_size)
    slot = torch.arange(slots, device=device)[None, None]
    if key.purpose in (Purpose.EVALUATE, Purpose.REFIT):
        total = EVALUATION_GROUP * slots
        row = (sample_index % EVALUATION_GROUP)[:, None, None].expand(-1, copies, 1)
        group = sample_index.div(EVALUATION_GROUP, rounding_mode="floor")[:, None, None]
        stream: int | Tensor = group << 12 | copy
    else:
        total = global_batch * copies * slots
        row = batch_index[:, None, None] * copies + copy
        stream = 0
    cell = row * slots + slot
    stratum = permute(cell, total, key, stream=stream) if strata == "permuted" else cell
    own_slot = layout.block_start.to(torch.int64).div(layout.block_size, rounding_mode="floor")
    stratum = stratum.gather(-1, own_slot[:, None].expand_as(jitter))
    # In the last stratum a large jitter could round u up to 1, which no CDF can invert.
    u = ((stratum + jitter) / total).clamp(max=1.0 - 2.0**-53)
    return token_u, torch.where(_first_in_slot(layout, own_slot)[:, None], u, jitter)


def _first_in_slot(layout: BlockLayout, own_slot: Tensor) -> Tensor:
    """Whether the token's block is the first of its row that starts in its slot, bool [batch, seq]."""
    start = layout.block_start.to(torch.int64)
    # Slots rise along the row, so only the block that ends where this one starts can share the slot.
    before = own_slot.gather(1, (start - 1).clamp(min=0))
    return (start == 0) | (before < own_slot)


def _resample_uniforms(layout: BlockLayout, key: NoiseKey, sample_index: Tensor, copies: int) -> Tensor:
    """One more keyed uniform per block, float64 [batch, copies, seq]."""
    copy = torch.arange(copies, device=sample_index.device)[None, :, None]
    first_token = layout.block_start.to(torch.int64)[:, None]
    return uniforms(key, sample_index[:, None, None], copy, first_token, RESAMPLE_DRAW)


def _conditioned_counts(plan: NoisePlan, t: Tensor, n: Tensor, u: Tensor, layout: BlockLayout) -> Tensor:
    """Counts k given t: binomial(n, t) conditioned on k / n inside the clip range, by inversion at u.

    The token at offset j of a block holds the probability of k = j + 1, so that one running sum over the row
    is the CDF of every block: no loop and no rejection. Where no count fits, the result is not used.
    """
    beta, omega = plan.interval
    position = torch.arange(t.shape[-1], device=t.device)
    k = (position - layout.block_start.to(torch.int64))[:, None].expand_as(t) + 1
    inside = (k <= n) & (k >= beta * n - 1e-9 * n) & (k <= omega * n + 1e-9 * n)
    size, held = n.to(torch.float64), torch.minimum(k, n).to(torch.float64)
    log_choose = torch.lgamma(size + 1) - torch.lgamma(held + 1) - torch.lgamma(size - held + 1)
    log_pmf = log_choose + torch.special.xlogy(held, t) + torch.special.xlog1py(size - held, -t)
    pmf = torch.where(inside, log_pmf.exp(), 0.0)
    none = (1.0 - t) ** size if beta <= 1e-9 else torch.zeros_like(t)
    running = torch.nn.functional.pad(pmf.cumsum(dim=-1), (1, 0))
    start = layout.block_start.to(torch.int64)[:, None].expand_as(k)
    end = layout.block_end.to(torch.int64)[:, None].expand_as(k)
    base = running.gather(-1, start)
    target = u * (running.gather(-1, end) - base + none)
    below = (running[..., 1:] - base + none <= target) & (k <= n)
    return block_sum(below, layout) + (none <= target)
