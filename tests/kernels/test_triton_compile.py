"""Triton kernels compiled for GPUs that are not there: tensor cores multiply, nothing spills, all fits.

Compiled by this machine's Triton, whose wheel carries the assembler and the disassembler. Nothing runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from bdtrain_kernels.dispatch import SHARED_KIB

HERE = Path(__file__).resolve().parent
CASES = (
    # Everything on Hopper; of attention on the others the largest head, which is what may not fit.
    ("block_attention.triton_backend", 90, ""),
    *(("block_attention.triton_backend", capability, "D=128") for capability in (80, 89, 100, 120)),
    *(
        (f"{folder}.triton_kernels", capability, "")
        for folder in ("masked_cross_entropy", "rotary", "swiglu")
        for capability in (90, 120)
    ),
)


def compiled(module: str, capability: int, only: str) -> list[dict]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(HERE.parents[1] / "kernels")
    command = [
        sys.executable,
        str(HERE / "compile_check.py"),
        f"bdtrain_kernels.{module}",
        str(capability),
        only,
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def compilations() -> Iterator[dict[tuple[str, int, str], Future]]:
    """All of them under way, two at a time: the assembler takes a minute for some."""
    with ThreadPoolExecutor(2) as pool:
        yield {case: pool.submit(compiled, *case) for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]} sm_{case[1]}")
def test_kernels_compile_fit_and_use_the_tensor_cores(compilations, case):
    capability = case[1]
    results = compilations[case].result()
    assert results
    for result in results:
        assert result["shared"] <= SHARED_KIB[divmod(capability, 10)] * 1024, result
        if capability == 90:
            # A few bytes of spill outside the loops are accepted where the case says so; each was looked at.
            assert result["stack"] <= result["max_spill_bytes"], result
        if result["tensor_cores"]:
            on_warp_groups = {90: "hgmma", 100: "tcgen5"}.get(capability)
            if on_warp_groups is None:
                assert result["hmma"], result
            else:
                assert result[on_warp_groups], result
                assert not result["hmma"], result
