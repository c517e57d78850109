"""Gradients of a checkpoint: last layer by block against autograd, the whole against stored gradients."""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bdtrain.config import RunConfig, dump_resolved
from bdtrain.data.build import build_source
from bdtrain.data.loader import make_batch
from bdtrain.data.tokenizer import TokenizerInfo
from bdtrain.diffusion.gradient_variance import GradientRecords
from bdtrain.diffusion.keyed import NoiseKey, Purpose
from bdtrain.diffusion.micro_batch import corrupt_rows
from bdtrain.diffusion.objectives.build import make_objective
from bdtrain.diffusion.plan import NoisePlan, evaluation_plan
from bdtrain.diffusion.variance import BlockRecords
from bdtrain.errors import NonFiniteError, RefitError
from bdtrain.refit.candidates import SearchSettings
from bdtrain.refit.search import search
from bdtrain.testing import single_process_groups, tiny_model_config

MASK, VOCAB, BLOCK, SEQ = 4, 29, 4, 16
CPU = torch.device("cpu")
INFO = TokenizerInfo(
    vocab_size=VOCAB, sha256="0" * 64, pad_id=0, bos_id=1, eos_id=2, unk_id=3, mask_id=MASK, sep_id=5
)


@pytest.fixture(scope="module")
def model():
    """A tiny float64 model whose norms are not 1."""
    from bdtrain.model.build import build_model

    with single_process_groups() as groups:
        built = build_model(
            tiny_model_config(), pg_collection=groups, mask_id=MASK, seed=7, dtype=torch.float64
        )
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for name, parameter in built.named_parameters():
                if "layernorm" in name:
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        yield built


@dataclass
class Rows:
    """Rows of random tokens with documents of random lengths."""

    count: int = 6
    seed: int = 0
    tokenizer_info = INFO

    def all(self):
        rng = np.random.default_rng(self.seed)
        rows = rng.integers(MASK + 2, VOCAB, (self.count, SEQ))
        rows[rng.random(rows.shape) < 0.1] = INFO.eos_id
        return rows

    def batches(self, batch_size, *, dp_rank=0, dp_size=1):
        rows = self.all()
        for start in range(0, self.count, batch_size):
            numbers = range(start, min(start + batch_size, self.count))
            yield make_batch([rows[i] for i in numbers], INFO, numbers, range(len(numbers)))


def objective_of(plan: NoisePlan):
    return make_objective("block_diffusion", plan=plan, mask_id=MASK, vocab_size=VOCAB, seq_len=SEQ)


def measured(model, rows, **changes) -> GradientRecords:
    from bdtrain.refit.gradients import measure_gradients

    arguments = {"batch_size": 4, "seed": 5, "device": CPU, **changes}
    return measure_gradients(model, objective_of(evaluation_plan(BLOCK)), rows, **arguments)


def block_matrices(model, rows, *, seed=5, batch_size=4) -> list[torch.Tensor]:
    """The gradient of each block's summed nll with respect to the head's weight, by autograd."""
    from bdtrain.model.transformer import assemble_streams

    objective = objective_of(evaluation_plan(BLOCK))
    found = []
    for batch in rows.batches(batch_size):
        micro = corrupt_rows(
            objective,
            batch,
            key=NoiseKey(seed=seed, purpose=Purpose.REFIT),
            global_batch_size=batch_size,
            copies=1,
            device=CPU,
        )
        corrupted = micro.corrupted
        view = model(
            assemble_streams(corrupted.noisy, corrupted.clean),
            micro.layout,
            noisy_copies=1,
            clean=True,
            rows=corrupted.rows,
        )
        logits = view.logits()
        nll = torch.nn.functional.cross_entropy(logits, corrupted.targets[corrupted.rows], reduction="none")
        row, position = corrupted.rows[:, 0].nonzero(as_tuple=True)
        owner = list(zip(row.tolist(), micro.layout.block_start[row, position].tolist(), strict=True))
        for block in sorted(set(owner)):
            inside = torch.tensor([one == block for one in owner])
            (gradient,) = torch.autograd.grad(nll[inside].sum(), model.output_layer.weight, retain_graph=True)
            found.append(gradient)
    return found


