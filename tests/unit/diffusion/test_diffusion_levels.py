"""Strata, who may be masked, and independence of the split: every draw is a pure function of its key."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bdtrain.diffusion.corruption import block_sum, mask_tokens, rank_in_block, replace_uniformly
from bdtrain.diffusion.keyed import NoiseKey, Purpose
from bdtrain.diffusion.levels import draw_times, keyed_uniforms
from bdtrain.diffusion.objectives import make_objective
from bdtrain.diffusion.plan import NoisePlan
from bdtrain.diffusion.visibility import build_layout
from bdtrain.errors import ShapeError

MASK = 99
TRAIN = NoiseKey(1, Purpose.TRAIN, 5)


def one_document(batch, seq, block_size):
    return build_layout(torch.zeros(batch, seq, dtype=torch.int32), block_size, isolate=True)


def uniforms_of(layout, key=TRAIN, *, rows=None, global_batch=None, copies=1, strata="permuted"):
    rows = torch.arange(layout.shape[0]) if rows is None else rows
    global_batch = len(rows) if global_batch is None else global_batch
    return keyed_uniforms(
        layout,
        key,
        sample_index=rows,
        batch_index=rows,
        global_batch=global_batch,
        copies=copies,
        strata=strata,
    )


def ragged_batch(generator, batch=8, seq=24):
    """Rows of documents of random lengths, some with a BOS, some with padding at the end."""
    documents = torch.zeros(batch, seq, dtype=torch.int32)
    counted = torch.ones(batch, seq, dtype=torch.bool)
    for row in range(batch):
        at, number = 0, 0
        while at < seq:
            length = int(torch.randint(1, 12, (1,), generator=generator))
            documents[row, at : at + length] = number
            if torch.rand(1, generator=generator) < 0.5:
                counted[row, at] = False
            at, number = at + length, number + 1
        if row % 2:
            documents[row, -4:] = -1
            counted[row, -4:] = False
    x0 = torch.randint(0, 90, (batch, seq), generator=generator)
    return x0, documents, counted


PLANS = [
    NoisePlan(4),
    NoisePlan(4, kind="bernoulli"),
    NoisePlan(4, clip_range=(0.3, 0.8), resample=True),
    NoisePlan(4, kind="bernoulli", clip_range=(0.3, 0.8), resample=True, weighting="reference"),
    NoisePlan(4, kind="bernoulli", strata="reference_grid"),
    NoisePlan(4, strata="independent", schedule="cosine"),
]


@pytest.mark.parametrize("plan", PLANS, ids=range(len(PLANS)))
@pytest.mark.parametrize("purpose", [Purpose.TRAIN, Purpose.EVALUATE, Purpose.REFIT])
def test_noise_is_the_same_for_any_split_order_and_restart(plan, purpose):
    x0, documents, counted = ragged_batch(torch.Generator().manual_seed(0))
    key = NoiseKey(3, purpose, 17)
    sample = torch.arange(8) + 60  # crosses a group of 64

    def corrupt(rows):
        objective = make_objective("block_diffusion", plan=plan, mask_id=MASK, vocab_size=100, seq_len=24)
        return objective.corrupt(
            x0[rows],
            objective.layout(documents[rows]),
            counted[rows],
            key=key,
            sample_index=sample[rows],
            batch_index=rows,
            global_batch=8,
            copies=3,
        )

    whole = corrupt(torch.arange(8))
    for split in ([[3], [0, 7], [5, 2, 1], [6, 4]], [[7, 6, 5, 4, 3, 2, 1, 0]]):
        for rows in split:
            part = corrupt(torch.tensor(rows))
            for name in ("noisy", "rows", "targets", "weight", "counted", "level"):
                assert torch.equal(getattr(part, name), getattr(whole, name)[rows])


def test_other_steps_seeds_and_purposes_draw_other_noise():
    layout = one_document(4, 16, 4)
    base = uniforms_of(layout)[1]
    for key in (
        NoiseKey(1, Purpose.TRAIN, 6),
        NoiseKey(2, Purpose.TRAIN, 5),
        NoiseKey(1, Purpose.EVALUATE, 5),
        NoiseKey(1, Purpose.REFIT, 5),
    ):
        assert not (uniforms_of(layout, key)[1] == base).any()


@pytest.mark.parametrize(
    ("batch", "seq", "block_size", "copies"), [(4, 32, 4, 1), (3, 20, 5, 2), (5, 9, 1, 3)]
)
def test_every_stratum_of_the_global_batch_is_drawn_exactly_once(batch, seq, block_size, copies):
    layout = one_document(batch, seq, block_size)
    u = uniforms_of(layout, copies=copies)[1]
    total = batch * copies * seq // block_size
    strata = (u[..., ::block_size] * total).floor().flatten()
    assert torch.equal(strata.sort().values, torch.arange(total, dtype=torch.float64))
    assert torch.equal(u[..., ::block_size].repeat_interleave(block_size, -1), u)


def test_every_slot_has_uniform_marginals_and_neighbours_are_uncorrelated():
    batch, slots, steps = 4, 8, 1500
    layout = one_document(batch, slots * 4, 4)
    draws = torch.stack(
        [uniforms_of(layout, NoiseKey(1, Purpose.TRAIN, s))[1][:, 0, ::4] for s in range(steps)]
    )
    flat = draws.reshape(steps, batch * slots)
    # Mean and variance of U[0, 1) per slot, five standard errors.
    assert (flat.mean(0) - 0.5).abs().max() < 5 * (1 / 12 / steps) ** 0.5
    assert (flat.var(0) - 1 / 12).abs().max() < 5 * (1 / 180 / steps) ** 0.5
    # Sampling without replacement correlates any two cells by -1 / (N - 1), and no pair more than another.
    correlation = torch.corrcoef(flat.T)
    off_diagonal = correlation[~torch.eye(batch * slots, dtype=torch.bool)]
    assert off_diagonal.abs().max() < 1 / (batch * slots - 1) + 5 / steps**0.5
    assert abs(off_diagonal.mean().item() + 1 / (batch * slots - 1)) < 0.01


def test_evaluation_takes_strata_over_groups_of_64_sequences_for_each_replicate():
    layout = one_document(64, 8, 4)
    key = NoiseKey(1, Purpose.EVALUATE)
    for first in (0, 128):
        u = keyed_uniforms(
            layout,
            key,
            sample_index=torch.arange(first, first + 64),
            batch_index=torch.zeros(64, dtype=torch.int64),
            global_batch=1,
            copies=2,
            strata="permuted",
        )[1]
        for replicate in range(2):
            strata = (u[:, replicate, ::4] * 128).floor().flatten().sort().values
            assert torch.equal(strata, torch.arange(128, dtype=torch.float64))
        correlation = torch.corrcoef(torch.stack((u[:, 0, ::4].flatten(), u[:, 1, ::4].flatten())))[0, 1]
        assert correlation.abs() < 5 / 128**0.5


def test_only_the_first_block_that_starts_in_a_slot_owns_its_stratum():
    # Fragments of 5, 1, 1 and 5 tokens; blocks of 4 start at 0, 4 | 5 | 6 | 7, 11; slots 0, 1 | 1 | 1 | 1, 2.
    documents = torch.tensor([[0] * 5 + [1] + [2] + [3] * 5], dtype=torch.int32)
    layout = build_layout(documents, 4, isolate=True)
    assert layout.block_start[0].unique().tolist() == [0, 4, 5, 6, 7, 11]
    outside = {start: 0 for start in (0, 4, 5, 6, 7, 11)}
    for step in range(60):
        key = NoiseKey(9, Purpose.TRAIN, step)
        u = uniforms_of(layout, key)[1][0, 0]
        owned = (u[[0, 4, 11]] * 3).floor()
        assert owned.sort().values.tolist() == [0, 1, 2]
        jitter = uniforms_of(layout, key, strata="independent")[1][0, 0]
        assert torch.equal(u[[5, 6, 7]], jitter[[5, 6, 7]])
        for start in outside:
            outside[start] += int(u[start] != jitter[start])
    assert [outside[s] for s in (5, 6, 7)] == [0, 0, 0]
    assert min(outside[s] for s in (0, 4, 11)) == 60


@pytest.mark.parametrize(
    ("block_size", "low", "high", "tag"),
    [(4, 0.001, 1.0, "2_4"), (16, 0.45, 0.95, "3_16"), (64, 0.001, 1.0, "4_64")],
)
def test_the_reference_grid_repeats_the_golden_times(block_size, low, high, tag, golden, monkeypatch):
    data = np.load(golden / "antithetic.npz")
    u = torch.from_numpy(data[f"u_{tag}"]).double()
    expected = torch.from_numpy(data[f"t_{tag}_{low:g}_{high:g}"]).double()
    layout = one_document(u.shape[0], 64, block_size)

    def given_uniforms(key, sample, copy, token, draw):
        spread = u.repeat_interleave(block_size, 1)[:, None]
        return spread, spread

    monkeypatch.setattr("bdtrain.diffusion.levels.uniform_pair", given_uniforms)
    block_u = uniforms_of(layout, strata="reference_grid")[1]
    plan = NoisePlan(
        block_size, kind="bernoulli", clip_range=(low, high), weighting="reference", strata="reference_grid"
    )
    t, chance, weight = draw_times(plan, block_u)
    torch.testing.assert_close(t[:, 0], expected.expand(-1, 64), rtol=0, atol=2e-7)
    assert torch.equal(t, chance)
    torch.testing.assert_close(weight, 1 / t)


def test_reference_grid_shows_each_slot_a_fixed_stratum():
    u = uniforms_of(one_document(3, 8, 4), strata="reference_grid")[1][:, 0, ::4]
    assert (u.flatten() * 6).floor().tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("plan", PLANS, ids=range(len(PLANS)))
def test_padding_and_bos_stay_clean_and_blocks_count_their_maskable_tokens(plan):
    x0, documents, counted = ragged_batch(torch.Generator().manual_seed(1))
    objective = make_objective("block_diffusion", plan=plan, mask_id=MASK, vocab_size=100, seq_len=24)
    layout = objective.layout(documents)
    for step in range(20):
        out = objective.corrupt(
            x0,
            layout,
            counted,
            key=NoiseKey(1, Purpose.TRAIN, step),
            sample_index=torch.arange(8),
            batch_index=torch.arange(8),
            global_batch=8,
            copies=2,
        )
        stays = ~counted[:, None].expand_as(out.noisy)
        assert torch.equal(out.noisy[stays], x0[:, None].expand_as(out.noisy)[stays])
        assert not out.rows[stays].any()
        assert (out.noisy == MASK).equal(out.rows)
        assert (out.weight > 0).equal(out.rows)
        masked = block_sum(out.rows, layout)
        for row in range(8):
            for position in range(24):
                block = slice(int(layout.block_start[row, position]), int(layout.block_end[row, position]))
                n = int(counted[row, block].sum())
                assert out.maskable_in_block[row, position] == n
                for copy in range(2):
                    k = int(out.rows[row, copy, block].sum())
                    assert masked[row, copy, position] == k
                    if plan.kind == "count":
                        assert k == round(out.level[row, copy, position].item() * n)
                        assert k >= 1 or n == 0
                    if plan.resample and n > 1:
                        assert 0.3 * n <= k <= 0.8 * n


def test_blocks_too_short_to_resample_are_counted():
    documents = torch.tensor([[0, 1, 2, 2, 2, 2, 3, 3]], dtype=torch.int32)
    plan = NoisePlan(4, clip_range=(0.3, 0.8), resample=True)
    objective = make_objective("block_diffusion", plan=plan, mask_id=MASK, vocab_size=100, seq_len=8)
    for copies in (1, 3):
        out = objective.corrupt(
            torch.zeros(1, 8, dtype=torch.int64),
            objective.layout(documents),
            torch.ones(1, 8, dtype=torch.bool),
            key=TRAIN,
            sample_index=torch.tensor([0]),
            batch_index=torch.tensor([0]),
            global_batch=1,
            copies=copies,
        )
        assert out.unresampled_blocks.item() == 2 * copies  # the two documents of one token


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), block_size=st.integers(1, 9))
def test_rank_and_sum_in_blocks_agree_with_loops(seed, block_size):
    generator = torch.Generator().manual_seed(seed)
    _, documents, maskable = ragged_batch(generator, batch=2)
    layout = build_layout(documents, block_size, isolate=True)
    u = torch.rand(2, 3, 24, generator=generator, dtype=torch.float64)
    rank = rank_in_block(u, layout, maskable)
    sums = block_sum(maskable, layout)
    for row in range(2):
        for start, end in {
            (int(a), int(b)) for a, b in zip(layout.block_start[row], layout.block_end[row], strict=True)
        }:
            members = [p for p in range(start, end) if maskable[row, p]]
            assert sums[row, start:end].tolist() == [len(members)] * (end - start)
            for copy in range(3):
                ordered = sorted(members, key=lambda p: u[row, copy, p].item())
                for expected, position in enumerate(ordered):
                    assert rank[row, copy, position] == expected


def test_a_chance_of_0_masks_nothing_and_of_1_everything():
    u = torch.tensor([[0.0, 0.5, 1 - 2**-53]], dtype=torch.float64)
    x0 = torch.tensor([[1, 2, 3]])
    assert mask_tokens(x0, torch.zeros_like(u), u, mask_id=9)[0].tolist() == [[1, 2, 3]]
    assert mask_tokens(x0, torch.ones_like(u), u, mask_id=9)[0].tolist() == [[9, 9, 9]]


def test_uniform_replacement_draws_every_ordinary_token_equally_and_never_the_mask():
    count, vocab = 60_000, 6
    grid = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    who = grid[torch.randperm(count, generator=torch.Generator().manual_seed(0))]
    x0 = torch.full((count,), 4)
    xt, redrawn = replace_uniformly(x0, torch.tensor(0.25), who, grid, vocab_size=vocab, mask_id=2)
    assert redrawn.float().mean() == pytest.approx(0.25, abs=1e-4)
    counts = torch.bincount(xt[redrawn], minlength=vocab).double()
    assert counts[2] == 0
    np.testing.assert_allclose(counts[[0, 1, 3, 4, 5]], 0.25 * count / 5, rtol=0.06)
    assert (xt[~redrawn] == 4).all()
    with pytest.raises(ShapeError):
        replace_uniformly(x0, torch.tensor(0.25), who, grid, vocab_size=2, mask_id=2)


def test_shapes_and_block_sizes_must_agree():
    objective = make_objective("block_diffusion", plan=NoisePlan(4), mask_id=MASK, vocab_size=100, seq_len=8)
    index = torch.tensor([0])
    x0, counted = torch.zeros(1, 8, dtype=torch.int64), torch.ones(1, 8, dtype=torch.bool)
    keys = dict(key=TRAIN, sample_index=index, batch_index=index, global_batch=1, copies=1)
    with pytest.raises(ShapeError, match=r"plan\.block_size=4"):
        objective.corrupt(x0, one_document(1, 8, 2), counted, **keys)
    with pytest.raises(ShapeError):
        objective.corrupt(x0, one_document(1, 12, 4), counted, **keys)


@pytest.mark.gpu
def test_a_gpu_draws_the_same_masks_and_weights():
    x0, documents, counted = ragged_batch(torch.Generator().manual_seed(0))
    for plan in PLANS:
        objective = make_objective("block_diffusion", plan=plan, mask_id=MASK, vocab_size=100, seq_len=24)
        results = []
        for device in ("cpu", "cuda"):
            index = torch.arange(8, device=device)
            results.append(
                objective.corrupt(
                    x0.to(device),
                    objective.layout(documents.to(device)),
                    counted.to(device),
                    key=TRAIN,
                    sample_index=index,
                    batch_index=index,
                    global_batch=8,
                    copies=2,
                )
            )
        assert torch.equal(results[0].noisy, results[1].noisy.cpu())
        torch.testing.assert_close(results[0].weight, results[1].weight.cpu(), rtol=1e-6, atol=0)
