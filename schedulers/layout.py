"""A mesh laid over devices: who has how many samples, and which groups exchange over which links."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from anabranch.schedulers.cluster import Cluster, Device
from anabranch.schedulers.costs import Batch
from anabranch.schedulers.errors import PlanError
from anabranch.schedulers.links import GroupKind
from anabranch.schedulers.plan import Devices


@dataclass(frozen=True)
class Layout:
    """ranks: devices, [data][branch]. group_samples: of a replica; own_samples: of each of its ranks.

    Samples are those of the step's largest micro-batch. The kinds of the branch groups, of the data groups,
    and of the group of all.
    """

    ranks: tuple[tuple[Device, ...], ...]
    group_samples: tuple[int, ...]
    own_samples: tuple[tuple[int, ...], ...]
    branch_group: GroupKind
    data_group: GroupKind
    world: GroupKind

    @property
    def data(self) -> int:
        return len(self.ranks)

    @property
    def branch(self) -> int:
        return len(self.ranks[0])

    @cached_property
    def gathered_samples(self) -> int:
        """Samples that an all-gather over a branch group carries: ranks send equally many, padded."""
        return max(max(own) for own in self.own_samples) * self.branch


def make_layout(
    devices: Devices, cluster: Cluster, batch: Batch, samples: Sequence[int] | None = None
) -> Layout:
    """Devices, [data][branch], and a step's samples dealt to them; see `deal_samples`."""
    ranks = tuple(tuple(cluster.by_name[name] for name in row) for row in devices)
    data, branch = len(ranks), len(ranks[0])
    group_samples, own_samples = deal_samples(batch, data, branch, samples)
    return Layout(
        ranks, group_samples, own_samples, *group_kinds([[device.host for device in row] for row in ranks])
    )


def group_kinds(hosts: Sequence[Sequence[str]]) -> tuple[GroupKind, GroupKind, GroupKind]:
    """The kinds of branch groups (rows), data groups (columns) and the world of a mesh of hosts."""
    everywhere = {host for row in hosts for host in row}
    world = GroupKind(len(hosts) * len(hosts[0]), len(everywhere) > 1)
    return _kind(hosts), _kind(list(zip(*hosts, strict=True))), world


def _kind(groups: Sequence[Sequence[str]]) -> GroupKind:
    leaving: Counter[str] = Counter()
    for group in groups:
        if len(found := set(group)) > 1:
            leaving.update(found)
    return GroupKind(len(groups[0]), bool(leaving), max(leaving.values(), default=1))


def deal_samples(
    batch: Batch, data: int, branch: int, samples: Sequence[int] | None = None
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Samples of each replica, and of each of its ranks, in the largest micro-batch of a full step.

    BN groups are dealt whole, in order, to replicas by weights `samples`, then evenly to a replica's ranks;
    only where there are fewer groups than takers is a group cut.
    """
    if batch.num_samples < 1 or batch.bn_batch_size < 1:
        raise PlanError(
            f"a batch of {batch.num_samples} samples in groups of {batch.bn_batch_size}: give ≥ 1"
        )
    num_groups = -(-batch.num_samples // batch.bn_batch_size)
    whole, rest = divmod(batch.num_samples, num_groups)
    sizes = [whole + (index < rest) for index in range(num_groups)]
    sizes = sizes[: -(-num_groups // min(batch.accumulation, num_groups))]
    replicas = _divide(sizes, samples or [1] * data)
    ranks = tuple(tuple(sum(part) for part in _divide(replica, [1] * branch)) for replica in replicas)
    return tuple(map(sum, replicas)), ranks


def _divide(sizes: list[int], weights: Sequence[int]) -> list[list[int]]:
    takers = len(weights)
    if len(sizes) >= takers:
        ends = _ends(len(sizes), weights)
        return [sizes[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    if not sizes:
        return [[] for _ in weights]
    parts: list[list[int]] = []
    ends = _ends(takers, [1] * len(sizes))
    for size, start, end in zip(sizes, [0, *ends], ends, strict=False):
        inner = _ends(size, weights[start:end])
        parts += [[b - a] if b > a else [] for a, b in zip([0, *inner], inner, strict=False)]
    return parts


def _ends(total: int, weights: Sequence[int]) -> list[int]:
    """Where the parts of [0, total) end, in proportion to weights, by largest remainder."""
    whole = sum(weights)
    counts = [total * weight // whole for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda i: (-(total * weights[i] % whole), i))
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    ends, end = [], 0
    for count in counts:
        end += count
        ends.append(end)
    return ends
