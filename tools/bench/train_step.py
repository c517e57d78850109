"""CPU seconds of one training step beside the published code's computation, in one process, in turns.

Shape: batch 4, 256 tokens, hidden 256, 6 layers, 8 heads, vocabulary 8192, block size 16, fp32, forward +
backward of the loss, no optimizer. The twin (``reference_twin.py``) is held against golden vectors of the
published code by a test. Ours is the same network with its constant noise conditioning folded into the
weights, as a loaded checkpoint has it. Noise drawing is inside the time on our side; the twin gets its noise
for nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

BATCH, SEQ, HIDDEN, LAYERS, HEADS, VOCAB, BLOCK, COND = 4, 256, 256, 6, 8, 8192, 16, 128


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument(
        "--steps", type=int, default=7, help="timed steps of each side (default: %(default)s)"
    )
    parser.add_argument(
        "--threads", type=int, default=2, help="threads of the arithmetic (default: %(default)s)"
    )
    options = parser.parse_args()
    # Waiting threads must sleep: on a shared machine they would be counted as work.
    if os.environ.get("OMP_WAIT_POLICY") != "passive":
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.execv(sys.executable, [sys.executable, *sys.argv])

    import torch

    from bdtrain.parallel.libraries import prepare_libraries

    prepare_libraries()
    from bdtrain.testing import single_process_groups

    torch.set_num_threads(options.threads)
    with single_process_groups() as groups:
        result = measure(groups, options.steps)
    result["threads"] = options.threads
    result["versions"] = {"python": platform.python_version(), "torch": torch.__version__}
    result["machine"] = platform.processor() or platform.machine()
    report(result)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def measure(groups: Any, steps: int) -> dict[str, Any]:
    """Time whole steps and parts, each in turns."""
    import torch

    from tools.bench.reference_twin import ReferenceTwin

    torch.manual_seed(0)
    x0 = torch.randint(6, VOCAB - 1, (BATCH, SEQ))
    ours = OurStep(groups, x0)
    twin = ReferenceTwin(vocab=VOCAB, dim=HIDDEN, layers=LAYERS, heads=HEADS, cond=COND, block_size=BLOCK)
    t = torch.rand(BATCH, SEQ // BLOCK).clamp(min=1e-3).repeat_interleave(BLOCK, dim=1)
    xt = torch.where(torch.rand(BATCH, SEQ) < t, VOCAB - 1, x0)

    def twin_step() -> None:
        twin.loss(x0, xt, t).backward()
        twin.zero_grad(set_to_none=True)

    whole = in_turns({"ours": ours.step, "twin": twin_step}, steps)
    copies = in_turns({str(c): lambda c=c: ours.step(copies=c) for c in (1, 2, 4)}, max(steps // 2, 3))
    parts = in_turns(ours.parts(), max(steps // 2, 3))
    seconds, twin_seconds = statistics.median(whole["ours"]), statistics.median(whole["twin"])
    per_token = {c: statistics.median(v) / (BATCH * SEQ * int(c)) for c, v in copies.items()}
    return {
        "cpu_seconds_per_step": seconds,
        "twin_cpu_seconds_per_step": twin_seconds,
        "ratio": twin_seconds / seconds,
        "parameters": ours.parameters,
        "twin_parameters": sum(p.numel() for p in twin.parameters()),
        "parts": {name: statistics.median(values) for name, values in parts.items()},
        "noise_copies": {
            c: {
                "cpu_seconds_per_step": statistics.median(copies[c]),
                "cpu_microseconds_per_noisy_token": 1e6 * per_token[c],
                "relative": per_token[c] / per_token["1"],
            }
            for c in copies
        },
        "raw": {"ours": whole["ours"], "twin": whole["twin"]},
    }


class OurStep:
    """Our training step's forward and backward, whole and in parts."""

    def __init__(self, groups: Any, x0: Any) -> None:
        import torch

        from bdtrain.config import ModelConfig
        from bdtrain.diffusion.objectives.build import make_objective
        from bdtrain.diffusion.plan import NoisePlan
        from bdtrain.model.build import build_model

        self.torch, self.x0 = torch, x0
        self.mask_id = VOCAB - 1
        shape = ModelConfig(
            shape="bd3lm",
            num_layers=LAYERS,
            hidden_size=HIDDEN,
            num_heads=HEADS,
            vocab_size=VOCAB,
            vocab_multiple=128,
        )
        self.model = build_model(shape, pg_collection=groups, mask_id=self.mask_id)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        # The reference's own noise: t uniform over the full range, 1/t weights, one document per row.
        plan = NoisePlan(BLOCK, kind="bernoulli", weighting="reference")
        self.objective = make_objective(
            "block_diffusion",
            plan=plan,
            mask_id=self.mask_id,
            vocab_size=VOCAB,
            seq_len=SEQ,
            isolate_documents=False,
        )
        self.documents = torch.zeros(BATCH, SEQ, dtype=torch.int32)
        self.counted = torch.ones(BATCH, SEQ, dtype=torch.bool)
        self.index = torch.arange(BATCH)
        self.draws = 0

    def corrupt(self, copies: int = 1) -> Any:
        """Draw new noise."""
        from bdtrain.diffusion.keyed import NoiseKey, Purpose
        from bdtrain.diffusion.micro_batch import MicroBatch

        self.draws += 1
        layout = self.objective.layout(self.documents)
        corrupted = self.objective.corrupt(
            self.x0,
            layout,
            self.counted,
            key=NoiseKey(0, Purpose.TRAIN, self.draws),
            sample_index=self.index,
            batch_index=self.index,
            global_batch=BATCH,
            copies=copies,
        )
        return MicroBatch(layout=layout, corrupted=corrupted)

    def step(self, copies: int = 1) -> None:
        """Noise, forward, loss, backward."""
        from bdtrain.model.forward import forward_losses

        micro_batch = self.corrupt(copies)
        losses = forward_losses(self.model, self.objective, micro_batch)
        (losses.sum() / (copies * BATCH * SEQ)).backward()
        self.model.zero_grad(set_to_none=True)

    def parts(self) -> dict[str, Callable[[], None]]:
        """Forward and backward of the parts alone."""
        from bdtrain.model.transformer import assemble_streams
        from bdtrain_kernels import block_attention, prepare

        torch = self.torch
        fixed = self.corrupt()
        corrupted, layout = fixed.corrupted, fixed.layout
        heads_shape = (BATCH, HEADS, 2 * SEQ, HIDDEN // HEADS)
        q, k, v = (torch.randn(heads_shape, requires_grad=True) for _ in range(3))
        hidden = torch.randn(SEQ, BATCH, HIDDEN, requires_grad=True)
        rows = corrupted.rows.flatten(1)

        def layers() -> None:
            tokens = assemble_streams(corrupted.noisy, corrupted.clean)
            self.model(tokens, layout, noisy_copies=1, clean=True).sum().backward()
            self.model.zero_grad(set_to_none=True)

        def attention() -> None:
            prepared = prepare(layout, noisy_copies=1, clean=True, backend="auto")
            for number in range(LAYERS):
                last = number == LAYERS - 1
                queries = q[:, :, :SEQ] if last else q
                out = block_attention(
                    queries, k, v, prepared, noisy_copies=1, clean=True, queries="noisy" if last else "all"
                )
                out.sum().backward()

        def head_and_loss() -> None:
            view = self.model.view_rows(hidden, rows)
            self.objective.loss(
                view, corrupted.targets[corrupted.rows], corrupted.weight[corrupted.rows]
            ).sum().backward()
            self.model.zero_grad(set_to_none=True)

        return {
            "noise": lambda: self.corrupt() and None,
            "layers": layers,
            "attention_of_the_layers": attention,
            "head_and_loss": head_and_loss,
        }


def in_turns(sides: dict[str, Callable[[], None]], steps: int) -> dict[str, list[float]]:
    """CPU seconds of each side, A B A B ..., after two rounds that are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(steps + 2):
        for name, run in sides.items():
            started = time.process_time()
            run()
            if number >= 2:
                seconds[name].append(time.process_time() - started)
    return seconds


def report(result: dict[str, Any]) -> None:
    """Print a table."""
    print(
        f"CPU seconds per step (forward + backward), {result['threads']} threads, "
        f"medians of {len(result['raw']['ours'])}"
    )
    spread = {side: f"{min(v):.3f} to {max(v):.3f}" for side, v in result["raw"].items()}
    print(f"  published computation   {result['twin_cpu_seconds_per_step']:.3f}   ({spread['twin']})")
    print(f"  bdtrain                 {result['cpu_seconds_per_step']:.3f}   ({spread['ours']})")
    print(f"  ratio                   {result['ratio']:.2f}")
    print("parts, forward + backward of each alone:")
    for name, value in result["parts"].items():
        print(f"  {name:<24}{value:.3f}")
    print("noise copies over one clean stream:")
    for copies, facts in result["noise_copies"].items():
        print(
            f"  {copies}: {facts['cpu_seconds_per_step']:.3f} s per step, "
            f"{facts['cpu_microseconds_per_noisy_token']:.0f} us per noisy token ({facts['relative']:.2f})"
        )


if __name__ == "__main__":
    sys.exit(main())
