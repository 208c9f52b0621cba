"""What a worker's target gets from whoever started it: the same under Ray, torchrun, srun and in one process."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from typing import Any


@dataclass
class WorkerContext:
    """One rank's place in the run, what it tells its controller, and what the controller asks of it.

    device: "cpu" or "cuda:i" as this process numbers its GPUs. num_threads: its share of the host's cores.
    init_method: "tcp://address:port", "env://", or "" where there is one rank and no process group is needed.
    """

    rank: int
    world_size: int
    local_rank: int
    host: str
    device: str
    num_threads: int
    init_method: str
    backend: str
    _status: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)
    _stop_reason: str | None = field(default=None, init=False, repr=False)

    def publish(self, **status: Any) -> None:
        """Merge plain values into the status that the controller reads; cheap enough for every step."""
        with self._lock:
            self._status.update(status)

    def status(self) -> dict[str, Any]:
        """A copy of what was published, with rank, host and pid."""
        with self._lock:
            return {"rank": self.rank, "host": self.host, "pid": os.getpid(), **self._status}

    def request_stop(self, reason: str) -> None:
        """Ask the target to save and return at its next step; the first reason stays."""
        self._stop_reason = self._stop_reason or reason

    @property
    def stop_requested(self) -> str | None:
        """Why the target should stop, or None while it should go on."""
        return self._stop_reason
