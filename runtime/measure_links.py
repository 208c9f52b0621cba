"""Measures what collectives cost between the workers, and what an overlapped one takes from compute."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist

from anabranch.runtime import exchange
from anabranch.runtime.mesh import Mesh
from anabranch.runtime.plan_step import PlanStep
from anabranch.runtime.process_group import gather_json
from anabranch.schedulers.costs import Collective, Curve, GroupCost
from anabranch.schedulers.layout import group_kinds

_SIZES = tuple(4**i * 1024 for i in range(8))  # bytes: 1 KiB … 16 MiB
_ROUNDS, _SLOW_S = 5, 0.25  # larger messages than one that takes so long are drawn out

_RUN: dict[Collective, Callable[[torch.Tensor, dist.ProcessGroup], object]] = {
    "all_reduce": lambda x, group: exchange.all_reduce(x, group).wait(),
    "reduce_scatter": lambda x, group: _reduce_scatter(x, group),
    "all_gather": lambda x, group: _all_gather(x, group),
}


def link_costs(
    meshes: Mapping[int, Mesh],
    hosts: Sequence[str],
    in_steps: Mapping[int, Mapping[int, float]],
    occupancy: float,
    device: torch.device,
) -> tuple[GroupCost, ...]:
    """Costs of collectives over branch groups, data groups and all ranks, of every size that the meshes have.

    meshes: by branch size. hosts: by rank. in_steps: seconds of branch all-reduces seen in real steps, by group size
    and bytes: they count where there are any, and for reduce-scatters as much as these cost less alone. Collective.
    """
    found: dict[tuple[str, int, bool], GroupCost] = {}
    alone: dict[tuple[str, int, bool], Curve] = {}
    for branch, mesh in meshes.items():
        rows = [hosts[d * branch : (d + 1) * branch] for d in range(mesh.data)]
        kinds = group_kinds(rows)
        groups = (mesh.branch_group, mesh.data_group, mesh.world_group)
        for kind, group in zip(kinds, groups, strict=True):
            for collective in _RUN:
                key = (collective, kind.size, kind.across)
                if kind.size == 1 or key in found:
                    continue
                points = _measured(collective, group, mesh.world_group, device)
                alone[key] = Curve(tuple(sorted(points.items())))
                seen = in_steps.get(kind.size, {}) if collective != "all_gather" else {}
                if collective == "reduce_scatter":
                    whole = alone["all_reduce", kind.size, kind.across]
                    seen = {n: seconds * alone[key](n) / whole(n) for n, seconds in seen.items() if whole(n)}
                if seen:
                    low, high = min(seen), max(seen)
                    points = {n: s for n, s in points.items() if not low <= n <= high} | dict(seen)
                found[key] = GroupCost(
                    collective, kind.size, kind.across, Curve(tuple(sorted(points.items()))),
                    occupancy if collective == "all_reduce" else 0.0,
                )  # fmt: skip
    return tuple(found.values())


def _measured(
    collective: Collective, group: dist.ProcessGroup, world: dist.ProcessGroup, device: torch.device
) -> dict[int, float]:
    """Seconds by bytes, all groups at once; of a round the shortest of a group's ranks, which waited for none."""
    points: dict[int, float] = {}
    for num_bytes in _SIZES:
        x = torch.ones(num_bytes // 4, device=device)
        seconds = []
        for _ in range(_ROUNDS):
            dist.barrier(world)
            begun = time.perf_counter()
            _RUN[collective](x, group)
            if x.is_cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begun)
        rounds = zip(*gather_json(seconds, device, group), strict=True)
        here = statistics.median(map(min, rounds))
        points[num_bytes] = max(gather_json(here, device, world))  # the slowest group's
        if points[num_bytes] > _SLOW_S:
            break
    return points


def _reduce_scatter(x: torch.Tensor, group: dist.ProcessGroup) -> None:
    each = len(x) // group.size()
    exchange.reduce_scatter(x[: each * group.size()], [each] * group.size(), group).wait()


def _all_gather(x: torch.Tensor, group: dist.ProcessGroup) -> None:
    each = len(x) // group.size()
    exchange.all_gather(x[:each], [each] * group.size(), group)


def occupancy(step: PlanStep, rounds: int = 5) -> float:
    """The part of gradient transfers that overlapping them with the backward does not hide, in [0, 1]. Collective.

    From steps that reduce during the backward, and after it, in turn.
    """
    reducer, recorder = step.train.reducer, step.train.network.recorder
    step()
    hidden: list[float] = []
    exposed: list[float] = []
    transfers: list[float] = []
    for _ in range(rounds):
        for overlap, samples in ((True, hidden), (False, exposed)):
            reducer.overlap = overlap
            dist.barrier()
            samples.append(step.timed())
            if not overlap:
                transfers.append(recorder.times()[4])
    mine = [statistics.median(values) for values in (hidden, exposed, transfers)]
    device = step.batches[0].x.device
    together = [statistics.median(values) for values in zip(*gather_json(mine, device), strict=True)]
    with_overlap, without, transfer = together
    if transfer <= 0.01 * without:  # too small to tell
        return 0.0 if device.type == "cuda" else 1.0
    hides: float = (without - with_overlap) / transfer
    return min(max(1.0 - hides, 0.0), 1.0)
