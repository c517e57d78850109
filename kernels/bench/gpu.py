"""Every kernel on a GPU, one command, under 5 minutes of it: correctness first, then speed beside baselines.

    python kernels/bench/gpu.py --out kernels/bench/DATE-gpu

writes DATE-gpu.json (all numbers) and DATE-gpu.md (tables). Times are CUDA events, medians over rotating
inputs in one process, so every ratio is of one run. ``--trial`` runs the same code on a CPU on tiny shapes,
the Triton kernels under their interpreter: it shows that everything works, not how fast.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]


def main() -> int:
    """Run the sections that were asked for and write what they found, also when one of them fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    parser.add_argument("--trial", action="store_true", help="on a CPU, tiny shapes, interpreted kernels")
    parser.add_argument("--only", default="", help="sections whose name contains this")
    parser.add_argument("--no-sweep", action="store_true", help="leave out the shapes of the programs")
    options = parser.parse_args()
    if options.trial:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
        from bdtrain.testing.interpreter import quicken_interpreter

        quicken_interpreter()
    import torch

    if not options.trial and not torch.cuda.is_available():
        print("error: no CUDA device; --trial runs the same code on a CPU", file=sys.stderr)
        return 2
    result: dict[str, Any] = {"command": " ".join(sys.argv), "versions": _versions(torch, options.trial)}
    failed = False
    for name, section in _sections(options.trial, sweep=not options.no_sweep).items():
        if options.only not in name:
            continue
        begun = time.perf_counter()
        try:
            result[name] = section()
        except Exception as error:  # later sections still have something to say
            result[name] = {"failed": f"{type(error).__name__}: {error}"}
            failed = True
        result.setdefault("seconds", {})[name] = time.perf_counter() - begun
        print(_as_markdown(name, result[name]), flush=True)
        if options.out is not None:
            _write(options.out, result)
    print(f"seconds: {result.get('seconds')}")
    return int(failed)


def _sections(trial: bool, *, sweep: bool) -> dict[str, Callable[[], Any]]:
    """Name -> what to run, in order; the device's ceilings are measured once, first."""
    import gpu_attention as attention
    import gpu_others as others
    import torch
    from gpu_timing import Clock, measure_ceilings

    device = "cpu" if trial else "cuda"
    clock = Clock(device, repeats=1 if trial else 12)
    ceilings: dict[str, float] = {}

    def measure() -> dict[str, float]:
        size, numbers = (64, 1 << 10) if trial else (8192, 1 << 29)
        ceilings.update(measure_ceilings(clock, size=size, numbers=numbers))
        return ceilings

    def speed(cases: tuple[Any, ...], sides: tuple[str, ...]) -> Callable[[], Any]:
        peak = lambda: ceilings.get("matmul_tflops", 790.0)  # noqa: E731
        return lambda: [row for case in cases for row in attention.measure_case(clock, case, peak(), sides)]

    case = attention.Case
    if trial:
        small = case(32, 4, 16, batch=1, heads=2, kv_heads=1)
        return {
            "ceilings": measure,
            "attention: correctness": lambda: attention.check_correctness(
                device, torch.float32, (small,), ("triton", "flash", "flex")
            ),
            "attention: speed": speed(
                (small,), ("triton", "causal SDPA over L", "flash", "SDPA, dense mask")
            ),
            "attention: shapes": lambda: attention.sweep(clock, seq=32, block_size=4, head_dims=()),
            "head and loss": lambda: others.measure_loss(
                clock, rows=8, hidden=16, vocab=40, dtype=torch.float32, backends=("chunked", "triton")
            ),
            "decoding": lambda: others.measure_decoding(
                clock, batch=1, keys=(64,), rows=(4,), copy_tb_per_s=ceilings.get("copy_tb_per_s", 1.0)
            ),
            "elementwise": lambda: others.measure_elementwise(device, trial=True),
        }
    main_cases = tuple(case(4096, size, dim) for dim in (64, 128) for size in (4, 16, 128, 1024))
    sections: dict[str, Callable[[], Any]] = {
        "ceilings": measure,
        "attention: correctness": lambda: attention.check_correctness(
            device, torch.bfloat16, attention.CORRECTNESS, ("triton", "flash", "flex")
        ),
        "attention: speed": speed(main_cases, ("triton", "flex", "causal SDPA over L")),
        "attention: other lengths": speed(
            (case(1024, 16, 128), case(16384, 16, 128, batch=1)), ("triton", "flex", "causal SDPA over L")
        ),
        "attention: documents, key heads, copies": speed(
            (
                case(4096, 16, 128, documents=7),
                case(4096, 16, 128, kv_heads=4),
                case(4096, 16, 128, copies=2),
                case(4096, 16, 128, copies=4, batch=2),
            ),
            ("triton", "flex"),
        ),
        "attention: rectangles of a library": speed(
            (case(4096, 16, 128), case(4096, 16, 64)), ("triton", "flash")
        ),
        "attention: dense mask": speed(
            (case(2048, 16, 128), case(2048, 16, 64)), ("triton", "SDPA, dense mask")
        ),
    }
    for rows, hidden, vocab in ((8192, 2048, 50304), (8192, 4096, 152064), (65536, 2048, 152064)):
        sections[f"head and loss: {rows} rows, vocabulary {vocab}"] = functools.partial(
            others.measure_loss,
            clock,
            rows=rows,
            hidden=hidden,
            vocab=vocab,
            dtype=torch.bfloat16,
            backends=("chunked", "triton"),
        )
    sections["decoding"] = lambda: others.measure_decoding(
        clock,
        batch=1,
        keys=(1024, 4096, 32768),
        rows=(4, 16, 32),
        copy_tb_per_s=ceilings.get("copy_tb_per_s", 4.3),
    )
    sections["elementwise"] = lambda: others.measure_elementwise(device, trial=False)
    if sweep:
        sections["attention: seconds to compile the shapes"] = lambda: {
            "seconds": attention.compile_ahead((64, 128), workers=min(12, os.cpu_count() or 1))
        }
        sections["attention: shapes"] = lambda: attention.sweep(
            clock, seq=4096, block_size=16, head_dims=(64, 128)
        )
    return sections


def _versions(torch: Any, trial: bool) -> dict[str, str]:
    import triton

    device = platform.processor() or platform.machine()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "device": device if trial else torch.cuda.get_device_name(),
    }


def _as_markdown(name: str, found: Any) -> str:
    from gpu_timing import markdown_table

    rows = found if isinstance(found, list) else [found]
    return f"\n## {name}\n\n{markdown_table(rows) if rows else 'nothing'}\n"


def _write(out: Path, result: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    heading = f"# Kernels on {result['versions']['device']}\n\n`{result['command']}`\n\n"
    heading += ", ".join(f"{name} {version}" for name, version in result["versions"].items()) + "\n"
    parts = [
        _as_markdown(name, found) for name, found in result.items() if name not in ("command", "versions")
    ]
    out.with_suffix(".md").write_text(heading + "".join(parts), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
