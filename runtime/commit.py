"""What survivors of a failure do with the step that was under way: a pure function of what they hold.

A rank is *prepared*(t) when it holds every reduced gradient of step t, and *committed*(t) when it has applied them.
Between the two lies a vote of all ranks, so nobody commits t before all are prepared(t):

    rank 0   ── gradients t ── prepared(t) ── vote ── committed(t)
    rank 1   ── gradients t ────── prepared(t) ── vote ✗ killed
    rank 2   ── gradients t ── prepared(t) ── vote ✗ connection lost        applies t from the gradients it kept
    rank 3   ── gradients t ✗ connection lost                               then nobody passed the vote: all discard t
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class RankState:
    """What a living process holds for its rank; None in its place for a rank that holds nothing (it is new).

    committed: steps applied. prepared: steps whose reduced gradients it has, committed or one more. tended: the step
    whose evaluation and checkpoint it has done.
    """

    committed: int
    prepared: int
    tended: int = 0


@dataclass(frozen=True)
class Decision:
    """For all ranks. action: of the unfinished step, or "rewind" to the last checkpoint.

    step: where all stand afterwards. sources: newcomer → the rank of its data group that it is filled from. leader:
    the rank whose position in the run (what was tested and saved) counts.
    """

    action: Literal["apply", "discard", "rewind"]
    step: int = 0
    sources: dict[int, int] = field(default_factory=dict)
    leader: int = 0


def decide(states: Sequence[RankState | None], branch: int) -> Decision:
    """The decision for ranks in order, `branch` innermost.

    Rewinds only where a newcomer has no living rank of its data group (those that hold the same branches).
    """
    held = {rank: state for rank, state in enumerate(states) if state is not None}
    if not held:
        return Decision("rewind")
    last = max(state.committed for state in held.values())
    all_prepared = all(state.prepared > last for state in held.values())
    step = last + 1 if all_prepared else last
    if any(step not in (state.committed, state.prepared) for state in held.values()):
        return Decision("rewind")  # no run of the protocol leads here
    sources = {}
    for rank, state in enumerate(states):
        if state is None:
            peers = [peer for peer in held if peer % branch == rank % branch]
            if not peers:
                return Decision("rewind")
            sources[rank] = peers[0]
    applies = any(state.committed < step for state in held.values())
    leader = max(held, key=lambda rank: (held[rank].tended, -rank))
    return Decision("apply" if applies else "discard", step, sources, leader)
