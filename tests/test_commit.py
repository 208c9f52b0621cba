"""The commit protocol, exhaustively: every interleaving of three ranks with up to two deaths, in recovery too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from anabranch.runtime.commit import Decision, RankState, decide

RANKS = range(3)
NUM_STEPS, MAX_DEATHS = 2, 2
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

    most: the largest step that any rank has committed, and when it was lost for good.
    """

    ranks: tuple[Rank | None, ...]
    reducing: tuple[frozenset[int], ...]
    voting: tuple[frozenset[int], ...]
    deaths: int = 0
    frozen: bool = False
    most: int = 0


Decide = Callable[[list[RankState | None], int], Decision]


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
    if world.frozen and any(rank is None for rank in world.ranks):
        yield recovered(world, decide)


def advance(world: World, r: int, rank: Rank) -> Iterator[World]:
    """The next thing that a rank does by itself; survivors may get on until they notice a death."""
    step = rank.committed
    if rank.phase == COMPUTING:
        entered = with_rank(world.reducing, step, r)
        yield world._replace(ranks=put(world, r, rank._replace(phase=REDUCING)), reducing=entered)
    elif rank.phase == REDUCING and len(world.reducing[step]) == len(RANKS):
        yield world._replace(ranks=put(world, r, rank._replace(phase=PREPARED)))
    elif rank.phase == PREPARED:
        entered = with_rank(world.voting, step, r)
        yield world._replace(ranks=put(world, r, rank._replace(phase=VOTING)), voting=entered)
    elif rank.phase == VOTING and len(world.voting[step]) == len(RANKS):
        yield world._replace(ranks=put(world, r, rank._replace(phase=PASSED)))
    elif rank.phase == PASSED:
        applied = Rank(rank.committed + 1)
        yield world._replace(ranks=put(world, r, applied), most=max(world.most, applied.committed))


def recovered(world: World, decide: Decide) -> World:
    """The controller: survivors quiesced, the dead replaced by empty processes, all ordered."""
    states = [rank.state if rank else None for rank in world.ranks]
    decision = decide(states, 1)
    living = [state for state in states if state]
    if living:
        assert decision.action != "rewind", f"rewinds though {states} live"
        assert decision.step >= world.most, (
            f"step {world.most} was committed, {decision} of {states} loses it"
        )
        assert all(source in range(3) and states[source] for source in decision.sources.values())
    ranks = tuple(
        (rank if rank and rank.filled else Rank(0, filled=False))._replace(order=decision)
        for rank in world.ranks
    )
    # Collectives of the new generation: nobody has entered them.
    nobody = tuple(frozenset[int]() for _ in range(NUM_STEPS))
    most = decision.step if decision.action == "rewind" else world.most
    return World(ranks, nobody, nobody, world.deaths, False, most)


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
        self.value = (decision.action, decision.step, tuple(sorted(decision.sources.items())))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Frozen) and self.value == other.value

    def __hash__(self) -> int:
        return hash(self.value)


def test_every_interleaving_ends_at_one_step_and_loses_none() -> None:
    reached, ended = explore(decide)
    assert reached > 3_000
    assert ended >= 3, "without, with one and with two deaths"


def some_prepared_is_enough(states: list[RankState | None], branch: int) -> Decision:
    held = {rank: state for rank, state in enumerate(states) if state}
    if not held:
        return Decision("rewind")
    step = max(state.prepared for state in held.values())
    return Decision("apply", step, {rank: min(held) for rank in RANKS if rank not in held})


def always_discards(states: list[RankState | None], branch: int) -> Decision:
    held = {rank: state for rank, state in enumerate(states) if state}
    if not held:
        return Decision("rewind")
    step = min(state.committed for state in held.values())
    return Decision("discard", step, {rank: min(held) for rank in RANKS if rank not in held})


@pytest.mark.parametrize("wrong", [some_prepared_is_enough, always_discards])
def test_a_wrong_decision_is_found(wrong: Decide) -> None:
    with pytest.raises(AssertionError, match=r"has no gradients|loses it|has committed"):
        explore(wrong)


def state(committed: int, prepared: int | None = None, tended: int = 0) -> RankState:
    return RankState(committed, committed if prepared is None else prepared, tended)


@pytest.mark.parametrize(
    ("states", "branch", "expected"),
    [
        # all survivors are prepared: they apply, the newcomer is filled by its data peer (same branches)
        ([state(7, 8), None, state(7, 8), state(7, 8)], 2, Decision("apply", 8, {1: 3}, 0)),
        # one has committed, hence all were prepared: the others follow
        ([state(7, 8), None, state(8), state(7, 8)], 2, Decision("apply", 8, {1: 3}, 0)),
        # one is not prepared, so nobody can have passed the vote
        ([state(7, 8), None, state(7), state(7, 8)], 2, Decision("discard", 7, {1: 3}, 0)),
        # both holders of a branch are gone
        ([state(7, 8), None, state(7, 8), None], 2, Decision("rewind")),
        ([state(7), None], 2, Decision("rewind")),
        ([None, None], 1, Decision("rewind")),
        # who has tested and saved tells the others
        ([state(8, tended=4), state(8, tended=8), None], 1, Decision("discard", 8, {2: 0}, 1)),
    ],
)
def test_decisions(states: list[RankState | None], branch: int, expected: Decision) -> None:
    assert decide(states, branch) == expected
