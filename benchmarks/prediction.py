"""The simulator against reality: predicted step times of plans that no trial of the measurement ran."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from anabranch.benchmarks.plan_case import Case, batch_of, data_plan, measure_cases, multi, plan_on
from anabranch.benchmarks.record import RESULTS, write_record
from anabranch.runtime.audit import time_plans
from anabranch.runtime.measure import measure_costs
from anabranch.runtime.model_spec import spec_of
from anabranch.schedulers import BranchPlacement, ModelSpec, Plan, format_plan
from anabranch.schedulers.plan import SAMPLE
from anabranch.schedulers.predict import Predictor

CASES = (
    multi(14, 4, 32),
    multi(8, 6, 64),
    multi(14, 3, 16, width=2),
    multi(8, 4, 32, block="basic", preact="shared", width=2),
)

# by workers, as asked: mean error at most, pairs in order at least
_ERROR = {2: (0.10, 0.95), 4: (0.20, 0.90)}
_PLANS = 12  # of a case, at most
_TURNS = 3  # of measuring costs and timing plans


def run(
    *, workers: int = 2, rounds: int = 16, folder: Path = RESULTS, resume: bool = False
) -> dict[str, Any]:
    """Predicted against measured step times of many plans, none of them used for calibration.

    Costs are measured, and the plans timed, in turn: the machine drifts by more than the error that is looked for.
    """
    cases = measure_cases(f"prediction_{workers}", CASES, workers, rounds, folder, resume, _measured)
    figures = _figures(cases)
    if workers in _ERROR:
        most, least = _ERROR[workers]
        figures["asked"] = {
            "mean_absolute_error": most,
            "pairs_in_order": least,
            "pairs_apart": 60,
            "spread": 1.5,
        }
        figures["met"] = (
            figures["mean_absolute_error"] <= most
            and (figures["pairs_in_order"] or 0) >= least
            and figures["pairs_apart"] >= 60
            and max(figures["spread"]) >= 1.5
        )
    record = {"workers": workers, "rounds": rounds, **figures, "cases": cases}
    return {**record, "path": str(write_record(f"prediction_{workers}", record, folder))}


def _measured(rank: int, case: Case, rounds: int) -> dict[str, Any]:
    network, setting = case.network(), case.setting()
    cluster, devices = case.cluster()
    spec = spec_of(network)
    # The measurement ran data parallelism itself: how far that is off is the machine's drift, not the model's.
    plans = {**_some_plans(spec, devices), "data": data_plan(spec, devices)}
    predicted: dict[str, list[float]] = {name: [] for name in plans}
    samples: dict[str, list[float]] = {name: [] for name in plans}
    for _ in range(_TURNS):
        costs = measure_costs(network, setting, cluster, devices, budget_s=60 / _TURNS)
        predict = Predictor(spec, cluster, costs, batch_of(setting))
        timed = time_plans(network, plans, setting, rounds=max(rounds // _TURNS, 2), budget_s=90 / _TURNS)
        for name, plan in plans.items():
            predicted[name].append(predict(plan).total_s)
            samples[name] += timed[name]
    rows = {
        name: {
            "plan": format_plan(plan),
            "predicted_s": statistics.median(predicted[name]),
            "measured_s": statistics.median(samples[name]),
            "predictions_s": predicted[name],
            "samples_s": samples[name],
        }
        for name, plan in plans.items()
    }
    reference, data = rows.pop("data"), samples["data"]
    each = len(data) // _TURNS
    turns = [statistics.median(data[turn * each : (turn + 1) * each]) for turn in range(_TURNS)]
    return {"plans": [*rows.values()], "reference": {**reference, "turns_s": [*predicted["data"], *turns]}}


def _figures(cases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    errors = [row["predicted_s"] / row["measured_s"] - 1 for case in cases for row in case["plans"]]
    spreads = [
        max(row["measured_s"] for row in case["plans"]) / min(row["measured_s"] for row in case["plans"])
        for case in cases
    ]
    apart, right = _pairs(cases, "samples_s", "predictions_s")
    return {
        "num_plans": len(errors),
        "mean_absolute_error": statistics.mean(map(abs, errors)),
        "spread": spreads,
        "pairs_apart": apart,
        "pairs_in_order": right / apart if apart else None,
        "pairs_apart_and_in_order_by_medians": _pairs(cases, "measured_s", "predicted_s"),
    }


def _pairs(cases: Sequence[Mapping[str, Any]], measured: str, predicted: str) -> tuple[int, int]:
    """Pairs of plans more than 10 % apart, and those of them that were predicted in order.

    Plans are compared by their ratio within each round, and within each measuring of costs: what drifts hits both.
    """

    def ratio(a: float | Sequence[float], b: Any) -> float:
        pairs = zip([a] if isinstance(a, float) else a, [b] if isinstance(b, float) else b, strict=True)
        return float(statistics.median(x / y for x, y in pairs))

    apart = right = 0
    for case in cases:
        for a, b in combinations(case["plans"], 2):
            found = ratio(a[measured], b[measured])
            if max(found, 1 / found) > 1.1:
                apart += 1
                right += (found > 1) == (ratio(a[predicted], b[predicted]) > 1)
    return apart, right


def _some_plans(spec: ModelSpec, devices: Sequence[str]) -> dict[str, Plan]:
    """Plans that no trial of the measurement ran: mixed ones, and counts that differ from block to block."""
    plans: dict[str, Plan] = {}
    world, stages = len(devices), sorted({block.name.partition(".")[0] for block in spec.blocks})
    for branch in [m for m in range(2, world + 1) if world % m == 0]:
        for chosen in [some for num in range(1, len(stages) + 1) for some in combinations(stages, num)]:
            for lead in (0, 1, 2):
                placed = {
                    block.name: _led(block.num_branches, branch, lead)
                    if block.name.partition(".")[0] in chosen
                    else SAMPLE
                    for block in spec.blocks
                }
                label = f"{world // branch}x{branch} {'+'.join(chosen)}" + f" led by {lead}" * bool(lead)
                plan = plan_on(devices, branch, placed)
                if plan not in plans.values():  # fewer branches than that to lead by
                    plans[label] = plan
    # from the last, all stages on one group: the slowest is among them
    some = [*reversed(plans)][:: -(-len(plans) // _PLANS)]
    return {name: plans[name] for name in some}


def _led(num_branches: int, ranks: int, lead: int) -> BranchPlacement:
    """Evenly but for `lead` branches that the first rank has instead of the last."""
    counts = [num_branches // ranks + (r < num_branches % ranks) for r in range(ranks)]
    lead = min(lead, counts[-1])
    counts[0], counts[-1] = counts[0] + lead, counts[-1] - lead
    return BranchPlacement.from_counts(counts)
