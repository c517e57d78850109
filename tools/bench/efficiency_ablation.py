"""Time and memory of eight ways to compute one training loss: the efficiency ablation of arXiv 2503.09573.

    .venv/bin/python tools/bench/efficiency_ablation.py --json result.json
    .venv/bin/python tools/bench/efficiency_ablation.py --device cuda --json result.json

Same model, batch and noise for all; forward and backward of the loss, no optimizer. Time is CPU time of the
process, or CUDA events, each way in turns with the others, medians. "kept" is the most that autograd held for
backward at one moment (distinct storages, parameters aside), "peak" the most that was allocated above what
was there before. Losses and gradients are compared in the same run; a test holds them equal in float64.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

SIZES: dict[str, dict[str, int]] = {
    "cpu": {"layers": 4, "hidden": 256, "heads": 4, "vocab": 8192, "batch": 1},
    "cuda": {"layers": 12, "hidden": 1024, "heads": 16, "vocab": 32768, "batch": 4},
}
LENGTHS = {"cpu": [256, 512, 1024], "cuda": [1024, 4096]}
BLOCK_SIZES = [4, 16, 128]
MAX_BLOCKS = {"cpu": 1024, "cuda": 256}
RECORDED_BLOCKS = 32
"""On a CPU the peak of loops over more blocks is left out: recording their allocations takes minutes."""
SLOW_S = 4.0
"""A way whose call takes longer is timed once."""


def main() -> int:
    """Measure and print."""
    options = parse_options()
    from tools.bench.bench_meters import run_benchmark

    return run_benchmark(options, lambda groups, device: measure(groups, options, device), describe)


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; sizes left out follow the device."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seq", type=int, nargs="+", help="tokens per row")
    parser.add_argument("--block-size", type=int, nargs="+", default=BLOCK_SIZES)
    for name in SIZES["cpu"]:
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each way")
    parser.add_argument("--threads", type=int, default=1, help="threads of the arithmetic on a CPU")
    parser.add_argument("--max-blocks", type=int, help="loops over more blocks than this are left out")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args(arguments)
    for name, size in SIZES[options.device].items():
        if getattr(options, name) is None:
            setattr(options, name, size)
    options.seq = options.seq or LENGTHS[options.device]
    options.max_blocks = options.max_blocks or MAX_BLOCKS[options.device]
    return options


def measure(groups: Any, options: argparse.Namespace, device: Any) -> dict[str, Any]:
    """All lengths and block sizes.

    Args:
        groups: process groups of size 1.
        options: from ``parse_options``.
        device: where.
    """
    import torch

    from bdtrain.config import ModelConfig
    from bdtrain.model.build import build_model

    shape = ModelConfig(
        num_layers=options.layers,
        hidden_size=options.hidden,
        num_heads=options.heads,
        vocab_size=options.vocab,
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    mask_id = options.vocab - 1
    model = build_model(shape, pg_collection=groups, mask_id=mask_id, dtype=dtype, device=device)
    cases = []
    for seq in options.seq:
        for block_size in options.block_size:
            print(f"seq {seq}, blocks of {block_size} ...", file=sys.stderr, flush=True)
            cases.append(measure_case(model, options, seq, block_size, device))
    sizes = {name: getattr(options, name) for name in SIZES["cpu"]}
    return {"device": device.type, "dtype": str(dtype), **sizes, "rounds": options.rounds, "cases": cases}


def measure_case(
    model: Any, options: argparse.Namespace, seq: int, block_size: int, device: Any
) -> dict[str, Any]:
    """All ways at one length and block size."""
    from tools.bench.bench_meters import failure_of, forget_compiled, forget_failure, in_turns
    from tools.bench.training_passes import OURS, all_passes

    objective, micro_batch = make_batch(options, seq, block_size, device)
    passes = all_passes()
    refused: dict[str, str] = {}
    blocks = -(-seq // block_size)
    if blocks > options.max_blocks:
        refused = {name: "not run: too many blocks" for name in passes if name.startswith("loop")}
    facts: dict[str, dict[str, Any]] = {}
    wanted: dict[str, Any] | None = None
    # Ours first: the others are compared with it.
    for name in sorted(passes, key=lambda name: name != OURS):
        if name in refused:
            continue
        peak = device.type == "cuda" or not name.startswith("loop") or blocks <= RECORDED_BLOCKS
        flex = "Flex" in name
        forget_compiled("flex" if flex else "")
        try:
            found = look_at(model, objective, micro_batch, passes[name], device, peak=peak)
        except Exception as error:  # whatever one way fails by, the others' rows stay
            refused[name] = (flex and why_no_gradients(device)) or failure_of(error)
        else:
            wanted = found if name == OURS else wanted
            facts[name] = found | differences(found, wanted)
            del facts[name]["gradients"]
        if name in refused:
            forget_failure(model, device)

    def step(name: str) -> Any:
        def run() -> None:
            passes[name](model, objective, micro_batch)
            model.zero_grad(set_to_none=True)

        return run

    sides = {name: step(name) for name in passes if name in facts}
    seconds = in_turns(sides, options.rounds, device, warm_up=1, slow_s=SLOW_S, failed=refused)
    facts = {name: facts[name] | {"seconds": statistics.median(v), "raw": v} for name, v in seconds.items()}
    return {"seq": seq, "block_size": block_size, "passes": facts, "refused": refused}


def make_batch(options: argparse.Namespace, seq: int, block_size: int, device: Any) -> tuple[Any, Any]:
    """Objective and one corrupted batch of random tokens, a document per row."""
    import torch

    from bdtrain.diffusion.keyed import NoiseKey, Purpose
    from bdtrain.diffusion.micro_batch import MicroBatch
    from bdtrain.diffusion.objectives.block_diffusion import BlockDiffusion
    from bdtrain.diffusion.plan import NoisePlan

    mask_id = options.vocab - 1
    objective = BlockDiffusion(NoisePlan(block_size), mask_id, options.vocab, isolate_documents=False)
    generator = torch.Generator().manual_seed(0)
    shape = (options.batch, seq)
    x0 = torch.randint(0, mask_id, shape, generator=generator).to(device)
    index = torch.arange(options.batch, device=device)
    layout = objective.layout(torch.zeros(shape, dtype=torch.int32, device=device))
    corrupted = objective.corrupt(
        x0,
        layout,
        torch.ones(shape, dtype=torch.bool, device=device),
        key=NoiseKey(0, Purpose.TRAIN, 1),
        sample_index=index,
        batch_index=index,
        global_batch=options.batch,
        copies=1,
    )
    return objective, MicroBatch(layout=layout, corrupted=corrupted)


def look_at(
    model: Any, objective: Any, micro_batch: Any, run: Any, device: Any, *, peak: bool
) -> dict[str, Any]:
    """Loss, gradients and memory of one way, ``peak`` if asked for."""
    from tools.bench.bench_meters import peak_bytes, watch_kept_bytes

    model.zero_grad(set_to_none=True)
    if device.type == "cuda":  # what is compiled at the first call shall not meet the hooks
        run(model, objective, micro_batch)
        model.zero_grad(set_to_none=True)
    with watch_kept_bytes(model) as kept:
        loss = run(model, objective, micro_batch).item()
    gradients = {name: p.grad.double().cpu() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    most = peak_bytes(lambda: run(model, objective, micro_batch), device) if peak else None
    model.zero_grad(set_to_none=True)
    return {"loss": loss, "gradients": gradients, "kept_bytes": kept.most, "peak_bytes": most}


def differences(found: dict[str, Any], wanted: dict[str, Any] | None) -> dict[str, float | None]:
    """How far a loss and its gradients are from ours, relative; of the gradients the worst parameter's.

    None where ours failed.
    """
    if wanted is None:
        return {"loss_difference": None, "gradient_difference": None}
    errors = [
        float((found["gradients"][name] - gradient).norm() / gradient.norm().clamp(min=1e-30))
        for name, gradient in wanted["gradients"].items()
    ]
    return {
        "loss_difference": abs(found["loss"] - wanted["loss"]) / abs(wanted["loss"]),
        "gradient_difference": max(errors),
    }


def why_no_gradients(device: Any) -> str:
    """Why FlexAttention gives no gradients on a CPU, in torch's own words; "" elsewhere."""
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    if device.type != "cpu":
        return ""
    x = torch.randn(1, 1, 128, 16, device=device, requires_grad=True)
    try:
        flex_attention(x, x, x).sum().backward()
    except NotImplementedError as refusal:
        return f"no backward here: {refusal}".split(". ")[0]
    return ""


