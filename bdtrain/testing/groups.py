"""Process groups for tests in one process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def single_process_groups() -> Iterator[Any]:
    """A world of one process, without a port.

    Where groups exist already they are used and left alone.

    Yields:
        Megatron's ``ProcessGroupCollection``, every group of size 1.
    """
    import torch.distributed as dist

    from bdtrain.parallel.groups import destroy_groups, init_groups

    ours = not dist.is_initialized()
    groups = init_groups()
    try:
        yield groups
    finally:
        if ours:
            destroy_groups()
