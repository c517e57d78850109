"""`count` and `bernoulli` draws through the model against the enumeration of all masks of every block.

Given the clean text, a block's loss depends on its own mask alone, so 16 noisy copies, copy r with mask
pattern r in every block, give the loss of every mask of every block in one pass. The expected training loss
follows from the definition: an integral over t of a sum over masks. Nothing of it comes from the noise plan's
tables.
"""

import math
from types import SimpleNamespace

import pytest
import torch

from bdtrain.diffusion.keyed import NoiseKey, Purpose
from bdtrain.diffusion.micro_batch import corrupt_rows
from bdtrain.diffusion.objectives.block_diffusion import BlockDiffusion
from bdtrain.diffusion.plan import NoisePlan
from bdtrain.model.forward import forward_losses
from bdtrain.model.transformer import assemble_streams

MASK, VOCAB, BLOCK = 4, 29, 4
COPIES, REPEATS = 4, 1024
RANGES = (None, (0.3, 0.8))
WEIGHTINGS = ("elbo", "reference", "flat")


@pytest.fixture
def enumeration(build, make_case, ragged):
    """Model, batch, and the loss of each mask of each block: {(row, start, end): float64 [2^4]}.

    Blocks of 4, 3, 2 and 1 tokens; the two BOS leave blocks of 4 with 3 maskable tokens.
    """
    model, case = build(), make_case(documents=ragged, block_size=BLOCK)
    counted = torch.ones(case.batch, case.seq, dtype=torch.bool)
    counted[0, 0] = counted[0, 5] = False
    layout = case.layout
    offset = torch.arange(case.seq) - layout.block_start
    pattern = torch.arange(2**BLOCK)[:, None]
    masked = ((pattern >> offset[:, None]) & 1).bool() & counted[:, None]
    xt = torch.where(masked, MASK, case.x0[:, None])
    targets = case.x0[:, None].expand_as(xt)
    with torch.no_grad():
        view = model(assemble_streams(xt, case.x0), layout, noisy_copies=2**BLOCK, clean=True, rows=masked)
        nll = torch.zeros(xt.shape, dtype=torch.float64).masked_scatter(masked, view.nll(targets[masked]))
    blocks = {
        (b, start, int(layout.block_end[b, start])): nll[b, :, start : layout.block_end[b, start]].sum(1)
        for b in range(case.batch)
        for start in sorted(set(layout.block_start[b].tolist()))
    }
    return SimpleNamespace(model=model, case=case, counted=counted, blocks=blocks)


def subsets(losses, counted):
    """Loss of each mask of the block's n maskable tokens: [(tokens masked, loss)], 2^n of them."""
    free = sum(int(c) << i for i, c in enumerate(counted.tolist()))
    return [(p.bit_count(), losses[p].item()) for p in range(2**BLOCK) if p & ~free == 0]


def by_integral(masks, n, clip_range, weighting, points=2000):
    """E over t uniform on the range of weight(t) * sum over masks of P(mask | t) * loss, by midpoints."""
    low, high = clip_range or (0.0, 1.0)
    per_count = [sum(loss for k, loss in masks if k == j) for j in range(n + 1)]
    total = 0.0
    for i in range(points):
        t = low + (high - low) * (i + 0.5) / points
        weight = {"elbo": (high - low) / t, "reference": 1 / t, "flat": 1.0}[weighting]
        total += weight * sum(t**k * (1 - t) ** (n - k) * per_count[k] for k in range(1, n + 1))
    return total / points


def by_counts(masks, n, clip_range, weighting):
    """The same with t integrated out: sum over k of c_k times the mean loss of the k-subsets."""
    low, high = clip_range or (0.0, 1.0)

    def cdf(k, trials, p):
        return sum(math.comb(trials, j) * p**j * (1 - p) ** (trials - j) for j in range(k + 1))

    total = 0.0
    for k in range(1, n + 1):
        if weighting == "flat":
            c = (cdf(k, n + 1, low) - cdf(k, n + 1, high)) / ((n + 1) * (high - low))
        else:
            c = (cdf(k - 1, n, low) - cdf(k - 1, n, high)) / k
            c /= high - low if weighting == "reference" else 1.0
        total += c * sum(loss for j, loss in masks if j == k) / math.comb(n, k)
    return total


