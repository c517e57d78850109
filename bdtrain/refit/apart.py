"""A re-fit in a process of its own: one that hangs, or is killed, costs itself alone."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import IO

from bdtrain.errors import RefitError
from bdtrain.tracking.child import child_environment

GRACE_S = 60.0
"""What a process is given beyond its own deadline, and to end when it is asked to."""

_ERROR = "error: "
_TAIL_BYTES = 1 << 16


class ApartError(RefitError):
    """What a process said when it failed.

    Args:
        message: its own words.
        exit_code: that it returned.
    """

    def __init__(self, message: str, exit_code: int = RefitError.exit_code) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def run_apart(words: Sequence[str], what: str, limit_s: float) -> None:
    """Make one re-fit in a process of its own. What it says on its standard output is seen at once.

    Args:
        words: its command, ``refit_command``.
        what: it is, for messages.
        limit_s: seconds after which it is killed.

    Raises:
        ApartError: if it failed, with what it said and its exit code; or if it did not end by itself.
    """
    with tempfile.TemporaryFile() as heard:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stderr=heard, env=child_environment(os.environ, gpus=True)
        )
        late = False
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            process.kill()
            late = True
        finally:
            end_process(process)
            said, message = _split(heard)
            # Of a process that did its work these are warnings of libraries, each time the same.
            if process.returncode:
                print(said, end="", file=sys.stderr, flush=True)
    code = process.returncode
    if late:
        raise ApartError(
            f"the re-fit of {what} did not end at its deadline (refit.deadline_s) and was killed"
        )
    if code < 0:
        raise ApartError(f"the re-fit of {what} was ended by {signal.Signals(-code).name}")
    if code:
        raise ApartError(message or f"the re-fit of {what} ended with {code}", code)


def _split(heard: IO[bytes]) -> tuple[str, str]:
    """What a process said besides its error, and the error, which is the last it says."""
    size = heard.seek(0, os.SEEK_END)
    heard.seek(max(size - _TAIL_BYTES, 0))
    lines = heard.read().decode(errors="replace").splitlines(keepends=True)
    begins = [number for number, line in enumerate(lines) if line.startswith(_ERROR)]
    if not begins:
        return "".join(lines), ""
    message = "".join(lines[begins[-1] :]).removeprefix(_ERROR)
    return "".join(lines[: begins[-1]]), message.rstrip()


def end_process(process: subprocess.Popen[bytes]) -> None:
    """End a process that still runs: asked first, because its Ray has things to put away."""
    try:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
    finally:
        # Who is asked a second time meanwhile waits no longer, and leaves nothing behind.
        if process.poll() is None:
            process.kill()
        process.wait()


@contextlib.contextmanager
def exit_on_request() -> Iterator[None]:
    """Turn SIGTERM into an exception: who is asked to end takes its child along."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def refit_command(words: Sequence[str]) -> list[str]:
    """The command of a re-fit with these arguments."""
    # -P: a file of the user's working folder must not hide a library.
    return [sys.executable, "-P", "-m", "bdtrain.refit", *words]