@pytest.mark.parametrize("max_logits", [1, 200, 1 << 20])
def test_last_layer_norms_are_those_of_autograd_block_by_block(model, max_logits):
    rows = Rows()
    records = measured(model, rows, max_logits=max_logits)
    expected = torch.stack([matrix.square().sum() for matrix in block_matrices(model, rows)])
    assert records.blocks.blocks == len(expected) > 20
    np.testing.assert_allclose(records.square, expected.numpy(), rtol=1e-10)
    assert len(set(records.blocks.maskable.tolist())) > 2


def test_sketches_keep_the_inner_products_of_the_blocks_gradients(model):
    rows = Rows(count=2)
    matrices = torch.stack(block_matrices(model, rows, batch_size=2)).flatten(1)
    exact = (matrices @ matrices.T).numpy()
    records = measured(model, rows, batch_size=2, width=4096)
    found = records.sketch.astype(np.float64) @ records.sketch.T
    norms = np.sqrt(np.diag(exact))
    assert np.abs(found - exact).max() < 5 * (8 / 4096) ** 0.5 * np.outer(norms, norms).max()


def test_masks_and_losses_are_those_of_the_measurement_of_losses(model):
    from bdtrain.refit.measure import measure_blocks

    rows = Rows()
    plain = measure_blocks(
        model, objective_of(evaluation_plan(BLOCK)), rows, batch_size=4, seed=5, device=CPU
    )
    ours = measured(model, rows).blocks
    for name, column in plain.to_arrays().items():
        assert getattr(ours, name).tobytes() == column.tobytes()


def test_measuring_keeps_the_mode_and_leaves_no_gradients(model):
    for training in (True, False):
        model.train(training)
        measured(model, Rows(count=2))
        assert model.training is training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_split_model_and_an_objective_without_noise_are_refused(model):
    from bdtrain.refit.gradients import measure_gradients

    def group(size):
        return SimpleNamespace(size=lambda: size)

    split = SimpleNamespace(pg_collection=SimpleNamespace(tp=group(2), pp=group(1)))
    objective = objective_of(evaluation_plan(BLOCK))
    with pytest.raises(RefitError, match="tp=2, pp=1"):
        measure_gradients(split, objective, Rows(), batch_size=4, seed=0, device=CPU)
    plain = make_objective("ar", plan=None, mask_id=MASK, vocab_size=VOCAB, seq_len=SEQ)
    with pytest.raises(RefitError, match="algo=ar"):
        measure_gradients(model, plain, Rows(), batch_size=4, seed=0, device=CPU)


def made_records(*, spread, direction, blocks=4000, sequences=50) -> GradientRecords:
    """Gradients along some axes: ``spread(k)`` of the loss and ``direction(k)`` of the gradient."""
    rng = np.random.default_rng(0)
    k = rng.permutation(np.arange(blocks) % BLOCK) + 1
    nll = k * (3.0 + spread(k) * rng.standard_normal(blocks))
    gradient = (direction(k) * rng.standard_normal(blocks))[:, None] * np.ones(2) * k[:, None]
    sequence = np.arange(blocks) // (blocks // sequences)
    return GradientRecords(
        BlockRecords(sequence, np.full(blocks, BLOCK), k, nll), (gradient**2).sum(1), gradient
    )


def reported(records: GradientRecords, **settings):
    from bdtrain.refit.gradients import compare_variances

    result = search(records.blocks, NoisePlan(BLOCK), SearchSettings(bootstrap_draws=60, **settings))
    return compare_variances(records, result), result


def test_plans_whose_gradient_spreads_as_the_loss_correlate_fully_and_others_do_not():
    same, result = reported(made_records(spread=lambda k: 1 / k, direction=lambda k: 5 / k))
    assert same.pearson > 0.99 and same.spearman > 0.97
    assert [plan.name for plan in same.plans] == [one.name for one in result.candidates]
    np.testing.assert_allclose(
        [plan.nelbo for plan in same.plans], [one.variance for one in result.candidates], rtol=1e-12
    )
    # The variance along the two axes is 2 * 25 times that of the loss.
    ratio = [plan.gradient / plan.nelbo for plan in same.plans]
    assert np.abs(np.array(ratio) / 50 - 1).max() < 0.15
    opposite, _ = reported(
        made_records(
            spread=lambda k: np.where(k < 3, 1.0, 0.1), direction=lambda k: np.where(k < 3, 0.1, 9.0)
        )
    )
    assert opposite.pearson < 0.5 < same.pearson
    assert opposite.least_gradient != opposite.least_nelbo
    assert opposite.excess > 0.1 and abs(same.excess) < 0.05
    assert 0 < same.pearson_error < 0.1


