"""A worker at half the speed: the plan gives it fewer branches, and the step takes what was predicted of the optimum.

`python -m anabranch.benchmarks slow-worker`.
"""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from anabranch.benchmarks.plan_case import Case, batch_of, measure_cases, multi
from anabranch.benchmarks.record import RESULTS, write_record
from anabranch.runtime.audit import time_plans
from anabranch.runtime.intervals import median_interval
from anabranch.runtime.measure import measure_costs, with_speeds
from anabranch.runtime.model_spec import spec_of
from anabranch.schedulers import Plan, format_plan, schedule
from anabranch.schedulers.predict import predict
from anabranch.schedulers.registry import make_request
from anabranch.schedulers.search import search

_CASES = (multi(14, 6, 32, groups=6), multi(8, 6, 64, width=2, groups=4))
_ASKED = 0.10
_TURNS = 6  # of measuring costs and timing plans


class HalfSpeed(TorchDispatchMode):
    """Every kernel takes twice the processor time: it is kept busy as long again. Exchanges are not kernels."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's has no types

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        begun = time.thread_time()
        result = function(*args, **(kwargs or {}))
        ended = time.thread_time()
        while time.thread_time() - ended < ended - begun:
            pass
        return result


def run(*, rounds: int = 48, folder: Path = RESULTS, resume: bool = False) -> dict[str, Any]:
    """Worker 1 of two is slowed; the branch split is asked for (`mesh`), and compared with the even one."""
    rows = measure_cases("slow_worker", _CASES, 2, rounds, folder, resume, _measured)
    record = {
        "workers": 2, "rounds": rounds, "cases": rows, "asked": {"absolute_error": _ASKED},
        "met": all(row["has_fewer_branches"] and abs(row["error"]) <= _ASKED for row in rows),
    }  # fmt: skip
    return {**record, "path": str(write_record("slow_worker", record, folder))}


def _measured(rank: int, case: Case, rounds: int) -> dict[str, Any]:
    """Costs are measured, and the plans timed, in turn, each turn's figures compared with each other.

    The machine drifts by more than the error that is looked for.
    """
    network, setting = case.network(), case.setting()
    cluster, devices = case.cluster()
    spec, batch = spec_of(network), batch_of(setting)
    plans: dict[str, Plan] = {}
    predicted: dict[str, list[float]] = {"auto": [], "even": []}
    turns: dict[str, list[list[float]]] = {"auto": [], "even": []}
    with ExitStack() as stack:
        if rank == 1:
            stack.enter_context(HalfSpeed())
        for _ in range(_TURNS):
            costs = measure_costs(network, setting, cluster, devices, budget_s=90 / _TURNS)
            unequal = with_speeds(cluster, devices, costs)
            if not plans:
                request = make_request(spec, unequal, mesh=(1, 2), costs=costs, batch=batch)
                plans = {"auto": search(request).plan, "even": schedule("even", spec, cluster, mesh=(1, 2))}
            for name, plan in plans.items():
                predicted[name].append(predict(plan, spec, unequal, costs, batch).total_s)
            timed = time_plans(network, plans, setting, rounds=max(rounds // _TURNS, 2), budget_s=60 / _TURNS)
            for name, seconds in timed.items():
                turns[name].append(seconds)
    medians = {name: [statistics.median(turn) for turn in found] for name, found in turns.items()}
    ratios = [a / b for a, b in zip(medians["auto"], predicted["auto"], strict=True)]
    split = [placed for placed in plans["auto"].blocks.values() if placed.split == "branch"]
    held = [sum(len((placed.branches or ())[r]) for placed in split) for r in range(2)]
    samples = {name: [seconds for turn in found for seconds in turn] for name, found in turns.items()}
    gain, low, high = median_interval([a / b for a, b in zip(samples["even"], samples["auto"], strict=True)])
    return {
        "auto": format_plan(plans["auto"]),
        "branches_by_rank": held,
        "has_fewer_branches": held[1] < held[0],
        "error": statistics.median(ratios) - 1,
        "predictions_s": predicted,
        "measured_s": medians,
        "even_over_auto": gain,
        "even_over_auto_interval_95": [low, high],
        "samples_s": turns,
    }
