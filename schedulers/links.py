"""What exchanges cost: measured where a group of that size was, else latency and bandwidth in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2

from anabranch.schedulers.cluster import Cluster, Link
from anabranch.schedulers.costs import Collective, Costs, GroupCost
from anabranch.schedulers.errors import PlanError


@dataclass(frozen=True)
class GroupKind:
    """Groups of ranks that exchange at the same time.

    size: ranks of one. across: some span hosts. sharing: most of them that share one host's way out.
    """

    size: int
    across: bool = False
    sharing: int = 1


class Links:
    """Seconds of collectives on a cluster.

    Closed form of n ranks, α latency, β bandwidth, s groups on one host's way out, B bytes:
        all_reduce                  2⌈log₂ n⌉α + 2s(n - 1)/n · B/β      (halving and doubling, or a ring's volume)
        all_gather, reduce_scatter   ⌈log₂ n⌉α +  s(n - 1)/n · B/β
    """

    def __init__(self, cluster: Cluster, costs: Costs) -> None:
        self._links = {False: cluster.local, True: cluster.across}
        self._measured: dict[tuple[Collective, bool], dict[int, GroupCost]] = {}
        for cost in costs.groups:
            self._measured.setdefault((cost.collective, cost.across), {})[cost.size] = cost

    def seconds(self, collective: Collective, group: GroupKind, num_bytes: float) -> float:
        """Of one exchange; PlanError when nothing is known of such links."""
        if group.size == 1 or num_bytes <= 0:
            return 0.0
        measured = self._measured.get((collective, group.across), {})
        if group.size in measured:
            return measured[group.size].seconds(num_bytes)
        times, volume = (2, 2.0) if collective == "all_reduce" else (1, 1.0)
        volume *= (group.size - 1) / group.size
        link = self._links[group.across]
        if link is None and measured:  # scaled from the nearest size: the volume grows with (n - 1)/n
            near = measured[min(measured, key=lambda size: (abs(size - group.size), size))]
            ratio = (group.size - 1) / group.size * near.size / (near.size - 1)
            return near.seconds(num_bytes) * ratio
        if link is None:
            where = "across hosts" if group.across else "inside a host"
            raise PlanError(
                f"no cost of an exchange of {group.size} ranks {where}: measure it, or give the cluster's link"
            )
        latency = times * ceil(log2(group.size)) * link.latency_s
        sharing = group.sharing if group.across else 1
        return latency + sharing * volume * num_bytes / link.bandwidth_bytes_per_s

    def occupancy(self, group: GroupKind) -> float:
        """The part of an overlapped all-reduce's time that is taken from compute."""
        measured = self._measured.get(("all_reduce", group.across), {})
        link: Link | None = self._links[group.across]
        if group.size in measured or (link is None and measured):
            return measured[min(measured, key=lambda size: (abs(size - group.size), size))].occupancy
        return link.occupancy if link is not None else 0.0
