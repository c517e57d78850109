"""A progress line on stderr: rate and time left."""

from __future__ import annotations

import sys
import time
from typing import TextIO

_TTY_SECONDS = 0.5
_PLAIN_SECONDS = 10.0
_MEGA = 1e6


class ProgressLine:
    """Counts bytes of input: a line that rewrites itself on a terminal; plain lines elsewhere."""

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        """Prepare; nothing is shown before :meth:`start`.

        Args:
            quiet: show nothing.
            stream: where to write; ``None`` is stderr.
        """
        self._quiet = quiet
        self._stream = stream if stream is not None else sys.stderr
        self._live = self._stream.isatty()
        self._total = self._before = self._now = 0
        self._begun = self._shown = 0.0

    def start(self, total: int, before: int) -> None:
        """Begin.

        Args:
            total: bytes of all input.
            before: bytes that an earlier run has done; they do not count for the rate.
        """
        self._total, self._before, self._now = total, before, before
        self._begun = self._shown = time.monotonic()

    def advance(self, count: int) -> None:
        """Count bytes and show the line if it is due."""
        self._now += count
        now = time.monotonic()
        if now - self._shown >= (_TTY_SECONDS if self._live else _PLAIN_SECONDS):
            self._shown = now
            self._show(self.text(now - self._begun), end="" if self._live else "\n")

    def finish(self) -> None:
        """Show the last line."""
        self._show(self.text(max(time.monotonic() - self._begun, 1e-9)), end="\n")

    def text(self, seconds: float) -> str:
        """The line after ``seconds`` of work."""
        rate = (self._now - self._before) / max(seconds, 1e-9)
        left = f"{_duration((self._total - self._now) / rate)} left" if rate > 0 else "time left unknown"
        if self._now >= self._total:
            left = f"done in {_duration(seconds)}"
        return (
            f"preprocess: {self._now / _MEGA:.1f} of {self._total / _MEGA:.1f} MB of input, "
            f"{rate / _MEGA:.2f} MB/s, {left}"
        )

    def _show(self, text: str, *, end: str) -> None:
        if not self._quiet:
            # The escape clears what a longer line left behind.
            self._stream.write(f"\r{text}\x1b[K{end}" if self._live else f"{text}{end}")
            self._stream.flush()


def _duration(seconds: float) -> str:
    """Hours, minutes and seconds, whichever are needed."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {whole % 60:02d}s" if minutes else f"{whole}s"
