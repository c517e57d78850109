"""The ranks of test_engine_precision.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from engine_ranks import (
    CPU,
    SEED,
    SEQ,
    VOCAB,
    Case,
    cases_from,
    make_grid,
    make_model,
    make_objective,
    relative_errors,
    squares,
    start,
    stretch,
    training,
)


def synthetic_rows() -> Any:
    from bdtrain.data.synthetic import SyntheticSource

    return SyntheticSource(split="train", seq_len=SEQ, seed=SEED, vocab_size=VOCAB, tokens=SEQ * 4096)


def measure(rank: int, world: int, listed: list[dict[str, Any]], counts: list[int], steps: int) -> Any:
    """Errors of the accumulated gradients by number of micro-batches; loss curves of the ZeRO 1 cases."""
    alone = start()
    errors, curves = {}, {}
    for case in cases_from(listed):
        groups = make_grid(case)
        # A tensor-parallel rank rounds other partial sums than the serial twin does.
        if case.tp == 1:
            errors[case.layout] = {str(n): accumulate(case, groups, alone, n) for n in counts}
        if case.zero == 1:
            curves[case.layout] = curve(case, groups, steps)
    return {"errors": errors, "curves": curves}


def curves_alone(rank: int, world: int, steps: int) -> dict[str, list[float]]:
    """One process: fp32, bf16, and bf16 with other noise."""
    start()
    case = Case()
    groups = make_grid(case)
    return {
        "fp32": curve(case, groups, steps),
        "bf16": curve(replace(case, precision="bf16"), groups, steps),
        "other noise": curve(replace(case, precision="bf16"), groups, steps, seed=SEED + 1),
    }


def curve(case: Case, groups: Any, steps: int, seed: int = SEED) -> list[float]:
    case = replace(case, lr=3e-3, clip=1.0, micro=4)
    with training(case, groups, steps, source=synthetic_rows(), seed=seed) as run:
        assert all(result.applied for result in run.results)
        return [result.loss for result in run.results]


def accumulate(case: Case, groups: Any, alone: Any, count: int) -> dict[str, float]:
    """One step of ``count`` micro-batches on each rank, beside the float64 sum of their gradients.

    Returns:
        Relative error of the worst tensor, and the same of a sum in bfloat16.
    """
    from bdtrain.data.loader import Loader, split_rows
    from bdtrain.diffusion.keyed import NoiseKey, Purpose
    from bdtrain.diffusion.micro_batch import corrupt_rows
    from bdtrain.model.forward import forward_losses

    dp = groups.dp.size()
    case = replace(case, rows=count * dp, micro=1, clip=None)
    objective = make_objective(case)
    with Loader(
        synthetic_rows(),
        global_batch_size=case.rows,
        dp_rank=groups.dp.rank(),
        dp_size=dp,
        prefetch_batches=0,
    ) as loader:
        rows = split_rows(loader.batch(0), 1)
    micro_batches = [
        corrupt_rows(
            objective,
            row,
            key=NoiseKey(SEED, Purpose.TRAIN, 0),
            global_batch_size=case.rows,
            copies=1,
            device=CPU,
        )
        for row in rows
    ]
    tokens = case.rows * SEQ  # no padding and no BOS here: all count
    model = make_model(replace(case, tp=1, pp=1, sp=False), alone)
    named = dict(model.named_parameters())
    exact = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in named.items()}
    naive = {name: torch.zeros(p.shape, dtype=torch.bfloat16) for name, p in named.items()}
    for micro_batch in micro_batches:
        model.zero_grad()
        (forward_losses(model, objective, micro_batch).sum() * (dp / tokens)).backward()
        for name, p in named.items():
            exact[name] += p.grad.double()
            naive[name] += p.grad.bfloat16()
    naive_errors = relative_errors({name: squares(naive[name], value) for name, value in exact.items()})
    for value in exact.values():
        dist.all_reduce(value, group=groups.dp)
        value /= dp
    with training(case, groups, 1, source=synthetic_rows()) as run:
        errors = relative_errors(
            {
                f.name: squares(run.gradients[f.name][: f.count], stretch(exact[f.name], f))
                for f in run.engine.fragments()
            }
        )
    assert len(micro_batches) == count and errors.keys() == naive_errors.keys()
    return {"ours": max(errors.values()), "bf16 sum": max(naive_errors.values())}
