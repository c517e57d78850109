"""The ranks of test_engine_layouts.py."""

from __future__ import annotations

from typing import Any

from engine_ranks import (
    ROWS,
    Case,
    RaggedRows,
    begin,
    cases_from,
    compare,
    make_grid,
    start,
    take_step,
    training,
)
from plain_twin import plain_training

STEPS, RECOMPUTED_STEPS = 5, 2
SPLIT = (Case(tp=2), Case(tp=2, sp=True), Case(tp=2, sp=True, zero=3))


def compare_with_plain_torch(rank: int, world: int, listed: list[dict[str, Any]]) -> dict[str, Any]:
    """Five steps of each case beside plain torch, and what happens without completion or without a mark."""
    alone = start()
    twins: dict[Any, Any] = {}
    cases = []
    for case in cases_from(listed):
        groups = make_grid(case)
        if case.data not in twins:
            twins[case.data] = plain_training(case, alone, STEPS)
        steps = STEPS if case.recompute == "none" else RECOMPUTED_STEPS
        with training(case, groups, steps) as run:
            cases.append(compare(run, twins[case.data]))
    return {
        "cases": cases,
        "incomplete": [leave_out_completion(case, alone) for case in SPLIT],
        "unmarked": [forget_a_mark(case) for case in SPLIT[:2]],
        "rows": describe_rows(),
    }


def leave_out_completion(case: Case, alone: Any) -> dict[str, Any]:
    """One step with gradients of replicated parameters as each rank found them."""
    import bdtrain.parallel.engine as engine

    groups = make_grid(case)
    complete = engine.complete_partial_gradients
    engine.complete_partial_gradients = lambda state, group: None
    try:
        with training(case, groups, 1) as run:
            return compare(run, plain_training(case, alone, 1))
    finally:
        engine.complete_partial_gradients = complete


def forget_a_mark(case: Case) -> list[float]:
    """The gradient norm of a step, and of one whose model does not say that one kind of matrix is cut."""
    norms = []
    for forget in (False, True):
        groups = make_grid(case)
        run = begin(case, groups)
        for name, parameter in run.engine.module.named_parameters():
            if forget and name.endswith("linear_fc1.weight"):
                parameter.tensor_model_parallel = False
        norms.append(take_step(run, case, groups, 0).grad_norm)
        run.engine.close()
    return norms


def describe_rows() -> dict[str, int]:
    """What is special about the rows of the steps."""
    from bdtrain.data.loader import make_batch

    source = RaggedRows()
    positions = range(ROWS * STEPS)
    batch = make_batch([source.sample(p) for p in positions], source.tokenizer_info, positions, positions)
    padding = batch.documents < 0
    return {
        "most documents in a row": int(batch.documents.max()) + 1,
        "padding": int(padding.sum()),
        "given": int((~batch.counted & ~padding).sum()),
    }
