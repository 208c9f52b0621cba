"""Two hosts behind a slow wire: the automatic plan splits samples early and branches late, and gains by it.

Two namespaces of this machine, each with one worker (root only). `python -m anabranch.benchmarks mixing`.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from anabranch.benchmarks.plan_case import Case, batch_of, multi
from anabranch.benchmarks.record import RESULTS, write_record
from anabranch.runtime.audit import automatic_plan, time_plans
from anabranch.runtime.intervals import median_interval
from anabranch.runtime.model_spec import spec_of
from anabranch.schedulers import format_plan, parse_plan, schedule
from anabranch.schedulers.cost_file import read_costs
from anabranch.schedulers.predict import predict

_CASE = multi(14, 4, 24, 32, width=4, shortcut="B")
_ASKED = 1.5


def run(*, mbit_per_s: float = 40.0, rounds: int = 8, folder: Path = RESULTS) -> dict[str, Any]:
    """Measures, plans and times on the two hosts; writes the record. Raises RuntimeError without root or `ip`, `tc`."""
    case = replace(_CASE, mbit_per_s=mbit_per_s)
    found = case.run(2, _measured, rounds)
    record = {
        "mbit_per_s": mbit_per_s, "case": str(case), "rounds": rounds, **found,
        "asked": {"speed_up_median": _ASKED}, "met": found["speed_up_median"] >= _ASKED,
    }  # fmt: skip
    return {**record, "path": str(write_record("mixing", record, folder))}


def _measured(rank: int, case: Case, rounds: int) -> dict[str, Any]:
    network, setting = case.network(), case.setting()
    cluster, devices = case.cluster()
    spec = spec_of(network)
    outcome = automatic_plan(network, setting, cluster, devices, budget_s=120, remeasure=True)
    plans = {
        "auto": parse_plan(outcome["plan"]).resolve(spec, cluster),
        "all-data": schedule("data", spec, cluster, mesh=(2, 1)),
        "all-branch": schedule("even", spec, cluster, mesh=(1, 2)),
    }
    samples = time_plans(network, plans, setting, rounds=rounds, budget_s=600)
    if rank:  # what the costs are is in rank 0's file
        return {}
    rival = min(("all-data", "all-branch"), key=lambda name: statistics.median(samples[name]))
    median, low, high = median_interval([a / b for a, b in zip(samples[rival], samples["auto"], strict=True)])
    costs = read_costs(outcome["costs"])
    predicted = {name: predict(plan, spec, cluster, costs, batch_of(setting)) for name, plan in plans.items()}
    return {
        "auto": format_plan(plans["auto"]),
        "better_of_the_others": rival,
        "speed_up_median": median,
        "speed_up_interval_95": [low, high],
        "samples_s": samples,
        "predicted_s": {name: prediction.total_s for name, prediction in predicted.items()},
        "bytes_by_link": {name: [t._asdict() for t in p.traffic] for name, p in predicted.items()},
        "audit": outcome["plans"],
    }
