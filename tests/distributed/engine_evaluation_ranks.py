"""The ranks of test_engine_evaluation.py."""

from __future__ import annotations

from typing import Any

import torch
from engine_ranks import (
    CPU,
    SEED,
    Case,
    RaggedRows,
    assemble,
    cases_from,
    make_config,
    make_grid,
    make_model,
    same_bits,
    snapshot,
    start,
    training,
)
from plain_twin import dense_losses, plain_training

STEPS, DRAWS, BATCH, SAMPLED, SAMPLES = 2, 2, 4, 12, 3


def evaluate(rank: int, world: int, listed: list[dict[str, Any]]) -> dict[str, Any]:
    """The averaged weights of each case measured, and a sample of its weights, beside the serial model's."""
    from bdtrain.model.weights import load_full_state

    alone = start()
    serial = make_model(Case(), alone)
    twin = plain_training(Case(), alone, STEPS)
    make_grid(Case())  # no stages: the serial model goes through the schedule, too
    told: dict[str, Any] = {"cases": []}
    for name in ("master", "ema"):
        load_full_state(serial, twin.state[name])
        told[f"plain {name}"] = plain_nelbo(serial)
        told[f"serial {name}"] = likelihood(serial)
    told["serial blocks"] = blocks(serial)
    for case in cases_from(listed):
        groups = make_grid(case)
        with training(case, groups, STEPS) as run:
            before = snapshot(run)
            with run.engine.averaged_weights() as averaged:
                measured = likelihood(run.engine.module)
                measured_blocks = blocks(run.engine.module)
            restored = same_bits(before, snapshot(run))
            load_full_state(serial, assemble(run))
            told["cases"].append(
                {
                    "averaged": averaged,
                    "ema": measured,
                    "blocks": measured_blocks,
                    "restored": restored,
                    "master": likelihood(run.engine.module),
                    "sample": sample(run.engine.module, case),
                    "serial_sample": sample(serial, Case()),
                    "untouched": same_bits(before, snapshot(run)),
                }
            )
    return told


def reported_objective() -> Any:
    from bdtrain.diffusion.build import build_objective, reported_plan

    config = make_config(Case())
    return build_objective(
        config.diffusion, config.data, RaggedRows().tokenizer_info, reported_plan(config.diffusion)
    )


def likelihood(model: Any) -> dict[str, Any]:
    from bdtrain.data.loader import ValidationSet
    from bdtrain.validation.likelihood import evaluate_likelihood

    source = RaggedRows()
    found = evaluate_likelihood(
        model,
        reported_objective(),
        ValidationSet(source),
        batch_size=BATCH,
        seed=SEED,
        replicates=DRAWS,
        device=CPU,
        token_bytes=torch.from_numpy(source.byte_lengths),
        exact=False,
    ).to_dict()
    return {name: value for name, value in found.items() if name != "seconds"}


def blocks(model: Any) -> dict[str, list[float]]:
    """Columns of the records of a re-fit."""
    from bdtrain.data.loader import ValidationSet
    from bdtrain.refit.measure import measure_blocks

    found = measure_blocks(
        model, reported_objective(), ValidationSet(RaggedRows()), batch_size=BATCH, seed=SEED, device=CPU
    )
    return {name: column.tolist() for name, column in found.to_arrays().items()}


@torch.no_grad()
def plain_nelbo(model: Any) -> float:
    """Weighted nats of all rows at once, mean over the draws, by all counted tokens."""
    from bdtrain.data.loader import make_batch
    from bdtrain.diffusion.keyed import NoiseKey, Purpose

    source, objective = RaggedRows(), reported_objective()
    numbers = range(source.num_samples)
    batch = make_batch([source.row(n) for n in numbers], source.tokenizer_info, numbers, numbers)
    layout = objective.layout(batch.documents)
    corrupted = objective.corrupt(
        batch.tokens,
        layout,
        batch.counted,
        key=NoiseKey(SEED, Purpose.EVALUATE),
        sample_index=batch.sample_index,
        batch_index=batch.batch_index,
        global_batch=len(numbers),
        copies=DRAWS,
    )
    losses = dense_losses(model, layout, corrupted).double()
    return (losses.sum() / DRAWS / corrupted.counted.sum()).item()


def sample(model: Any, case: Case) -> list[list[int] | None]:
    """Tokens of some samples with other draws."""
    from bdtrain.validation.generation import RunSampler

    config = make_config(case, validation={"sample_tokens": SAMPLED})
    sampler = RunSampler(config, RaggedRows().tokenizer_info)
    found = [sampler.sample(model, step) for step in range(SAMPLES)]
    return [None if one is None else one.tokens for one in found]
