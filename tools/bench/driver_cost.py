"""What the driver costs: CPU seconds of a whole step of the run's own loop beside a bare torch loop.

Both sides train the same model from the same weights on the same rows with the same noise, in turns, in
one process (or in two that share the rows: ``--ranks 2``); their losses are compared. Ours is
``Trainer.one_step`` with a report after every step: loader, Megatron's schedule, DeepSpeed's engine, AdamW
with the average, metrics. The bare loop is what one would write without any of it: ``backward``,
``clip_grad_norm_``, ``torch.optim.AdamW``, ``torch._foreach_lerp_``; with two ranks an all-reduce of one flat
gradient, as ``DistributedDataParallel`` does it, and the whole optimizer on each. Loader, noise and model are
the same code on both sides, so they cancel.

CPU seconds of the process with all its threads, since the machine may be shared.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

WARM_UP = 2
"""Rounds that are not counted: they make the optimizer's state and fill the caches."""


@dataclass(frozen=True)
class Shape:
    """What is trained.

    Attributes:
        layers: number of layers.
        hidden: channels.
        heads: attention heads.
        vocabulary: tokens.
        seq: tokens of a row.
        block: tokens of a diffusion block.
        rows: of a micro-batch.
        micro_batches: of a step, on each rank.
        zero_stage: how ours cuts the optimizer.
    """

    layers: int = 6
    hidden: int = 256
    heads: int = 8
    vocabulary: int = 8192
    seq: int = 256
    block: int = 16
    rows: int = 2
    micro_batches: int = 2
    zero_stage: int = 1

    def overrides(self, folder: Path, ranks: int) -> list[str]:
        """The run configuration."""
        return [
            "run.name=driver_cost",
            f"run.folder={folder}",
            "data.kind=synthetic",
            f"data.seq_len={self.seq}",
            f"data.synthetic_vocab_size={self.vocabulary}",
            f"model.num_layers={self.layers}",
            f"model.hidden_size={self.hidden}",
            f"model.num_heads={self.heads}",
            "model.vocab_multiple=16",
            f"diffusion.block_size={self.block}",
            "optim.lr=3.0e-4",
            "optim.schedule=constant",
            "optim.warmup_steps=0",
            "optim.grad_clip_norm=1.0",
            "optim.ema_decay=0.999",
            "train.steps=100000",
            "train.log_every_steps=1",
            f"train.global_batch_size={self.rows * self.micro_batches * ranks}",
            f"train.micro_batch_size={self.rows}",
            f"parallel.zero_stage={self.zero_stage}",
            "tracking.mlflow=false",
        ]


