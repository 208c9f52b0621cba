"""The scheduler "greedy": longest branch first, to the device that is then ready first."""

from __future__ import annotations

from anabranch.schedulers.divide import longest_first
from anabranch.schedulers.model_spec import BlockSpec
from anabranch.schedulers.plan import SAMPLE, BranchPlacement, Plan
from anabranch.schedulers.registry import register
from anabranch.schedulers.request import Request


@register("greedy")
def greedy(request: Request) -> Plan:
    """Split "branch" everywhere; a branch rank is as fast as its slowest device.

    Without a mesh all devices are one branch group. Without costs all branches count the same; with them an
    unequal branch counts its forward and backward seconds at the replica's samples.
    """
    data, branch = request.mesh or (1, len(request.cluster.devices))
    devices = request.place(data, branch)
    by_name = request.cluster.by_name
    speeds = [min(by_name[row[m]].speed for row in devices) for m in range(branch)]

    def place(block: BlockSpec) -> BranchPlacement:
        if branch == 1:
            return SAMPLE
        seconds, hosts = _seconds(request, block, data), _pinned(request, block)
        allowed = [
            [m for m in range(branch) if hosts.get(index, set()) <= {by_name[row[m]].host for row in devices}]
            or list(range(branch))
            for index in range(block.num_branches)
        ]
        return longest_first(seconds, allowed, branch, speeds)

    return request.complete(data, branch, place)


def _seconds(request: Request, block: BlockSpec, data: int) -> list[float]:
    if request.costs is None or request.batch is None:
        return [1.0] * block.num_branches
    cost = request.costs.models[0].elements[block.name]
    if not cost.unequal:
        return [1.0] * block.num_branches
    samples = request.batch.num_samples / data / request.batch.accumulation
    return [work.forward_s(samples) + work.backward_s(samples) for work in cost.branches]


def _pinned(request: Request, block: BlockSpec) -> dict[int, set[str]]:
    hosts: dict[int, set[str]] = {}
    for pin in request.pins:
        if pin.block == block.name:
            hosts.setdefault(pin.branch, set()).add(pin.host)
    return hosts
