"""How the samples of a batch are dealt to ranks: in BN groups, in order.

A batch is an ordered list of BN groups. Replicas are dealt whole groups, and so are the ranks of a replica
for the blocks that split samples; only where there are fewer groups than takers is a group cut, and its
statistics synchronized.

    12 samples, groups of 3, 2 × 2 ranks          12 samples, one group, 2 × 2 ranks
    groups    [a a a|b b b|c c c|d d d]           [a a a a a a a a a a a a]
    replicas  [  0        |     1     ]           [     0     |     1     ]      synchronized over `data`
    ranks     [ 00  | 01  | 10  | 11  ]           [ 00  | 01  | 10  | 11  ]      synchronized over all
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Share:
    """Consecutive samples of a batch.

    [start, stop), cut as `group_sizes`; the first sample belongs to the batch's group `first_group`.
    """

    start: int
    stop: int
    first_group: int
    group_sizes: tuple[int, ...]


@dataclass(frozen=True)
class Deal:
    """Who gets which samples of one batch (or micro-batch).

    start: index of its first sample in the step's batch. group_sizes: its BN groups.
    replicas: by data rank. ranks: by data rank and branch rank; together a replica's ranks hold what the
        replica holds.
    """

    start: int
    group_sizes: tuple[int, ...]
    replicas: tuple[Share, ...]
    ranks: tuple[tuple[Share, ...], ...]

    @property
    def num_samples(self) -> int:
        return sum(self.group_sizes)

    @property
    def groups_span_replicas(self) -> bool:
        """Whether a BN group's samples lie in several replicas."""
        return sum(len(share.group_sizes) for share in self.replicas) > len(self.group_sizes)

    @property
    def groups_span_ranks(self) -> bool:
        """Whether a BN group's samples lie on several ranks when every rank has samples of its own."""
        return sum(len(share.group_sizes) for row in self.ranks for share in row) > len(self.group_sizes)


def deal_step(
    num_samples: int,
    *,
    bn_batch_size: int,
    data: int,
    branch: int,
    samples: Sequence[int] | None = None,
    accumulation: int = 1,
) -> list[Deal]:
    """The micro-batches of one step of `num_samples` samples, each dealt to data × branch ranks.

    The step has ⌈num_samples ÷ bn_batch_size⌉ groups, sizes differing by at most one, larger first.
    Micro-batches are dealt whole groups; a short step may have fewer micro-batches than `accumulation`.
    samples: weights of the replicas (BN groups of each in a full step); even if None.
    """
    num_groups = -(-num_samples // bn_batch_size)
    sizes = even_parts(num_samples, num_groups)
    deals, start = [], 0
    for count in even_parts(num_groups, min(accumulation, num_groups)):
        deals.append(_deal(start, tuple(sizes[:count]), data, branch, samples))
        start, sizes = start + sum(sizes[:count]), sizes[count:]
    return deals


def even_parts(total: int, num_parts: int) -> list[int]:
    """`total` in `num_parts` parts that differ by at most one, larger first."""
    whole, rest = divmod(total, num_parts)
    return [whole + (index < rest) for index in range(num_parts)]


def _deal(
    start: int, group_sizes: tuple[int, ...], data: int, branch: int, samples: Sequence[int] | None
) -> Deal:
    whole = Share(0, sum(group_sizes), 0, group_sizes)
    replicas = _divide(whole, samples or [1] * data)
    ranks = tuple(tuple(_divide(replica, [1] * branch)) for replica in replicas)
    return Deal(start, group_sizes, tuple(replicas), ranks)


def _divide(share: Share, weights: Sequence[int]) -> list[Share]:
    """A share cut for takers with weights: between groups where there are enough of them, else inside."""
    sizes, takers = share.group_sizes, len(weights)
    if len(sizes) >= takers:
        per_taker = [list(sizes[a:b]) for a, b in _ranges(len(sizes), weights)]
        firsts = [share.first_group + a for a, _ in _ranges(len(sizes), weights)]
    else:
        per_taker, firsts = [], []
        for group, (a, b) in enumerate(_ranges(takers, [1] * len(sizes)) if sizes else []):
            for low, high in _ranges(sizes[group], weights[a:b]):
                per_taker.append([high - low])
                firsts.append(share.first_group + group)
        if not sizes:
            per_taker, firsts = [[] for _ in weights], [share.first_group] * takers
    shares, start = [], share.start
    for groups, first in zip(per_taker, firsts, strict=True):
        held = tuple(size for size in groups if size)
        shares.append(Share(start, start + sum(held), first, held))
        start += sum(held)
    return shares


def _ranges(total: int, weights: Sequence[int]) -> list[tuple[int, int]]:
    """[0, total) cut in proportion to weights, by largest remainder (earlier takers first among equals)."""
    whole = sum(weights)
    counts = [total * weight // whole for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda i: (-(total * weights[i] % whole), i))
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    edges = [sum(counts[:i]) for i in range(len(counts) + 1)]
    return list(pairwise(edges))
