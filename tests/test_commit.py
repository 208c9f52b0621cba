"""The commit protocol, exhaustively: every interleaving of three ranks with up to two deaths, in recovery too.

A dead rank is replaced or, where its host had the last room, left out; the ranks that are left out come back.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from itertools import combinations
from typing import Any, NamedTuple

import pytest

from anabranch.runtime.commit import Decision, RankState, decide

RANKS = range(3)
NUM_STEPS, MAX_DEATHS, MAX_GROWN = 2, 2, 1
COMPUTING, REDUCING, PREPARED, VOTING, PASSED = range(5)


class Rank(NamedTuple):
    """One process. phase: within step committed + 1. order: what the last decision tells it, still to be done."""

    committed: int
    phase: int = COMPUTING
    filled: bool = True
    order: Decision | None = None

    @property
    def state(self) -> RankState | None:
        return RankState(self.committed, self.committed + (self.phase >= PREPARED)) if self.filled else None


class World(NamedTuple):
    """ranks: None for a dead one. entered: by step, who has ever entered its reduction and its vote (the dead too).

    most: the largest step that any rank has committed, and when it was lost for good. grown: how often ranks that were
    left out came back.
    """

    ranks: tuple[Rank | None, ...]
    reducing: tuple[frozenset[int], ...]
    voting: tuple[frozenset[int], ...]
    deaths: int = 0
    frozen: bool = False
    most: int = 0
    grown: int = 0


Decide = Callable[[list[RankState | None], int, Collection[int]], Decision]


def moves(world: World, decide: Decide) -> Iterator[World]:
    """Every world that may come next."""
    for r, rank in enumerate(world.ranks):
        if rank is None:
            continue
        if world.deaths < MAX_DEATHS:
            yield world._replace(ranks=put(world, r, None), deaths=world.deaths + 1, frozen=True)
        if rank.order is not None:
            yield obey(world, r, rank)
        elif rank.committed < NUM_STEPS and rank.filled:
            yield from advance(world, r, rank)
    dead = [r for r, rank in enumerate(world.ranks) if rank is None]
    if world.frozen and dead:
        for num in range(len(dead) + 1):  # any of them may be without room
            for vacant in combinations(dead, num):
                if num < len(world.ranks):
                    yield recovered(world, decide, vacant)
    missing = len(RANKS) - len(world.ranks)
    if (
        missing
        and not dead
        and world.grown < MAX_GROWN
        and all(rank.order is None for rank in world.ranks if rank)
    ):
        newcomers = (Rank(0, filled=False),) * missing
        yield recovered(world._replace(ranks=world.ranks + newcomers, grown=world.grown + 1), decide)


def advance(world: World, r: int, rank: Rank) -> Iterator[World]:
    """The next thing that a rank does by itself; survivors may get on until they notice a death."""
    step = rank.committed
    if rank.phase == COMPUTING:
        entered = with_rank(world.reducing, step, r)
        yield world._replace(ranks=put(world, r, rank._replace(phase=REDUCING)), reducing=entered)
    elif rank.phase == REDUCING and len(world.reducing[step]) == len(world.ranks):
        yield world._replace(ranks=put(world, r, rank._replace(phase=PREPARED)))
    elif rank.phase == PREPARED:
        entered = with_rank(world.voting, step, r)
        yield world._replace(ranks=put(world, r, rank._replace(phase=VOTING)), voting=entered)
    elif rank.phase == VOTING and len(world.voting[step]) == len(world.ranks):
        yield world._replace(ranks=put(world, r, rank._replace(phase=PASSED)))
    elif rank.phase == PASSED:
        applied = Rank(rank.committed + 1)
        yield world._replace(ranks=put(world, r, applied), most=max(world.most, applied.committed))


def recovered(world: World, decide: Decide, vacant: Collection[int] = ()) -> World:
    """The controller: survivors quiesced, the dead replaced by empty processes or left out, all ordered."""
    states = [rank.state if rank else None for rank in world.ranks]
    decision = decide(states, 1, vacant)
    living = [state for state in states if state]
    order = decision.ranks
    assert sorted(order) == [r for r in range(len(states)) if r not in vacant], f"{decision} of {states}"
    if living:
        assert decision.action != "rewind", f"rewinds though {states} live"
        assert decision.step >= world.most, (
            f"step {world.most} was committed, {decision} of {states} loses it"
        )
        sources = decision.sources.values()
        assert all(source < len(order) and states[order[source]] for source in sources), (
            "a source has nothing"
        )
        assert all((states[order[r]] is None) == (r in decision.sources) for r in range(len(order)))
    before = [world.ranks[r] for r in order]
    ranks = tuple(
        (rank if rank and rank.filled else Rank(0, filled=False))._replace(order=decision) for rank in before
    )
    # Collectives of the new generation: nobody has entered them.
    nobody = tuple(frozenset[int]() for _ in range(NUM_STEPS))
    most = decision.step if decision.action == "rewind" else world.most
    return World(ranks, nobody, nobody, world.deaths, False, most, world.grown)


def obey(world: World, r: int, rank: Rank) -> World:
    """A rank does as ordered; a newcomer once its source stands where it should."""
    decision = rank.order
    assert decision is not None
    if decision.action == "rewind":
        return world._replace(ranks=put(world, r, Rank(0)))
    if not rank.filled:
        source = world.ranks[decision.sources[r]]
        if source is None or source.order is not None:
            return world
        return world._replace(ranks=put(world, r, Rank(decision.step)))
    if rank.committed == decision.step - 1:
        assert rank.phase >= PREPARED, f"rank {r} is to apply step {decision.step} and has no gradients"
    else:
        assert rank.committed == decision.step, f"rank {r} has committed {rank.committed}, {decision}"
    most = max(world.most, decision.step)
    return world._replace(ranks=put(world, r, Rank(decision.step)), most=most)


def put(world: World, r: int, rank: Rank | None) -> tuple[Rank | None, ...]:
    return (*world.ranks[:r], rank, *world.ranks[r + 1 :])


def with_rank(entered: tuple[frozenset[int], ...], step: int, r: int) -> tuple[frozenset[int], ...]:
    return (*entered[:step], entered[step] | {r}, *entered[step + 1 :])


def explore(decide: Decide) -> tuple[int, int]:
    """All reachable worlds, and those in which the run has ended; every world must be able to end."""
    nobody = tuple(frozenset[int]() for _ in range(NUM_STEPS))
    start = World((Rank(0),) * 3, nobody, nobody)
    seen, waiting, ended = {key(start)}, [start], 0
    while waiting:
        world = waiting.pop()
        following = [new for new in moves(world, decide) if key(new) != key(world)]
        done = all(rank and rank.order is None and rank.committed == NUM_STEPS for rank in world.ranks)
        if done:
            ended += 1
        assert following or done, f"nothing can happen any more in {world}"
        for new in following:
            if key(new) not in seen:
                seen.add(key(new))
                waiting.append(new)
    return len(seen), ended


def key(world: World) -> Any:
    """Worlds that differ only in what a decision's object is are one."""
    ranks = tuple(rank and (*rank[:-1], rank.order and _Frozen(rank.order)) for rank in world.ranks)
    return (ranks, *world[1:])


