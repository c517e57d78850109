"""What a Triton kernel is compiled as where there is no GPU: tests compile it and read the machine code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class CompileCase:
    """One kernel with one set of types and constants.

    Attributes:
        name: of the case, for messages.
        kernel: the ``triton.jit`` function.
        types: Triton's word for the type of every run-time argument ("*bf16", "*fp32", "i32", "fp32").
        constants: values of the ``tl.constexpr`` arguments.
        num_warps: warps of a program.
        num_stages: stages of the software pipeline.
        tensor_cores: the machine code must multiply on tensor cores (on Hopper by whole warp groups).
        max_spill_bytes: stack bytes per thread that are accepted on Hopper.
        aligned: arguments known to be multiples of 16, as Triton finds at run time for most pointers and
            strides.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int
    tensor_cores: bool
    max_spill_bytes: int = 0
    aligned: frozenset[str] = field(default_factory=frozenset)