def test_by_count_squares_are_means_over_the_blocks_of_that_count():
    records = made_records(spread=lambda k: 1 / k, direction=lambda k: 5 / k)
    report, _ = reported(records)
    for one in report.counts:
        inside = records.blocks.masked == one.masked_low
        assert one.masked_low == one.masked_high and one.blocks == inside.sum()
        assert one.square == pytest.approx(records.square[inside].mean())
        mean = records.sketch[inside].astype(float).mean(0)
        size = inside.sum()
        assert one.mean_square == pytest.approx(
            (size * (mean @ mean) - records.square[inside].mean()) / (size - 1)
        )
        assert one.nll_variance == pytest.approx(records.blocks.nll[inside].var(ddof=1))
        # Both numbers of a gradient are one normal draw: its square spreads by sqrt(2) of its mean.
        expected = one.variance * math.sqrt(2 / size)
        assert one.variance_error == pytest.approx(expected, rel=0.4)
    assert json.dumps(report.to_dict(), allow_nan=False)


def test_a_search_of_too_few_plans_has_no_correlation():
    made = made_records(spread=lambda k: 1 / k, direction=lambda k: 1 / k)
    report, result = reported(made, mode="counts", widths=())
    assert len(result.candidates) == len(report.plans) == 2
    assert report.pearson is report.spearman_error is None
    assert "no correlation" in report.describe()


def test_fitted_counts_are_compared_beside_the_clip_ranges():
    made = made_records(spread=lambda k: 1 / k, direction=lambda k: 5 / k)
    (counts, result), (ranges, _) = reported(made, mode="counts"), reported(made)
    assert [plan.name for plan in counts.plans[:2]] == [one.name for one in result.candidates]
    # The first one is the plan in use, of both.
    assert counts.plans[2:] == ranges.plans[1:] and counts.plans[0] == ranges.plans[0]
    assert counts.pearson is not None and counts.pearson > 0.99
    # Which one is best is a matter of the search.
    assert {counts.least_nelbo, counts.least_gradient} <= {one.name for one in result.candidates}


def stored_gradients(model, plan, batches, *, draws, seed) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """All gradients [batches, draws, entries] and losses, one backward pass each, and each entry's name."""
    from bdtrain.model.forward import forward_losses

    objective = objective_of(plan)
    gradients, losses = [], []
    for number, batch in enumerate(batches):
        for draw in range(draws):
            micro = corrupt_rows(
                objective,
                batch,
                key=NoiseKey(seed=seed, purpose=Purpose.TRAIN, step=number * draws + draw),
                global_batch_size=len(batch.tokens),
                copies=1,
                device=CPU,
            )
            loss = forward_losses(model, objective, micro).sum() / micro.corrupted.counted.sum()
            parts = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
            gradients.append(
                torch.cat(
                    [
                        torch.zeros(p.numel()) if g is None else g.flatten()
                        for g, p in zip(parts, model.parameters(), strict=True)
                    ]
                ).numpy()
            )
            losses.append(float(loss.detach()))
    names = [name for name, p in model.named_parameters() for _ in range(p.numel())]
    shape = (len(batches), draws)
    return np.reshape(gradients, (*shape, -1)), np.reshape(losses, shape), names


