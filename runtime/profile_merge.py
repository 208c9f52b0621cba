"""All ranks' steps as one profile: compute, transfer and wait apart, and who was waited for.

An exchange ends for all when its last rank arrives: until then the others *wait*, from then on all *transfer*:

    rank 0   ██ forward ██│░░ wait ░░│▒ transfer ▒│         wait = last arrival - own arrival
    rank 1   ████████ forward ███████│▒ transfer ▒│         blamed: rank 1, where it was slower than the others
                                                            since its exchange before

Arrays are (records, steps) of steps that recorded the same on every rank: a short last batch is left out.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from anabranch.runtime.profile_steps import RankSteps, Signature
from anabranch.runtime.recorder import WHOLE

Array = np.ndarray[Any, np.dtype[np.float64]]
PARTS = ("data", "forward", "backward", "exchange", "reduction", "optimizer", "idle")
_BUCKETS = {"data_bucket": "data", "world_bucket": "world"}
_COLLECTIVES = ("all_reduce", "reduce_scatter", "all_gather")
_AXES = {**dict.fromkeys(_COLLECTIVES, "branch"), "data_sum": "data", "world_sum": "world"} | _BUCKETS


@dataclass(frozen=True)
class Exchange:
    """One collective in every step: (ranks, steps) of its group. reduction: gradients, given before waited for."""

    op: str
    element: str
    part: str
    num_bytes: int
    ranks: tuple[int, ...]
    wait: Array
    transfer: Array
    columns: tuple[int, ...]  # of each rank's records

    @property
    def reduction(self) -> bool:
        return self.op in _BUCKETS


class Merged:
    """Ranks' regular steps. spans[r]: signatures; start[r], end[r]: (records, steps); step[r]: (2, steps)."""

    def __init__(self, ranks: Sequence[RankSteps], branch: int) -> None:
        self.branch, self.num_ranks = branch, len(ranks)
        num = min(len(rank.steps) for rank in ranks)
        usual = [Counter(names for names, _ in rank.steps).most_common(1)[0][0] for rank in ranks]
        self.regular = [
            i for i in range(num) if all(rank.steps[i][0] == u for rank, u in zip(ranks, usual, strict=True))
        ]
        self.num_measured = num
        if not self.regular:  # ranks alternate between batches of two sizes: take the last step of all
            self.regular = [num - 1]
            usual = [rank.steps[-1][0] for rank in ranks]
        self.spans: list[tuple[Signature, ...]] = usual
        cubes = [np.stack([rank.steps[i][1] for i in self.regular], axis=-1) for rank in ranks]
        self.start = [cube[:-1, 0] for cube in cubes]
        self.end = [cube[:-1, 1] for cube in cubes]
        self.step = [cube[-1] for cube in cubes]
        self.exchanges = self._exchanges()
        self.blame = self._blame()

    def step_s(self, rank: int) -> Array:
        start, end = self.step[rank]
        return np.asarray(end - start)

    def parts(self, rank: int) -> dict[str, Array]:
        """Seconds by part and step, as `Recorder.times`, and what none accounts for."""
        zero = np.zeros(len(self.regular))
        found = {part: zero.copy() for part in PARTS}
        for (part, element, op, _), length in zip(
            self.spans[rank], self.end[rank] - self.start[rank], strict=True
        ):
            if op and part in WHOLE:
                continue
            if op:
                found["exchange"] += length
                found[part] -= length
            elif not element:
                found[part] += length
        return {**found, "unattributed": self.step_s(rank) - sum(found.values())}

    def compute(self, rank: int) -> dict[tuple[str, str], Array]:
        """Seconds of (part, element) without exchanges."""
        found: dict[tuple[str, str], Array] = defaultdict(lambda: np.zeros(len(self.regular)))
        for (part, element, op, _), length in zip(
            self.spans[rank], self.end[rank] - self.start[rank], strict=True
        ):
            if element:
                found[part, element] += -length if op else length
        return found

    def _group(self, axis: str, rank: int) -> tuple[int, ...]:
        if axis == "world":
            return tuple(range(self.num_ranks))
        if axis == "data":
            return tuple(range(rank % self.branch, self.num_ranks, self.branch))
        first = rank - rank % self.branch
        return tuple(range(first, first + self.branch))

    def _exchanges(self) -> list[Exchange]:
        """The k-th exchange of every rank of a group is the same one: a group's ranks all run them in one order."""
        columns: dict[tuple[str, tuple[int, ...], bool], list[list[int]]] = defaultdict(list)
        for rank, names in enumerate(self.spans):
            own: dict[tuple[str, tuple[int, ...], bool], list[int]] = defaultdict(list)
            for column, (part, _, op, _) in enumerate(names):
                if op and part != "sent":
                    axis = _AXES[op]
                    own[axis, self._group(axis, rank), op in _BUCKETS].append(column)
            for key, found in own.items():
                columns[key].append(found)
        exchanges = []
        for (_, ranks, is_bucket), of_ranks in columns.items():
            for same in zip(*of_ranks, strict=True):
                part, element, op, num_bytes = self.spans[ranks[0]][same[0]]
                start = np.stack([self.start[r][c] for r, c in zip(ranks, same, strict=True)])
                end = np.stack([self.end[r][c] for r, c in zip(ranks, same, strict=True)])
                arrival = start
                if is_bucket:  # "sent" stands just before
                    arrival = np.stack([self.start[r][c - 1] for r, c in zip(ranks, same, strict=True)])
                wait = np.clip(np.minimum(arrival.max(0), end) - start, 0, None)
                exchanges.append(
                    Exchange(op, element, part, num_bytes, ranks, wait, end - start - wait, same)
                )
        return exchanges

    def _work(self, rank: int, since: Array, until: Array) -> dict[tuple[str, str], Array]:
        """What the rank did in an interval of each step: seconds by (part, element); exchanges lie outside."""
        found: dict[tuple[str, str], Array] = defaultdict(lambda: np.zeros(len(self.regular)))
        for (part, element, op, _), start, end in zip(
            self.spans[rank], self.start[rank], self.end[rank], strict=True
        ):
            if not op and (element or part in ("data", "optimizer", "idle")):
                overlap = np.minimum(end, until) - np.maximum(start, since)
                if overlap.max(initial=0.0) > 0:
                    found[part, element] += np.clip(overlap, 0, None)
        return found

    def _blame(self) -> dict[tuple[int, str, str], Array]:
        """(rank, part, element) that others waited for → (ranks, steps) seconds that each of them did."""
        blame: dict[tuple[int, str, str], Array] = {}
        shape = (self.num_ranks, len(self.regular))
        ends: list[list[Array]] = [[] for _ in range(self.num_ranks)]
        for exchange in self.exchanges:
            if not exchange.reduction:
                for rank, column in zip(exchange.ranks, exchange.columns, strict=True):
                    ends[rank].append(self.end[rank][column])
        for exchange in self.exchanges:
            if len(exchange.ranks) == 1:
                continue
            arrival, work = [], []
            for rank, column in zip(exchange.ranks, exchange.columns, strict=True):
                at = self.start[rank][column - 1 if exchange.reduction else column]
                since = self.step[rank][0]
                for end in ends[rank]:
                    since = np.where(end <= at, np.maximum(end, since), since)
                arrival.append(at)
                work.append(self._work(rank, since, at))
            late = np.argmax(np.stack(arrival), 0)
            keys = sorted({key for of_rank in work for key in of_rank})
            if not keys:
                continue
            zero = np.zeros(shape[1])
            table = np.stack(
                [[of_rank.get(key, zero) for key in keys] for of_rank in work]
            )  # ranks, keys, steps
            steps = np.arange(shape[1])
            own = table[late, :, steps]  # steps, keys
            others = (table.sum(0).T - own) / (len(work) - 1)
            why = np.argmax(own - others, 1)
            for position, key in {(int(p), int(k)) for p, k in zip(late, why, strict=True)}:
                chosen = (late == position) & (why == key)
                found = blame.setdefault((exchange.ranks[position], *keys[key]), np.zeros(shape))
                for index, rank in enumerate(exchange.ranks):
                    found[rank] += np.where(chosen, exchange.wait[index], 0.0)
        return blame


def spread(values: Sequence[float] | Array) -> dict[str, float]:
    """p50 and p95 over steps."""
    return {"p50": float(np.percentile(values, 50)), "p95": float(np.percentile(values, 95))}


def over_ranks(values: Sequence[float]) -> dict[str, float]:
    """min, median, max over ranks."""
    return {"min": min(values), "median": float(np.median(values)), "max": max(values)}


def summed(
    exchanges: Sequence[Exchange], rank: int, what: Callable[[Exchange], Array], num_steps: int
) -> Array:
    """A rank's seconds (steps,) over some exchanges."""
    total = np.zeros(num_steps)
    for exchange in exchanges:
        if rank in exchange.ranks:
            total += what(exchange)[exchange.ranks.index(rank)]
    return total
