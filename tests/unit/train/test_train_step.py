"""The step through Megatron's schedule and DeepSpeed equals a plain torch loop."""

import pytest
import torch
import torch.nn.functional as F

from bdtrain.data.loader import Batch, split_rows
from bdtrain.diffusion.keyed import NoiseKey, Purpose
from bdtrain.diffusion.objectives.build import make_objective
from bdtrain.diffusion.plan import NoisePlan
from bdtrain.errors import DataError, RankError, RefitError
from bdtrain.model.build import build_model
from bdtrain.model.init import global_parameters
from bdtrain.parallel.engine import AVERAGE_KEY, Engine, deepspeed_settings
from bdtrain.parallel.groups import prepare_deepspeed
from bdtrain.parallel.mpu import MegatronGrid
from bdtrain.testing import single_process_groups, tiny_model_config
from bdtrain.train.optim import AveragedAdamW, parameter_groups
from bdtrain.train.step import train_step

MASK, VOCAB, SEQ, ROWS, CLIP, LR, DECAY, AVERAGE = 4, 29, 16, 6, 0.05, 0.03, 0.1, 0.8
# Adam divides by the root of the squared gradient: without this, rounding of a tiny one becomes a whole step.
EPSILON = 1e-3


@pytest.fixture(scope="module")
def groups():
    prepare_deepspeed()
    with single_process_groups() as collection:
        yield collection


def make_batch(step):
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(6, VOCAB, (ROWS, SEQ), generator=generator)
    documents = torch.zeros(ROWS, SEQ, dtype=torch.int32)
    documents[1, 7:], documents[2, 3:], documents[2, 11:] = 1, 1, 2
    documents[3, 10:] = -1
    counted = documents >= 0
    counted[4, 0] = False  # a BOS
    index = torch.arange(ROWS)
    return Batch(tokens, documents, counted, step * ROWS + index, index)


def make_engine(groups, *, micro_batch_size, zero_stage):
    model = build_model(tiny_model_config(), pg_collection=groups, mask_id=MASK, seed=3)
    optimizer = AveragedAdamW(
        parameter_groups(global_parameters(model), weight_decay=DECAY), ema_decay=AVERAGE, lr=LR, eps=EPSILON
    )
    settings = deepspeed_settings(
        micro_batch_size=micro_batch_size, data_parallel=1, zero_stage=zero_stage, grad_clip_norm=CLIP
    )
    return Engine(model, optimizer, settings=settings, grid=MegatronGrid(), zero_stage=zero_stage)


def make_parts(algo="block_diffusion"):
    return make_objective(algo, plan=NoisePlan(4), mask_id=MASK, vocab_size=VOCAB, seq_len=SEQ)


def our_steps(groups, objective, *, micro_batch_size, copies, steps, zero_stage=1):
    engine = make_engine(groups, micro_batch_size=micro_batch_size, zero_stage=zero_stage)
    results = [
        train_step(
            engine,
            objective,
            make_batch(step),
            seed=11,
            step=step,
            lr=LR * (step + 1),
            global_batch_size=ROWS,
            micro_batch_size=micro_batch_size,
            noise_copies=copies,
            device=torch.device("cpu"),
        )
        for step in range(steps)
    ]
    return engine, results


def plain_steps(groups, objective, *, copies, steps):
    """One batch at a time: dense logits of all rows, cross-entropy, torch's AdamW, average by hand."""
    model = build_model(tiny_model_config(), pg_collection=groups, mask_id=MASK, seed=3)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}],
        lr=LR,
        eps=EPSILON,
    )
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses, norms = [], []
    for step in range(steps):
        batch = make_batch(step)
        layout = objective.layout(batch.documents)
        c = objective.corrupt(
            batch.tokens,
            layout,
            batch.counted,
            key=NoiseKey(11, Purpose.TRAIN, step),
            sample_index=batch.sample_index,
            batch_index=batch.batch_index,
            global_batch=ROWS,
            copies=copies,
        )
        streams = [] if c.noisy is None else [c.noisy.flatten(1)]
        streams += [] if c.clean is None else [c.clean]
        noisy = 0 if c.noisy is None else copies
        everything = torch.ones_like(c.rows)
        logits = model(
            torch.cat(streams, 1), layout, noisy_copies=noisy, clean=c.clean is not None, rows=everything
        ).logits()[:, :VOCAB]
        logits = logits.index_fill(1, torch.tensor([MASK]), float("-inf"))
        targets = torch.where(c.rows, c.targets, 6).flatten()
        nll = F.cross_entropy(logits, targets, reduction="none").view(c.rows.shape)
        loss = (nll * c.weight * c.rows).sum() / (c.counted.sum() * c.rows.shape[1])
        for group in optimizer.param_groups:
            group["lr"] = LR * (step + 1)
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        optimizer.step()
        losses.append(float(loss.detach()))
        keep = min(AVERAGE, (2 + step) / (11 + step))
        for name, p in model.named_parameters():
            average[name] = keep * average[name] + (1 - keep) * p.detach()
    return model, average, losses, norms


