"""Scaling from 1 to 8 workers, weak (samples a worker) and strong (samples in all): measured where there are devices.

Beyond that predicted from the measured costs (`schedulers.predict`), for workers like those measured, each with a
device of its own; collectives of larger groups are drawn from the largest measured, or taken from the data sheet's link
where one device was. Plans: data parallelism, and the automatic one. Efficiency: of weak scaling t₁ ÷ t_n, of strong
scaling t₁ ÷ (n · t_n). t₁ is one worker's step in the same process tree, rank 0's while the others wait:

    a round, in turn    alone   rank 0 ████████    rank 1 ░░ barrier     t₁
                        data    rank 0 ████▒       rank 1 ████▒          t_n: the slowest rank's
                        auto    rank 0 ████▒       rank 1 ████▒
"""

from __future__ import annotations

import copy
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from anabranch.benchmarks.plan_case import Case
from anabranch.benchmarks.record import RESULTS, write_record
from anabranch.benchmarks.workers import device_of, interleaved, run_workers
from anabranch.runtime.audit import automatic_plan
from anabranch.runtime.errors import ConfigError
from anabranch.runtime.intervals import median_interval
from anabranch.runtime.measure import measure_costs
from anabranch.runtime.mesh import Mesh, make_mesh
from anabranch.runtime.model_spec import spec_of
from anabranch.runtime.plan_step import PlanStep, StepSetting
from anabranch.schedulers import Cluster, Device, Plan, format_plan, parse_plan
from anabranch.schedulers.costs import Batch, Costs
from anabranch.schedulers.device_table import device_kind, local_link
from anabranch.schedulers.predict import predict
from anabranch.schedulers.registry import make_request, schedule
from anabranch.schedulers.search import search

MOST = 8
Mode = Literal["weak", "strong"]
MODES: tuple[Mode, ...] = ("weak", "strong")
_ALONE = "alone"


def run(
    *,
    depth: int = 20,
    num_branches: int = 4,
    batch_size: int = 32,
    most: int = MOST,
    rounds: int = 16,
    plan_budget_s: float = 20.0,
    folder: Path = RESULTS,
) -> dict[str, Any]:
    """Measures, predicts the rest, writes folder/scaling.json. batch_size: a worker's in weak, all workers' in strong.

    rows: {mode, plan (data or auto), workers, batch, label (measured or predicted), median_s, images_per_s,
    efficiency; where measured samples_s, alone_s (one worker's, of the same rounds), efficiency_interval_95}. A
    predicted efficiency is against one worker's step beside which the costs were measured. Raises ConfigError where the
    batch does not divide.
    """
    counts = [2**i for i in range(most.bit_length()) if 2**i <= most]
    if batch_size % counts[-1]:
        raise ConfigError(f"--batch-size {batch_size} does not divide over {counts[-1]} workers")
    num_devices = torch.cuda.device_count() or len(os.sched_getaffinity(0))
    here = [count for count in counts if count <= num_devices] or [1]
    case = Case("multi_resnet", {"depth": depth, "num_branches": num_branches}, batch_size)
    rows: list[dict[str, Any]] = []
    costs: Costs | None = None
    alone_s: list[float] = []
    for count in here:
        for mode in MODES:
            batch = batch_size * (count if mode == "weak" else 1)
            is_last = (count, mode) == (here[-1], "strong")
            found = run_workers(
                count,
                _measure,
                replace(case, batch_size=batch),
                case,
                rounds,
                plan_budget_s,
                is_last,
                threads=1,
            )
            costs, alone_s = found["costs"], found["samples_s"].pop(_ALONE)
            for plan, samples in found["samples_s"].items():
                rows.append(
                    {"mode": mode, "plan": plan, "workers": count, "batch": batch, "label": "measured",
                     "toml": found["plans"][plan], "samples_s": samples, "alone_s": alone_s,
                     **_rate(mode, count, batch, samples, alone_s)}
                )  # fmt: skip
    assert costs is not None, "of the last"
    for count in counts[len(here) :]:
        for mode in MODES:
            batch = batch_size * (count if mode == "weak" else 1)
            for row in _predicted(case, costs, mode, count, batch):
                rated = _rate(mode, count, batch, [row.pop("total_s")], [statistics.median(alone_s)])
                del rated["efficiency_interval_95"]
                rows.append(row | rated)
    record = {"network": str(case), "rounds": rounds, "threads_per_worker": 1, "rows": rows}
    return {**record, "path": str(write_record("scaling", record, folder))}


