"""Which of several failed workers is the cause: the one that did not fail in a collective."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from anabranch.cluster.errors import NoPeerLost, WorkerError

# What gloo, NCCL and torch's store say on the ranks whose peer went away.
_PEER_LOST = (
    "connection closed by peer",
    "connection reset",
    "connection refused",
    "broken pipe",
    "socket closed",
    "nccl",
    "gloo",
    "processgroup",
    "process group",
)


@dataclass(frozen=True)
class Failure:
    """One worker's end. text: what the user reads. in_collective: it may only have noticed another's failure.

    exception: the pickled exception, where it can be pickled. died: the process is gone, or was given up.
    step: the last that the target told of, -1: none.
    """

    rank: int
    host: str
    text: str
    in_collective: bool
    exception: bytes | None = None
    died: bool = False
    step: int = -1

    @classmethod
    def of(cls, rank: int, host: str, error: BaseException, skip_frames: int = 1) -> Failure:
        """The failure of a target that raised; the first `skip_frames` frames of its traceback are ours."""
        trace = error.__traceback__
        for _ in range(skip_frames):
            trace = trace.tb_next if trace else None
        lines = traceback.format_exception(type(error), error, trace)
        try:
            pickled = pickle.dumps(error)
            pickle.loads(pickled)
        except Exception:  # any exception class may refuse, in any way
            pickled = None
        return cls(rank, host, "".join(lines).rstrip(), failed_in_collective(error), pickled)

    @property
    def message(self) -> str:
        """Rank, host and what happened there."""
        return f"rank {self.rank} on host {self.host} failed:\n{self.text}"

    @property
    def short(self) -> str:
        """What happened, in a line: how the process ended, or the exception itself."""
        lines = [line for line in self.text.splitlines() if line.strip()]
        if not self.died:
            return lines[-1]
        # Ray sees the end of a connection, and guesses long
        return (
            "its process was killed or crashed" if "End of file" in lines[0] else lines[0].partition(". ")[0]
        )


_EXCHANGES = "/torch/distributed/", "/torch/cuda/", "/runtime/shared_memory.py"
_DEEP = 6  # what is further out runs something else by now


def failed_in_collective(error: BaseException) -> bool:
    """Whether an exception, or one that it was raised from, is a collective's: its cause may be another rank's."""
    if isinstance(error, NoPeerLost):
        return False
    for link in _causes(error):
        if any(
            cls.__name__.startswith("Dist") and cls.__module__.startswith("torch")
            for cls in type(link).__mro__
        ):
            return True
        if isinstance(link, RuntimeError | OSError) and any(word in str(link).lower() for word in _PEER_LOST):
            return True
    return False


def waits_for_others(stack: Sequence[traceback.FrameSummary]) -> bool:
    """Whether a running thread waits for other ranks.

    In torch.distributed, in the memory that ranks of a host share, for its GPU (on which exchanges run), or in a torch
    work's own wait, which has no frame of its own.
    """
    if (stack[-1].line or "").endswith(".wait()"):
        return True
    return any(place in frame.filename for frame in stack[-_DEEP:] for place in _EXCHANGES)


def gpu_works(device: str) -> bool:
    """Whether a rank's GPU ("cuda:0") has work left, as it has while an exchange on it waits for others.

    The host itself may be anywhere then: where the queue of the GPU is full, it waits within the next operator.
    """
    if not device.startswith("cuda"):
        return False
    import torch

    with suppress(RuntimeError):  # the GPU is lost
        return torch.cuda.is_initialized() and not torch.cuda.current_stream(device).query()
    return False


def worker_error(failures: Sequence[Failure]) -> WorkerError:
    """The error to raise for failures in the order in which they were seen; at least one."""
    cause = next((failure for failure in failures if not failure.in_collective), failures[0])
    error = WorkerError(cause.message, {failure.rank: failure.text for failure in failures})
    if cause.exception:
        try:
            error.__cause__ = pickle.loads(cause.exception)
        except Exception:  # its module exists on the worker only; the text has it all
            error.__cause__ = None
    return error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
