"""Faults on request, for tests of what a run survives; nothing happens unless BDTRAIN_FAULT is set."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import BinaryIO

from bdtrain.checkpoint.files import FileActions
from bdtrain.errors import ConfigError

VARIABLE = "BDTRAIN_FAULT"
PHASES = ("data", "forward", "step", "save", "validate")
KINDS = ("kill", "term", "stop", "exception", "nan_loss", "enospc", "slow")
SLOW_S = 1.0

_FORM = f"{VARIABLE} is rank:step:phase:kind, several joined by ';'; rank is a number or * for all"


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        step: number of the step, from 1, in which it happens.
        phase: where in the step, one of ``PHASES``.
        kind: what happens, one of ``KINDS``.
    """

    step: int
    phase: str
    kind: str


class Faults:
    """The faults of this rank; each happens once.

    Args:
        faults: what is to happen.
    """

    def __init__(self, faults: Iterable[Fault] = ()) -> None:
        self._left = list(faults)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str], rank: int) -> Faults:
        """What BDTRAIN_FAULT asks of this rank.

        Args:
            environment: of this process.
            rank: number of this process.

        Raises:
            ConfigError: if the variable cannot be read; a fault that never happens proves nothing.
        """
        faults = []
        for text in filter(None, (part.strip() for part in environment.get(VARIABLE, "").split(";"))):
            who, fault = _parse(text)
            if who in ("*", str(rank)):
                faults.append(fault)
        return cls(faults)

    def at(self, phase: str, step: int) -> bool:
        """Do what is asked for here.

        Args:
            phase: where the loop is, one of ``PHASES``.
            step: number of the step, from 1.

        Returns:
            Whether the caller must make the loss of this step not finite (kind ``nan_loss``).

        Raises:
            RuntimeError: kind ``exception``.
            OSError: kind ``enospc``, as from a full disk.
        """
        if not self._left:
            return False
        spoil = False
        for fault in [fault for fault in self._left if (fault.phase, fault.step) == (phase, step)]:
            self._left.remove(fault)
            spoil = _perform(fault) or spoil
        return spoil


class FaultyDisk(FileActions):
    """The disk, with the faults of phase ``save`` at the first write of a save.

    Args:
        faults: of this rank.
        step: number of the step that is saved.
    """

    def __init__(self, faults: Faults, step: int) -> None:
        self._faults, self._step = faults, step

    def write(self, file: BinaryIO, data: bytes | memoryview) -> None:
        """Write, unless something happens first."""
        self._faults.at("save", self._step)
        super().write(file, data)


def _parse(text: str) -> tuple[str, Fault]:
    words = text.split(":")
    if len(words) != 4:
        raise ConfigError(f"{_FORM}; found {text!r}")
    who, step, phase, kind = words
    if not (who == "*" or who.isdecimal()) or not step.isdecimal():
        raise ConfigError(f"{_FORM}; found rank {who!r} and step {step!r}")
    if phase not in PHASES or kind not in KINDS:
        raise ConfigError(
            f"{_FORM}; found {text!r}; phase is one of {', '.join(PHASES)}, kind one of {', '.join(KINDS)}"
        )
    if kind == "nan_loss" and phase != "forward":
        raise ConfigError(f"{VARIABLE}: kind nan_loss needs phase forward, found {text!r}")
    return who if who == "*" else str(int(who)), Fault(int(step), phase, kind)


def _perform(fault: Fault) -> bool:
    where = f"asked for by {VARIABLE} in {fault.phase} of step {fault.step}"
    if fault.kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.kind == "term":
        os.kill(os.getpid(), signal.SIGTERM)
    elif fault.kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault.kind == "exception":
        raise RuntimeError(where)
    elif fault.kind == "enospc":
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} ({where})")
    elif fault.kind == "slow":
        time.sleep(SLOW_S)
    return fault.kind == "nan_loss"
