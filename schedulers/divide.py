"""How a block's branches may be divided among branch ranks.

Branches that cost alike are dealt by counts: all counts where these are few, else evenly inside a class of
branch ranks, for every division among classes – the best where more branches never take less time – else to
whoever is ready first. Unequal ones: every assignment where these are few; else branch and bound over
(longest forward, longest backward, most parameter bytes), which keeps what nothing beats; beyond its nodes
longest first, with `is_exact` false.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import combinations, pairwise, product
from math import comb, prod
from typing import TYPE_CHECKING, NamedTuple

from anabranch.schedulers.plan import BranchPlacement

if TYPE_CHECKING:
    from anabranch.schedulers.options import Options

_MOST_LISTED = 400  # divisions of a block's branches that are listed in full
_MOST_NODES = 20_000  # of branch and bound


class Division(NamedTuple):
    """is_exact: the best division is among them, for every purpose of the search."""

    placements: list[BranchPlacement]
    is_exact: bool


def divisions(options: Options, members: Sequence[int], pins: Mapping[int, frozenset[str]]) -> Division:
    """For elements that are placed as one. pins: by branch, hosts that its branch rank must be on."""
    i = members[0]
    num_branches, ranks = options.pricing.num_branches[i], options.layout.ranks
    everyone = tuple(range(options.num_columns))
    allowed = [everyone] * num_branches
    for branch, hosts in pins.items():
        allowed[branch] = tuple(m for m in everyone if hosts <= {row[m].host for row in ranks})
    if not all(allowed):
        return Division([], True)
    if all(options.pricing.is_counted(member) for member in members):
        return _counted(options, num_branches, allowed, bool(pins))
    return _assigned(options, members, allowed)


def _counted(
    options: Options, num_branches: int, allowed: list[tuple[int, ...]], is_pinned: bool
) -> Division:
    num_columns, classes, is_exact = options.num_columns, options.classes, True
    counts: list[tuple[int, ...]]
    is_even = len(classes) == 1 and num_branches % num_columns == 0  # then nothing needs less memory
    in_classes = options.memory in ("fullest", "average")
    if not in_classes and comb(num_branches + num_columns - 1, num_columns - 1) <= _MOST_LISTED:
        counts = list(_compositions(num_branches, num_columns))
        if not options.limits and not is_pinned:  # branch ranks of a class can be exchanged
            counts = [found for found in counts if _is_sorted(found, classes)]
    elif comb(num_branches + len(classes) - 1, len(classes) - 1) <= _MOST_LISTED:
        is_exact = (not options.limits or is_even) and not is_pinned
        counts = [_spread(totals, classes) for totals in _compositions(num_branches, len(classes))]
    else:
        is_exact, counts = False, [_spread(_by_speed(options, num_branches), classes)]
    if not is_pinned:
        return Division([_from_counts(found) for found in counts], is_exact)
    placements = [found for each in counts if (found := _matched(each, allowed)) is not None]
    return Division(placements or [longest_first([1.0] * num_branches, allowed, num_columns)], is_exact)


@lru_cache(maxsize=4096)
def _from_counts(counts: tuple[int, ...]) -> BranchPlacement:
    return BranchPlacement.from_counts(counts)


def _compositions(total: int, num_parts: int) -> Iterator[tuple[int, ...]]:
    for bars in combinations(range(total + num_parts - 1), num_parts - 1):
        yield tuple(b - a - 1 for a, b in pairwise((-1, *bars, total + num_parts - 1)))


def _is_sorted(counts: Sequence[int], classes: Sequence[Sequence[int]]) -> bool:
    return all(counts[a] >= counts[b] for members in classes for a, b in pairwise(members))


def _spread(totals: Sequence[int], classes: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Counts by branch rank: each class's branches evenly, larger first."""
    counts = [0] * sum(map(len, classes))
    for total, members in zip(totals, classes, strict=True):
        each, more = divmod(total, len(members))
        for position, m in enumerate(members):
            counts[m] = each + (position < more)
    return tuple(counts)


