"""Pins: branches that a person puts on hosts. `[[pins]] match = "stage3.*"  branch = 0  host = "node-a"`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from anabranch.schedulers.cluster import Cluster
from anabranch.schedulers.errors import PlanError
from anabranch.schedulers.model_spec import EDGES, ModelSpec
from anabranch.schedulers.plan import BranchPlacement, Devices, Plan, mesh_name
from anabranch.schedulers.request import Pin, Request
from anabranch.schedulers.wording import did_you_mean, first_few, quote


def check_pins(plan: Plan, request: Request) -> None:
    """Raise PlanError with the first pin that a plan with devices breaks.

    A pinned block is split "branch", and the branch rank that holds the branch has a device on the host.
    """
    for pin in request.pins:
        branches = plan.blocks[pin.block].branches
        if plan.branch == 1 or branches is None:
            raise PlanError(
                f"{pin.where}: branch {pin.branch} of {pin.block} is pinned to {quote(pin.host)}, the plan splits "
                f'{pin.block} "sample" on {mesh_name(plan.data, plan.branch)}: split it "branch" or drop the pin'
            )
        rank = next(m for m, held in enumerate(branches) if pin.branch in held)
        hosts = {row[rank].rpartition(":")[0] for row in plan.devices or ()}
        if pin.host not in hosts:
            raise PlanError(
                f"{pin.where}: branch {pin.branch} of {pin.block} is pinned to {quote(pin.host)}, the plan has it "
                f"on branch rank {rank} on {first_few(sorted(hosts))}: place it there, change devices, or ask "
                'the scheduler "optimal", which keeps pins'
            )


def check_pin_rules(
    pins: Sequence[Pin],
    model: ModelSpec,
    cluster: Cluster,
    data: int,
    branch: int,
    devices: Devices | None,
    fixed: Mapping[str, BranchPlacement],
) -> None:
    """Raise PlanError, naming the pins, where no plan on the mesh can keep them."""
    hosts = sorted({device.host for device in cluster.devices})
    first: dict[tuple[str, int], Pin] = {}
    unit_of = {name: unit for unit in model.units for name in unit}
    for pin in pins:
        block, unit = model.by_name[pin.block], unit_of[pin.block]
        what = f"{pin.where}: branch {pin.branch} of {pin.block} is pinned to {quote(pin.host)}"
        if pin.branch >= block.num_branches:
            raise PlanError(f"{what}, which has branches 0 to {block.num_branches - 1}: name one of them")
        if pin.host not in hosts:
            raise PlanError(
                f"{what}, the cluster has {first_few(hosts)}{did_you_mean(pin.host, hosts)}: name one of them"
            )
        counts = {model.by_name[name].num_branches for name in unit if name not in EDGES}
        if branch == 1 or len(counts) > 1 or {*EDGES} & {*unit}:
            why = "the mesh has one branch rank" if branch == 1 else f"{first_few(unit)} share parameters"
            raise PlanError(f'{what}, but {why}, so all are split "sample": drop the pin or change that')
        if pin.block in fixed and fixed[pin.block].split == "sample":
            raise PlanError(f'{what}, and a [[blocks]] rule splits it "sample": drop one of them')
        for member in unit:  # placed as one: pins of one are pins of all
            other = first.setdefault((member, pin.branch), pin)
            if other.host != pin.host and not _share_rank(cluster, other.host, pin.host, data, devices):
                raise PlanError(
                    f"{what}, and {other.where} pins it to {quote(other.host)}; a branch has one branch rank, and "
                    f"no branch rank of the mesh {mesh_name(data, branch)} has devices on both: drop one of them"
                )


def _share_rank(cluster: Cluster, a: str, b: str, data: int, devices: Devices | None) -> bool:
    """Whether a branch rank (its devices in all replicas) can be on both hosts."""
    if devices is None:
        return data > 1
    host_of = {name: device.host for name, device in cluster.by_name.items()}
    columns = ({host_of.get(name, "") for name in column} for column in zip(*devices, strict=True))
    return any({a, b} <= column for column in columns)