class Stopwatch:
    """CPU seconds of the parts of a step, and of the parts of those."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def time(self, part: str) -> Iterator[None]:
        """Add what the block takes."""
        started = time.process_time()
        try:
            yield
        finally:
            self.seconds[part] += time.process_time() - started

    def watch(self, stack: ExitStack, owner: Any, name: str, part: str) -> None:
        """Time every call of ``owner.name`` until the stack is closed."""
        original = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.time(part):
                return original(*args, **kwargs)

        setattr(owner, name, timed)
        stack.callback(setattr, owner, name, original)

    def take(self) -> dict[str, float]:
        """The parts since the last call."""
        taken, self.seconds = dict(self.seconds), defaultdict(float)
        return taken


class Ours:
    """The run's own loop."""

    def __init__(self, shape: Shape, folder: Path, stack: ExitStack) -> None:
        from bdtrain.checkpoint.communicator import TorchCommunicator
        from bdtrain.config import load_config
        from bdtrain.config.layout import resolve_layout
        from bdtrain.parallel.groups import init_groups, read_launch
        from bdtrain.tracking.console import Console
        from bdtrain.tracking.goodput import Goodput
        from bdtrain.train.faults import Faults
        from bdtrain.train.folder import claim_run_folder
        from bdtrain.train.launch import start_attempt
        from bdtrain.train.run_lock import RunLock
        from bdtrain.train.setup import build_parts, prepare_machine

        launch = read_launch(os.environ)
        config = load_config([], shape.overrides(folder, launch.world_size)).config
        layout = resolve_layout(config, launch.world_size)
        device = prepare_machine(config, launch)
        self.groups = init_groups(launch)
        communicator = TorchCommunicator()
        lock = RunLock(folder)
        stack.callback(lock.release)
        claimed = claim_run_folder(config, communicator, lock)
        config, parts = build_parts(
            config,
            layout,
            self.groups,
            communicator,
            known=None,
            device=device,
            # What it prints is made and thrown away.
            console=Console(enabled=launch.rank == 0, stream=io.StringIO()),
            stack=stack,
        )
        self.trainer = start_attempt(
            config,
            layout,
            parts,
            claimed,
            goodput=Goodput(),
            stop=SimpleNamespace(pending=None),  # type: ignore[arg-type]
            faults=Faults(),
            stack=stack,
        )
        self.config, self.device, self.watch = config, device, Stopwatch()
        self._watch(stack)

    def _watch(self, stack: ExitStack) -> None:
        from bdtrain.parallel import engine as engine_room
        from bdtrain.train import step as step_room

        watch, trainer = self.watch, self.trainer
        watch.watch(stack, trainer.loader, "batch", "data")
        watch.watch(stack, step_room, "corrupt_rows", "noise")
        watch.watch(stack, step_room, "_count", "counts")
        watch.watch(stack, step_room, "run_schedule", "forward and backward")
        watch.watch(stack, trainer.engine, "step", "update")
        watch.watch(stack, trainer.engine._client_optimizer, "step", "optimizer")
        watch.watch(stack, engine_room, "complete_partial_gradients", "completion")
        watch.watch(stack, trainer.parts.communicator, "barrier", "barrier")
        watch.watch(stack, trainer, "report", "metrics")

    def step(self) -> float:
        """One step with its report; the loss."""
        result, lr = self.trainer.one_step()
        self.trainer.report(lr)
        return result.loss


