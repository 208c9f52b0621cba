"""A run that stands still though all its ranks answer: how long is too long."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import Any

_HANG_STEPS = 10


class Stall:
    """Follows the ranks' statuses. hang_s: the least time without a step that counts as a hang."""

    def __init__(self, hang_s: float) -> None:
        self.hang_s = hang_s
        self._seen: tuple[int, list[str], list[float]] = (-1, [], [])
        self._since = time.monotonic()
        self._step_times: deque[float] = deque(maxlen=25)

    def begin(self) -> None:
        """The ranks have just been ordered on."""
        self._seen, self._since = (-1, [], []), time.monotonic()

    def excuse(self, seconds: float) -> None:
        """So long nobody looked: that does not count."""
        self._since += seconds

    @property
    def step_s(self) -> float:
        """The median step's time, 0 before any."""
        return median(self._step_times) if self._step_times else 0.0

    def hangs_for(self, statuses: Sequence[dict[str, Any]]) -> float:
        """Seconds without a step where that is too long, else 0. A rank that waits for what it writes itself tells so
        all the time: it lives, however long its store takes."""
        step, now = step_of(statuses), time.monotonic()
        phases = [str(status.get("phase")) for status in statuses]
        waits = [float(status.get("store_wait_s", 0.0)) for status in statuses]
        if (step, phases, waits) != self._seen or not set(phases) <= {"training", "evaluating", "saving"}:
            self._seen, self._since = (step, phases, waits), now
            self._step_times.extend(s["step_time_s"] for s in statuses[:1] if "step_time_s" in s)
            return 0.0
        limit = max(self.hang_s, _HANG_STEPS * self.step_s)
        if set(phases) != {"training"}:  # tests and checkpoints may take many steps' time
            limit *= _HANG_STEPS
        stood = now - self._since
        return stood if stood >= limit else 0.0


def step_of(statuses: Sequence[dict[str, Any]]) -> int:
    """The last step that any rank has told of."""
    return max([int(status.get("step", 0)) for status in statuses], default=0)
