"""What going on after a failure needs to know: limits, and the decisions that are the runtime's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from anabranch.cluster.failures import Failure


@dataclass(frozen=True)
class Recovery:
    """How `run_on_ray` replaces lost ranks, or goes on without them.

    decide: gets every rank's state, as its target gave it to `await_order`: with "committed" None for a newcomer, None
    for a rank that nobody has room for; returns the order for all: "action", "step", "ranks" (those that go on, in the
    order of their ranks from then on) and whatever else their targets need.
    retries: whether another try could end otherwise than this failure did.
    told: gets an event when its outcome is known, plain data. Of a lost rank: rank, host, cause, step, action, spare,
    replaced, at (time.time() when it was noticed), seconds (None where the run ended before another step), text (one
    line, empty where another event's says it); action is "ended" where the run ended before it was made good. Of fewer
    or more replicas: mesh and before ("1x2", "2x2"), hosts (lost or found), step, action, at, seconds, text. Of workers
    that were to be taken in and did not come: host, cause, at, text. Of other warnings: cause, at, text.
    max_failures: that are recovered from in a run; what is lost with a host counts once. spares: processes that wait.
    hang_s: the least time without a step, or ten of them, that counts as a hang. min_replicas: fewest branch groups
    that the run goes on with while no host has room for more; None: all of them.
    """

    decide: Callable[[list[dict[str, Any] | None]], dict[str, Any]]
    retries: Callable[[Failure], bool]
    told: Callable[[dict[str, Any]], None]
    max_failures: int = 3
    spares: int = 0
    hang_s: float = 30.0
    min_replicas: int | None = None