class _Frozen:
    """A decision that can be hashed."""

    def __init__(self, decision: Decision) -> None:
        sources = tuple(sorted(decision.sources.items()))
        self.value = (decision.action, decision.step, sources, decision.ranks)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Frozen) and self.value == other.value

    def __hash__(self) -> int:
        return hash(self.value)


def test_every_interleaving_ends_at_one_step_and_loses_none() -> None:
    reached, ended = explore(decide)
    assert reached > 3_000
    assert ended >= 3, "without, with one and with two deaths"


def some_prepared_is_enough(
    states: list[RankState | None], branch: int, vacant: Collection[int] = ()
) -> Decision:
    right = decide(states, branch, vacant)
    step = max((state.prepared for state in states if state), default=0)
    return right if right.action == "rewind" else replace(right, action="apply", step=step)


def always_discards(states: list[RankState | None], branch: int, vacant: Collection[int] = ()) -> Decision:
    right = decide(states, branch, vacant)
    step = min((state.committed for state in states if state), default=0)
    return right if right.action == "rewind" else replace(right, action="discard", step=step)


def forgets_who_is_new(states: list[RankState | None], branch: int, vacant: Collection[int] = ()) -> Decision:
    """Sources by the ranks before, where some are left out."""
    right = decide(states, branch, vacant)
    sources = {new: right.ranks[source] for new, source in right.sources.items()}
    return replace(right, sources=sources)


