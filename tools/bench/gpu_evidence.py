"""What is measured on a GPU, in steps of ten minutes at most: tests, kernels, whole training steps, a run.

    python tools/bench/gpu_evidence.py kernels --out runs/gpu
    python tools/bench/gpu_evidence.py train --out runs/gpu --corpus runs/books16k/corpus
    python tools/bench/gpu_evidence.py all --out runs/gpu --trial

A step leaves OUT/STEP.log (all that its commands printed) and OUT/STEP.json (machine, versions, commands,
seconds, exit codes) beside what the commands write. At ``--limit`` a command is told to end, as a run is by a
scheduler: what it measured stays, and training goes on with the same command. ``--trial`` runs the same
programs on a CPU, tiny: it shows that they work, not how fast.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
GRACE_S = 30.0
"""Seconds from SIGTERM, which a training run answers with a checkpoint, to SIGKILL."""

LIBRARIES = ("torch", "triton", "deepspeed", "megatron-core", "flash-attn", "transformers")

# Utilisation by the datasheet of an H100 or H200: 989 TFLOP/s of dense bf16.
_PRESET = "tools/bench/train_step.py --device cuda --peak-tflops 989 --preset"
_SHAPES = "--length 1024 4096 --block-size 4 16 64"
_TINY = "tools/bench/train_step.py --tiny --threads 1 --steps 1 --peak-tflops 1"
_RUN = "-m deepspeed.launcher.runner --num_gpus 1 launchers/pretrain.py --config configs/run"
_BOOKS = f"{_RUN}/books-1gpu.yaml data.path={{corpus}} tracking.mlflow=false"

STEPS: Mapping[str, Sequence[str]] = {
    "tests": ("-m pytest -q -n 4 -m gpu tests",),
    "kernels": ("kernels/bench/gpu.py --out {out}/kernels",),
    # The shape of the target once more in a process of its own: the spread of repeats.
    "small": (
        f"{_PRESET} small {_SHAPES} --json {{out}}/small.json",
        f"{_PRESET} small --length 1024 --block-size 16 --json {{out}}/small-again.json",
    ),
    "1b": (
        f"{_PRESET} 1b {_SHAPES} --json {{out}}/1b.json",
        f"{_PRESET} 1b --length 4096 --block-size 16 --json {{out}}/1b-again.json",
    ),
    "train": (
        f"{_BOOKS} run.folder={{out}}/train",
        "launchers/evaluate_checkpoint.py --checkpoint {out}/train/checkpoint --data {corpus} --baselines",
    ),
    "profile": (
        f"{_BOOKS} run.folder={{out}}/profile train.steps=60 optim.warmup_steps=6 "
        "optim.decay_steps=15 profile.steps=50:53 refit.mode=off "
        "validation.every_steps=0 checkpoint.every_steps=0",
    ),
}
"""Arguments of Python, in the order in which the steps tell most."""

TRIAL: Mapping[str, Sequence[str]] = {
    "tests": ("-m pytest -q -n 0 -m gpu --collect-only tests/kernels/test_triton_block_attention.py",),
    "kernels": ("kernels/bench/gpu.py --trial --only loss --out {out}/kernels",),
    "small": (f"{_TINY} --length 32 64 --block-size 4 --json {{out}}/small.json",),
    "1b": (f"{_TINY} --json {{out}}/1b.json",),
    "train": (
        f"{_RUN}/tiny_synthetic.yaml train.steps=20 run.folder={{out}}/train",
        "launchers/evaluate_checkpoint.py --checkpoint {out}/train/checkpoint --sequences 16",
    ),
    "profile": (f"{_RUN}/tiny_synthetic.yaml train.steps=6 profile.steps=4:6 run.folder={{out}}/profile",),
}
"""The same programs for ``--trial``."""


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
        command: as a shell takes it.
        code: its exit code; negative for a signal.
        seconds: of wall time.
        told_to_end: whether it reached its limit.
    """

    command: str
    code: int
    seconds: float
    told_to_end: bool


def run_step(step: str, out: Path, *, corpus: Path | None, trial: bool, limit_s: float) -> bool:
    """Run a step's commands, one after another, until one fails or time is up.

    Args:
        step: key of ``STEPS``.
        out: folder of the results.
        corpus: of ``tools/preprocess.py``; where it is needed.
        trial: on a CPU, tiny.
        limit_s: seconds of all of them.

    Returns:
        Whether all of them ended well, and in time.
    """
    out.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    begun = time.monotonic()
    with (out / f"{step}.log").open("a", encoding="utf-8") as log:
        for text in (TRIAL if trial else STEPS)[step]:
            words = [word.format(out=out, corpus=corpus) for word in shlex.split(text)]
            left = limit_s - (time.monotonic() - begun)
            outcomes.append(_run([sys.executable, *words], log, limit_s=max(left, 0.0)))
            _write(out / f"{step}.json", trial, outcomes)
            last = outcomes[-1]
            print(f"{step}: {last.code} after {last.seconds:.0f} s: {last.command}", flush=True)
            if last.code or last.told_to_end:
                return False
    return True


def _run(words: Sequence[str], log: Any, *, limit_s: float) -> Outcome:
    """Run a command in a session of its own, so that all of its processes can be told to end."""
    log.write(f"$ {shlex.join(words)}\n")
    log.flush()
    begun = time.monotonic()
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        words,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env={**os.environ, "PYTHONPATH": path.rstrip(os.pathsep), "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    )
    told = False
    try:
        process.wait(limit_s)
    except subprocess.TimeoutExpired:
        told = True
    finally:
        for sent, patience in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, None)):
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, sent)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(patience)
    return Outcome(shlex.join(words), process.returncode, time.monotonic() - begun, told)


def _write(path: Path, trial: bool, outcomes: Sequence[Outcome]) -> None:
    result = {
        "trial": trial,
        "machine": _machine(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in LIBRARIES},
        "commands": [asdict(outcome) for outcome in outcomes],
    }
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _machine() -> str:
    """GPUs and driver as their own tool names them; the processor where there is none."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    with contextlib.suppress(OSError):
        done = subprocess.run(query, capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.strip()
    return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def main(arguments: list[str]) -> int:
    """Run steps.

    Returns:
        0 if all of them ended well; 1 if one did not, and 2 for arguments that do not fit.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", nargs="+", choices=[*STEPS, "all"])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--corpus", type=Path, help="of tools/preprocess.py, vocabulary 16384, to train on")
    parser.add_argument("--limit", type=float, default=570.0, help="seconds of a step (default: 570)")
    parser.add_argument("--trial", action="store_true", help="on a CPU, tiny")
    options = parser.parse_args(arguments)
    steps = list(STEPS) if "all" in options.step else options.step
    needy = [step for step in steps if any("{corpus}" in text for text in STEPS[step])]
    if needy and options.corpus is None and not options.trial:
        parser.error(f"{', '.join(needy)}: give --corpus, a folder that tools/preprocess.py made")
    out = options.out.resolve()
    corpus = None if options.corpus is None else options.corpus.resolve()
    ended = [run_step(step, out, corpus=corpus, trial=options.trial, limit_s=options.limit) for step in steps]
    return int(not all(ended))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