def pairwise(x: np.ndarray) -> tuple[float, float, float]:
    """Total, given data and |mean|^2 from all pairs of draws, x [batches, draws, entries]."""
    batches, draws, _ = x.shape
    pairs = [(i, j) for i in range(batches) for j in range(i)]
    across = [
        ((x[i, a] - x[j, b]) ** 2).sum() / 2 for i, j in pairs for a in range(draws) for b in range(draws)
    ]
    given = [
        ((x[i, a] - x[i, b]) ** 2).sum() / 2 for i in range(batches) for a in range(draws) for b in range(a)
    ]
    square = [(x[i, a] * x[j, b]).sum() for i, j in pairs for a in range(draws) for b in range(draws)]
    return float(np.mean(across)), float(np.mean(given)) if given else math.nan, float(np.mean(square))


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("micro", [3, 2])
def test_full_gradient_variances_are_those_of_stored_gradients(model, draws, micro):
    from bdtrain.refit.full_gradients import measure_plan

    plan = NoisePlan(BLOCK, clip_range=(0.3, 0.8))
    batches = list(Rows(count=12).batches(3))
    width = 1 << 16  # more than any group has entries: sketches are exact, and so is the jackknife
    found = measure_plan(
        model,
        objective_of(plan),
        plan,
        batches,
        draws=draws,
        seed=3,
        noise_copies=1,
        micro_batch_size=micro,
        device=CPU,
        width=width,
    )
    gradients, losses, names = stored_gradients(model, plan, batches, draws=draws, seed=3)
    assert found.loss == pytest.approx(losses.mean(), rel=1e-10)
    parts = {
        "embedding": [name.startswith("embedding.") for name in names],
        "layers": [name.startswith("decoder.") for name in names],
        "head": [name.startswith(("final_layernorm.", "output_layer.")) for name in names],
    }
    assert np.sum(list(parts.values()), axis=0).tolist() == [1] * len(names)
    cases = [(found.gradient, gradients), (found.losses, losses[..., None])]
    cases += [(found.groups[name], gradients[..., np.array(inside)]) for name, inside in parts.items()]
    for ours, stored in cases:
        total, given, square = pairwise(stored)
        assert ours.total == pytest.approx(total, rel=1e-8)
        assert ours.mean_square == pytest.approx(square, rel=1e-7, abs=1e-12)
        if draws == 1:
            assert ours.given_data is ours.given_data_error is None
        else:
            assert ours.given_data == pytest.approx(given, rel=1e-8)
        left = np.array([pairwise(np.delete(stored, m, axis=0)) for m in range(len(stored))])
        errors = np.sqrt(0.75 * ((left - left.mean(0)) ** 2).sum(0))
        assert ours.total_error == pytest.approx(errors[0], rel=1e-6)
        assert ours.mean_square_error == pytest.approx(errors[2], rel=1e-6)
        if draws > 1:
            assert ours.given_data_error == pytest.approx(errors[1], rel=1e-6)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_ratios_of_plans_are_at_the_comparison_scale_and_paired(model):
    from bdtrain.refit.full_gradients import measure_plan

    batches = list(Rows(count=8).batches(2))

    def run(**changes):
        plan = NoisePlan(BLOCK, clip_range=(0.3, 0.8), **changes)
        return measure_plan(
            model,
            objective_of(plan),
            plan,
            batches,
            draws=2,
            seed=3,
            noise_copies=1,
            micro_batch_size=2,
            device=CPU,
            width=64,
        )

    # The reference weighting is the elbo weighting over the range's width: the same plan at the scale.
    ratio, error = run(weighting="reference").ratio_to(run(), 1)
    assert ratio == pytest.approx(1.0, rel=1e-6) and error == pytest.approx(0.0, abs=1e-6)
    ratio, error = run(kind="bernoulli").ratio_to(run(), 1)
    assert ratio != 1.0 and error > 0.0


