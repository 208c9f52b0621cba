"""The plans of (d), (e) and (f) for a row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from anabranch.benchmarks.table5_sides import Row, network_of, setting_of
from anabranch.runtime.audit import automatic_plan
from anabranch.runtime.model_shape import model_shape, shared_bytes
from anabranch.runtime.model_spec import spec_of
from anabranch.runtime.plan_step import StepSetting
from anabranch.schedulers import Cluster, Device, ModelSpec, Plan, parse_plan
from anabranch.schedulers.analytic import analytic_costs
from anabranch.schedulers.costs import Batch
from anabranch.schedulers.device_table import device_kind, local_link
from anabranch.schedulers.optimal import candidates
from anabranch.schedulers.registry import make_request, schedule

_SHORT = (2, 2, 2)  # blocks a stage of the network that plans are made on: every distinct block is in it


def plan_of(
    row: Row, variant: str, memory_format: str, device: torch.device, budget_s: float, facts: dict[str, Any]
) -> Plan:
    """Data parallelism for (d), all branches split evenly for (e), the automatic plan for (f). Collective.

    facts: gets how an automatic plan was found, and which of (d) and (e) it is; it is timed as its own side anyway.
    """
    spec, cluster = spec_of(network_of(row, variant)), cluster_of(device)
    data, even = _rivals(row, spec, cluster)
    if variant[0] in "de":
        return data if variant[0] == "d" else even
    short = network_of(row, variant, memory_format, _SHORT)
    if dist.get_backend() == "fake":
        found = _predicted_plan(row, short, cluster, facts)
    else:
        setting = setting_of(replace(row, compiled=False), memory_format)
        found = _automatic_plan(short.to(device), setting, cluster, budget_s, facts)
    plan = _drawn_out(found, spec)
    same = [name for name, other in (("d", data), ("e", even)) if _is_same(plan, other)]
    facts["same_as"] = same[0] if same else ""
    return plan


def _rivals(row: Row, spec: ModelSpec, cluster: Cluster) -> tuple[Plan, Plan]:
    num = len(cluster.devices)
    return (
        schedule("data", spec, cluster, mesh=(num, 1)),
        schedule("even", spec, cluster, mesh=row.mesh),
    )


def _is_same(plan: Plan, other: Plan) -> bool:
    return all(getattr(plan, field) == getattr(other, field) for field in ("data", "branch", "blocks"))


def cluster_of(device: torch.device) -> Cluster:
    """The ranks that are here."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    devices = tuple(Device("localhost", rank, kind) for rank in range(dist.get_world_size()))
    return Cluster(devices)


def _automatic_plan(
    network: nn.Module, setting: StepSetting, cluster: Cluster, budget_s: float, facts: dict[str, Any]
) -> Plan:
    """The runtime's own: costs measured, searched, the best plans timed against data parallelism. Collective."""
    outcome = automatic_plan(network, setting, cluster, cluster.names, budget_s=budget_s, remeasure=True)
    facts["audit"] = [{key: value for key, value in one.items() if key != "plan"} for one in outcome["plans"]]
    facts["chosen"] = outcome["chosen"]
    return parse_plan(outcome["plan"]).resolve(spec_of(network), cluster)


def _predicted_plan(row: Row, network: nn.Module, cluster: Cluster, facts: dict[str, Any]) -> Plan:
    """The best by data sheets, where the ranks are not there to be measured."""
    spec, kind = spec_of(network), cluster.devices[0].kind
    costs = analytic_costs(
        model_shape(network, spec, row.precision), (kind,), shared=shared_bytes(network, spec),
        precision="half" if row.precision == "bf16" else "fp32",
    )  # fmt: skip
    request = make_request(
        spec, replace(cluster, local=local_link(device_kind(kind))), costs=costs,
        batch=Batch(row.batch, row.bn_batch_size),
    )  # fmt: skip
    facts["audit"] = "not timed: searched from data sheets"
    return candidates(request, 2)[0].plan


def _drawn_out(plan: Plan, spec: ModelSpec) -> Plan:
    """The short network's plan for the whole one: a stage's later blocks are as its second."""

    def short(name: str) -> str:
        stage, _, block = name.partition(".block")
        return f"{stage}.block{min(int(block), _SHORT[0])}"

    return replace(plan, blocks={block.name: plan.blocks[short(block.name)] for block in spec.blocks})