def _measure(
    rank: int, case: Case, alone: Case, rounds: int, plan_budget_s: float, with_costs: bool
) -> dict[str, Any]:
    """alone: what one worker trains. samples_s: by plan and of that one, paired by round."""
    device, world = device_of(rank), dist.get_world_size()
    network, setting = case.network().to(device), case.setting()
    cluster = _cluster(world, device)
    spec = spec_of(network)
    plans = {"data": schedule("data", spec, cluster)}
    if world > 1:
        outcome = automatic_plan(
            network, setting, cluster, cluster.names, budget_s=plan_budget_s, remeasure=True
        )
        plans["auto"] = parse_plan(outcome["plan"]).resolve(spec, cluster)
    samples = _interleaved(network, plans, setting, replace(alone, groups=1).setting(), rounds, device)
    costs = None
    if with_costs:
        costs = measure_costs(network, setting, cluster, cluster.names, budget_s=plan_budget_s)
    named = {name: format_plan(replace(plan, scheduler=None)) for name, plan in plans.items()}
    return {"samples_s": samples, "plans": named, "costs": costs}


def _interleaved(
    network: nn.Module, plans: Mapping[str, Plan], setting: StepSetting, of_one: StepSetting, rounds: int,
    device: torch.device,
) -> dict[str, list[float]]:  # fmt: skip
    """Seconds a step of each plan and of rank 0 alone, one figure a round, the slowest rank's. Collective."""
    world = dist.get_world_size()
    meshes = {plan.branch: make_mesh(plan.data, plan.branch, device.type) for plan in plans.values()}
    sides: dict[str, Callable[[], object]] = {
        name: PlanStep(copy.deepcopy(network), plan, meshes[plan.branch], setting)
        for name, plan in plans.items()
    }
    # Every rank has a mesh of its own, of one rank: how blocks run is agreed on by all, whoever steps.
    whole = init_device_mesh(device.type, (world, 1, 1), mesh_dim_names=("worker", "data", "branch"))
    group = whole.get_group("data")
    mine = Mesh(whole["data", "branch"], 1, 1, 0, 0, group, whole.get_group("branch"), group)
    plan = schedule("data", spec_of(network), _cluster(1, device))
    step = PlanStep(copy.deepcopy(network), plan, mine, of_one)
    sides[_ALONE] = step if dist.get_rank() == 0 else lambda: None  # the others wait at the next barrier
    samples = interleaved(sides, rounds)
    table = torch.tensor(list(samples.values()), dtype=torch.float64, device=device)
    dist.all_reduce(table, op=dist.ReduceOp.MAX)
    return dict(zip(samples, table.tolist(), strict=True))


def _cluster(num_devices: int, device: torch.device) -> Cluster:
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return Cluster(tuple(Device("localhost", index, kind) for index in range(num_devices)))


def _predicted(case: Case, costs: Costs, mode: Mode, count: int, batch_size: int) -> list[dict[str, Any]]:
    """Both plans on workers that are not here."""
    kind = costs.models[0].kind
    cluster = Cluster(tuple(Device("localhost", index, kind) for index in range(count)))
    if not costs.groups:  # one device: nothing to measure collectives with
        cluster = replace(cluster, local=local_link(device_kind(kind)))
    spec = spec_of(case.network())
    batch = Batch(batch_size, batch_size // count)
    request = make_request(spec, cluster, costs=costs, batch=batch)
    plans = {"data": schedule("data", spec, cluster), "auto": search(request).plan}
    return [
        {"mode": mode, "plan": name, "workers": count, "batch": batch_size, "label": "predicted",
         "toml": format_plan(replace(plan, scheduler=None)),
         "total_s": predict(plan, spec, cluster, costs, batch).total_s}
        for name, plan in plans.items()
    ]  # fmt: skip


def _rate(
    mode: Mode, workers: int, batch: int, samples_s: Sequence[float], alone_s: Sequence[float]
) -> dict[str, Any]:
    """A row's figures from a step's seconds and one worker's, paired by round."""
    shared = workers if mode == "strong" else 1
    ratios = [one / (shared * together) for one, together in zip(alone_s, samples_s, strict=True)]
    efficiency, low, high = median_interval(ratios)
    median_s = statistics.median(samples_s)
    return {
        "median_s": median_s,
        "images_per_s": batch / median_s,
        "efficiency": efficiency,
        "efficiency_interval_95": [low, high],
    }


def print_table(record: dict[str, Any], console: Console) -> None:
    """Every row."""
    table = Table(title=record["network"], title_justify="left", box=None, pad_edge=False)
    columns = ("mode", "plan", "workers", "batch", "ms", "images/s", "efficiency (95 %)", "")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index in (0, 1, 7) else "right")
    for row in sorted(record["rows"], key=lambda row: (row["mode"], row["plan"], row["workers"])):
        table.add_row(
            row["mode"], row["plan"], str(row["workers"]), str(row["batch"]), f"{1e3 * row['median_s']:,.1f}",
            f"{row['images_per_s']:,.0f}", _efficiency(row), row["label"],
        )  # fmt: skip
    console.print(table, highlight=False)


def _efficiency(row: dict[str, Any]) -> str:
    text = f"{100 * row['efficiency']:.0f} %"
    if "efficiency_interval_95" not in row:
        return text
    low, high = row["efficiency_interval_95"]
    return f"{text} ({100 * low:.0f}–{100 * high:.0f})"
