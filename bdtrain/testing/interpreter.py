"""Triton's interpreter without its slowest habit, and with a numpy younger than itself.

At every call of one device function by another it patches the whole language module again, milliseconds each
time and never undone. Once per module of device functions is enough: the executor of a kernel patches
(and restores) the language that the kernel's own module uses by itself.

The bounds of a loop are arrays of one number in Triton 3.6, and numpy from 2.4 on no longer takes those for
integers.
"""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def quicken_interpreter() -> None:
    """Make interpreted Triton kernels bearable, and right with any numpy; for tests and trials on a CPU.

    Call it in a process that was started with ``TRITON_INTERPRET=1``. Does nothing where this version of
    Triton is built otherwise.
    """
    from triton.runtime import interpreter

    patch_tensor = getattr(interpreter, "_patch_lang_tensor", None)
    if patch_tensor is not None:

        def patch_with_index(tensor: Any, *rest: Any) -> None:
            patch_tensor(tensor, *rest)  # which knows what was there before and puts it back after the kernel
            tensor.__index__ = lambda self: int(self.handle.data.item())

        interpreter._patch_lang_tensor = patch_with_index

    patch = getattr(interpreter, "_patch_lang", None)
    if patch is None:
        return
    patched: set[int] = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        module = self.fn.__globals__
        if id(module) not in patched:
            patched.add(id(module))
            patch(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
