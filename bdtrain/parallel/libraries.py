"""What the heavy libraries must be told before they are imported."""

from __future__ import annotations

import logging
import os
import warnings


def prepare_libraries() -> None:
    """Silence what the user can do nothing about. Call once, before Megatron or DeepSpeed is imported.

    Megatron warns once for each module that could have used Transformer Engine or Apex, which bdtrain never
    needs; DeepSpeed warns of gathers that it uses itself and that torch means to rename.
    """
    warnings.filterwarnings("ignore", message=".*Transformer Engine and Apex are not installed.*")
    warnings.filterwarnings(
        "ignore", message=".*_all_gather_base.*|.*all_gather_into_tensor.*", category=FutureWarning
    )
    warnings.filterwarnings("ignore", message="Apex is not installed.*", category=UserWarning)
    warnings.filterwarnings("ignore", message="full scope is deprecated.*", category=UserWarning)
    logging.getLogger("megatron").setLevel(logging.ERROR)
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
