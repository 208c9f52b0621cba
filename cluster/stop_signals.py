"""Ctrl-C and SIGTERM as requests: the first asks the workers to save and end, a second one does not wait for them."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

REASONS = {signal.SIGINT: "interrupt", signal.SIGTERM: "terminate"}
# torchrun and terminals deliver one Ctrl-C twice (to the group, then to each child): not yet a second one.
SAME_PRESS_S = 1.0


@contextmanager
def stop_signals(on_stop: Callable[[str], None]) -> Iterator[None]:
    """For its duration the first SIGINT or SIGTERM calls `on_stop` with "interrupt" or "terminate".

    Another one after more than a second raises KeyboardInterrupt. The handlers found are put back. Outside the main
    thread, where Python allows no handlers, nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    first: float | None = None

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal first
        now = time.monotonic()
        if first is None:
            first = now
            on_stop(REASONS[signal.Signals(number)])
        elif now - first > SAME_PRESS_S:
            raise KeyboardInterrupt

    found = {number: signal.signal(number, handle) for number in REASONS}
    try:
        yield
    finally:
        for number, handler in found.items():
            signal.signal(number, handler)
