"""Seconds of one training step, whole and by part.

    tools/bench/train_step.py                              against the published computation
    tools/bench/train_step.py --seq 1024 --backend dense   ... and against our dense attention
    tools/bench/train_step.py --device cuda                presets small and 1b on a GPU
    tools/bench/train_step.py --device cuda --length 1024 4096 --block-size 4 16 64
    tools/bench/train_step.py --tiny                       the same code on a CPU, to try it

The first two: CPU seconds, all sides in turns in one process. Shape: batch 4, hidden 256, 6 layers, 8 heads,
vocabulary 8192, block size 16, fp32, forward + backward of the loss, no optimizer. The twin
(``reference_twin.py``) is held against golden vectors of the published code by a test. Ours is the same
network with its constant noise conditioning folded into the weights, as a loaded checkpoint has it. Noise
drawing is inside the time on our side; the twin gets its noise for nothing.

The last two: whole steps with the optimizer against the same model with FlexAttention and the loss over full
rows, in turns (``model_step.py``).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

BATCH, HIDDEN, LAYERS, HEADS, VOCAB, BLOCK, COND = 4, 256, 6, 8, 8192, 16, 128


def main() -> int:
    """Measure and print."""
    options = parse_options()
    from tools.bench.bench_meters import run_benchmark

    presets = options.device == "cuda" or options.tiny

    def measured(groups: Any, device: Any) -> dict[str, Any]:
        return measure_presets(groups, options, device) if presets else measure(groups, options)

    return run_benchmark(options, measured, describe_presets if presets else report)


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--steps", type=int, default=7, help="timed steps of each side (default: 7)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    on_cpu = parser.add_argument_group("against the published computation")
    on_cpu.add_argument("--threads", type=int, default=2, help="threads of the arithmetic (default: 2)")
    on_cpu.add_argument("--seq", type=int, default=256, help="tokens per row (default: 256)")
    on_cpu.add_argument(
        "--backend",
        nargs="+",
        choices=("dense", "tree", "triton", "flex", "flash"),
        default=[],
        help="time our step with these attention backends, too",
    )
    presets = parser.add_argument_group("presets")
    presets.add_argument(
        "--preset", nargs="+", choices=("small", "1b"), default=["small", "1b"], help="default: both"
    )
    presets.add_argument(
        "--length", type=int, nargs="+", default=[None], help="tokens of a row (default: the preset's)"
    )
    presets.add_argument(
        "--block-size",
        type=int,
        nargs="+",
        default=[None],
        help="L' (default: the preset's); each, of each length",
    )
    presets.add_argument("--tiny", action="store_true", help="a tiny preset in place of them, on any device")
    presets.add_argument(
        "--peak-tflops",
        type=float,
        help="roof of the utilisation (default: a matrix product of the same run)",
    )
    presets.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: by the device")
    presets.add_argument("--documents", type=int, default=1, help="documents of a row (default: 1)")
    options = parser.parse_args(arguments)
    if options.seq % BLOCK:
        parser.error(f"--seq {options.seq}: choose a multiple of {BLOCK}, the tokens of a block")
    if options.steps < 1 or options.documents < 1:
        parser.error("--steps and --documents must be at least 1")
    return options


def measure(groups: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Time whole steps and parts on a CPU, each in turns."""
    import torch

    from tools.bench.bench_meters import in_turns
    from tools.bench.reference_twin import ReferenceTwin

    seq, steps, cpu = options.seq, options.steps, torch.device("cpu")
    torch.manual_seed(0)
    x0 = torch.randint(6, VOCAB - 1, (BATCH, seq))
    ours = OurStep(groups, x0)
    twin = ReferenceTwin(vocab=VOCAB, dim=HIDDEN, layers=LAYERS, heads=HEADS, cond=COND, block_size=BLOCK)
    t = torch.rand(BATCH, seq // BLOCK).clamp(min=1e-3).repeat_interleave(BLOCK, dim=1)
    xt = torch.where(torch.rand(BATCH, seq) < t, VOCAB - 1, x0)

    def twin_step() -> None:
        twin.loss(x0, xt, t).backward()
        twin.zero_grad(set_to_none=True)

    sides: dict[str, Callable[[], object]] = {"ours": ours.step, "twin": twin_step}
    sides |= {f"ours, {name}": partial(ours.step, backend=name) for name in options.backend}
    few = max(steps // 2, 3)
    whole = in_turns(sides, steps, cpu)
    copies = in_turns({str(c): partial(ours.step, copies=c) for c in (1, 2, 4)}, few, cpu)
    parts = in_turns(ours.parts(), few, cpu)
    medians = {side: statistics.median(values) for side, values in whole.items()}
    per_token = {c: statistics.median(v) / (BATCH * seq * int(c)) for c, v in copies.items()}
    return {
        "seq": seq,
        "cpu_seconds_per_step": medians["ours"],
        "twin_cpu_seconds_per_step": medians["twin"],
        "ratio": medians["twin"] / medians["ours"],
        "ratios": {side: value / medians["ours"] for side, value in medians.items() if side != "ours"},
        "parameters": ours.parameters,
        "twin_parameters": sum(p.numel() for p in twin.parameters()),
        "parts": {name: statistics.median(values) for name, values in parts.items()},
        "noise_copies": {
            c: {
                "cpu_seconds_per_step": statistics.median(copies[c]),
                "cpu_microseconds_per_noisy_token": 1e6 * per_token[c],
                "relative": per_token[c] / per_token["1"],
                "raw": copies[c],
            }
            for c in copies
        },
        "raw": whole,
    }


class OurStep:
    """Our training step's forward and backward, whole and in parts."""

    def __init__(self, groups: Any, x0: Any) -> None:
        import torch

        from bdtrain.config import ModelConfig
        from bdtrain.diffusion.objectives.build import make_objective
        from bdtrain.diffusion.plan import NoisePlan
        from bdtrain.model.build import build_model

        self.torch, self.x0, self.seq = torch, x0, x0.shape[1]
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
            seq_len=self.seq,
            isolate_documents=False,
        )
        self.documents = torch.zeros(BATCH, self.seq, dtype=torch.int32)
        self.counted = torch.ones(BATCH, self.seq, dtype=torch.bool)
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

    def step(self, copies: int = 1, backend: str = "auto") -> None:
        """Noise, forward, loss, backward."""
        from bdtrain.model.forward import forward_losses
        from tools.bench.training_passes import attention_backend

        with attention_backend(self.model, backend):
            micro_batch = self.corrupt(copies)
            losses = forward_losses(self.model, self.objective, micro_batch)
            (losses.sum() / (copies * BATCH * self.seq)).backward()
        self.model.zero_grad(set_to_none=True)

    def parts(self) -> dict[str, Callable[[], None]]:
        """Forward and backward of the parts alone."""
        from bdtrain.model.transformer import assemble_streams
        from bdtrain_kernels import block_attention, prepare

        torch, seq = self.torch, self.seq
        fixed = self.corrupt()
        corrupted, layout = fixed.corrupted, fixed.layout
        heads_shape = (BATCH, HEADS, 2 * seq, HIDDEN // HEADS)
        q, k, v = (torch.randn(heads_shape, requires_grad=True) for _ in range(3))
        hidden = torch.randn(seq, BATCH, HIDDEN, requires_grad=True)
        rows = corrupted.rows.flatten(1)

        def layers() -> None:
            tokens = assemble_streams(corrupted.noisy, corrupted.clean)
            self.model(tokens, layout, noisy_copies=1, clean=True).sum().backward()
            self.model.zero_grad(set_to_none=True)

        def attention() -> None:
            prepared = prepare(layout, noisy_copies=1, clean=True, backend="auto")
            for number in range(LAYERS):
                last = number == LAYERS - 1
                queries = q[:, :, :seq] if last else q
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


def report(result: dict[str, Any]) -> str:
    """The comparison on a CPU as text."""
    from tools.bench.bench_meters import describe_spread

    raw = result["raw"]
    lines = [
        f"CPU seconds per step (forward + backward), {result['threads']} threads, {result['seq']} tokens per "
        f"row, medians of {len(raw['ours'])} (least to most)",
        f"  {'bdtrain':<24}{describe_spread(raw['ours'])}",
    ]
    for side, ratio in result["ratios"].items():
        name = "published computation" if side == "twin" else side.replace("ours", "bdtrain")
        lines.append(f"  {name:<24}{describe_spread(raw[side])}   {ratio:.2f} times as long")
    lines.append("parts, forward + backward of each alone:")
    lines += [f"  {name:<24}{value:.3f}" for name, value in result["parts"].items()]
    lines.append("noise copies over one clean stream:")
    for copies, facts in result["noise_copies"].items():
        lines.append(
            f"  {copies}: {facts['cpu_seconds_per_step']:.3f} s per step, "
            f"{facts['cpu_microseconds_per_noisy_token']:.0f} us per noisy token ({facts['relative']:.2f})"
        )
    return "\n".join(lines)


def measure_presets(groups: Any, options: argparse.Namespace, device: Any) -> dict[str, Any]:
    """Whole steps of presets."""
    import torch

    from tools.bench import model_step
    from tools.bench.bench_meters import write_result
    from tools.bench.presets import preset_config

    name = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    dtype = getattr(torch, name)
    peak = options.peak_tflops or model_step.measure_peak_tflops(device, dtype)
    # All of them before the first is measured: one that cannot be costs no other its time.
    cases = [
        (preset, preset_config(preset, seq, block_size))
        for preset in (["tiny"] if options.tiny else options.preset)
        for seq in options.length
        for block_size in options.block_size
    ]
    result: dict[str, Any] = {
        "device": device.type,
        "dtype": name,
        "peak_tflops": peak,
        "peak_measured": options.peak_tflops is None,
        "presets": [],
    }
    for preset, config in cases:
        begun = time.perf_counter()
        found = model_step.measure_preset(
            groups,
            preset,
            config,
            device=device,
            dtype=dtype,
            steps=options.steps,
            documents=options.documents,
        )
        result["presets"].append(found)
        print(f"{_summary_row(found, peak)} {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
        if options.json is not None:  # where time may run out, what was measured stays
            write_result(options.json, result)
    return result


def describe_presets(result: dict[str, Any]) -> str:
    """Markdown of whole steps."""
    measured = "measured: a square matrix product" if result["peak_measured"] else "given"
    lines = [
        f"{result['machine']}, torch {result['versions']['torch']}, {result['dtype']}, "
        f"roof {result['peak_tflops']:.3g} TFLOP/s ({measured}).",
        "",
        "| preset | tokens of a row | L' | tokens/s | utilisation | tokens/s of the baseline "
        "| ours / baseline | time of a noisy token, 1, 2, 4 copies |",
        "|---|---|---|---|---|---|---|---|",
        *(_summary_row(preset, result["peak_tflops"]) for preset in result["presets"]),
    ]
    for preset in result["presets"]:
        lines += ["", *_describe_preset(preset, result["peak_tflops"])]
    return "\n".join(lines)


def _summary_row(preset: dict[str, Any], peak_tflops: float) -> str:
    cells = [preset["preset"], str(preset["seq"]), str(preset["block_size"])]
    sides = preset["sides"]
    ours, baseline = (sides.get(name) for name in preset["names"])
    cells += _speed(ours, peak_tflops) if ours else ["failed", ""]
    cells += _speed(baseline, peak_tflops)[:1] if baseline else ["failed"]
    cells.append(f"{baseline['seconds'] / ours['seconds']:.2f}" if ours and baseline else "")
    copies = preset["noise_copies"]
    one = copies.get("1")
    relative = [
        f"{facts['seconds_per_noisy_token'] / one['seconds_per_noisy_token']:.2f}" if facts and one else "-"
        for facts in copies.values()
    ]
    return f"| {' | '.join([*cells, ', '.join(relative)])} |"


def _speed(side: dict[str, Any], peak_tflops: float) -> list[str]:
    """Tokens per second, and utilisation."""
    utilisation = side["useful_flops"] / side["seconds"] / (peak_tflops * 1e12)
    return [f"{side['tokens_per_second']:,.0f}", f"{utilisation:.1%}"]


def _describe_preset(preset: dict[str, Any], peak_tflops: float) -> list[str]:
    from tools.bench.bench_meters import describe_spread

    sides, difference = preset["sides"], preset["loss_difference"]
    apart = "" if difference is None else f"; losses of the sides differ by {difference:.0e}"
    lines = [
        f"**{preset['preset']}** ({preset['config']}): {preset['parameters'] / 1e6:.4g}M parameters, "
        f"{preset['rows']} rows of {preset['seq']} tokens (the preset has {preset['wanted_rows']}), blocks "
        f"of {preset['block_size']}, {preset['documents']} documents a row, recompute {preset['recompute']}"
        f"{apart}.",
        "",
        "| side | attention | ms per step | tokens/s | utilisation | peak, GiB |",
        "|---|---|---|---|---|---|",
    ]
    for name, side in sides.items():
        speed, utilisation = _speed(side, peak_tflops)
        lines.append(
            f"| {name} | {side['backend']} | {describe_spread(side['raw'], factor=1e3, digits=1)} | "
            f"{speed} | {utilisation} | {side['peak_bytes'] / 2**30:.3g} |"
        )
    lines += [f"| {name} | failed: {reason} | | | | |" for name, reason in preset["failed"].items()]
    if not sides:
        return lines
    ours, *others = sides.values()
    if others:
        lines += ["", f"The baseline takes {others[0]['seconds'] / ours['seconds']:.2f} times as long."]
    lines += [
        "",
        "| ms of a step | " + " | ".join(sides) + " |",
        "|---|" + "---|" * len(sides),
    ]
    for part in ours["parts"]:
        values = " | ".join(f"{side['parts'][part] * 1e3:.1f}" for side in sides.values())
        lines.append(f"| {part} | {values} |")
    values = " | ".join(f"{side['attention_alone_seconds'] * 1e3:.1f}" for side in sides.values())
    lines += [
        f"| attention of the layers (measured alone, inside the layers' time) | {values} |",
        "",
        "| noise copies | ms per step | us per noisy token |",
        "|---|---|---|",
    ]
    for copies, facts in preset["noise_copies"].items():
        if facts is None:
            lines.append(f"| {copies} | out of memory | |")
            continue
        lines.append(
            f"| {copies} | {describe_spread(facts['raw'], factor=1e3, digits=1)} | "
            f"{facts['seconds_per_noisy_token'] * 1e6:.3g} |"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
