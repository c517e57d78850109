r"""Does the noise plan matter: short finetunes of one base under several plans, paired by seed.

    python tools/bench/plan_comparison.py run --base runs/base16/checkpoint --corpus runs/books/corpus \
        --block-size 16 --out runs/plans16 --seeds 1 2
    python tools/bench/plan_comparison.py table --out runs/plans16 --variances variance16.json

Runs of one seed see the same rows in the same order, and are validated with the same noise, so plans are
compared within seeds: y[plan, seed] = plan + seed + error. The error's standard deviation comes from the
residuals, with (plans - 1)(seeds - 1) degrees of freedom, and says which difference could be seen at all. A
run that is done is not made again, so that seeds can be added later. ``--variances`` puts beside them what
``tools/measure_variance.py --json`` found for the plans on the base.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bdtrain.diffusion.plan import NoisePlan
from bdtrain.errors import BdtrainError, report_failure
from bdtrain.refit.gradient_sums import name_plan
from bdtrain.refit.history import read_history
from bdtrain.refit.snapshot import refit_folder

ROOT = Path(__file__).resolve().parents[2]

_FULL = "diffusion.plan.clip_range=null"
_BERNOULLI = "diffusion.plan.kind=bernoulli"

PLANS: Mapping[str, Sequence[str]] = {
    "bernoulli-full": (_FULL, _BERNOULLI),
    "count-full": (_FULL,),
    "bernoulli-0.3-0.8": ("diffusion.plan.clip_range=[0.3,0.8]", _BERNOULLI),
    "count-0.3-0.8": ("diffusion.plan.clip_range=[0.3,0.8]",),
    "bernoulli-0.45-0.95": ("diffusion.plan.clip_range=[0.45,0.95]", _BERNOULLI),
    "count-0.45-0.95": ("diffusion.plan.clip_range=[0.45,0.95]",),
    "count-0.5-1": ("diffusion.plan.clip_range=[0.5,1.0]",),
    "refit-clip": (_FULL, "refit.mode=clip"),
    "refit-counts": (_FULL, "refit.mode=counts"),
}
"""Settings of each; ``count-full`` draws k uniformly, and re-fits begin with it."""

POWER = 2.8
"""Standard errors of a difference that is seen at the 5% level in 80% of experiments (normal law)."""


class ComparisonError(BdtrainError):
    """Runs that cannot be compared."""


@dataclass(frozen=True)
class Comparison:
    """Plans against the first of them.

    Attributes:
        names: of the plans.
        seeds: for which every plan has a run.
        values: nats per token, [plans, seeds].
        error: standard deviation of a run's own error (residual); nan with one seed.
        seed_spread: standard deviation over seeds of one plan, pooled; nan with one seed.
    """

    names: tuple[str, ...]
    seeds: tuple[int, ...]
    values: np.ndarray
    error: float
    seed_spread: float

    @property
    def degrees(self) -> int:
        """Degrees of freedom of ``error``."""
        return (len(self.names) - 1) * (len(self.seeds) - 1)

    @property
    def error_of_difference(self) -> float:
        """Standard error of the difference of two plans, each the mean over the seeds."""
        return self.error * math.sqrt(2.0 / len(self.seeds))

    @property
    def detectable(self) -> float:
        """Least difference that such an experiment shows in 80% of cases."""
        return POWER * self.error_of_difference

    def differences(self) -> np.ndarray:
        """Mean of each plan less that of the first, [plans]."""
        means = self.values.mean(axis=1)
        return np.asarray(means - means[0])


def compare(values: Mapping[str, Mapping[int, float]]) -> Comparison:
    """Compare plans over the seeds that all of them have.

    Args:
        values: result by plan and seed.

    Raises:
        ComparisonError: with less than two plans, or no seed that all have.
    """
    names = tuple(values)
    if len(names) < 2:
        raise ComparisonError(f"{len(names)} plans have runs; a comparison takes two or more")
    seeds = tuple(sorted(set.intersection(*(set(runs) for runs in values.values()))))
    if not seeds:
        found = "; ".join(f"{name}: {sorted(runs)}" for name, runs in values.items())
        raise ComparisonError(f"no seed has a run of every plan ({found}); make the missing runs")
    table = np.array([[values[name][seed] for seed in seeds] for name in names])
    error = spread = math.nan
    if len(seeds) > 1:
        plans, columns = table.mean(axis=1, keepdims=True), table.mean(axis=0, keepdims=True)
        residuals = table - plans - columns + table.mean()
        error = math.sqrt(float((residuals**2).sum()) / ((len(names) - 1) * (len(seeds) - 1)))
        spread = math.sqrt(float(table.var(axis=1, ddof=1).mean()))
    return Comparison(names, seeds, table, error, spread)


def run_folder(out: Path, name: str, seed: int) -> Path:
    """Where a run lies."""
    return out / f"{name}-seed{seed}"


def run_command(options: argparse.Namespace, name: str, seed: int) -> list[str]:
    """The training of one plan and seed."""
    fitted = name.startswith("refit-")
    settings = [
        f"run.name=plans-{name}-seed{seed}",
        f"run.folder={run_folder(options.out, name, seed)}",
        f"run.seed={seed}",
        f"data.path={options.corpus}",
        f"train.init_from={options.base}",
        f"diffusion.block_size={options.block_size}",
        "optim.lr=2.0e-3",
        "optim.warmup_steps=50",
        f"optim.decay_steps={options.steps // 2}",
        "optim.ema_decay=0.99",
        f"train.steps={options.steps}",
        "train.num_threads=1",
        "train.log_every_steps=50",
        "validation.every_steps=0",
        f"validation.sequences={options.sequences}",
        "validation.at_start=false",
        "validation.sample_tokens=0",
        "checkpoint.every_steps=0",
        "tracking.mlflow=false",
        *PLANS[name],
    ]
    if fitted:
        # The paper's procedure: measured between two steps, used from the next one on.
        settings += [
            "refit.placement=inline",
            "refit.lag_steps=0",
            "refit.blocks=8192",
            f"refit.every_tokens={options.steps * 250}",
        ]
    config = ROOT / "configs" / "run" / "books_cpu.yaml"
    return [sys.executable, str(ROOT / "launchers" / "pretrain.py"), "--config", str(config), *settings]


def check_same(options: argparse.Namespace) -> None:
    """Refuse to mix runs of different experiments in a folder.

    Raises:
        ComparisonError: naming what differs.
    """
    names = ("base", "corpus", "block_size", "steps", "sequences")
    now = {name: str(getattr(options, name)) for name in names}
    path = options.out / "comparison.json"
    if not path.exists():
        path.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    changed = [
        f"{name}: {before.get(name)} there, {now[name]} now"
        for name in names
        if before.get(name) != now[name]
    ]
    if changed:
        raise ComparisonError(
            f"{options.out} has runs of another experiment ({'; '.join(changed)}); give another --out"
        )


def make_runs(options: argparse.Namespace) -> int:
    """Make the runs that are missing.

    Raises:
        ComparisonError: if a run fails; those before it stay.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    check_same(options)
    for seed in options.seeds:
        for name in options.plans:
            folder = run_folder(options.out, name, seed)
            if (folder / "summary.json").exists():
                print(f"{folder.name}: there already", flush=True)
                continue
            log = folder.with_suffix(folder.suffix + ".log")
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
            with log.open("w", encoding="utf-8") as file:
                command = run_command(options, name, seed)
                done = subprocess.run(command, stdout=file, stderr=file, env=environment, check=False)
            if done.returncode:
                raise ComparisonError(f"{folder.name} ended with {done.returncode}; see {log}")
            print(f"{folder.name}: {read_run(folder)['nelbo']:.4f} nats/token", flush=True)
    return 0


