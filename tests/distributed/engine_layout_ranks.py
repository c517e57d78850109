"""The ranks of test_engine_layouts.py."""

from __future__ import annotations

from typing import Any

from engine_ranks import Case, cases_from, compare, make_grid, plain_training, start, training

STEPS = 5


def compare_with_plain_torch(rank: int, world: int, listed: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Five steps of each case beside plain torch."""
    alone = start()
    twins: dict[Any, Any] = {}
    told = []
    for case in cases_from(listed):
        print("CASE", __import__("time").time(), case.layout, case.shape, flush=True)
        groups = make_grid(case)
        if case.data not in twins:
            twins[case.data] = plain_training(case, alone, STEPS)
        with training(case, groups, STEPS) as run:
            told.append(compare(run, twins[case.data]))
    without = [
        leave_out_completion(case, alone)
        for case in (Case(tp=2), Case(tp=2, sp=True), Case(tp=2, sp=True, zero=3))
    ]
    return [{"cases": told, "without_completion": without}][0]


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