def describe(result: dict[str, Any]) -> str:
    """Markdown: all cases in one table, then each with its spread."""
    from tools.bench.training_passes import all_passes

    unit = "CPU ms" if result["device"] == "cpu" else "ms"
    cases = result["cases"]
    lines = [
        f"{result['layers']} layers x {result['hidden']}, {result['heads']} heads, vocabulary "
        f"{result['vocab']}, batch {result['batch']}, {result['dtype'].removeprefix('torch.')}; forward and "
        f"backward, median of {result['rounds']}, one for what takes more than {SLOW_S:.0f} s.",
        "",
        f"A cell: {unit} · kept for backward, MiB. Columns: tokens per row / tokens per block.",
        "",
        "| way | " + " | ".join(f"{case['seq']} / {case['block_size']}" for case in cases) + " |",
        "|---|" + "---|" * len(cases),
    ]
    refused: dict[str, None] = {}
    for name in all_passes():
        cells = []
        for case in cases:
            fact = case["passes"].get(name)
            if fact is None:
                refused[f"{name}: {case['refused'][name]}."] = None
                cells.append("none")
            else:
                cells.append(f"{fact['seconds'] * 1e3:.0f} · {fact['kept_bytes'] / 2**20:.0f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", *refused] if refused else []
    for case in cases:
        lines += ["", *_describe_case(case, unit)]
    return "\n".join(lines)


def _describe_case(case: dict[str, Any], unit: str) -> list[str]:
    from tools.bench.bench_meters import describe_spread
    from tools.bench.training_passes import OURS

    ours = case["passes"].get(OURS)
    lines = [
        f"**seq {case['seq']}, blocks of {case['block_size']}**",
        "",
        f"| way | {unit}, median (least to most) | of ours | kept, MiB | peak, MiB | loss differs | "
        "gradients differ |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, fact in case["passes"].items():
        peak = "" if fact["peak_bytes"] is None else f"{fact['peak_bytes'] / 2**20:.0f}"
        share = "" if ours is None else f"{fact['seconds'] / ours['seconds']:.2f}"
        apart = (fact["loss_difference"], fact["gradient_difference"])
        loss, gradient = ("" if value is None else f"{value:.0e}" for value in apart)
        lines.append(
            f"| {name} | {describe_spread(fact['raw'], factor=1e3, digits=0)} | {share} | "
            f"{fact['kept_bytes'] / 2**20:.0f} | {peak} | {loss} | {gradient} |"
        )
    return [*lines, *(f"| {name} | {reason} | | | | | |" for name, reason in case["refused"].items())]


if __name__ == "__main__":
    sys.exit(main())
