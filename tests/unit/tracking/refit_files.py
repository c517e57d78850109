"""Re-fits of a run as files, made of numbers that a test knows."""

from __future__ import annotations

import json
from pathlib import Path

WIDTHS = {0.5: (0.0, 0.25, 0.5), 0.8: (0.0, 0.2)}


def variance(begin: float, end: float) -> float:
    """Any function that no two ranges share a value of."""
    return 0.02 + 0.01 * (1.0 - begin) ** 2 + 0.003 * (end - begin)


def error(begin: float, end: float) -> float:
    return variance(begin, end) / 30


def candidate(begin: float, end: float, *, name: str = "", **more: object) -> dict[str, object]:
    full = (begin, end) == (0.0, 1.0)
    return {
        "name": name or ("full range" if full else f"clip {begin:g}-{end:g}"),
        "clip_range": None if full else [begin, end],
        "density": None,
        "is_current": False,
        "finite": True,
        "variance": variance(begin, end),
        "variance_error": error(begin, end),
        "independent_variance": 2 * variance(begin, end),
        **more,
    }


def plan(clip_range: list[float] | None, *, density: list[float] | None = None) -> dict[str, object]:
    return {"block_size": 4, "clip_range": clip_range, "density": density, "kind": "count"}


def make_result(**more: object) -> dict[str, object]:
    ranges = [(begin, begin + width) for width, begins in WIDTHS.items() for begin in begins]
    current = candidate(0.0, 1.0, name="current (full range)", is_current=True)
    losses = [
        {
            **{"masked_low": k, "masked_high": k, "nll": 4.0 - 0.1 * k, "nll_error": 0.02 * k},
            **{"block_variance": 1.0 + k, "block_variance_error": 0.1 * k},
        }
        for k in (1, 2, 3, 4)
    ]
    return {
        "candidates": [current, *(candidate(*ends) for ends in ranges)],
        "winner": "clip 0.5-1",
        "at_edge": ["narrowest", "highest start"],
        "strata": "stratified",
        "current": plan(None),
        "losses": losses,
        **more,
    }


def make_counts(size: int = 4, cells: int = 4, *, adopt: bool = True) -> dict[str, object]:
    """Of mode ``counts``: from uniform counts to a density that rises in equal steps."""
    wide = size // cells
    losses = [
        {"masked_low": cell * wide + 1, "masked_high": (cell + 1) * wide, "nll": 3.0, "nll_error": 0.1}
        for cell in range(cells)
    ]
    rising = [2 * (cell + 1) / (cells * (cells + 1)) for cell in range(cells)]
    current = candidate(0.0, 1.0, name="current (full range)", is_current=True, drawn=[1 / cells] * cells)
    fitted = candidate(0.0, 1.0, name="fitted counts", density=[1.0] * cells, drawn=rising)
    return make_result(
        candidates=[current, fitted],
        losses=losses,
        winner="fitted counts",
        adopt=adopt,
        at_edge=[],
        settings={"mode": "counts"},
    )


def make_gradients(**more: object) -> dict[str, object]:
    """The gradient's variance of each plan is three times the loss's."""
    ends = [(0.0, 1.0), *((begin, begin + width) for width, begins in WIDTHS.items() for begin in begins)]
    names = ["current (full range)", *(str(candidate(*pair)["name"]) for pair in ends[1:])]
    plans = [
        {
            **{"name": name, "nelbo": variance(*pair), "finite": True},
            **{"gradient": 3 * variance(*pair), "gradient_error": error(*pair)},
        }
        for name, pair in zip(names, ends, strict=True)
    ]
    counts = [
        {"masked_low": k, "masked_high": k, "variance": 7.0 - k, "variance_error": 0.3 * k}
        for k in (1, 2, 3, 4)
    ]
    return {
        "plans": plans,
        "counts": counts,
        "pearson": 0.987,
        "pearson_error": 0.012,
        "spearman": 0.9,
        "spearman_error": 0.05,
        "least_nelbo": "clip 0.5-1",
        "least_gradient": "clip 0.5-1",
        "excess": 0.0,
        **more,
    }


def line(step: int, outcome: str, clip_range: list[float] | None, version: int, **more: object) -> dict:
    return {
        "snapshot_step": step,
        "adopt_step": step + 4,
        "outcome": outcome,
        "reason": f"reason of step {step}",
        "version": version,
        "plan": plan(clip_range),
        "metrics": {},
        **more,
    }


def search_metrics() -> dict[str, float]:
    return {
        "sched/variance": variance(0.0, 1.0),
        "sched/variance_error": error(0.0, 1.0),
        "sched/variance_best": variance(0.5, 1.0),
        "sched/gain": variance(0.0, 1.0) / variance(0.5, 1.0) - 1,
        "sched/p_best": 0.93,
        "sched/at_edge": 1.0,
    }


def make_refits(run: Path) -> Path:
    """Step 5 adopts 0.5 to 1, step 10 comes too late, step 15 fails."""
    folder = run / "refit"
    place = folder / "step-000000005"
    place.mkdir(parents=True)
    (place / "schedule.json").write_text(json.dumps({"format": "bdtrain-schedule/1", "snapshot_step": 5}))
    report = {"results": {"4": make_result()}, "gradients": {"4": make_gradients()}}
    (place / "report.json").write_text(json.dumps(report))
    lines = [
        line(5, "adopted", [0.5, 1.0], 1, metrics=search_metrics()),
        line(10, "late", [0.5, 1.0], 1),
        line(15, "failed", [0.5, 1.0], 1),
    ]
    (folder / "history.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    return folder
