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
from anabranch.benchmarks.table5_plans import cluster_of, plan_of
from anabranch.benchmarks.table5_sides import (
    DdpSide,
    OurSide,
    Row,
    family,
    faster_format,
    network_of,
    probe_formats,
    setting_of,
)
from anabranch.benchmarks.workers import device_of, interleaved
from anabranch.runtime.config import OptimizerConfig
from anabranch.runtime.mesh import Mesh, make_mesh
from anabranch.runtime.model_spec import spec_of
from anabranch.runtime.optimizer import make_optimizer
from anabranch.runtime.process_group import gather_json
from anabranch.schedulers import Plan, format_plan, parse_plan

_SAY_S = 5.0  # between lines
_Side = DdpSide | OurSide


def measure_row(
    rank: int, row: Row, variants: Sequence[str], rounds: int, steps: int, plan_budget_s: float, rest: float,
    told: bool,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """What was measured, by variant. Collective.

    plan_budget_s: seconds for measuring what an automatic plan is searched from.
    rest: what comes after this row, in rows like it, to tell how long it takes. told: progress goes to standard error.
    """
    say = _Progress(str(row), rounds, rest, told and rank == 0)
    device = device_of(rank)
    _first_use(device)
    say("memory formats")
    probed = probe_formats(row, [*dict.fromkeys(map(family, variants))], device)
    meshes: dict[int, Mesh] = {}
    found: dict[str, dict[str, Any]] = {}
    sides: dict[str, _Side] = {}
    for variant in variants:
        seconds = probed[family(variant)]
        memory_format = faster_format(seconds)
        facts: dict[str, Any] = {"memory_format": memory_format, "format_probe_s": seconds}
        plan = None
        if variant[0] in "def":
            say(f"planning ({variant})")
            plan = plan_of(row, variant, memory_format, device, plan_budget_s, facts)
            if plan.data not in meshes:
                meshes[plan.data] = make_mesh(plan.data, plan.branch, device.type)
            facts["mesh"] = f"{plan.data}x{plan.branch}"
            facts["plan"] = format_plan(replace(plan, scheduler=None))
        say(f"building ({variant})")
        sides[variant] = _built(row, variant, plan, meshes, device, facts)
        found[variant] = facts
    say("timing")
    samples = interleaved(sides, rounds, steps, warm_up=0, on_round=say.rounds_done)
    table = torch.tensor(list(samples.values()), dtype=torch.float64, device=device)
    dist.all_reduce(table, op=dist.ReduceOp.MAX)  # the slowest rank's
    for variant, values in zip(samples, table.tolist(), strict=True):
        found[variant]["samples_s"] = values
    return found


def _built(
    row: Row, variant: str, plan: Plan | None, meshes: dict[int, Mesh], device: torch.device,
    facts: dict[str, Any],
) -> _Side:  # fmt: skip
    """A variant's side, warmed up by two steps; facts: gets loss, traffic and how blocks run. Collective."""
    is_alone = dist.get_backend() == "fake"
    side = _side(row, variant, plan, meshes, device, facts["memory_format"])
    if isinstance(side, DdpSide) and side.compiled:
        facts["compiled"] = side.compiled
    side()
    first_loss = side.loss
    side.counted()
    if isinstance(side, OurSide):
        facts["how_to_run"] = side.step.how_to_run.to_dict()
    mine = [first_loss, side.sent_bytes]
    losses, sent = zip(*([mine] if is_alone else gather_json(mine, device)), strict=True)
    if is_alone:  # its sums are of one rank: no loss; what travels is priced later
        facts["exchanges"] = side.exchanges
    else:
        facts["first_loss"] = sum(losses) / len(losses)
    facts["sent_bytes_per_rank"] = max(sent)
    return side


def _side(
    row: Row, variant: str, plan: Plan | None, meshes: dict[int, Mesh], device: torch.device, memory_format: str
) -> _Side:  # fmt: skip
    setting, network = setting_of(row, memory_format), network_of(row, variant, memory_format)
    if plan is not None:
        return OurSide(network, setting, plan, meshes[plan.data])
    world, rank, is_alone = dist.get_world_size(), dist.get_rank(), dist.get_backend() == "fake"
    part = slice(rank * row.batch // world, (rank + 1) * row.batch // world)
    compiled = row.compiled and variant == "b" and not is_alone
    # Over one rank DDP copies every gradient into its buckets and sums nothing: no baseline of ours, which skips both.
    return DdpSide(
        network,
        setting,
        part,
        device,
        tuned=variant != "a",
        wrapped=world > 1 and not is_alone,
        compiled=compiled,
    )


def measure_peak(rank: int, row: Row, variant: str, memory_format: str, plan_text: str | None) -> int | None:
    """Most bytes that a rank has while it builds a variant and takes two steps; None: unknown (no Linux). Collective.

    To be run in processes that have done nothing else: what others have left there would be used again for nothing.
    Blocks run as they are: a compiler's own memory would be most of it.
    """
    row = replace(row, compiled=False)
    device = device_of(rank)
    _first_use(device)
    plan, meshes = None, dict[int, Mesh]()
    if plan_text is not None:
        plan = parse_plan(plan_text).resolve(spec_of(network_of(row, variant)), cluster_of(device))
        meshes[plan.data] = make_mesh(plan.data, plan.branch, device.type)
    with PeakMemory(device) as memory:
        side = _side(row, variant, plan, meshes, device, memory_format)
        side()
        side()
    mine = memory.num_bytes
    peaks = [mine] if dist.get_backend() == "fake" else gather_json(mine, device)
    return None if None in peaks else max(peaks)


def _first_use(device: torch.device) -> None:
    """What a process's first optimizer and DDP import is not the first variant's memory."""
    network: nn.Module = nn.Linear(1, 1).to(device)
    if dist.get_backend() != "fake":
        network = DistributedDataParallel(network)
    network(torch.ones(1, 1, device=device)).sum().backward()
    make_optimizer(OptimizerConfig(), network.parameters()).step()


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
