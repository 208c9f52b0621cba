"""A run with fewer branch groups than it should have looks for room, and starts processes there beside the training.

host back ─► room (each second) ─► processes start and load, the others train on ─► all wait ─► ready: a round begins
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

from anabranch.cluster.ray_calls import counted
from anabranch.cluster.worker_group import WorkerGroup

_LOAD_S = 120.0
_AGAIN_S = 20.0  # after processes that did not come


class Growth:
    """What is missing of a group's mesh (data, branch), and those on their way."""

    def __init__(self, group: WorkerGroup, mesh: tuple[int, int]) -> None:
        self.group, self.mesh = group, mesh
        self._waiting: list[Any] = []  # refs to the states of those that load
        self._until = self._next = 0.0

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
        from ray.exceptions import RayError

        refs = [member.ref for member in self.group.joining]
        failed, _ = counted("watch_wait", ray.wait, refs, num_returns=len(refs), timeout=0)
        if failed or now > self._until:
            self._stop()
            return []
        num = len(self._waiting)
        if len(counted("watch_wait", ray.wait, self._waiting, num_returns=num, timeout=0)[0]) < num:
            return []
        with suppress(RayError):
            states: list[dict[str, Any] | None] = counted("result", ray.get, self._waiting)
            if all(states):
                return [state for state in states if state]
        self._stop()
        return []

    def _stop(self) -> None:
        self.group.dismiss()
        self._next = time.monotonic() + _AGAIN_S
