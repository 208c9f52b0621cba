"""How far a part of the start is, in the name of the worker's phase: "timing blocks 3/7, 4 s left"."""

from __future__ import annotations

import time
from collections.abc import Callable

OnProgress = Callable[[int, int], object]  # how many are done, of how many


def silent(done: int, total: int) -> None:
    """For those who are not told."""


def countdown(publish: Callable[..., object], phase: str) -> OnProgress:
    """Publishes the phase with how much is done; the seconds left are counted as if what is left took as long."""
    begun = time.monotonic()

    def tell(done: int, total: int) -> None:
        seconds = (time.monotonic() - begun) / done * (total - done) if done else 0.0
        publish(phase=f"{phase} {done}/{total}" + (f", {seconds:.0f} s left" if done else ""))

    return tell