@pytest.mark.parametrize(
    ("algo", "micro_batch_size", "copies", "zero_stage"),
    [
        ("block_diffusion", 6, 1, 1),
        ("block_diffusion", 2, 3, 1),
        ("block_diffusion", 3, 1, 2),
        ("mdlm", 2, 2, 1),
        ("ar", 3, 1, 1),
    ],
)
def test_step_equals_plain_torch(groups, algo, micro_batch_size, copies, zero_stage):
    objective = make_parts(algo)
    engine, results = our_steps(
        groups,
        objective,
        micro_batch_size=micro_batch_size,
        copies=copies,
        steps=4,
        zero_stage=zero_stage,
    )
    model, average, losses, norms = plain_steps(groups, objective, copies=copies, steps=4)
    assert [r.loss for r in results] == pytest.approx(losses, rel=1e-4)
    assert [r.grad_norm for r in results] == pytest.approx(norms, rel=1e-4)
    assert min(norms) > CLIP  # clipping was at work
    assert all(r.applied for r in results)
    ours = dict(engine.module.named_parameters())
    for name, theirs in model.named_parameters():
        torch.testing.assert_close(ours[name], theirs, rtol=1e-4, atol=2e-5)
    with engine.averaged_weights() as there_is_one:
        assert there_is_one
        for name, parameter in engine.module.named_parameters():
            torch.testing.assert_close(parameter.data, average[name], rtol=1e-4, atol=2e-5)
    for name, theirs in model.named_parameters():
        torch.testing.assert_close(ours[name], theirs, rtol=1e-4, atol=2e-5)
    engine.close()


class Poisoned:
    """An objective whose loss is not a number at some steps."""

    def __init__(self, objective, bad):
        self.objective, self.bad, self.calls = objective, bad, 0

    def __getattr__(self, name):
        return getattr(self.objective, name)

    def loss(self, view, targets, weight):
        self.calls += 1
        loss = self.objective.loss(view, targets, weight)
        return loss * float("nan") if self.calls - 1 in self.bad else loss


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_step_that_is_not_finite_changes_nothing(groups, zero_stage):
    # Two micro-batches a step; only the second one of step 1 is poisoned.
    objective = Poisoned(make_parts(), bad={3})
    engine = make_engine(groups, micro_batch_size=3, zero_stage=zero_stage)
    snapshots, results = [], []
    for step in range(3):
        results.append(
            train_step(
                engine,
                objective,
                make_batch(step),
                seed=11,
                step=step,
                lr=LR,
                global_batch_size=ROWS,
                micro_batch_size=3,
                noise_copies=1,
                device=torch.device("cpu"),
            )
        )
        weights = {n: p.detach().clone() for n, p in engine.module.named_parameters()}
        states = [s[AVERAGE_KEY].clone() for s in engine._client_optimizer.state.values()]
        snapshots.append((weights, states))
    assert [r.applied for r in results] == [True, False, True]
    assert results[1].grad_norm == float("inf")
    (before, average_before), (after, average_after), (last, _) = snapshots
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert all(torch.equal(a, b) for a, b in zip(average_before, average_after, strict=True))
    assert not all(torch.equal(after[n], last[n]) for n in after)
    assert all(torch.isfinite(p).all() for p in last.values())
    engine.close()


def test_an_error_gives_the_weights_back_unless_the_peers_may_be_elsewhere(groups, monkeypatch):
    """To publish weights is a collective: begun by one rank alone, it would never end."""
    engine, _ = our_steps(groups, make_parts(), micro_batch_size=3, copies=1, steps=2)
    weights = {name: value.detach().clone() for name, value in engine.module.named_parameters()}
    published = []
    publish = engine._state.publish_masters
    monkeypatch.setattr(engine._state, "publish_masters", lambda: published.append(1) or publish())
    masters = [master.detach().clone() for master in engine._state.masters()]
    alone = [(1, error, True) for error in (RefitError, DataError, OSError, RuntimeError, KeyboardInterrupt)]
    several = [
        (2, error, False) for error in (RankError, DataError, OSError, RuntimeError, KeyboardInterrupt)
    ]
    for ranks, error, given_back in [*alone, *several, (2, RefitError, True)]:
        engine._ranks = ranks
        published.clear()
        with pytest.raises(error), engine.averaged_weights():
            assert any(not torch.equal(weights[n], p) for n, p in engine.module.named_parameters())
            raise error("in the middle of it")
        assert len(published) == 1 + given_back, (ranks, error)
        if not given_back:
            engine._set_masters(masters)
        assert all(torch.equal(weights[n], p) for n, p in engine.module.named_parameters())
    engine.close()


def test_no_average_before_the_first_update(groups):
    engine = make_engine(groups, micro_batch_size=3, zero_stage=1)
    with engine.averaged_weights() as there_is_one:
        assert not there_is_one
    engine.close()


def test_split_keeps_every_row_once():
    batch = make_batch(0)
    parts = split_rows(batch, 4)
    assert [p.tokens.shape[0] for p in parts] == [4, 2]
    assert torch.equal(torch.cat([p.tokens for p in parts]), batch.tokens)
    assert torch.equal(torch.cat([p.sample_index for p in parts]), batch.sample_index)
