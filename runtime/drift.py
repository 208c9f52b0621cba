"""Whether a run's steps become slower, and which rank or link it is: told while training."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median

_SKIP, _WINDOW = 5, 25  # steps: left out at the start (allocators, caches), and compared
_EVERY = 5  # steps between two looks: each is a sixth of what recording costs
_SLOWER, _CAUSE = 1.25, 0.5  # told where steps take so much longer; a cause explains so much of it


class DriftWatch:
    """Compares the last steps with the first ones.

    names: of the ranks, as in the plan ("host:index").
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self._seen = 0
        self._first: list[Mapping[str, Sequence[float]]] = []
        self._last: deque[Mapping[str, Sequence[float]]] = deque(maxlen=_WINDOW)
        self._before = 0.0  # seconds of the first steps
        self._told = False

    def observe(self, times_s: Mapping[str, Sequence[float]]) -> str:
        """After a step: its seconds by part and rank (recorder.by_part), kept. What to tell, mostly nothing."""
        self._seen += 1
        if self._seen <= _SKIP:
            return ""
        if len(self._first) < _WINDOW:
            self._first.append(times_s)
            self._before = median(max(one["step"]) for one in self._first)
            return ""
        self._last.append(times_s)
        if len(self._last) < _WINDOW or self._seen % _EVERY:
            return ""
        before, now = self._before, median(max(one["step"]) for one in self._last)
        if now <= _SLOWER * before:
            self._told = False
            return ""
        if self._told:
            return ""
        self._told = True
        cause = self._cause(now - before)
        return f"steps take {1e3 * now:.0f} ms, {now / before:.1f} times as long as at first: {cause}"

    def _cause(self, more: float) -> str:
        computes = [
            self._grown(("forward", "backward", "optimizer"), rank) for rank in range(len(self.names))
        ]
        slowest = max(range(len(computes)), key=computes.__getitem__)
        if computes[slowest] >= _CAUSE * more:
            return f"rank {slowest} ({self.names[slowest]}) computes {1e3 * computes[slowest]:.0f} ms longer"
        # a rank that others wait for waits least itself: what all wait longer for is the wire
        waits = min(self._grown(("exchange", "reduction"), rank) for rank in range(len(self.names)))
        if waits >= _CAUSE * more:
            return f"communication takes {1e3 * waits:.0f} ms longer on every rank, the link is slower"
        idle = max(self._grown(("data", "idle"), rank) for rank in range(len(self.names)))
        if idle >= _CAUSE * more:
            return f"data and what happens between steps take {1e3 * idle:.0f} ms longer"
        return "no rank and no link by itself; `anabranch profile` shows more"

    def _grown(self, parts: Sequence[str], rank: int) -> float:
        first, last = (
            median(sum(one[part][rank] for part in parts) for one in steps)
            for steps in (self._first, self._last)
        )
        return last - first
