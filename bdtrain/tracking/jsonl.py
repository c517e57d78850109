"""Metrics as JSON lines: one object per report, appended and flushed, readable while the run goes on."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from types import TracebackType

from bdtrain.tracking.names import METRICS


class JsonlWriter:
    """Appends ``{"step": ..., "time": ..., "<metric>": ...}`` lines to a file.

    Args:
        path: the file; its folder is made.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append one line.

        Args:
            step: batches taken so far.
            values: metrics by their name in ``tracking/names.py``; a value that is not finite is written as a
                string, since JSON has no word for it.

        Raises:
            KeyError: for a name that is not in the list.
        """
        unknown = sorted(set(values) - set(METRICS))
        if unknown:
            raise KeyError(f"metrics {unknown} are not in bdtrain/tracking/names.py")
        finite = {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **finite}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> JsonlWriter:
        """The writer itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self.close()
