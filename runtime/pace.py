"""How a thread works beside the training: it leaves most of the machine to it, until somebody waits."""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import suppress

_NICE = 19  # on a core that the step needs too: 1.4 % of it; who waits for the thread sleeps, and leaves it the core
_REST = 3  # times what it computed: beside 400 MB a step of 0.2 s is then not measurably longer


class Pace:
    """One thread's, which calls `start` and `rest`; others may `hurry` it."""

    def __init__(self) -> None:
        self._hurried, self._from = threading.Event(), 0.0

    def start(self) -> None:
        """This thread steps back behind all others; what it computes is counted from here on."""
        if sys.platform == "linux":  # where a thread has a priority of its own
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        self._from = time.thread_time()

    def rest(self) -> None:
        """Sleeps for three times what the thread has computed since, not where it is waited for."""
        if threading.main_thread().is_alive():  # a program that ends waits too
            self._hurried.wait(_REST * (time.thread_time() - self._from))
        self._from = time.thread_time()

    def hurry(self) -> None:
        """From now on it rests no more."""
        self._hurried.set()
