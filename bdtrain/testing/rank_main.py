"""One rank of ``run_ranks``: ``python -m bdtrain.testing.rank_main FOLDER RANK``."""

from __future__ import annotations

import faulthandler
import importlib
import importlib.util
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PEER_GONE = (
    "closed by peer",
    "reset by peer",
    "connection refused",
    "timed out",
    "broken pipe",
    "connection closed",
)


def main(folder: Path, rank: int) -> int:
    """Run the function, write its result or its traceback.

    Returns:
        The exit code.
    """
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    try:
        function = _load(job["target"])
        value = function(rank, job["world_size"], *json.loads(job["arguments"]))
        _write_result(folder, rank, value)
    except BaseException as error:
        told = {"time": time.monotonic(), "traceback": traceback.format_exc(), "peer_gone": _is_echo(error)}
        _write(folder / f"failure-{rank}.json", json.dumps(told).encode())
        return 1
    return 0


def _load(target: str) -> Callable[..., Any]:
    module, _, function = target.rpartition(":")
    if not module.endswith(".py"):
        loaded = importlib.import_module(module)
    else:
        path = Path(module)
        # Last: a test's neighbour must not hide a library.
        sys.path.append(str(path.parent))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = loaded
        spec.loader.exec_module(loaded)
    found: Callable[..., Any] = getattr(loaded, function)
    return found


def _write_result(folder: Path, rank: int, value: Any) -> None:
    """As JSON where that gives back the same value, else by ``torch.save``."""
    try:
        text = json.dumps(value)
        same = bool(json.loads(text) == value)
    except (TypeError, ValueError):
        same = False
    if same:
        _write(folder / f"result-{rank}.json", text.encode())
        return
    import torch

    torch.save(value, folder / f"result-{rank}.pt")


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def _is_echo(error: BaseException) -> bool:
    """Whether this rank only says that another one is gone."""
    text = f"{type(error).__name__}: {error}".lower()
    return not isinstance(error, AssertionError) and any(words in text for words in _PEER_GONE)


def _end_with_parent() -> None:
    """Kill this rank and what it started when the parent's end of the pipe closes."""
    while True:
        if not os.read(0, 1):
            os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    threading.Thread(target=_end_with_parent, name="parent-watch", daemon=True).start()
    code = main(Path(sys.argv[1]), int(sys.argv[2]))
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: a process group that was not destroyed can hang in its destructor.
    os._exit(code)
