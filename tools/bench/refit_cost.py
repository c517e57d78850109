"""What a re-fit costs: CPU seconds until the best clip range is known, and what training feels of it.

``search`` compares two ways to find the range of least variance, on one checkpoint and the same rows:

ours       one pass with stratified mask counts, from which every range is judged (``bdtrain.refit``)
reference  one forward pass for each range with t drawn from it, and the variance of the blocks' losses: the
           way of the authors' public code

Both look for the range of least variance under independent draws, which is what the reference's statistic
estimates; and for the least of it over the squared mean. "Truth" is what ours says from all rows of the
split. A budget of n rows is judged by a bootstrap over rows: how often is the range found the true best one?
The reference's estimates are moved by a factor, so that each range has its true value on average: its noise
is its own, its target is the same.

``trainer`` is in ``refit_step_cost.py``: CPU time of training steps with a re-fit on another core.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bdtrain.diffusion.plan import NoisePlan, evaluation_plan
from bdtrain.diffusion.variance import BlockRecords
from bdtrain.refit.candidates import SearchSettings
from bdtrain.refit.search import search
from tools.bench.refit_budget import (
    CERTAIN,
    CLOSE,
    Found,
    OnePass,
    PassPerRange,
    has_finite_variance,
    judge_choices,
    needed_rows,
    noise_of_grid,
    only_full_blocks,
    reference_plans,
    resampled_rows,
    spread_of_ratio,
    sweep,
)

BATCH = 32
"""Rows of a forward pass, on both sides."""

SMALL = (2, 4, 8, 16)
"""Rows of smaller passes, whose cost is no multiple of a row's."""

SIDES = {
    "ours, independent": "independent",
    "reference, independent": "independent",
    "ours, relative": "relative",
    "reference, relative": "relative",
    "ours, stratified": "stratified",
}
"""Procedures, each with what it looks for; the last has no rival: training's draws are stratified."""


@dataclass(frozen=True)
class Measured:
    """Everything that was measured on a checkpoint.

    Attributes:
        block_size: L'.
        pool: full blocks of all rows, our pass.
        passes: full blocks of some rows, by range.
        our_seconds: CPU seconds per row of our pass, on the rows of ``passes`` and in turns with them.
        range_seconds: the same of the ranges' passes, all ranges.
        small_seconds: CPU seconds of passes of ``SMALL`` rows, ours and those of all ranges, [2, sizes].
        covered: share of the blocks that are full.
        parameters: of the model.
    """

    block_size: int
    pool: BlockRecords
    passes: dict[str, BlockRecords]
    our_seconds: list[float]
    range_seconds: list[float]
    small_seconds: list[list[float]]
    covered: float
    parameters: int

    def save(self, path: Path) -> None:
        """Write all of it into one file."""
        arrays = {f"pool/{name}": column for name, column in self.pool.to_arrays().items()}
        for place, (name, records) in enumerate(self.passes.items()):
            arrays |= {f"pass/{place}/{name}/{key}": column for key, column in records.to_arrays().items()}
        rest = [self.block_size, self.covered, self.parameters]
        for name in ("our_seconds", "range_seconds", "small_seconds"):
            arrays[name] = np.array(getattr(self, name))
        np.savez_compressed(path, rest=np.array(rest), **arrays)

    @classmethod
    def load(cls, path: Path) -> Measured:
        """Read what ``save`` wrote."""
        with np.load(path) as file:
            arrays = dict(file)
        columns: dict[str, dict[str, np.ndarray]] = {}
        for name, column in arrays.items():
            if name.startswith("pass/"):
                columns.setdefault(name.rsplit("/", 1)[0], {})[name.rsplit("/", 1)[1]] = column
        ordered = sorted(columns, key=lambda name: int(name.split("/")[1]))
        pool = {name[5:]: column for name, column in arrays.items() if name.startswith("pool/")}
        return cls(
            block_size=int(arrays["rest"][0]),
            pool=BlockRecords.from_arrays(pool),
            passes={name.split("/")[2]: BlockRecords.from_arrays(columns[name]) for name in ordered},
            our_seconds=arrays["our_seconds"].tolist(),
            range_seconds=arrays["range_seconds"].tolist(),
            small_seconds=arrays["small_seconds"].tolist(),
            covered=float(arrays["rest"][1]),
            parameters=int(arrays["rest"][2]),
        )


