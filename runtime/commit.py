"""What survivors of a failure do with the step that was under way: a pure function of what they hold.

A rank is *prepared*(t) when it holds every reduced gradient of step t, and *committed*(t) when it has applied them.
Between the two lies a vote of all ranks, so nobody commits t before all are prepared(t):

    rank 0   ── gradients t ── prepared(t) ── vote ── committed(t)
    rank 1   ── gradients t ────── prepared(t) ── vote ✗ killed
    rank 2   ── gradients t ── prepared(t) ── vote ✗ connection lost        applies t from the gradients it kept
    rank 3   ── gradients t ✗ connection lost                               then nobody passed the vote: all discard t
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
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

    step: where all stand afterwards. ranks: those that go on, in the order of their ranks from then on, by which the
    others are named. sources: newcomer → the rank of its data group that it is filled from. leader: the rank whose
    position in the run (what was tested and saved) counts.
    """

    action: Literal["apply", "discard", "rewind"]
    step: int = 0
    sources: dict[int, int] = field(default_factory=dict)
    leader: int = 0
    ranks: tuple[int, ...] = ()


def decide(states: Sequence[RankState | None], branch: int, vacant: Collection[int] = ()) -> Decision:
    """The decision for ranks in order, `branch` innermost; nobody is there for the `vacant` ones.

    With vacant ranks as many whole branch groups go on as can be made of the others. Rewinds only where some branches
    have no living holder (those with the same branches are each other's data group).
    """
    held = {rank: state for rank, state in enumerate(states) if state is not None}
    living = [rank for rank in range(len(states)) if rank not in vacant]
    columns = [[rank for rank in living if rank % branch == b] for b in range(branch)]
    everybody = Decision("rewind", ranks=_in_rows(living, branch)[: len(living) // branch * branch])
    if not all(any(rank in held for rank in column) for column in columns):
        return everybody  # nothing is kept: any process can be any rank
    last = max(state.committed for state in held.values())
    all_prepared = all(state.prepared > last for state in held.values())
    step = last + 1 if all_prepared else last
    if any(step not in (state.committed, state.prepared) for state in held.values()):
        return everybody  # no run of the protocol leads here
    num = min(map(len, columns))
    chosen = [sorted(column, key=lambda rank: rank not in held)[:num] for column in columns]  # holders first
    ranks = _in_rows([rank for column in chosen for rank in column], branch)
    new = {old: rank for rank, old in enumerate(ranks)}
    sources = {
        new[rank]: min(new[peer] for peer in chosen[rank % branch] if peer in held)
        for rank in ranks
        if rank not in held
    }
    applies = any(state.committed < step for state in held.values())
    leader = max((rank for rank in ranks if rank in held), key=lambda rank: (held[rank].tended, -new[rank]))
    return Decision("apply" if applies else "discard", step, sources, new[leader], ranks)


def _in_rows(ranks: Sequence[int], branch: int) -> tuple[int, ...]:
    """The same ranks, branch groups that are whole first, each in its order; then one of each column in turn."""
    rows = {rank // branch for rank in ranks}
    whole = [row for row in sorted(rows) if sum(rank // branch == row for rank in ranks) == branch]
    first = [row * branch + b for row in whole for b in range(branch)]
    rest = sorted(set(ranks) - set(first))
    columns = [[rank for rank in rest if rank % branch == b] for b in range(branch)]
    paired = [rank for row in zip(*columns, strict=False) for rank in row]
    return (*first, *paired, *(rank for rank in rest if rank not in paired))