class Bare:
    """The same training without the driver.

    Args:
        ours: for its loader, its objective and its configuration; nothing that it changes is shared.
        fused: torch's fused AdamW.
    """

    def __init__(self, ours: Ours, *, fused: bool) -> None:
        import torch

        from bdtrain.model.build import build_model

        self.ours, self.torch, self.watch = ours, torch, Stopwatch()
        config, parts = ours.config, ours.trainer.parts
        assert config.optim.ema_decay is not None and config.optim.grad_clip_norm is not None
        self.decay, self.clip = config.optim.ema_decay, config.optim.grad_clip_norm
        self.model = build_model(
            config.model,
            pg_collection=ours.groups,
            mask_id=parts.loader.tokenizer_info.mask_id,
            seed=config.run.seed,
            device=ours.device,
        )
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self.parameters if p.dim() > 1]},
            {"params": [p for p in self.parameters if p.dim() == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=config.optim.lr,
            betas=config.optim.betas,
            eps=config.optim.epsilon,
            weight_decay=config.optim.weight_decay,
            fused=fused,
        )
        self.average = [p.detach().clone() for p in self.parameters]
        self.world = ours.groups.dp.size()
        self.done = 0

    def step(self) -> float:
        """One step; the loss."""
        import torch.distributed as dist

        from bdtrain.data.loader import split_rows
        from bdtrain.diffusion.keyed import NoiseKey, Purpose
        from bdtrain.diffusion.micro_batch import corrupt_rows
        from bdtrain.model.forward import forward_losses

        config, watch, torch = self.ours.config, self.watch, self.torch
        objective, size = self.ours.trainer.parts.objective, config.train.global_batch_size
        with watch.time("data"):
            batch = self.ours.trainer.loader.batch(self.done * size)
        key = NoiseKey(seed=config.run.seed, purpose=Purpose.TRAIN, step=self.done)
        with watch.time("noise"):
            micro_batches = [
                corrupt_rows(
                    objective, rows, key=key, global_batch_size=size, copies=1, device=self.ours.device
                )
                for rows in split_rows(batch, self.ours.trainer.layout.micro_batch_size)
            ]
        counted = batch.counted.sum()
        if self.world > 1:
            dist.all_reduce(counted)
        loss = torch.zeros(())
        with watch.time("forward and backward"):
            for micro_batch in micro_batches:
                part = forward_losses(self.model, objective, micro_batch).sum() / counted
                part.backward()
                loss += part.detach()
        if self.world > 1:
            with watch.time("reduction"):
                self._reduce(dist)
                dist.all_reduce(loss)
        with watch.time("update"):
            torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
            with watch.time("optimizer"):
                self.optimizer.step()
                self.done += 1
                decay = min(self.decay, (1 + self.done) / (10 + self.done))
                with torch.no_grad():
                    torch._foreach_lerp_(self.average, self.parameters, 1 - decay)
            self.optimizer.zero_grad(set_to_none=True)
        return float(loss)

    def _reduce(self, dist: Any) -> None:
        """Sum the gradients over the ranks, all in one."""
        gradients = [p.grad for p in self.parameters]
        flat = self.torch.cat([g.reshape(-1) for g in gradients])
        dist.all_reduce(flat)
        for gradient, whole in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(whole.view_as(gradient))


def measure(shape: Shape, steps: int, *, bare: str = "both") -> dict[str, Any]:
    """Steps of all sides in turns, in this process, which is one rank.

    Args:
        shape: what is trained.
        steps: timed steps of each side.
        bare: "both", or only the loop with torch's "plain" or "fused" AdamW.

    Returns:
        CPU seconds by side and step, medians of the parts, the largest difference of a loss.
    """
    import torch.distributed as dist

    from bdtrain.parallel.groups import destroy_groups
    from bdtrain.parallel.libraries import prepare_libraries

    prepare_libraries()
    kinds = ("plain", "fused") if bare == "both" else (bare,)
    with ExitStack() as stack:
        folder = Path(_shared_folder(stack))
        stack.callback(destroy_groups)
        ours = Ours(shape, folder / "run", stack)
        sides: dict[str, Any] = {"ours": ours}
        sides |= {kind: Bare(ours, fused=kind == "fused") for kind in kinds}
        seconds, parts, losses = run_in_turns(sides, steps, before=lambda: dist.barrier())
        return {
            "parameters": sum(p.numel() for p in sides[kinds[0]].parameters),
            "seconds": seconds,
            "parts": {side: medians(values) for side, values in parts.items()},
            "loss_difference": max(
                abs(a - b) / abs(b)
                for kind in kinds
                for a, b in zip(losses["ours"], losses[kind], strict=True)
            ),
        }


def run_in_turns(
    sides: Mapping[str, Any], steps: int, *, before: Callable[[], None]
) -> tuple[dict[str, list[float]], dict[str, list[dict[str, float]]], dict[str, list[float]]]:
    """A B C A B C ...: seconds, parts and losses of each side and step."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    parts: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    losses: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(steps + WARM_UP):
        for name, side in sides.items():
            before()
            started = time.process_time()
            losses[name].append(side.step())
            taken = time.process_time() - started
            if number >= WARM_UP:
                seconds[name].append(taken)
                parts[name].append({**side.watch.take(), "whole": taken})
            else:
                side.watch.take()
    return seconds, parts, losses


def medians(records: list[dict[str, float]]) -> dict[str, float]:
    """Median of each part, with the rests: of the update, and of the whole step."""
    inside = ("optimizer", "whole", "completion")
    full = []
    for record in records:
        named = sum(value for part, value in record.items() if part not in inside)
        rest = {
            "rest": record["whole"] - named,
            "update without optimizer": record["update"] - record["optimizer"],
        }
        full.append({**record, **rest})
    return {part: statistics.median(r.get(part, 0.0) for r in full) for part in full[0]}


def over(result: Mapping[str, Any], kind: str) -> tuple[float, float, float]:
    """How much more ours takes: by medians, and the quartiles of the step-by-step ratios."""
    ours, bare = result["seconds"]["ours"], result["seconds"][kind]
    ratios = sorted(a / b - 1 for a, b in zip(ours, bare, strict=True))
    quarter = len(ratios) // 4
    return (
        statistics.median(ours) / statistics.median(bare) - 1,
        ratios[quarter],
        ratios[-1 - quarter],
    )


def rank_main(rank: int, world_size: int, shape: dict[str, int], steps: int, folder: str) -> dict[str, Any]:
    """One of two ranks; see ``run_ranks``."""
    os.environ["BENCH_FOLDER"] = folder
    return measure(Shape(**shape), steps)


def _shared_folder(stack: ExitStack) -> str:
    given = os.environ.get("BENCH_FOLDER")
    return given or stack.enter_context(tempfile.TemporaryDirectory(prefix="bdtrain-bench-"))


def report(title: str, result: Mapping[str, Any]) -> None:
    """Print a table."""
    print(f"{title}: CPU seconds per step and rank, medians of {len(result['seconds']['ours'])}")
    print(f"  {result['parameters'] / 1e6:.2f}M parameters; largest relative difference of a loss "
          f"{result['loss_difference']:.1e}")  # fmt: skip
    for side, values in result["seconds"].items():
        line = f"  {side:<8}{statistics.median(values):.3f}   ({min(values):.3f} to {max(values):.3f})"
        if side != "ours":
            middle, low, high = over(result, side)
            line += f"   ours {middle:+.1%}; half of the step-by-step ratios within {low:+.1%} to {high:+.1%}"
        print(line)
    sides = list(result["parts"])
    print(f"  {'part':<28}" + "".join(f"{side:>9}" for side in sides))
    for part in sorted({part for parts in result["parts"].values() for part in parts} - {"whole"}):
        print(f"  {part:<28}" + "".join(f"{result['parts'][side].get(part, 0.0):9.4f}" for side in sides))


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument(
        "--steps", type=int, default=15, help="timed steps of each side (default: %(default)s)"
    )
    parser.add_argument(
        "--ranks", type=int, default=1, choices=(1, 2), help="processes (default: %(default)s)"
    )
    parser.add_argument("--zero-stage", type=int, default=1, help="of ours (default: %(default)s)")
    parser.add_argument(
        "--micro-batches",
        type=int,
        default=Shape.micro_batches,
        help="of a step and rank: more tokens for the same parameters (default: %(default)s)",
    )
    options = parser.parse_args()
    # Waiting threads must sleep: on a shared machine they would be counted as work.
    if os.environ.get("OMP_WAIT_POLICY") != "passive" or os.environ.get("OMP_NUM_THREADS") != "1":
        os.environ.update(OMP_WAIT_POLICY="passive", OMP_NUM_THREADS="1")
        os.execv(sys.executable, [sys.executable, *sys.argv])
    shape = replace(Shape(), zero_stage=options.zero_stage, micro_batches=options.micro_batches)
    if options.ranks == 1:
        result = measure(shape, options.steps)
        report("one process", result)
        results = [result]
    else:
        from bdtrain.testing import run_ranks

        with tempfile.TemporaryDirectory(prefix="bdtrain-bench-") as folder:
            results = run_ranks(
                f"{Path(__file__).resolve()}:rank_main",
                options.ranks,
                vars(shape),
                options.steps,
                folder,
                timeout_s=1800,
            )
        for rank, result in enumerate(results):
            report(f"rank {rank} of {options.ranks}", result)
    if options.json is not None:
        import deepspeed
        import torch

        facts = {
            "shape": vars(shape),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "deepspeed": deepspeed.__version__,
            },
            "ranks": results,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
