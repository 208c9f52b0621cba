"""A run that was told to stop and did: not a failure, and its folder can be resumed."""

from __future__ import annotations


class Stopped(Exception):
    """The run ended early on request, after its checkpoint was written.

    run_dir: the run's folder. The message says where the run stands and how to go on.
    """

    exit_code = 1

    def __init__(self, message: str, run_dir: str = "") -> None:
        super().__init__(message)
        self.run_dir = run_dir


class Interrupted(Stopped):
    """Ctrl-C (SIGINT)."""

    exit_code = 130


class Terminated(Stopped):
    """SIGTERM, as a cluster's scheduler sends it before it takes a machine away."""

    exit_code = 143


def stopped_by(reason: str) -> type[Stopped]:
    """What to raise for the reason that a run was given to end: "interrupt", else as for SIGTERM."""
    return Interrupted if reason == "interrupt" else Terminated
