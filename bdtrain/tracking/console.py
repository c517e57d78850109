"""What a run prints: plain lines on standard output, from one rank only."""

from __future__ import annotations

import sys
from typing import TextIO


def format_count(value: float) -> str:
    """A number with a suffix: 950, 12.3k, 4.56M, 7.89B."""
    for limit, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}"


def format_seconds(seconds: float) -> str:
    """A duration: 42s, 3m05s, 2h07m, 3d04h."""
    total = round(max(seconds, 0.0))
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m{total % 60:02d}s"
    if total < 86400:
        return f"{total // 3600}h{total % 3600 // 60:02d}m"
    return f"{total // 86400}d{total % 86400 // 3600:02d}h"


class Console:
    """Prints from one rank and is silent on the others.

    Args:
        enabled: whether this rank prints.
        stream: where to; standard output if None.
    """

    def __init__(self, *, enabled: bool = True, stream: TextIO | None = None) -> None:
        self._enabled = enabled
        self._stream = stream or sys.stdout

    def line(self, text: str = "") -> None:
        """Print one line."""
        if not self._enabled:
            return
        try:
            print(text, file=self._stream, flush=True)
        except BrokenPipeError:
            # Whoever read along has left (`| head`, a closed terminal): no reason to end a run.
            self._enabled = False
        except OSError:
            return  # a full disk under the log; the next line may fit

    def progress(
        self,
        *,
        step: int,
        steps: int,
        loss: float,
        lr: float,
        tokens_per_second: float,
        seconds_left: float,
        mfu: float | None = None,
    ) -> None:
        """The progress line of training; ``mfu`` in [0, 1], left out where the device's peak is not known."""
        width = len(str(steps))
        utilization = "" if mfu is None else f"  MFU {mfu:.1%}"
        self.line(
            f"step {step:>{width}}/{steps}  loss {loss:.4f}  lr {lr:.2e}  "
            f"{format_count(tokens_per_second)} tokens/s{utilization}  ETA {format_seconds(seconds_left)}"
        )