def read_run(folder: Path) -> dict[str, Any]:
    """NELBO of a finished run and the plans that it adopted.

    Raises:
        ComparisonError: if it has no result.
    """
    try:
        after = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["after"]
        nelbo, noise = float(after["nelbo"]), float(after["nelbo_noise_error"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ComparisonError(
            f"{folder} has no result ({error}); remove it and make the run again"
        ) from error
    refits = list(read_history(refit_folder(folder)).values())
    adopted = [one for one in refits if one.outcome == "adopted"]
    return {
        "nelbo": nelbo,
        "noise_error": noise,
        "refits": len(refits),
        "adopted": len(adopted),
        "last": name_plan(adopted[-1].plan) if adopted else None,
    }


def tabulate(options: argparse.Namespace) -> int:
    """Print the comparison, with variances where they are given.

    Raises:
        ComparisonError: if a run has no result, or the variances cannot be read.
    """
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for name in PLANS:
        runs = sorted(options.out.glob(f"{name}-seed*/summary.json"))
        if runs:
            found[name] = {
                int(path.parent.name.rpartition("seed")[2]): read_run(path.parent) for path in runs
            }
    result = compare(
        {name: {seed: run["nelbo"] for seed, run in runs.items()} for name, runs in found.items()}
    )
    variances = {} if options.variances is None else read_variances(options.variances)
    print(describe(result, found, variances))
    if options.json is not None:
        plain = {
            "plans": list(result.names),
            "seeds": list(result.seeds),
            "nelbo": result.values.tolist(),
            "error": None if math.isnan(result.error) else result.error,
            "seed_spread": None if math.isnan(result.seed_spread) else result.seed_spread,
            "runs": found,
        }
        options.json.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    return 0


def read_variances(path: Path) -> dict[str, dict[str, float]]:
    """Variances of a training step's loss and gradient by plan, at one scale.

    Losses and gradients are those of an average over the range, whatever the weighting: so plans compare.

    Args:
        path: of what ``tools/measure_variance.py --json`` wrote.

    Returns:
        By the plan's name: ``loss`` and ``gradient``, ``gradient_error``, and of both the part that is left
        given the data (``loss_noise``, ``gradient_noise``).

    Raises:
        ComparisonError: if the file holds something else.
    """
    try:
        found = {}
        for one in json.loads(path.read_text(encoding="utf-8"))["plans"]:
            square = float(one["scale"]) ** 2
            loss, gradient = one["loss_variance"], one["gradient"]
            values = {
                "loss": loss["total"],
                "loss_noise": loss["given_data"],
                "gradient": gradient["total"],
                "gradient_error": gradient["total_error"],
                "gradient_noise": gradient["given_data"],
            }
            found[str(one["name"])] = {name: square * float(value) for name, value in values.items()}
        return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ComparisonError(
            f"{path} holds no variances ({type(error).__name__}: {error}); give what "
            "tools/measure_variance.py --json wrote, with at least two --draws"
        ) from error


def measured_name(name: str, runs: Mapping[int, Mapping[str, Any]]) -> str | None:
    """What ``read_variances`` calls a plan: of re-fits the last one adopted, None where runs differ in it."""
    kind, _, interval = name.partition("-")
    if kind == "refit":
        last = {run["last"] for run in runs.values()}
        return last.pop() if len(last) == 1 else None
    clip_range = None
    if interval != "full":
        low, _, high = interval.partition("-")
        clip_range = (float(low), float(high))
    # Of any block size: the name leaves it out.
    return name_plan(NoisePlan(2, kind=kind, clip_range=clip_range))


def describe(
    result: Comparison,
    runs: Mapping[str, Mapping[int, Mapping[str, Any]]],
    variances: Mapping[str, Mapping[str, float]] | None = None,
) -> str:
    """The comparison as a Markdown table, best plan first.

    Args:
        result: of ``compare``.
        runs: of ``read_run``, by plan and seed.
        variances: of ``read_variances``, to put beside them.
    """
    several = len(result.seeds) > 1
    if several:
        lines = [
            f"seeds {', '.join(map(str, result.seeds))}; standard deviation over the seeds of one plan "
            f"{result.seed_spread:.4f}, of a run's own error {result.error:.4f} "
            f"({result.degrees} degrees of freedom)",
            f"standard error of a difference {result.error_of_difference:.4f}; least difference that is seen "
            f"in 80% of cases {result.detectable:.4f} nats/token",
        ]
    else:
        lines = [f"one seed ({result.seeds[0]}): no errors, so nothing is ranked"]
    heading = ["plan", "NELBO", f"against {result.names[0]}", "in standard errors", "plans adopted"]
    if variances:
        heading += ["variance of the loss", "of it noise", "variance of the gradient", "of it noise"]
    lines += ["", f"| {' | '.join(heading)} |", "|---" * len(heading) + "|"]
    means, differences = result.values.mean(axis=1), result.differences()
    for index in np.argsort(means):
        name = result.names[index]
        ratio = (
            f"{differences[index] / result.error_of_difference:+.1f}" if result.error > 0.0 and index else ""
        )
        adopted = [runs[name][seed] for seed in result.seeds]
        fitted = ", ".join(f"{run['adopted']} of {run['refits']}" for run in adopted if run["refits"])
        cells = [name, f"{means[index]:.4f}", f"{differences[index]:+.4f}", ratio, fitted]
        if variances:
            cells += _variance_cells(variances.get(measured_name(name, runs[name]) or ""))
        lines.append(f"| {' | '.join(cells)} |")
    if several and result.error > 0.0:
        near = np.flatnonzero(means <= means.min() + 2.0 * result.error_of_difference)
        names = [result.names[index] for index in near[np.argsort(means[near])]]
        lines += ["", f"within 2 standard errors of the least: {', '.join(names)}"]
    return "\n".join(lines)


def _variance_cells(found: Mapping[str, float] | None) -> list[str]:
    if found is None:
        return ["not measured", "", "", ""]
    gradient = f"{found['gradient']:.3f} +- {found['gradient_error']:.3f}"
    return [f"{found['loss']:.4f}", f"{found['loss_noise']:.4f}", gradient, f"{found['gradient_noise']:.3f}"]


def main(arguments: list[str]) -> int:
    """Make runs or compare them.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="make the runs that are missing")
    run.add_argument(
        "--base", type=Path, required=True, help="model folder or checkpoint that all begin with"
    )
    run.add_argument("--corpus", type=Path, required=True, help="of tools/preprocess.py, vocabulary 4096")
    run.add_argument("--block-size", type=int, required=True)
    run.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    run.add_argument("--plans", nargs="+", choices=list(PLANS), default=list(PLANS))
    run.add_argument("--steps", type=int, default=1000)
    run.add_argument("--sequences", type=int, default=1024, help="held-out rows of the final validation")
    run.add_argument("--out", type=Path, required=True, help="folder of the runs")
    table = commands.add_parser("table", help="compare the runs that are there")
    table.add_argument("--out", type=Path, required=True)
    table.add_argument("--variances", type=Path, help="of the base, from tools/measure_variance.py --json")
    table.add_argument("--json", type=Path, help="write the numbers here")
    options = parser.parse_args(arguments)
    try:
        return make_runs(options) if options.command == "run" else tabulate(options)
    except (BdtrainError, OSError, KeyboardInterrupt) as error:
        return report_failure(error)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