def measure(checkpoint: Path, *, rows: int, pool_rows: int | None, threads: int) -> Measured:
    """Our pass over all rows, and one pass for each range over some of them.

    Args:
        checkpoint: a model folder; its corpus is read.
        rows: for each range, spread evenly over the split.
        pool_rows: for our pass; None: all.
        threads: of torch.
    """
    import torch

    from bdtrain.data.build import build_source
    from bdtrain.data.loader import ValidationSet
    from bdtrain.diffusion.build import build_objective
    from bdtrain.refit.measure import measure_blocks
    from bdtrain.validation.evaluate import load_saved

    torch.set_num_threads(threads)
    device = torch.device("cpu")
    saved, model = load_saved(checkpoint, device=device)
    config = saved.config
    size = config.diffusion.block_size
    source = build_source(config.data, split="valid", seed=config.run.seed)

    def run(plan: NoisePlan, part: ValidationSet, seed: int) -> tuple[BlockRecords, float]:
        objective = build_objective(config.diffusion, config.data, source.tokenizer_info, plan)
        clock = time.process_time()
        records = measure_blocks(model, objective, part, batch_size=BATCH, seed=seed, device=device)
        return records, (time.process_time() - clock) / part.num_sequences

    ours = evaluation_plan(size)
    ranges = {name: plan for name, plan in reference_plans(size).items() if has_finite_variance(plan)}
    found: dict[str, list[BlockRecords]] = {name: [] for name in ranges}
    our_seconds, range_seconds = [], []
    run(ours, ValidationSet(source, max_sequences=rows, part=(0, BATCH)), 0)  # the first one warms up
    for turn, start in enumerate(range(0, rows, BATCH)):
        part = ValidationSet(source, max_sequences=rows, part=(start, start + BATCH))
        our_seconds.append(run(ours, part, 1)[1])
        spent = 0.0
        numbered = list(enumerate(ranges.items(), start=1))
        # The order turns round every other time; each range has noise of its own.
        for number, (name, plan) in numbered if turn % 2 == 0 else numbered[::-1]:
            records, seconds = run(plan, part, 1 + number)
            found[name].append(only_full_blocks(records, size))
            spent += seconds
        range_seconds.append(spent)
        our_seconds.append(run(ours, part, 1)[1])
    small: list[list[float]] = [[], []]
    for count in SMALL:
        few = ValidationSet(source, max_sequences=rows, part=(0, count))
        small[0].append(count * statistics.median(run(ours, few, 1)[1] for _ in range(9)))
        small[1].append(count * sum(run(plan, few, 1)[1] for plan in ranges.values()))
    whole, _ = run(ours, ValidationSet(source, max_sequences=pool_rows), 1)
    pool = only_full_blocks(whole, size)
    return Measured(
        block_size=size,
        pool=pool,
        passes={name: BlockRecords.concatenate(parts) for name, parts in found.items()},
        our_seconds=our_seconds,
        range_seconds=range_seconds,
        small_seconds=small,
        covered=pool.blocks / whole.blocks,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def analyse(measured: Measured, *, draws: int, seed: int) -> dict[str, Any]:
    """Budgets of both sides and their ratio, as plain values."""
    generator = np.random.Generator(np.random.PCG64(seed))
    size, names = measured.block_size, list(measured.passes)
    plans = [reference_plans(size)[name] for name in names]
    pool, passes = OnePass.of(measured.pool, plans), passes_of(measured)
    rows, reference_rows = pool.sums.shape[1], passes.sums.shape[2]

    def find(side: str, criterion: str, count: int) -> Found:
        truth = pool.estimates(None, criterion)[0]
        if side.startswith("ours"):
            found = pool.estimates(resampled_rows(count, rows, draws, generator), criterion)
        else:
            weights = resampled_rows(count, reference_rows, draws, generator)
            found = passes.estimates(weights, criterion) / passes.estimates(None, criterion) * truth
        return judge_choices(count, truth, found)

    sweeps = {
        side: sweep(lambda count, side=side, criterion=criterion: find(side, criterion, count))
        for side, criterion in SIDES.items()
    }
    needed = {
        side: {
            "best": needed_rows(steps, lambda one: one.best),
            "close": needed_rows(steps, lambda one: one.close),
        }
        for side, steps in sweeps.items()
    }
    best = np.argsort(pool.estimates(None)[0])[:6]
    noises = [noise_of_grid(measured.pool, plans[i], draws=300, generator=generator) for i in best]
    result = {
        "block_size": size,
        "parameters": measured.parameters,
        "pool": {"rows": rows, "blocks": measured.pool.blocks, "full_blocks": measured.covered},
        "reference_rows": reference_rows,
        "left_out": [name for name in reference_plans(size) if name not in names],
        "ranges": table_of_ranges(names, pool, passes, draws=draws, generator=generator),
        "seconds_per_row": {
            "ours": statistics.median(measured.our_seconds),
            "reference": statistics.median(measured.range_seconds),
        },
        "seconds_per_row_spread": {
            "ours": [min(measured.our_seconds), max(measured.our_seconds)],
            "reference": [min(measured.range_seconds), max(measured.range_seconds)],
        },
        "small_seconds": dict(zip(("ours", "reference"), measured.small_seconds, strict=True)),
        "sweeps": {side: [vars(one) for one in steps] for side, steps in sweeps.items()},
        "needed_rows": needed,
        "grid_noise": dict(zip(("free", "even"), np.mean(noises, axis=0).tolist(), strict=True)),
        "row_ratio_spread": {
            criterion: spread_of_ratio(pool, passes, criterion, times=20, draws=300, generator=generator)
            for criterion in ("independent", "relative")
        },
        "search_seconds": search_seconds(measured, needed["ours, independent"]["best"]),
    }
    return {**result, "ratios": {name: ratios_of(result, name) for name in ("independent", "relative")}}


def passes_of(measured: Measured) -> PassPerRange:
    """The reference's passes, with the blocks that had no mask."""
    passes = list(measured.passes.values())
    rows = set(np.concatenate([records.sequence for records in passes]).tolist())
    ids, blocks = np.unique(measured.pool.sequence, return_counts=True)
    counts = {row: count for row, count in zip(ids.tolist(), blocks.tolist(), strict=True) if row in rows}
    return PassPerRange.of(passes, counts)


def table_of_ranges(
    names: Sequence[str], pool: OnePass, passes: PassPerRange, *, draws: int, generator: np.random.Generator
) -> list[dict[str, Any]]:
    """What each side says of each range from all of its rows, with bootstrap errors."""
    columns: dict[str, np.ndarray] = {}
    for side, criterion in SIDES.items():
        source: OnePass | PassPerRange = pool if side.startswith("ours") else passes
        rows = pool.sums.shape[1] if side.startswith("ours") else passes.sums.shape[2]
        columns[side] = source.estimates(None, criterion)[0]
        drawn = source.estimates(resampled_rows(rows, rows, draws, generator), criterion)
        columns[f"{side}, error"] = drawn.std(axis=0, ddof=1)
    return [
        {"name": name, **{key: float(column[place]) for key, column in columns.items()}}
        for place, name in enumerate(names)
    ]


def cost_of(result: Mapping[str, Any], side: str, rows: float) -> float:
    """CPU seconds of forward passes over so many rows; below a batch between the small passes measured."""
    name = side.split(",")[0]
    each = result["seconds_per_row"][name]
    if rows >= BATCH:
        return float(rows * each)
    return float(np.interp(rows, [*SMALL, BATCH], [*result["small_seconds"][name], BATCH * each]))


def ratios_of(result: Mapping[str, Any], criterion: str) -> dict[str, float | None]:
    """CPU seconds of the reference over ours, in several readings."""
    sides = f"ours, {criterion}", f"reference, {criterion}"

    def ratio(kind: str = "best", *, factor: float = 1.0, rows: float = 1.0, added: float = 0.0) -> Any:
        ours, theirs = (result["needed_rows"][side][kind] for side in sides)
        if ours is None or theirs is None:
            return None
        cost = cost_of(result, sides[0], ours) + added
        return cost_of(result, sides[1], theirs * rows) * factor / cost

    grid, judged, ranges = result["grid_noise"], result["search_seconds"], len(result["ranges"])
    return {
        "best": ratio(),
        f"within {CLOSE:.0%} of the best": ratio("close"),
        "best, the whole grid paid for": ratio(factor=1.0 + len(result["left_out"]) / ranges),
        "best, t on an even grid": ratio(rows=(grid["even"] / grid["free"]) ** 2),
        "best, with our estimates": ratio(added=judged["estimates"]),
        "best, with our whole search": ratio(added=judged["search"]),
    }


def search_seconds(measured: Measured, rows: float | None) -> dict[str, float]:
    """CPU seconds of our judgement at a budget: estimates alone, and the search with its bootstrap."""
    count = None if rows is None else max(math.ceil(rows), BATCH)
    part = np.isin(measured.pool.sequence, np.unique(measured.pool.sequence)[:count])
    records = BlockRecords(**{name: column[part] for name, column in measured.pool.to_arrays().items()})
    plans = [reference_plans(measured.block_size)[name] for name in measured.passes]
    clock = time.process_time()
    OnePass.of(records, plans).estimates(None)
    estimates = time.process_time() - clock
    clock = time.process_time()
    search(records, next(iter(reference_plans(measured.block_size).values())), SearchSettings())
    return {"estimates": estimates, "search": time.process_time() - clock}


def describe(result: Mapping[str, Any]) -> str:
    """The result as text."""
    seconds, spread, pool = result["seconds_per_row"], result["seconds_per_row_spread"], result["pool"]
    grid, judged, ranges = result["grid_noise"], result["search_seconds"], result["ranges"]
    lines = [
        f"block size {result['block_size']}, {result['parameters'] / 1e6:.2f}M parameters; truth from "
        f"{pool['rows']} rows, {pool['blocks']} full blocks ({pool['full_blocks']:.1%} of all)",
        f"CPU ms per row: ours {seconds['ours'] * 1e3:.2f} "
        f"({spread['ours'][0] * 1e3:.2f} to {spread['ours'][1] * 1e3:.2f}), reference "
        f"{seconds['reference'] * 1e3:.1f} for {len(ranges)} ranges "
        f"({spread['reference'][0] * 1e3:.1f} to {spread['reference'][1] * 1e3:.1f})",
        *(
            f"  CPU ms of a pass of few rows, {name}: "
            + ", ".join(f"{count}: {one * 1e3:.0f}" for count, one in zip(SMALL, spent, strict=True))
            for name, spent in result["small_seconds"].items()
        ),
        f"no finite variance, left out: {', '.join(result['left_out'])}",
        *describe_ranges(result),
        f"rows (of each range), P(best), P(within {CLOSE:.0%}), mean regret",
    ]
    for side, steps in result["sweeps"].items():
        lines.append(side)
        lines += [
            f"  {one['rows']:8d}  {one['best']:.3f}  {one['close']:.3f}  {one['regret']:.2%}" for one in steps
        ]
        for kind, rows in result["needed_rows"][side].items():
            words = "more than tried"
            if rows is not None:
                least = "at most " if rows <= steps[0]["rows"] else ""
                words = f"{least}{rows:.1f} rows, {cost_of(result, side, rows):.3f} CPU s"
            lines.append(f"  P({kind}) >= {CERTAIN}: {words}")
    lines.append(
        f"noise of the reference's statistic of 4,096 blocks: t free {grid['free']:.2%}, on an even grid "
        f"{grid['even']:.2%}"
    )
    lines.append(
        f"our judgement: {judged['estimates']:.2f} CPU s, with bootstrap and decision {judged['search']:.2f}"
    )
    for criterion, ratios in result["ratios"].items():
        lines.append(f"CPU seconds, reference over ours, {criterion}")
        lines += [
            f"  {name}: " + ("unknown" if value is None else f"{value:.1f}") for name, value in ratios.items()
        ]
        spread_of = result["row_ratio_spread"][criterion]
        passes = seconds["reference"] / seconds["ours"]
        lines.append(
            f"  large budgets, everything resampled: rows {statistics.median(spread_of):.2f} "
            f"({spread_of[1]:.2f} to {spread_of[-2]:.2f}, 18 of 20), CPU "
            f"{statistics.median(spread_of) * passes:.0f} ({spread_of[1] * passes:.0f} to "
            f"{spread_of[-2] * passes:.0f})"
        )
    return "\n".join(lines)


def describe_ranges(result: Mapping[str, Any]) -> list[str]:
    """The best ranges by each criterion, and how far the two sides agree."""
    lines = []
    for criterion in ("independent", "relative", "stratified"):
        ours, theirs = f"ours, {criterion}", f"reference, {criterion}"
        ranges = sorted(result["ranges"], key=lambda one, ours=ours: one[ours])
        lines.append(f"{criterion}: ours from all rows, the reference from {result['reference_rows']}")
        for one in ranges[:5]:
            value = f"  {one['name']:15} {one[ours]:9.4f} +- {one[f'{ours}, error']:.4f}"
            if theirs in one:
                value += f"   {one[theirs]:9.4f} +- {one[f'{theirs}, error']:.4f}"
            lines.append(value)
        if theirs in ranges[0]:
            worst = max(
                abs(one[ours] - one[theirs]) / math.hypot(one[f"{ours}, error"], one[f"{theirs}, error"])
                for one in ranges
            )
            lines.append(f"  largest difference of {len(ranges)}: {worst:.1f} standard errors")
    return lines


def run_search(options: argparse.Namespace) -> dict[str, Any]:
    """The part ``search`` of the command."""
    if options.load is not None:
        measured = Measured.load(options.load)
    else:
        clock = time.process_time()
        measured = measure(
            options.checkpoint, rows=options.rows, pool_rows=options.pool_rows, threads=options.threads
        )
        print(f"measured in {time.process_time() - clock:.0f} CPU s", flush=True)
        if options.save is not None:
            measured.save(options.save)
    result = analyse(measured, draws=options.draws, seed=options.seed)
    print(describe(result))
    return result


def main(arguments: Sequence[str]) -> int:
    """Measure, print, write.

    Returns:
        The exit code.
    """
    from tools.bench.refit_step_cost import add_trainer_arguments, run_trainer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    one = parts.add_parser("search", help="CPU seconds until the best range is known")
    source = one.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", type=Path, help="model folder, with a corpus that is there")
    source.add_argument("--load", type=Path, help="what --save wrote, in place of measuring")
    one.add_argument("--save", type=Path, help="write the measured blocks (.npz)")
    one.add_argument("--rows", type=int, default=256, help=f"rows of each range, a multiple of {BATCH}")
    one.add_argument("--pool-rows", type=int, help="rows of our pass that make the truth; all by default")
    one.add_argument("--threads", type=int, default=1)
    one.add_argument("--draws", type=int, default=1000, help="of the bootstrap")
    one.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    one.add_argument("--json", type=Path)
    one.set_defaults(run=run_search)
    two = parts.add_parser("trainer", help="CPU time of training steps beside a re-fit")
    add_trainer_arguments(two)
    two.set_defaults(run=run_trainer)
    options = parser.parse_args(arguments)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    before = os.getloadavg()
    result = options.run(options)
    if result is None:
        return 0
    import torch

    result["versions"] = {"python": platform.python_version(), "torch": torch.__version__}
    result["load"] = [before[0], os.getloadavg()[0]]
    print(f"load average {before[0]:.1f} before, {os.getloadavg()[0]:.1f} after")
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
