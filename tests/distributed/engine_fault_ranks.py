"""The ranks of test_engine_faults.py."""

from __future__ import annotations

from typing import Any

from engine_ranks import Case, begin, cases_from, make_grid, same_bits, snapshot, start, take_step

SPOILED = (False, True, True, False)


def spoil_one_rank(rank: int, world: int, listed: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Steps of which some are spoiled on rank 1 alone, beside a run that never took those."""
    start()
    return [survive(case, rank) for case in cases_from(listed)]


def survive(case: Case, rank: int) -> dict[str, Any]:
    groups = make_grid(case)
    run = begin(case, groups)
    kept = []
    before = snapshot(run)
    for step, bad in enumerate(SPOILED):
        take_step(run, case, groups, step, spoil=bad and rank == 1)
        after = snapshot(run)
        kept.append(same_bits(before, after))
        before = after
    skipped = run.engine.skipped_steps
    run.engine.close()
    control = begin(case, groups)
    for step, bad in enumerate(SPOILED):
        if not bad:
            take_step(control, case, groups, step)
    told = {
        "applied": [result.applied for result in run.results],
        "norms": [str(result.grad_norm) for result in run.results],
        "unchanged": kept,
        "skipped": skipped,
        "same_as_control": same_bits(before, snapshot(control)),
        "losses": [result.loss for result in run.results if result.applied],
        "control_losses": [result.loss for result in control.results],
    }
    control.engine.close()
    return told
