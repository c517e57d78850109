"""The exception family of bdtrain: every message a user can meet starts from here.

A message says what was found, what is allowed and what to do. ``exit_code`` is what a launcher returns to the
shell, so that a supervisor can tell a mistake in the configuration from a fault of the data or of the run.
"""

from __future__ import annotations

import sys


class BdtrainError(Exception):
    """Base of every error that bdtrain raises on purpose.

    Attributes:
        exit_code: what a launcher returns to the shell.
        everywhere: raised on every rank in the same words, so that the first one tells it.
    """

    exit_code = 1
    everywhere = False


class ConfigError(BdtrainError):
    """The configuration is wrong; raised before any process group or device is touched.

    Args:
        message: text for the user, all problems at once, one per line.
    """

    exit_code = 3


class ShapeError(BdtrainError, ValueError):
    """Tensors or sizes that must agree do not."""


class DataError(BdtrainError):
    """Text, shards or an index cannot be used as they are."""

    exit_code = 6


class TokenizerError(DataError):
    """A tokenizer model is missing, damaged or not the one that made the corpus."""


class CheckpointError(BdtrainError):
    """A checkpoint is missing, damaged or does not fit the model."""

    exit_code = 7


class NonFiniteError(BdtrainError):
    """Loss or gradients were not finite for too many steps in a row."""

    exit_code = 4


class RefitError(BdtrainError):
    """A re-fit of the noise plan cannot be done, or its result cannot be used."""

    exit_code = 8


class RankError(RefitError):
    """One of several ranks cannot finish what all do together: the others wait for it, so the run ends.

    Unlike other failures of a re-fit it is never survived, and that rank is the one to tell it.
    """


def report_failure(error: BaseException, *, enabled: bool = True) -> int:
    """Print what ended a command, one message and no traceback, and say its exit code.

    Args:
        error: a ``BdtrainError``, an ``OSError`` or a ``KeyboardInterrupt``; anything else is a bug and is
            raised again.
        enabled: whether this process prints; one rank is enough.

    Returns:
        The exit code: that of the error, 1 for the system's refusal, 130 for an interrupt.
    """
    if isinstance(error, BdtrainError):
        text, code = f"error: {error}", error.exit_code
    elif isinstance(error, KeyboardInterrupt):
        text, code = "interrupted", 130
    elif isinstance(error, OSError):
        text, code = f"error: {error.filename or 'a file'}: {error.strerror or error}", 1
    else:
        raise error
    if enabled:
        print(text, file=sys.stderr)
    return code
