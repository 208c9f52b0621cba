"""What can go wrong outside the training code: the cluster, and a worker on it."""

from __future__ import annotations


class ClusterError(ValueError):
    """The cluster cannot run what was asked; raised before a worker starts. Exit code 2."""


class NoPeerLost(Exception):
    """Beside OSError or RuntimeError: no rank lost another, whatever its text says of a connection (to a store)."""


class WorkerError(RuntimeError):
    """A worker failed. The message is the root cause's: rank, host and its traceback.

    worker_failures: every failed rank's message; the root cause is the rank that did not fail in a collective.
    `__cause__` is the exception itself where it could be carried over (a wrong input is recognised by it).
    """

    def __init__(self, message: str, worker_failures: dict[int, str]) -> None:
        super().__init__(message)
        self.worker_failures = worker_failures

    def __reduce__(self) -> tuple[type[WorkerError], tuple[str, dict[int, str]]]:
        return type(self), (str(self), self.worker_failures)


class StoppedError(RuntimeError):
    """The run was asked to stop and its workers did not end by themselves in time, or had not begun.

    reason: "interrupt" (exit code 130) or "terminate" (143), or what the watch gave.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[StoppedError], tuple[str, str]]:
        return type(self), (str(self), self.reason)