def drawn(enumeration, objective):
    """Weighted loss of every drawn block, {block: float64 [draws]}, after a look at `forward_losses`."""
    case = enumeration.case
    x0, documents, counted = (x.repeat(REPEATS, 1) for x in (case.x0, case.documents, enumeration.counted))
    index = torch.arange(len(x0))
    key = NoiseKey(11, Purpose.TRAIN, 3)

    def corrupt(few):
        rows = SimpleNamespace(
            tokens=x0[few],
            documents=documents[few],
            counted=counted[few],
            sample_index=index[few],
            batch_index=index[few],
        )
        return corrupt_rows(
            objective, rows, key=key, global_batch_size=len(x0), copies=COPIES, device=torch.device("cpu")
        )

    def by_table(corrupted):
        values = {}
        for (b, start, end), losses in enumeration.blocks.items():
            masked = corrupted.rows[b :: case.batch, :, start:end]
            weight = corrupted.weight[b :: case.batch, :, start:end].double().amax(-1)
            pattern = (masked.long() << torch.arange(end - start)).sum(-1)
            values[b, start, end] = (weight * losses[pattern]).flatten()
        return values

    # The product's own pass for the first rows, all copies: what the table gives for their masks.
    batch = corrupt(slice(case.batch))
    with torch.no_grad():
        losses = forward_losses(enumeration.model, objective, batch).double()
    rows = batch.corrupted.rows
    placed = torch.zeros(rows.shape, dtype=torch.float64).masked_scatter(rows, losses)
    for (b, start, end), values in by_table(batch.corrupted).items():
        torch.testing.assert_close(placed[b, :, start:end].sum(-1), values, rtol=1e-6, atol=1e-8)

    many = corrupt(slice(None)).corrupted
    assert many.rows[: case.batch].equal(rows)
    return by_table(many), int(many.counted.sum()) / REPEATS


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("clip_range", RANGES)
def test_draws_through_the_model_average_to_the_enumerated_objective(enumeration, clip_range, weighting):
    exact = {}
    for (b, start, end), losses in enumeration.blocks.items():
        counted = enumeration.counted[b, start:end]
        n = int(counted.sum())
        masks = subsets(losses, counted)
        assert len(masks) == 2**n
        for w in WEIGHTINGS:
            exact[w, b, start, end] = by_counts(masks, n, clip_range, w)
        integral = by_integral(masks, n, clip_range, weighting)
        assert integral == pytest.approx(exact[weighting, b, start, end], rel=1e-5)
    total = {w: sum(v for key, v in exact.items() if key[0] == w) for w in WEIGHTINGS}

    for kind in ("count", "bernoulli"):
        plan = NoisePlan(BLOCK, kind=kind, clip_range=clip_range, weighting=weighting)
        values, denominator = drawn(enumeration, BlockDiffusion(plan, MASK, VOCAB))
        # The two BOS are never masked; the reference divides by them all the same.
        assert denominator == (32 if weighting == "reference" else 30)
        for block, losses in values.items():
            wanted = exact[weighting, *block]
            error = losses.std().item() / len(losses) ** 0.5
            assert abs(losses.mean().item() - wanted) < 4.5 * error + 1e-6 * wanted, (kind, block)
            assert error < 0.05 * wanted, (kind, block)
        # All blocks together are sharp enough to tell the weightings apart (the full range has two).
        mean = sum(losses.mean().item() for losses in values.values())
        assert mean == pytest.approx(total[weighting], rel=0.015), kind
        for other in WEIGHTINGS:
            if total[other] != pytest.approx(total[weighting], rel=1e-9):
                assert mean != pytest.approx(total[other], rel=0.03), (kind, other)
