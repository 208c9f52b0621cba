"""Scaling from 1 to 8 workers, weak (samples a worker) and strong (samples in all): measured where there are devices.

Beyond that predicted from the measured costs (`schedulers.predict`), for workers like those measured, each with a
device of its own; collectives of larger groups are drawn from the largest measured, or taken from the data sheet's link
where one device was. Plans: data parallelism, and the automatic one. Efficiency: of weak scaling t₁ ÷ t_n, of strong
scaling t₁ ÷ (n · t_n).
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from anabranch.benchmarks.plan_case import Case
from anabranch.benchmarks.record import RESULTS, write_record
from anabranch.benchmarks.workers import device_of, run_workers
from anabranch.runtime.audit import automatic_plan, time_plans
from anabranch.runtime.errors import ConfigError
from anabranch.runtime.measure import measure_costs
from anabranch.runtime.model_spec import spec_of
from anabranch.schedulers import Cluster, Device, format_plan, parse_plan
from anabranch.schedulers.costs import Batch, Costs
from anabranch.schedulers.device_table import device_kind, local_link
from anabranch.schedulers.predict import predict
from anabranch.schedulers.registry import make_request, schedule
from anabranch.schedulers.search import search

MOST = 8
Mode = Literal["weak", "strong"]
MODES: tuple[Mode, ...] = ("weak", "strong")


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

    rows: {mode, plan (data or auto), workers, batch, label (measured or predicted), median_s, samples_s (where
    measured), images_per_s, efficiency}. Raises ConfigError where the batch does not divide.
    """
    counts = [2**i for i in range(most.bit_length()) if 2**i <= most]
    if batch_size % counts[-1]:
        raise ConfigError(f"--batch-size {batch_size} does not divide over {counts[-1]} workers")
    num_devices = torch.cuda.device_count() or len(os.sched_getaffinity(0))
    here = [count for count in counts if count <= num_devices] or [1]
    case = Case("multi_resnet", {"depth": depth, "num_branches": num_branches}, batch_size)
    rows: list[dict[str, Any]] = []
    costs: Costs | None = None
    for count in here:
        for mode in MODES:
            batch = batch_size * (count if mode == "weak" else 1)
            is_last = (count, mode) == (here[-1], "strong")
            found = run_workers(
                count, _measure, replace(case, batch_size=batch), rounds, plan_budget_s, is_last, threads=1
            )
            costs = found.pop("costs")
            for plan, samples in found["samples_s"].items():
                rows.append(
                    {"mode": mode, "plan": plan, "workers": count, "batch": batch, "label": "measured",
                     "toml": found["plans"][plan], "samples_s": samples, "median_s": statistics.median(samples)}
                )  # fmt: skip
    assert costs is not None, "of the last"
    for count in counts[len(here) :]:
        for mode in MODES:
            rows += _predicted(case, costs, mode, count, batch_size * (count if mode == "weak" else 1))
    _rate(rows)
    record = {"network": str(case), "rounds": rounds, "threads_per_worker": 1, "rows": rows}
    return {**record, "path": str(write_record("scaling", record, folder))}


def _measure(rank: int, case: Case, rounds: int, plan_budget_s: float, with_costs: bool) -> dict[str, Any]:
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
    samples = time_plans(network, plans, setting, rounds=rounds)
    costs = None
    if with_costs:
        costs = measure_costs(network, setting, cluster, cluster.names, budget_s=plan_budget_s)
    named = {name: format_plan(replace(plan, scheduler=None)) for name, plan in plans.items()}
    return {"samples_s": samples, "plans": named, "costs": costs}


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
         "median_s": predict(plan, spec, cluster, costs, batch).total_s}
        for name, plan in plans.items()
    ]  # fmt: skip


def _rate(rows: Sequence[dict[str, Any]]) -> None:
    """Adds images_per_s and efficiency, against one worker's data parallelism of the same mode."""
    alone = {row["mode"]: row["median_s"] for row in rows if row["workers"] == 1}
    for row in rows:
        row["images_per_s"] = row["batch"] / row["median_s"]
        speed_up = alone[row["mode"]] / row["median_s"]
        row["efficiency"] = speed_up if row["mode"] == "weak" else speed_up / row["workers"]


def print_table(record: dict[str, Any], console: Console) -> None:
    """Every row."""
    table = Table(title=record["network"], title_justify="left", box=None, pad_edge=False)
    for index, column in enumerate(("mode", "plan", "workers", "batch", "ms", "images/s", "efficiency", "")):
        table.add_column(column, justify="left" if index in (0, 1, 7) else "right")
    for row in sorted(record["rows"], key=lambda row: (row["mode"], row["plan"], row["workers"])):
        table.add_row(
            row["mode"], row["plan"], str(row["workers"]), str(row["batch"]), f"{1e3 * row['median_s']:,.1f}",
            f"{row['images_per_s']:,.0f}", f"{100 * row['efficiency']:.0f} %", row["label"],
        )  # fmt: skip
    console.print(table, highlight=False)
