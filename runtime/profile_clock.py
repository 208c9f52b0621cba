"""One clock for all ranks: how far each one's is from rank 0's.

    rank r   t0 ──►          ──► t1        offset = T - (t0 + t1) / 2, wrong by half the round trip at most
    rank 0          ──► T ──►

The quickest of some round trips counts. Clocks drift apart by some microseconds a second, so it is done before and
after what is measured, and `aligned` draws a line between.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

_ROUNDS = 40


@dataclass(frozen=True)
class ClockOffset:
    """At second `at` of this rank's clock rank 0's showed at + offset_s, give or take error_s."""

    at: float
    offset_s: float
    error_s: float


def clock_offset(
    group: dist.ProcessGroup | None = None, clock: Callable[[], float] = time.perf_counter
) -> ClockOffset:
    """This rank's offset to rank 0. Collective over a group of processes on CPUs (default: the default group)."""
    group = group or dist.group.WORLD
    assert group is not None, "in a process group"
    rank, here = group.rank(), ClockOffset(clock(), 0.0, 0.0)
    first = dist.get_global_rank(group, 0)
    buffer = torch.zeros(1, dtype=torch.float64)
    for other in range(1, group.size()):
        if rank == 0:
            peer = dist.get_global_rank(group, other)
            for _ in range(_ROUNDS):
                dist.recv(buffer, peer, group=group)
                buffer[0] = clock()
                dist.send(buffer, peer, group=group)
        elif rank == other:
            found = []
            for _ in range(_ROUNDS):
                begun = clock()
                dist.send(buffer, first, group=group)
                dist.recv(buffer, first, group=group)
                ended, middle = clock(), float(buffer)
                found.append((ended - begun, middle, (begun + ended) / 2))
            trip, theirs, mine = min(found)
            here = ClockOffset(mine, theirs - mine, trip / 2)
    return here


def aligned(seconds: float, before: ClockOffset, after: ClockOffset) -> float:
    """A moment of a rank's clock on rank 0's."""
    span = after.at - before.at
    drift = (after.offset_s - before.offset_s) / span if span > 0 else 0.0
    return seconds + before.offset_s + drift * (seconds - before.at)
