"""What going on after a failure needs to know: limits, and the decisions that are the runtime's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from anabranch.cluster.failures import Failure


@dataclass(frozen=True)
class Recovery:
    """How `run_on_ray` replaces lost ranks.

    decide: gets every rank's state, as its target gave it to `await_order` (with "committed": None for a newcomer);
    returns the order for all: "action", "step" and whatever else their targets need. retries: whether another try
    could end otherwise than this failure did. told: gets an event when its outcome is known, plain data: rank, host,
    cause, step, action, spare, seconds (None where the run ended before another step), text (one line).
    max_failures: that are recovered from in a run. spares: processes that wait. hang_s: the least time without a
    step, or ten of them, that counts as a hang.
    """

    decide: Callable[[list[dict[str, Any]]], dict[str, Any]]
    retries: Callable[[Failure], bool]
    told: Callable[[dict[str, Any]], None]
    max_failures: int = 3
    spares: int = 0
    hang_s: float = 30.0
