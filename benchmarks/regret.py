"""The plan that is chosen automatically, against all others and against plain data parallelism, in fresh rounds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from anabranch.benchmarks import prediction
from anabranch.benchmarks.plan_case import Case, data_plan, measure_cases, multi, plan_on
from anabranch.benchmarks.record import RESULTS, write_record
from anabranch.runtime.audit import automatic_plan, time_plans
from anabranch.runtime.intervals import median_interval
from anabranch.runtime.model_spec import spec_of
from anabranch.schedulers import BranchPlacement, ModelSpec, Plan, format_plan, parse_plan
from anabranch.schedulers.plan import SAMPLE

# Behind a slow wire the gradients of data parallelism cost more than the activations of a split: it is not the best.
CASES = (
    multi(8, 4, 16),
    multi(8, 2, 32, width=2),
    multi(8, 4, 16, mbit_per_s=100),
    multi(8, 8, 8, mbit_per_s=100),
)
NEVER_SLOWER = (
    *prediction.CASES,
    multi(8, 2, 8),
    multi(8, 4, 128),
    multi(20, 2, 32),
    multi(8, 4, 16, width=4),
    multi(8, 8, 32),
    Case("multi_resnet", {"depth": 11, "num_branches": 2, "block": "bottleneck"}, 16, 16),
)
_MOST_RATIO = 1.02
_RIVALS = 3  # the best at first, timed again


def run(
    *, workers: int = 2, rounds: int = 60, folder: Path = RESULTS, resume: bool = False
) -> dict[str, Any]:
    """The automatic plan against the best of all other plans of these small networks, re-timed in fresh rounds."""
    rows = measure_cases(f"regret_{workers}", CASES, workers, rounds, folder, resume, _against_all)
    slow_links = sum(not row["data_parallel_is_best"] for row in rows)
    record = {
        "workers": workers, "rounds": rounds, "cases": rows, "met": _keep_ratio(rows) and slow_links >= 2,
        "asked": {"ratio_interval_95_upper": _MOST_RATIO, "cases_where_data_parallelism_is_not_best": 2},
    }  # fmt: skip
    return {**record, "path": str(write_record(f"regret_{workers}", record, folder))}


def never_slower(
    *, workers: int = 2, rounds: int = 60, folder: Path = RESULTS, resume: bool = False
) -> dict[str, Any]:
    """The automatic plan against plain data parallelism, in fresh rounds, over ten networks and batches."""
    name = f"never_slower_{workers}"
    rows = measure_cases(name, NEVER_SLOWER, workers, rounds, folder, resume, _against_data)
    record = {
        "workers": workers, "rounds": rounds, "cases": rows, "met": _keep_ratio(rows),
        "asked": {"ratio_interval_95_upper": _MOST_RATIO, "cases": 10},
    }  # fmt: skip
    return {**record, "path": str(write_record(name, record, folder))}


def _keep_ratio(rows: Sequence[Mapping[str, Any]]) -> bool:
    return all(row["ratio_interval_95"][1] <= _MOST_RATIO for row in rows)


def _against_all(rank: int, case: Case, rounds: int) -> dict[str, Any]:
    """The chosen plan and the best of all others: a plan against itself would show the machine's noise."""
    network, setting = case.network(), case.setting()
    cluster, devices = case.cluster()
    spec = spec_of(network)
    outcome = automatic_plan(network, setting, cluster, devices, remeasure=True, budget_s=40)
    chosen = parse_plan(outcome["plan"]).resolve(spec, cluster)
    plans = _all_plans(spec, devices)
    first = time_plans(network, plans, setting, rounds=8, budget_s=60)
    others = [name for name in plans if not _are_the_same(plans[name], chosen)]
    best = sorted(others, key=lambda name: statistics.median(first[name]))[:_RIVALS]
    again = {"auto": chosen, **{name: plans[name] for name in best}}
    samples = time_plans(network, again, setting, rounds=rounds, budget_s=90)
    rival = min(best, key=lambda name: statistics.median(samples[name]))
    ratio, low, high = median_interval([a / b for a, b in zip(samples["auto"], samples[rival], strict=True)])
    fastest = chosen if ratio <= 1 else plans[rival]
    return {
        "num_plans": len(plans),
        "auto": format_plan(chosen),
        "best_of_the_others": rival,
        "ratio_median": ratio,
        "ratio_interval_95": [low, high],
        "data_parallel_is_best": all(placed.split == "sample" for placed in fastest.blocks.values()),
        "audit": outcome["plans"],
        "samples_s": samples,
        "first_medians_s": {name: statistics.median(values) for name, values in first.items()},
    }


def _are_the_same(one: Plan, other: Plan) -> bool:
    return (one.data, one.branch, one.blocks) == (other.data, other.branch, other.blocks)


def _against_data(rank: int, case: Case, rounds: int) -> dict[str, Any]:
    network, setting = case.network(), case.setting()
    cluster, devices = case.cluster()
    spec = spec_of(network)
    outcome = automatic_plan(network, setting, cluster, devices, remeasure=True, budget_s=30)
    chosen = parse_plan(outcome["plan"]).resolve(spec, cluster)
    found = {"auto": outcome["plan"], "audit": outcome["plans"]}
    if chosen.branch == 1:  # the same plan
        return {**found, "auto": "data parallelism", "ratio_median": 1.0, "ratio_interval_95": [1.0, 1.0]}
    plans = {"auto": chosen, "data": data_plan(spec, devices)}
    samples = time_plans(network, plans, setting, rounds=rounds, budget_s=60)
    ratio, low, high = median_interval([a / b for a, b in zip(samples["auto"], samples["data"], strict=True)])
    return {**found, "ratio_median": ratio, "ratio_interval_95": [low, high], "samples_s": samples}


def _all_plans(spec: ModelSpec, devices: Sequence[str]) -> dict[str, Plan]:
    """Every split of every block, even counts, and stem and head with their neighbours."""
    world, plans = len(devices), {"data": data_plan(spec, devices)}
    for branch in [m for m in range(2, world + 1) if world % m == 0]:
        for splits in product("sb", repeat=len(spec.blocks)):
            if "b" not in splits:
                continue
            placed = {
                block.name: BranchPlacement.even(block.num_branches, branch) if split == "b" else SAMPLE
                for block, split in zip(spec.blocks, splits, strict=True)
            }
            plans[f"{world // branch}x{branch} {''.join(splits)}"] = plan_on(devices, branch, placed)
    return plans