def test_what_has_no_variance_is_refused(model):
    from bdtrain.refit.full_gradients import measure_plan, take_batches
    from bdtrain.refit.gradient_sums import GradientSums

    plan = NoisePlan(BLOCK)
    settings = {"seed": 0, "noise_copies": 1, "micro_batch_size": 2, "device": CPU}
    objective = objective_of(plan)
    with pytest.raises(RefitError, match="--draws 0"):
        measure_plan(model, objective, plan, [], draws=0, **settings)
    with pytest.raises(RefitError, match="1 batch has no variance"):
        measure_plan(model, objective, plan, Rows(count=2).batches(2), draws=1, **settings)
    source = SimpleNamespace(num_samples=7)
    with pytest.raises(RefitError, match="need 8 rows, and the split has 7"):
        take_batches(source, batches=4, batch_size=2)
    with pytest.raises(RefitError, match="2 batches"):
        take_batches(source, batches=1, batch_size=2)
    sums = GradientSums(dict(model.named_parameters()))
    with pytest.raises(NonFiniteError, match="batch 0"):
        sums.add(math.nan)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, model) -> Path:
    """A model folder of a run on synthetic data."""
    from bdtrain.checkpoint.weights import save_model
    from bdtrain.model.build import build_model
    from bdtrain.model.weights import full_state

    config = RunConfig.model_validate(
        {
            "run": {"name": "tiny", "folder": "unused"},
            "data": {"kind": "synthetic", "seq_len": SEQ, "synthetic_tokens": 32768},
            "model": tiny_model_config(vocab_size=None).model_dump(),
            "diffusion": {"block_size": BLOCK, "plan": {"clip_range": [0.3, 0.8]}},
            "train": {"steps": 1, "global_batch_size": 4},
        }
    )
    info = build_source(config.data, split="valid", seed=config.run.seed).tokenizer_info
    config = config.model_copy(
        update={"model": config.model.model_copy(update={"vocab_size": info.vocab_size})}
    )
    built = build_model(config.model, pg_collection=model.pg_collection, mask_id=info.mask_id)
    folder = tmp_path_factory.mktemp("saved") / "model"
    facts = {
        "step": 9,
        "noise_plan": NoisePlan(BLOCK, clip_range=(0.3, 0.8)).to_dict(),
        "tokenizer": {"sha256": info.sha256, "mask_id": info.mask_id},
    }
    save_model(folder, full_state(built), config_yaml=dump_resolved(config), facts=facts, tokenizer=None)
    return folder


def test_the_report_of_a_refit_has_each_block_size_or_says_what_went_wrong(saved):
    from bdtrain.refit.gradients import report_gradients
    from bdtrain.validation.evaluate import load_saved

    opened, model = load_saved(saved, device=CPU)
    config = opened.config
    source = build_source(config.data, split="valid", seed=config.run.seed)
    records = made_records(spread=lambda k: 1 / k, direction=lambda k: 1 / k)
    result = search(records.blocks, NoisePlan(BLOCK), SearchSettings(bootstrap_draws=20))
    arguments = {"batch_size": 4, "seed": 1, "device": CPU}
    report = report_gradients(model, config.diffusion, config.data, source, {BLOCK: result}, **arguments)
    assert report[str(BLOCK)]["blocks"] >= 64 and -1 <= report[str(BLOCK)]["pearson"] <= 1
    assert json.dumps(report, allow_nan=False)
    wrong = report_gradients(model, config.diffusion, config.data, source, {5: result}, **arguments)
    assert "block_size=5 does not divide" in wrong["5"]["error"]


def command():
    """``main`` of the tool."""
    path = Path(__file__).parents[3] / "tools" / "measure_variance.py"
    spec = importlib.util.spec_from_file_location("measure_variance_tool", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_the_command_measures_plans_and_writes_json(saved, tmp_path, capsys):
    out = tmp_path / "new" / "variance.json"
    words = ["--plan", "current", "--plan", "full", "--plan", "bernoulli:0.3,0.8"]
    code = command()(
        ["--checkpoint", str(saved), *words, "--batches", "3", "--batch-size", "2", "--json", str(out)]
    )
    printed = capsys.readouterr().out
    assert code == 0
    record = json.loads(out.read_text())
    assert [one["name"] for one in record["plans"]] == [
        "clip 0.3-0.8",
        "full range",
        "clip 0.3-0.8, bernoulli",
    ]
    assert all(name in printed for name in ("clip 0.3-0.8, bernoulli", "full range", "step 9"))
    assert record["batch_size"] == 2 and record["draws"] == 2 and record["plans"][0]["scale"] == 2.0
    for one in record["plans"]:
        groups = one["groups"].values()
        assert sum(group["total"] for group in groups) == pytest.approx(one["gradient"]["total"], rel=1e-8)
        assert 0 < one["gradient"]["given_data"] < one["gradient"]["total"] * 1.5
    assert record["plans"][0]["versus_first"]["total"] == {"ratio": 1.0, "error": 0.0}


def test_the_command_refuses_an_unknown_plan_with_the_exit_code_of_a_refit(saved, capsys):
    assert command()(["--checkpoint", str(saved), "--plan", "wide"]) == RefitError.exit_code
    assert "give full, clip:LOW,HIGH" in capsys.readouterr().err
