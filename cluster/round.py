"""One recovery under way, or one change of the number of replicas: what led to it, and who waits already."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from anabranch.cluster.failures import Failure


@dataclass
class Round:
    """events: of lost ranks, as `Recovery.told` gets them. states: of the ranks that wait. asked: rank → (ref, until
    when). vacant: ranks that no host has room for, with what to say of that. counted: node IDs of hosts on which a loss
    was counted. found: hosts that have room again. mesh: before and after, where they differ. why: of fewer ranks.
    """

    events: list[dict[str, Any]] = field(default_factory=list)
    states: dict[int, dict[str, Any]] = field(default_factory=dict)
    asked: dict[int, tuple[Any, float]] = field(default_factory=dict)
    vacant: dict[int, Failure] = field(default_factory=dict)
    counted: set[str] = field(default_factory=set)
    found: list[str] = field(default_factory=list)
    mesh: tuple[str, str] | None = None
    why: list[str] = field(default_factory=list)
    order: dict[str, Any] = field(default_factory=dict)
    began: float = field(default_factory=time.time)

    def decided(self, order: dict[str, Any], under_way: int) -> None:
        """Completes the events. under_way: the step that the ranks were in."""
        self.order = {key: order[key] for key in ("action", "step")}
        for event in self.events:
            event["step"] = max(event["step"], under_way)  # statuses are a second old
            event |= {
                "at": self.began,
                "action": order["action"],
                "resumed_from": order["step"],
                "lost_steps": max(event["step"] - 1 - order["step"], 0),
            }

    def told(self, seconds: float | None) -> Iterator[dict[str, Any]]:
        """What there is to tell at its end, which came after `seconds`. Of one that was not decided: what led to it."""
        if not self.order:
            for event in self.events:
                text = (
                    f"rank {event['rank']} on {event['host']} failed in step {event['step']} ({event['cause']}); "
                    "the run ended before it was made good"
                )
                yield {**event, "at": self.began, "action": "ended", "seconds": None, "text": text}
            return
        took = f" in {seconds:.1f} s" if seconds is not None else ""
        step = self.order["step"]
        back = f", all went on from step {step}" if self.order["action"] == "rewind" else ""
        for event in self.events:
            elsewhere = (
                f" on {event['now_on']}" if event.get("now_on", event["host"]) != event["host"] else ""
            )
            by = {None: "connected again", True: "replaced by a spare", False: "replaced by a new process"}
            text = (
                f"rank {event['rank']} on {event['host']} failed in step {event['step']} ({event['cause']}), "
                f"{by[event['spare']]}{elsewhere}{took}{back}; {event['lost_steps']} steps lost"
            )
            yield {**event, "seconds": seconds, "text": text if event["replaced"] else ""}
        if self.mesh is None:
            return
        before, after = self.mesh
        gone = [event for event in self.events if not event["replaced"]]
        goes_on = f"the run goes on as {after} (it was {before}){took}"
        if self.why:
            lost = max(event["lost_steps"] for event in gone)
            text = f"{'; '.join(self.why)}; {goes_on}{back}; {lost} steps lost"
        else:
            text = f"{', '.join(self.found)} has room: {goes_on}, after step {step}"
        yield {
            "mesh": after,
            "before": before,
            "hosts": sorted({event["host"] for event in gone}) or self.found,
            **self.order,
            "at": self.began,
            "seconds": seconds,
            "text": text,
        }
