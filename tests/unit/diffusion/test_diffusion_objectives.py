"""Objectives: golden losses, exactness at block size 1, MDLM as one block, AR, what a row may know."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bdtrain.diffusion.keyed import NoiseKey, Purpose
from bdtrain.diffusion.levels import draw_times
from bdtrain.diffusion.objectives import Corrupted, DenseVocabView, make_objective
from bdtrain.diffusion.plan import NoisePlan, evaluation_plan, full_masking_plan
from bdtrain.errors import ConfigError, ShapeError

TRAIN = NoiseKey(1, Purpose.TRAIN, 5)
REFERENCE = dict(kind="bernoulli", clip_range=(0.001, 1.0), weighting="reference", strata="reference_grid")


def corrupt(objective, x0, documents=None, counted=None, *, key=TRAIN, copies=1) -> Corrupted:
    batch, _ = x0.shape
    documents = torch.zeros_like(x0, dtype=torch.int32) if documents is None else documents
    counted = torch.ones_like(x0, dtype=torch.bool) if counted is None else counted
    index = torch.arange(batch)
    return objective.corrupt(
        x0,
        objective.layout(documents),
        counted,
        key=key,
        sample_index=index,
        batch_index=index,
        global_batch=batch,
        copies=copies,
    )


@pytest.mark.parametrize(
    ("name", "algo", "block_size"), [("bd3lm_b4", "block_diffusion", 4), ("mdlm", "mdlm", 64)]
)
def test_golden_masks_weights_and_losses_are_repeated(name, algo, block_size, golden, monkeypatch):
    data = np.load(golden / f"{name}.npz")
    x0 = torch.from_numpy(data["x0"]).long()
    masked = torch.from_numpy(data["masked"])
    u = torch.from_numpy(data["u"]).double().repeat_interleave(block_size, 1)[:, None]
    # The golden file keeps the mask, not the uniforms behind it: 0 masks at any time, the largest never.
    token_u = torch.where(masked, 0.0, 1 - 2**-53).double()[:, None]
    monkeypatch.setattr("bdtrain.diffusion.levels.uniform_pair", lambda *_: (token_u, u))

    objective = make_objective(
        algo, plan=NoisePlan(block_size, **REFERENCE), mask_id=96, vocab_size=97, seq_len=64
    )
    counted = torch.ones(2, 64, dtype=torch.bool)
    counted[:, 0] = False  # BOS
    losses = {}
    for purpose in (Purpose.TRAIN, Purpose.EVALUATE):
        # Only the denominator differs between the two, so the draw may be training's.
        out = corrupt(objective, x0, counted=counted)
        torch.testing.assert_close(out.level[:, 0], torch.from_numpy(data["move_chance"]).expand(2, 64))
        assert torch.equal(out.noisy[:, 0], torch.from_numpy(data["xt"]).long())
        assert torch.equal(out.rows[:, 0], masked)
        view = DenseVocabView(torch.from_numpy(data["raw_logits"])[out.rows[:, 0]], 97, [96])
        rows = objective.loss(view, out.targets[out.rows], out.weight[out.rows])
        token_loss = torch.zeros(2, 64)
        token_loss[masked] = rows
        torch.testing.assert_close(token_loss, torch.from_numpy(data["token_loss"]), rtol=1e-4, atol=5e-4)
        denominator = objective.denominator(
            objective.layout(torch.zeros(2, 64, dtype=torch.int32)), counted, purpose=purpose
        )
        losses[purpose] = (rows.sum() / denominator.sum()).item()
        if purpose is Purpose.EVALUATE:
            assert torch.equal(denominator.float(), torch.from_numpy(data["eval_token_mask"]))
    assert losses[Purpose.TRAIN] == pytest.approx(float(data["train_loss"]), rel=1e-5)
    assert losses[Purpose.EVALUATE] == pytest.approx(float(data["eval_loss"]), rel=1e-5)
    assert losses[Purpose.TRAIN] == pytest.approx(losses[Purpose.EVALUATE] * 63 / 64, rel=1e-6)


def test_golden_log_probabilities_are_those_of_the_view(golden):
    for name in ("bd3lm_b4", "mdlm"):
        data = np.load(golden / f"{name}.npz")
        masked = torch.from_numpy(data["masked"])
        logits = torch.from_numpy(data["raw_logits"])[masked]
        view = DenseVocabView(logits, 97, [96])
        expected = torch.from_numpy(data["log_probs"])[masked]
        for token in range(96):
            ids = torch.full((logits.shape[0],), token)
            torch.testing.assert_close(-view.nll(ids), expected[:, token], rtol=0, atol=5e-4)


PLANS = [
    NoisePlan(24),
    NoisePlan(24, kind="bernoulli", clip_range=(0.3, 0.8), weighting="reference"),
    NoisePlan(24, clip_range=(0.3, 0.8), resample=True),
]


@pytest.mark.parametrize("plan", PLANS, ids=range(len(PLANS)))
@pytest.mark.parametrize("isolate", [True, False])
def test_mdlm_is_block_diffusion_with_one_block_bit_for_bit(plan, isolate):
    x0 = torch.randint(0, 90, (4, 24), generator=torch.Generator().manual_seed(0))
    documents = (torch.arange(24) // 9).to(torch.int32).expand(4, 24)
    outs = []
    for algo in ("block_diffusion", "mdlm"):
        # The block size of an MDLM plan does not matter: it is the sequence.
        own = plan if algo == "block_diffusion" else plan.with_block_size(12)
        objective = make_objective(
            algo, plan=own, mask_id=99, vocab_size=100, seq_len=24, isolate_documents=isolate
        )
        outs.append((objective, corrupt(objective, x0, documents, copies=2)))
    (block, a), (mdlm, b) = outs
    for name in ("noisy", "rows", "targets", "weight", "counted", "level"):
        assert torch.equal(getattr(a, name), getattr(b, name))
    assert a.clean is not None
    assert b.clean is None
    assert (block.clean, mdlm.clean) == (True, False)
    assert torch.equal(block.layout(documents).block_start, mdlm.layout(documents).doc_start)


def conditional_logits(prefixes: torch.Tensor, vocab: int) -> torch.Tensor:
    """An arbitrary next-token model: logits from the prefix (padded with -1), float64 [rows, vocab]."""
    code = ((prefixes + 2) * torch.tensor([7, 31, 101][: prefixes.shape[1]])).sum(1, keepdim=True)
    return torch.sin(code.double() * (1 + torch.arange(vocab)) * 0.7) * 2


@pytest.mark.parametrize("plan", [full_masking_plan(1), evaluation_plan(1)])
def test_block_size_1_fully_masked_is_the_exact_nll_and_sums_to_1_over_all_sequences(plan):
    ordinary, seq = 3, 3
    sequences = torch.tensor(list(itertools.product(range(ordinary), repeat=seq)))
    objective = make_objective("block_diffusion", plan=plan, mask_id=3, vocab_size=4, seq_len=seq)
    out = corrupt(objective, sequences)
    assert out.rows.all()
    torch.testing.assert_close(out.weight, torch.ones_like(out.weight))
    # The layout lets a masked token see its clean prefix alone.
    layout = objective.layout(torch.zeros_like(sequences, dtype=torch.int32))
    logits, exact = [], torch.zeros(len(sequences), dtype=torch.float64)
    for position in range(seq):
        visible = torch.arange(seq) < layout.block_start[0, position]
        prefix = torch.where(visible, sequences, -1)
        logits.append(conditional_logits(prefix, 6))
        # One-step conditionals from separate forwards of prefix + [MASK], over the three ordinary tokens.
        chances = conditional_logits(prefix, 6)[:, :ordinary].softmax(1)
        exact -= chances.gather(1, sequences[:, position : position + 1]).squeeze(1).log()
    view = DenseVocabView(torch.stack(logits, 1).flatten(0, 1), 4, [3])
    rows = objective.loss(view, out.targets[out.rows], out.weight[out.rows].double())
    nll = rows.view(len(sequences), seq).sum(1)
    torch.testing.assert_close(nll, exact, rtol=1e-12, atol=0)
    assert (-nll).exp().sum().item() == pytest.approx(1.0, abs=1e-12)


def test_the_draw_does_not_look_at_the_tokens():
    generator = torch.Generator().manual_seed(0)
    x0, other = torch.randint(0, 90, (2, 4, 16), generator=generator)
    for kind in ("count", "bernoulli"):
        objective = make_objective(
            "block_diffusion", plan=NoisePlan(4, kind=kind), mask_id=99, vocab_size=100, seq_len=16
        )
        a, b = corrupt(objective, x0), corrupt(objective, other)
        assert torch.equal(a.rows, b.rows)
        assert torch.equal(a.weight, b.weight)


@pytest.mark.parametrize("algo", ["block_diffusion", "mdlm", "ar"])
@pytest.mark.parametrize("isolate", [True, False])
def test_no_row_can_see_the_token_it_predicts(algo, isolate):
    """Change one token: no row that predicts it may see, through the layout, an input that changed."""
    seq = 16
    x0 = torch.randint(0, 90, (1, seq), generator=torch.Generator().manual_seed(0))
    documents = torch.tensor([[0] * 6 + [1] * 3 + [2] * 7], dtype=torch.int32)
    objective = make_objective(
        algo, plan=NoisePlan(4), mask_id=99, vocab_size=100, seq_len=seq, isolate_documents=isolate
    )
    layout = objective.layout(documents)
    base = corrupt(objective, x0, documents)
    predictions = 0
    for changed in range(seq):
        other = x0.clone()
        other[0, changed] = (other[0, changed] + 1) % 90
        out = corrupt(objective, other, documents)
        for q in range(seq):
            predicts = q + 1 if algo == "ar" else q
            if not base.rows[0, 0, q] or predicts != changed:
                continue
            predictions += 1
            bounds = [int(getattr(layout, n)[0, q]) for n in ("doc_start", "block_start", "block_end")]
            doc_start, start, end = bounds
            if objective.noisy:
                assert torch.equal(out.noisy[0, 0, start:end], base.noisy[0, 0, start:end])
                assert torch.equal(other[0, doc_start:start], x0[0, doc_start:start])
            else:
                assert torch.equal(other[0, doc_start:end], x0[0, doc_start:end])
    assert predictions == int(base.rows.sum())


def test_bos_is_in_the_training_denominator_under_reference_weighting_only():
    # BOS, 3 tokens | BOS, 1 token | 2 tokens without BOS | 2 of padding
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 2, 2, -1, -1]], dtype=torch.int32)
    counted = torch.tensor([[0, 1, 1, 1, 0, 1, 1, 1, 0, 0]], dtype=torch.bool)
    x0 = torch.zeros(1, 10, dtype=torch.int64)
    text = (documents >= 0).tolist()
    for weighting in ("elbo", "flat", "reference"):
        objective = make_objective(
            "block_diffusion", plan=NoisePlan(5, weighting=weighting), mask_id=9, vocab_size=10, seq_len=10
        )
        train = corrupt(objective, x0, documents, counted).counted
        held_out = corrupt(objective, x0, documents, counted, key=NoiseKey(1, Purpose.EVALUATE)).counted
        assert train.tolist() == (text if weighting == "reference" else counted.tolist())
        assert held_out.tolist() == counted.tolist()


def test_autoregression_predicts_the_next_counted_token_of_the_same_document():
    x0 = torch.tensor([[1, 11, 12, 13, 14, 1, 16, 17, 0, 0]])
    # BOS 11 12 | 13 14 without BOS | BOS 16 17 | padding
    documents = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, -1, -1]], dtype=torch.int32)
    counted = torch.tensor([[0, 1, 1, 1, 1, 0, 1, 1, 0, 0]], dtype=torch.bool)
    isolated = make_objective("ar", plan=None, mask_id=99, vocab_size=100, seq_len=10)
    out = corrupt(isolated, x0, documents, counted)
    assert out.noisy is None
    assert torch.equal(out.clean, x0)
    assert out.rows[0, 0].nonzero().flatten().tolist() == [0, 1, 3, 5, 6]
    assert out.targets[out.rows].tolist() == [11, 12, 14, 16, 17]
    assert out.weight[out.rows].tolist() == [1.0] * 5
    # 13 begins a document: nothing predicts it, so it is not counted.
    assert out.counted[0].nonzero().flatten().tolist() == [1, 2, 4, 6, 7]
    joined = make_objective("ar", plan=None, mask_id=99, vocab_size=100, seq_len=10, isolate_documents=False)
    out = corrupt(joined, x0, documents, counted)
    assert out.targets[out.rows].tolist() == [11, 12, 13, 14, 16, 17]
    assert out.counted.sum() == out.rows.sum()


def test_autoregressive_loss_is_the_sequence_nll():
    x0 = torch.tensor([[0, 2, 1, 1], [2, 2, 0, 1]])
    objective = make_objective("ar", plan=None, mask_id=3, vocab_size=4, seq_len=4)
    out = corrupt(objective, x0)
    logits = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    view = DenseVocabView(logits[out.rows[:, 0]], 4, [3])
    loss = objective.loss(view, out.targets[out.rows], out.weight[out.rows]).sum() / out.counted.sum()
    chances = logits[..., :3].softmax(-1)
    expected = -sum(chances[i, j, x0[i, j + 1]].log() for i in range(2) for j in range(3)) / 6
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), rows=st.integers(0, 5))
def test_a_dense_view_computes_what_its_definition_says(seed, rows):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, 12, generator=generator, dtype=torch.float64)
    view = DenseVocabView(logits, 10, [4])
    kept = [0, 1, 2, 3, 5, 6, 7, 8, 9]
    ids = torch.tensor(kept)[torch.randint(0, 9, (rows,), generator=generator)]
    assert (view.num_rows, view.vocab_size) == (rows, 10)
    torch.testing.assert_close(view.logsumexp(), logits[:, kept].logsumexp(1))
    torch.testing.assert_close(view.values_at(ids), logits[torch.arange(rows), ids])
    torch.testing.assert_close(view.nll(ids), view.logsumexp() - view.values_at(ids))
    assert torch.isinf(view.logits()[:, [4, 10, 11]]).all()
    torch.testing.assert_close(view.sum_over_vocab(view.logits().exp()), logits[:, kept].exp().sum(1))
    if rows:
        torch.testing.assert_close(view.maximum(), logits[:, kept].amax(1))


def test_excluded_columns_get_no_gradient_and_no_nan():
    logits = torch.randn(3, 6, requires_grad=True)
    DenseVocabView(logits, 5, [2]).nll(torch.tensor([0, 1, 3])).sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[:, [2, 5]] == 0).all()


def test_bernoulli_times_are_inside_the_clip_range():
    u = torch.linspace(0, 1 - 2**-53, 9, dtype=torch.float64)
    t, chance, weight = draw_times(NoisePlan(4, kind="bernoulli", clip_range=(0.3, 0.8)), u)
    torch.testing.assert_close(t, 0.3 + 0.5 * u)
    assert torch.equal(t, chance)
    torch.testing.assert_close(weight, 0.5 / t)


def test_objectives_refuse_what_they_cannot_do():
    with pytest.raises(ConfigError, match="block_diffusion, mdlm, ar"):
        make_objective("sedd2", plan=None, mask_id=1, vocab_size=4, seq_len=8)
    with pytest.raises(ConfigError, match="noise plan"):
        make_objective("mdlm", plan=None, mask_id=1, vocab_size=4, seq_len=8)
    with pytest.raises(ConfigError, match="does not divide"):
        make_objective("block_diffusion", plan=NoisePlan(3), mask_id=1, vocab_size=4, seq_len=8)
    with pytest.raises(ConfigError, match="mask_id=4"):
        make_objective("block_diffusion", plan=NoisePlan(4), mask_id=4, vocab_size=4, seq_len=8)
    with pytest.raises(ShapeError):
        DenseVocabView(torch.zeros(2, 3), 4, [])
