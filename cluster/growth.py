"""A run with fewer branch groups than it should have looks for room, and starts processes there beside the training.

host back ─► room (each second) ─► processes start and load, the others train on ─► all wait ─► ready: a round begins
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from anabranch.cluster.failures import Failure
from anabranch.cluster.ray_calls import counted
from anabranch.cluster.worker_group import WorkerGroup

_LOAD_S = 120.0
_AGAIN_S, _MOST_S = 20.0, 600.0  # after processes that did not come: twice as long each time


class Growth:
    """What is missing of a group's mesh (data, branch), and those on their way. told: gets why they did not come."""

    def __init__(self, group: WorkerGroup, mesh: tuple[int, int], told: Callable[[str, str], None]) -> None:
        self.group, self.mesh, self._told = group, mesh, told
        self._waiting: list[Any] = []  # refs to the states of those that load
        self._until = self._next = 0.0
        self._pause_s = _AGAIN_S

    def look(self) -> list[dict[str, Any]]:
        """Once a second: the states of those who wait for their first order, once all do; before that none."""
        missing = self.mesh[0] - len(self.group.members) // self.mesh[1]
        now = time.monotonic()
        if self.group.joining:
            return self._loaded(now)
        if missing and now >= self._next and (num := self.group.room(self.mesh[1], missing)):
            self.group.enlist(self.mesh[1], num)
            self._waiting = [self.group.quiesce(each, -2, _LOAD_S) for each in self.group.joining]
            self._until = now + _LOAD_S
        return []

    def _loaded(self, now: float) -> list[dict[str, Any]]:
        import ray

        num = len(self._waiting)
        ready, _ = counted("watch_wait", ray.wait, self._waiting, num_returns=num, timeout=0)
        failure = self._failure()
        if len(ready) == num and not failure:
            self._pause_s = _AGAIN_S
            return [counted("result", ray.get, ref) for ref in self._waiting]
        if failure or now > self._until:
            failure = failure or f"not ready in {_LOAD_S:g} s"
            self._told(self.group.joining[0].seat.host.name, failure)
            self.group.dismiss()
            self._next, self._pause_s = now + self._pause_s, min(2 * self._pause_s, _MOST_S)
        return []

    def _failure(self) -> str:
        """Why one of them ended before it had a place; "" where none did."""
        import ray

        refs = [member.ref for member in self.group.joining]
        for ref in counted("watch_wait", ray.wait, refs, num_returns=len(refs), timeout=0)[0]:
            ended = self.group.result(-1, ref)
            return ended.short if isinstance(ended, Failure) else "it ended"
        return ""
