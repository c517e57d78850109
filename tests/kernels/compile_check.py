"""Compiles Triton kernels for GPUs that are not there and reads the machine code; prints one JSON line each.

A process of its own: what the tests' process decorated is interpreted and cannot be compiled.

    python compile_check.py bdtrain_kernels.block_attention.triton_backend 90 128

takes a module with ``compile_cases``, a compute capability and the text that names must contain.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def main() -> int:
    """Compile and report."""
    module, capability, only = sys.argv[1], int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else ""
    from bdtrain_kernels.dispatch import SHARED_KIB

    for case in importlib.import_module(module).compile_cases(SHARED_KIB[divmod(capability, 10)]):
        if only in case.name:
            print(json.dumps(compile_case(case, capability)), flush=True)
    return 0


def compile_case(case: Any, capability: int) -> dict[str, Any]:
    """Compile one case.

    Returns:
        name; registers, stack (spilled bytes) and shared memory (bytes) of a program; counts of warp group
        (HGMMA), fifth generation (UTCHMMA and the like) and plain (HMMA) matrix instructions.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in case.constants else case.types[name] for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in case.aligned}
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=dict(case.constants), attrs=aligned)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        usage = _run(tools / "cuobjdump", "-res-usage", binary)
        code = _run(tools / "nvdisasm", "-c", binary)
    return {
        "name": case.name,
        "registers": int(re.findall(r"REG:(\d+)", usage)[-1]),
        "stack": int(re.findall(r"STACK:(\d+)", usage)[-1]),
        "shared": int(compiled.metadata.shared),
        "hgmma": len(re.findall(r"\bHGMMA\b", code)),
        "tcgen5": len(re.findall(r"\bUTC\w*MMA\b", code)),
        "hmma": len(re.findall(r"\bHMMA\b", code)),
        "tensor_cores": case.tensor_cores,
        "max_spill_bytes": case.max_spill_bytes,
    }


def _run(*command: Any) -> str:
    return subprocess.run(
        [str(part) for part in command], check=True, capture_output=True, text=True, env=dict(os.environ)
    ).stdout


if __name__ == "__main__":
    sys.exit(main())
