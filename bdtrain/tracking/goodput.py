"""Where the time of a run went, over all its attempts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from bdtrain.tracking.jsonl import AttemptSpan

ACTIVITIES = ("setup", "training", "data_wait", "validation", "checkpoint", "refit", "other", "lost", "down")
"""What the seconds of a run are divided into.

``training`` is forward, backward and update of steps that count; ``lost`` the work of an earlier attempt
after the checkpoint that was resumed from, and steps that were skipped; ``down`` the time between attempts.
"""

_NOT_ACTIVE = ("lost", "down")


class Goodput:
    """Divides the wall time of a run among activities; exactly one is on at any moment.

    A step that is repeated after a fault is useful once: its first execution is in ``lost``, with everything
    else that an earlier attempt did after the checkpoint. That attempt is dead and cannot tell, so the times
    of its lines in the metrics file say how long it was at work (up to its last line; the rest is ``down``).

    Args:
        earlier: ``to_dict()`` of the checkpoint that is resumed from; None for a new run, and for one whose
            earlier attempts left no checkpoint.
        spans: earlier attempts, from ``attempt_spans(metrics file)`` before this attempt writes there.
        clock: seconds that never run backwards.
        now: seconds since 1970.
    """

    def __init__(
        self,
        earlier: Mapping[str, Any] | None = None,
        *,
        spans: Sequence[AttemptSpan] = (),
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._clock, self._now = clock, now
        self._activity, self._since, self._began = "setup", clock(), now()
        self._seconds = dict.fromkeys(ACTIVITIES, 0.0)
        self.add_earlier(earlier, spans=spans)

    def add_earlier(
        self, earlier: Mapping[str, Any] | None = None, *, spans: Sequence[AttemptSpan] = ()
    ) -> None:
        """Add what earlier attempts did, once, where the clock had to run before that was known.

        Args:
            earlier: as in the constructor.
            spans: as in the constructor.
        """
        saved_at = 0.0
        if earlier is not None:
            for name, value in earlier["seconds"].items():
                self._seconds[name] = self._seconds.get(name, 0.0) + value
            saved_at = earlier["saved_at"]
        self._seconds["lost"] += sum(max(0.0, span.last - max(span.first, saved_at)) for span in spans)
        # From the end of each attempt, or from the checkpoint if that is later, to the beginning of the next.
        begins = [*(span.first for span in spans[1:]), self._began]
        for span, begin in zip(spans, begins, strict=False):
            self._seconds["down"] += max(0.0, begin - max(span.last, saved_at))

    def switch(self, activity: str) -> str:
        """Begin another activity.

        Args:
            activity: one of ``ACTIVITIES``, ``lost`` and ``down`` aside.

        Returns:
            The one that was on.
        """
        if activity not in ACTIVITIES or activity in _NOT_ACTIVE:
            allowed = [name for name in ACTIVITIES if name not in _NOT_ACTIVE]
            raise KeyError(f"{activity!r} is no activity; choose from {allowed}")
        now = self._clock()
        self._seconds[self._activity] += now - self._since
        previous, self._activity, self._since = self._activity, activity, now
        return previous

    @contextmanager
    def during(self, activity: str) -> Iterator[None]:
        """Do one thing for the length of a block, then go on with what was on before."""
        previous = self.switch(activity)
        try:
            yield
        finally:
            self.switch(previous)

    def lose(self, seconds: float) -> None:
        """Take time of training back: the step it went into changed nothing.

        Args:
            seconds: wall time, at most what training has.
        """
        self.switch(self._activity)
        seconds = min(seconds, self._seconds["training"])
        self._seconds["training"] -= seconds
        self._seconds["lost"] += seconds

    def seconds(self, activity: str) -> float:
        """Wall time of an activity so far, all attempts together."""
        running = self._clock() - self._since if activity == self._activity else 0.0
        return self._seconds[activity] + running

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: seconds by activity, and when this was said (seconds since 1970)."""
        return {"seconds": {name: self.seconds(name) for name in self._seconds}, "saved_at": self._now()}

    def summary(self) -> dict[str, float]:
        """Seconds by activity and the goodput.

        Returns:
            ``<activity>_seconds`` each; ``wall_seconds``, the sum of all but ``down``, since a time without
            any attempt is a cluster's queue and not the run's doing; ``goodput``, training over
            ``wall_seconds``.
        """
        seconds = {f"{name}_seconds": self.seconds(name) for name in self._seconds}
        wall = sum(seconds.values()) - seconds["down_seconds"]
        return {
            "goodput": seconds["training_seconds"] / wall if wall > 0 else 0.0,
            "wall_seconds": wall,
            **seconds,
        }
