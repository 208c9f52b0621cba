"""What a worker's target gets from whoever started it: the same under Ray, torchrun, srun and in one process."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class WorkerContext:
    """One rank's place in the run, what it tells its controller, and what the controller asks of it.

    device: "cpu" or "cuda:i" as this process numbers its GPUs. num_threads: its share of the host's cores.
    init_method: "tcp://address:port", "env://", or "" where there is one rank and no process group is needed.
    recovers: whether whoever started it replaces lost ranks: then a rank that lost another quiesces (it waits in
    `await_order`). generation: which forming of the process groups, from 0; a newcomer has -1 and rank -1 until it is
    ordered to a place. order: the last one. where: tells from another thread what the target is at. settle: called
    from another thread before the process is ended, waits up to so many seconds for what it does beside the target.
    """

    rank: int
    world_size: int
    local_rank: int
    host: str
    device: str
    num_threads: int
    init_method: str
    backend: str
    recovers: bool = False
    generation: int = 0
    order: dict[str, Any] | None = field(default=None, init=False)
    where: Callable[[], str] = field(default=lambda: "", init=False, repr=False)
    settle: Callable[[float], object] = field(default=lambda wait_s: None, init=False, repr=False)
    thread: int = field(default_factory=threading.get_ident, init=False, repr=False)
    _status: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)
    _stop_reason: str | None = field(default=None, init=False, repr=False)
    _changed: threading.Condition = field(default_factory=threading.Condition, init=False, repr=False)
    _quiesced: dict[str, Any] | None = field(default=None, init=False, repr=False)
    _on_abort: Callable[[], None] | None = field(default=None, init=False, repr=False)
    _aborted: int = field(default=-2, init=False, repr=False)

    def publish(self, **status: Any) -> None:
        """Merge plain values into the status that the controller reads; cheap enough for every step.

        None takes a value away that is no longer true.
        """
        with self._lock:
            self._status.update(status)
            for name in [name for name, value in status.items() if value is None]:
                del self._status[name]

    def status(self) -> dict[str, Any]:
        """A copy of what was published, with rank, host, pid and the generation in which it waits for an order."""
        with self._lock:
            waits = self.generation if self._quiesced is not None else None
            return {"rank": self.rank, "host": self.host, "pid": os.getpid(), "waits": waits, **self._status}

    def request_stop(self, reason: str) -> None:
        """Ask the target to save and return at its next step; the first reason stays."""
        self._stop_reason = self._stop_reason or reason

    @property
    def stop_requested(self) -> str | None:
        """Why the target should stop, or None while it should go on."""
        return self._stop_reason

    @property
    def aborted(self) -> bool:
        """Whether the controller has given up this generation's process groups."""
        return self._aborted >= self.generation

    def abort(self) -> None:
        """Ends every collective of this process at once, if it has a process group."""
        with self._changed:
            if self._on_abort is not None:
                self._on_abort()

    def on_abort(self, abort: Callable[[], None] | None) -> None:
        """What ends every collective of this process at once, from another thread; None where there are no groups."""
        with self._changed:
            self._on_abort = abort
            if abort is not None and self.aborted:
                abort()

    def await_order(self, **state: Any) -> dict[str, Any]:
        """Quiesced, with nothing of a process group left: tells its state and waits for the controller's order.

        Takes the place that the order gives (the context's fields in order["place"]).
        """
        with self._changed:
            self._quiesced = {"generation": self.generation, **state}
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._quiesced is None)
            assert self.order is not None, "given"
            return self.order

    def quiesce(self, generation: int, wait_s: float) -> dict[str, Any] | None:
        """From another thread: gives up groups up to `generation`; the target's state once it waits, None if it does
        not within `wait_s`."""
        with self._changed:
            self._aborted = max(self._aborted, generation)
            if self._quiesced is None and self._on_abort is not None and self.aborted:
                self._on_abort()
            self._changed.wait_for(lambda: self._quiesced is not None, wait_s)
            return self._quiesced

    def give_order(self, order: dict[str, Any]) -> None:
        """From another thread: what the waiting target does next."""
        with self._changed:
            for name, value in order["place"].items():
                setattr(self, name, value)
            self.order, self._quiesced = order, None
            self._changed.notify_all()
