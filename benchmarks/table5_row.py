"""One row of Table V, on every rank: formats, plans, sides one after another, then rounds in turn."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from anabranch.benchmarks.memory import PeakMemory
from anabranch.benchmarks.table5_sides import (
    FORMATS,
    DdpSide,
    OurSide,
    Row,
    family,
    network_of,
    probe_formats,
    setting_of,
)
from anabranch.benchmarks.workers import device_of, interleaved
from anabranch.runtime.audit import automatic_plan
from anabranch.runtime.config import OptimizerConfig
from anabranch.runtime.mesh import make_mesh
from anabranch.runtime.model_shape import model_shape, shared_bytes
from anabranch.runtime.model_spec import spec_of
from anabranch.runtime.optimizer import make_optimizer
from anabranch.runtime.plan_step import StepSetting
from anabranch.runtime.process_group import gather_json
from anabranch.schedulers import Cluster, Device, Plan, format_plan, parse_plan
from anabranch.schedulers.analytic import analytic_costs
from anabranch.schedulers.costs import Batch
from anabranch.schedulers.device_table import device_kind, local_link
from anabranch.schedulers.optimal import candidates
from anabranch.schedulers.registry import make_request, schedule

_SHORT = (2, 2, 2)  # blocks a stage of the network that plans are made on: every distinct block is in it
_SAY_S = 5.0


def measure_row(
    rank: int, row: Row, variants: Sequence[str], rounds: int, steps: int, plan_budget_s: float, rest: float,
    told: bool,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """What was measured, by variant. Collective.

    plan_budget_s: seconds for measuring what an automatic plan is searched from.
    rest: what comes after this row, in rows like it, to tell how long it takes. told: progress goes to standard error.
    """
    begun = time.perf_counter()
    say = _Progress(str(row), rounds, rest, told and rank == 0)
    device = device_of(rank)
    is_fake = dist.get_backend() == "fake"
    world = dist.get_world_size()
    cluster = _cluster(device)
    _first_use(device)
    say("memory formats")
    probed = probe_formats(row, [*dict.fromkeys(map(family, variants))], device)
    formats = {kind: min(seconds, key=seconds.__getitem__) for kind, seconds in probed.items()}
    meshes = {world: make_mesh(world, 1, device.type)}
    found: dict[str, dict[str, Any]] = {}
    sides: dict[str, DdpSide | OurSide] = {}
    for variant in variants:
        say(f"building ({variant})")
        memory_format = formats[family(variant)]
        setting = setting_of(row, memory_format, world)
        facts: dict[str, Any] = {"memory_format": memory_format, "format_probe_s": probed[family(variant)]}
        network = network_of(row, variant).to(memory_format=FORMATS[memory_format])  # type: ignore[call-overload]
        plan = None
        if variant[0] in "def":
            spec = spec_of(network)
            if variant[0] == "f":
                say(f"planning ({variant})")
                short = network_of(row, variant, _SHORT).to(memory_format=FORMATS[memory_format])  # type: ignore[call-overload]
                if is_fake:
                    found_plan = _predicted_plan(row, short, cluster, facts)
                else:
                    found_plan = _automatic_plan(short.to(device), setting, cluster, plan_budget_s, facts)
                plan = _drawn_out(found_plan, network)
            else:
                mesh = (world, 1) if variant[0] == "d" else row.mesh
                plan = schedule("data" if variant[0] == "d" else "even", spec, cluster, mesh=mesh)
            if plan.branch not in {mesh.branch for mesh in meshes.values()}:
                meshes[plan.data] = make_mesh(plan.data, plan.branch, device.type)
            facts |= {
                "mesh": f"{plan.data}x{plan.branch}",
                "plan": format_plan(replace(plan, scheduler=None)),
            }
            if variant[0] == "f":
                facts["same_as"] = _same_as(plan, network, row, cluster)
        part = slice(rank * row.batch // world, (rank + 1) * row.batch // world)
        with PeakMemory(device) as memory:
            side: DdpSide | OurSide
            if plan is None:
                side = DdpSide(network, setting, part, device, tuned=variant != "a", wrapped=not is_fake)
            else:
                side = OurSide(network, setting, plan, meshes[plan.data])
            side()
            first_loss = side.loss
            side()
        if isinstance(side, OurSide):
            side.detailed()
        mine = [first_loss, side.sent_bytes, memory.num_bytes]
        losses, sent, peaks = zip(*([mine] if is_fake else gather_json(mine, device)), strict=True)
        if is_fake:
            facts["exchanges"] = side.exchanges
        else:
            facts["first_loss"] = sum(losses) / len(losses)
        facts["sent_bytes_per_rank"] = max(sent)
        facts["peak_memory_bytes"] = None if None in peaks else max(peaks)
        found[variant], sides[variant] = facts, side
        del network, side
    say("timing")
    samples = interleaved(sides, rounds, steps, warm_up=0, on_round=say.rounds_done)
    table = torch.tensor(list(samples.values()), dtype=torch.float64, device=device)
    dist.all_reduce(table, op=dist.ReduceOp.MAX)  # the slowest rank's
    for variant, seconds in zip(samples, table.tolist(), strict=True):
        found[variant]["samples_s"] = seconds
    found[variants[0]]["row_s"] = time.perf_counter() - begun
    return found


def _first_use(device: torch.device) -> None:
    """What a process's first optimizer and DDP import is not the first variant's memory."""
    network: nn.Module = nn.Linear(1, 1).to(device)
    if dist.get_backend() != "fake":
        network = DistributedDataParallel(network)
    network(torch.ones(1, 1, device=device)).sum().backward()
    make_optimizer(OptimizerConfig(), network.parameters()).step()


def _cluster(device: torch.device) -> Cluster:
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
        model_shape(network, spec), (kind,), shared=shared_bytes(network, spec),
        precision="half" if row.precision == "bf16" else "fp32",
    )  # fmt: skip
    request = make_request(
        spec, replace(cluster, local=local_link(device_kind(kind))), costs=costs,
        batch=Batch(row.batch, row.batch // row.world_size),
    )  # fmt: skip
    facts["audit"] = "not timed: searched from data sheets"
    return candidates(request, 2)[0].plan


def _drawn_out(plan: Plan, network: nn.Module) -> Plan:
    """The short network's plan for the whole one: a stage's later blocks are as its second."""
    names = [block.name for block in spec_of(network).blocks]

    def short(name: str) -> str:
        stage, _, block = name.partition(".block")
        return f"{stage}.block{min(int(block), _SHORT[0])}"

    return replace(plan, blocks={name: plan.blocks[short(name)] for name in names})


def _same_as(plan: Plan, network: nn.Module, row: Row, cluster: Cluster) -> str:
    """Which of (d) and (e) the automatic plan is, "" where it is neither; it is timed as its own side anyway."""
    spec, world = spec_of(network), plan.world_size
    for name, scheduler, mesh in (("d", "data", (world, 1)), ("e", "even", row.mesh)):
        other = schedule(scheduler, spec, cluster, mesh=mesh)
        if all(getattr(plan, field) == getattr(other, field) for field in ("data", "branch", "blocks")):
            return name
    return ""


class _Progress:
    """Says what rank 0 does, and how long all rows will take."""

    def __init__(self, row: str, rounds: int, rest: float, told: bool) -> None:
        self.row, self.rounds, self.rest, self.told = row, rounds, rest, told
        self.begun = self.said = time.perf_counter()

    def __call__(self, what: str) -> None:
        if self.told:
            print(f"{self.row}: {what}", file=sys.stderr, flush=True)
        self.timing = time.perf_counter()

    def rounds_done(self, done: int) -> None:
        now = time.perf_counter()
        if not self.told or (now - self.said < _SAY_S and done < self.rounds):
            return
        self.said = now
        left = (now - self.timing) / done * (self.rounds - done)
        left += self.rest * (now - self.begun + left)
        print(f"{self.row}: round {done}/{self.rounds}, {left:.0f} s left", file=sys.stderr, flush=True)
