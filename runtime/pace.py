"""How fast a thread works beside the training: it leaves most of the machine to it, until somebody waits."""

from __future__ import annotations

import threading
import time

_REST = (
    3  # times what it computed: a step of 0.2 s beside 400 MB that are written is then not measurably longer
)


class Pace:
    """One thread's, which calls `start` and `rest`; others may `hurry` it."""

    def __init__(self) -> None:
        self._hurried, self._from = threading.Event(), 0.0

    def start(self) -> None:
        """Counts what this thread computes from here on."""
        self._from = time.thread_time()

    def rest(self) -> None:
        """Sleeps for three times what the thread has computed since, not where it is waited for."""
        if threading.main_thread().is_alive():  # a program that ends waits too
            self._hurried.wait(_REST * (time.thread_time() - self._from))
        self.start()

    def hurry(self) -> None:
        """From now on it rests no more."""
        self._hurried.set()