def _by_speed(options: Options, num_branches: int) -> list[int]:
    """Branches of each class, one after another to the class that is ready first."""
    sizes = [len(members) for members in options.classes]
    speeds = [min(profile.speed for profile in options.columns[members[0]]) for members in options.classes]
    totals = [0] * len(sizes)
    for _ in range(num_branches):
        best = min(range(len(sizes)), key=lambda c: (totals[c] // sizes[c] + 1) / speeds[c])
        totals[best] += 1
    return totals


def _matched(counts: Sequence[int], allowed: Sequence[Sequence[int]]) -> BranchPlacement | None:
    """Branches on branch ranks so that counts and pins hold; None where they cannot."""
    held: list[list[int]] = [[] for _ in counts]

    def place(branch: int, seen: set[int]) -> bool:
        for m in allowed[branch]:
            if m in seen or not counts[m]:
                continue
            seen.add(m)
            if len(held[m]) < counts[m]:
                held[m].append(branch)
                return True
            for other in held[m]:
                if place(other, seen):
                    held[m][held[m].index(other)] = branch
                    return True
        return False

    order = sorted(range(len(allowed)), key=lambda branch: len(allowed[branch]))
    if not all(place(branch, set()) for branch in order):
        return None
    return BranchPlacement("branch", tuple(map(tuple, held)))


def _assigned(options: Options, members: Sequence[int], allowed: list[tuple[int, ...]]) -> Division:
    num_columns = options.num_columns
    if prod(map(len, allowed)) <= _MOST_LISTED:
        return Division([_placed(ranks, num_columns) for ranks in product(*allowed)], True)
    search = _Bound(options, members, allowed)
    search.run()
    is_exact = search.nodes < _MOST_NODES and len(members) == 1 and not options.limits
    return Division([_placed(ranks, num_columns) for _, ranks in search.best], is_exact)


def _placed(ranks: Sequence[int], num_columns: int) -> BranchPlacement:
    held: list[list[int]] = [[] for _ in range(num_columns)]
    for branch, m in enumerate(ranks):
        held[m].append(branch)
    return BranchPlacement("branch", tuple(map(tuple, held)))


def longest_first(
    seconds: Sequence[float], allowed: Sequence[Sequence[int]], num_columns: int, speeds: Sequence[float] = ()
) -> BranchPlacement:
    """Longest branch first, to the branch rank that is then ready first."""
    speeds = speeds or [1.0] * num_columns
    loads, ranks = [0.0] * num_columns, [0] * len(seconds)
    for branch in sorted(range(len(seconds)), key=lambda branch: (len(allowed[branch]), -seconds[branch])):
        best = min(allowed[branch], key=lambda m: (loads[m] + seconds[branch]) / speeds[m])
        ranks[branch], loads[best] = best, loads[best] + seconds[branch]
    return _placed(ranks, num_columns)


class _Bound:
    """Depth-first over branches, longest first. best: (what no other beats, branch rank of each branch)."""

    def __init__(self, options: Options, members: Sequence[int], allowed: list[tuple[int, ...]]) -> None:
        self.nodes, self.allowed, self.num_columns = 0, allowed, options.num_columns
        pricing = options.pricing
        profiles = [options.columns[m] for m in range(self.num_columns)]
        self.class_of = {m: number for number, group in enumerate(options.classes) for m in group}
        num = pricing.num_branches[members[0]]
        self.bytes = [sum(pricing.held_bytes(i, (branch,)) for i in members) for branch in range(num)]

        def seconds(m: int, held: tuple[int, ...]) -> list[float]:
            """[forward, backward by profile] of a branch rank."""
            return [
                sum(pricing.part(i, p.kind, p.group, held)[phase] for i in members) / p.speed
                for phase in (0, 1)
                for p in profiles[m]
            ]

        self.start = [seconds(m, ()) for m in range(self.num_columns)]
        self.more = [
            [
                [a - b for a, b in zip(seconds(m, (branch,)), self.start[m], strict=True)]
                for m in range(self.num_columns)
            ]
            for branch in range(num)
        ]
        self.order = sorted(range(num), key=lambda branch: (-max(map(sum, self.more[branch])), branch))
        self.best: list[tuple[tuple[float, ...], tuple[int, ...]]] = []

    def run(self) -> None:
        self.loads = [list(load) for load in self.start]
        self.held = [0] * self.num_columns
        self.ranks = [0] * len(self.order)
        self._place(0)

    def _value(self) -> tuple[float, ...]:
        half = [len(load) // 2 for load in self.loads]
        return (
            max(max(load[:h]) for load, h in zip(self.loads, half, strict=True)),
            max(max(load[h:]) for load, h in zip(self.loads, half, strict=True)),
            max(self.held),
        )

    def _place(self, depth: int) -> None:
        value = self._value()
        if any(all(a <= b for a, b in zip(best, value, strict=True)) for best, _ in self.best):
            return
        if depth == len(self.order):
            self.best = [
                (best, ranks)
                for best, ranks in self.best
                if not all(b <= a for a, b in zip(best, value, strict=True))
            ]
            self.best.append((value, tuple(self.ranks)))
            return
        self.nodes += 1
        branch, tried = self.order[depth], set[object]()
        ready = sorted(self.allowed[branch], key=lambda m: sum(self.loads[m]) + sum(self.more[branch][m]))
        free = all(len(columns) == self.num_columns for columns in self.allowed)
        for m in ready:
            alike = (self.class_of[m], tuple(self.loads[m]), self.held[m]) if free else m
            if alike in tried:
                continue
            tried.add(alike)
            if self.nodes >= _MOST_NODES and self.best:
                return
            before = self.loads[m]
            self.loads[m] = [a + b for a, b in zip(before, self.more[branch][m], strict=True)]
            self.held[m] += self.bytes[branch]
            self.ranks[branch] = m
            self._place(depth + 1)
            self.loads[m] = before
            self.held[m] -= self.bytes[branch]
