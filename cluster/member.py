"""One process of a run, seen from the driver: a rank's, or one that waits for a place."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from anabranch.cluster.placement import Seat


@dataclass
class Member:
    """seat: its rank is -1 where it waits. bundle: of the placement group, None: outside it. ref: of its run.

    gpu: Ray's number of the one that it uses, None: whichever Ray gave, or none. stderr: its file. begun: what is
    known of it from the start; status: that and what it last told, `answered` (time.monotonic()) when; status_ref: what
    it was asked and has not answered.
    """

    seat: Seat
    bundle: int | None
    actor: Any
    gpu: str | None = None
    ref: Any = None
    stderr: str = ""
    begun: dict[str, Any] = field(default_factory=dict)
    status: dict[str, Any] = field(default_factory=dict)
    status_ref: Any = None
    answered: float = field(default_factory=time.monotonic)

    def begin(self) -> None:
        """It has this seat from now on, and has told nothing yet."""
        device = f"{self.seat.host.name}:{self.seat.local_rank if self.gpu is None else self.gpu}"
        self.begun = {
            "rank": self.seat.rank,
            "host": self.seat.host.name,
            "device": device,
            "phase": "starting",
        }
        self.status = dict(self.begun)
        self.answered = time.monotonic()

    def told(self, status: dict[str, Any]) -> None:
        """All that it tells; what it has told before and does no more is no longer so."""
        self.status = self.begun | status
        self.answered = time.monotonic()