@pytest.mark.parametrize("wrong", [some_prepared_is_enough, always_discards, forgets_who_is_new])
def test_a_wrong_decision_is_found(wrong: Decide) -> None:
    with pytest.raises(AssertionError, match=r"has no gradients|loses it|has committed|has nothing"):
        explore(wrong)


def state(committed: int, prepared: int | None = None, tended: int = 0) -> RankState:
    return RankState(committed, committed if prepared is None else prepared, tended)


FOUR = (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("states", "branch", "expected"),
    [
        # all survivors are prepared: they apply, the newcomer is filled by its data peer (same branches)
        ([state(7, 8), None, state(7, 8), state(7, 8)], 2, Decision("apply", 8, {1: 3}, 0, FOUR)),
        # one has committed, hence all were prepared: the others follow
        ([state(7, 8), None, state(8), state(7, 8)], 2, Decision("apply", 8, {1: 3}, 0, FOUR)),
        # one is not prepared, so nobody can have passed the vote
        ([state(7, 8), None, state(7), state(7, 8)], 2, Decision("discard", 7, {1: 3}, 0, FOUR)),
        # both holders of a branch are gone
        ([state(7, 8), None, state(7, 8), None], 2, Decision("rewind", ranks=FOUR)),
        ([state(7), None], 2, Decision("rewind", ranks=(0, 1))),
        ([None, None], 1, Decision("rewind", ranks=(0, 1))),
        # who has tested and saved tells the others
        ([state(8, tended=4), state(8, tended=8), None], 1, Decision("discard", 8, {2: 0}, 1, (0, 1, 2))),
    ],
)
def test_decisions(states: list[RankState | None], branch: int, expected: Decision) -> None:
    assert decide(states, branch) == expected


@pytest.mark.parametrize(
    ("held", "vacant", "branch", "expected"),
    [
        # the first replica's host is gone: the second goes on as the first
        ((2, 3), (0, 1), 2, Decision("discard", 7, {}, 0, (2, 3))),
        # of two broken replicas one whole branch group is made
        ((0, 3), (1, 2), 2, Decision("discard", 7, {}, 0, (0, 3))),
        # whole ones stay as they are, what is left of the others is joined, and who is over goes
        ((0, 3, 4, 5, 7), (1, 2, 6), 2, Decision("discard", 7, {}, 0, (4, 5, 0, 3))),
        # a newcomer beside it is filled, even where its replica is not the one that was lost
        ((2, 3, 4), (0, 1), 2, Decision("discard", 7, {3: 1}, 0, (2, 3, 4, 5))),
        # the only living holder of a branch is kept, not a newcomer in its place
        ((0, 3), (1,), 2, Decision("discard", 7, {}, 0, (0, 3))),
        # nobody holds the other branches: any process can be any rank, from the checkpoint
        ((0, 2), (1, 3), 2, Decision("rewind", ranks=(0, 2))),
        ((0,), (1, 2, 3), 2, Decision("rewind")),
        # one comes back
        ((0, 1), (), 1, Decision("discard", 7, {2: 0}, 0, (0, 1, 2))),
    ],
)
def test_decisions_without_room(
    held: tuple[int, ...], vacant: tuple[int, ...], branch: int, expected: Decision
) -> None:
    num = max(*held, *vacant, *(3 if branch == 2 else 2,) * 2, 5 if 4 in held else 0) + 1
    states = [state(7) if rank in held else None for rank in range(num)]
    assert decide(states, branch, vacant) == expected
