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

from anabranch.benchmarks.plan_case import Case, multi
from anabranch.benchmarks.record import RESULTS, write_record
from anabranch.runtime.audit import automatic_plan, time_plans
from anabranch.runtime.intervals import median_interval
from anabranch.runtime.model_spec import spec_of
from anabranch.schedulers import format_plan, parse_plan, schedule

_CASES = (multi(14, 6, 32, groups=6), multi(8, 6, 64, width=2, groups=4))
_ASKED = 0.10


class HalfSpeed(TorchDispatchMode):
    """Every kernel takes twice the processor time: it is kept busy as long again. Exchanges are not kernels."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        begun = time.thread_time()
        result = function(*args, **(kwargs or {}))
        ended = time.thread_time()
        while time.thread_time() - ended < ended - begun:
            pass
        return result


def run(*, rounds: int = 30, folder: Path = RESULTS) -> dict[str, Any]:
    """Worker 1 of two is slowed; the branch split is asked for (`mesh`), and compared with the even one."""
    rows = [{"case": str(case), **case.run(2, _measured, rounds)} for case in _CASES]
    record = {
        "rounds": rounds, "cases": rows, "asked": {"absolute_error": _ASKED},
        "met": all(row["has_fewer_branches"] and abs(row["error"]) <= _ASKED for row in rows),
    }  # fmt: skip
    return {**record, "path": str(write_record("slow_worker", record, folder))}


def _measured(rank: int, case: Case, rounds: int) -> dict[str, Any]:
    network, setting = case.network(), case.setting()
    cluster, devices = case.cluster()
    with ExitStack() as stack:
        if rank == 1:
            stack.enter_context(HalfSpeed())  # type: ignore[no-untyped-call]
        outcome = automatic_plan(
            network, setting, cluster, devices, mesh=(1, 2), remeasure=True, budget_s=40, audit=False
        )
        spec = spec_of(network)
        plans = {
            "auto": parse_plan(outcome["plan"]).resolve(spec, cluster),
            "even": schedule("even", spec, cluster, mesh=(1, 2)),
        }
        samples = time_plans(network, plans, setting, rounds=rounds, budget_s=90)
    (best,) = [row for row in outcome["plans"] if row["name"] == outcome["chosen"]]
    measured = statistics.median(samples["auto"])
    split = [placed for placed in plans["auto"].blocks.values() if placed.split == "branch"]
    held = [sum(len((placed.branches or ())[r]) for placed in split) for r in range(2)]
    gain, low, high = median_interval([a / b for a, b in zip(samples["even"], samples["auto"], strict=True)])
    return {
        "auto": format_plan(plans["auto"]),
        "branches_by_rank": held,
        "has_fewer_branches": held[1] < held[0],
        "predicted_s": best["predicted_step_s"],
        "measured_s": measured,
        "error": measured / best["predicted_step_s"] - 1,
        "even_over_auto": gain,
        "even_over_auto_interval_95": [low, high],
        "samples_s": samples,
    }
