"""The plan chosen automatically: predicted, then timed against plain data parallelism on the workers themselves.

    costs ──► search ──► candidates ─┐
                  plain data parallelism ─┴─► interleaved rounds of real steps ──► the plan

A candidate is taken only where the 95 % interval of its paired step-time ratio to data parallelism lies below 1.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Any

import torch.distributed as dist
from torch import nn

from anabranch.runtime.intervals import median_interval
from anabranch.runtime.machine import cache_folder, keep
from anabranch.runtime.measure import cost_key, measure_costs, with_speeds, workers_key
from anabranch.runtime.mesh import make_mesh
from anabranch.runtime.model_spec import spec_of
from anabranch.runtime.plan_step import PlanStep, StepSetting
from anabranch.runtime.process_group import broadcast_json, gather_json
from anabranch.schedulers import Cluster, Plan, PlanError, PlanFile, format_plan
from anabranch.schedulers.cost_file import format_costs, parse_costs, read_costs
from anabranch.schedulers.costs import Batch, Costs
from anabranch.schedulers.optimal import Candidate, candidates
from anabranch.schedulers.registry import make_request
from anabranch.schedulers.search import search

OnStage = Callable[[str, int, int], None]
DATA = "data"
_CANDIDATES, _ROUNDS, _LEAST_ROUNDS, _AUDIT_S = 3, 24, 8, 30.0


def automatic_plan(
    network: nn.Module,
    setting: StepSetting,
    cluster: Cluster,
    devices: Sequence[str],
    *,
    mesh: tuple[int, int] | None = None,
    partial: PlanFile | None = None,
    budget_s: float = 60.0,
    costs_file: str = "",
    remeasure: bool = False,
    audit: bool = True,
    on_stage: OnStage = lambda stage, done, total: None,
) -> dict[str, Any]:
    """The best plan for a one-device network (prepared, kept as it is) on the ranks that stand. Collective.

    devices: by rank. mesh, partial: what the user settled. costs_file: to read; "" looks in the cache, then measures.
    Returns plain data, the same on all ranks: plan (TOML), chosen, search_s, gap, notes, costs (path, "" where what was
    measured could not be kept), costs_json (what that file holds), and plans: of each candidate name, plan,
    predicted_step_s, memory_bytes by rank, measured_step_s, samples_s, ratio and interval_95 against data parallelism,
    error (predicted ÷ measured - 1).

    Raises PlanError where no plan is possible, or the cost file is another network's or hardware's.
    """
    config, spec = setting.config, spec_of(network)
    key = {**cost_key(network, config), **workers_key(cluster, devices, next(network.parameters()).device)}
    costs, path = _costs(network, setting, cluster, devices, key, costs_file, remeasure, budget_s, on_stage)
    cluster = with_speeds(cluster, devices, costs)
    train = config.train
    batch = Batch(len(setting.x), train.bn_batch_size, train.accumulation)
    request = make_request(spec, cluster, mesh=mesh, partial=partial, costs=costs, batch=batch)
    request = replace(request, standing=tuple(devices))  # plans in another order could not be run
    found = search(request, lambda done, total: on_stage("searching", done, total))
    rivals = _rivals(candidates(request, _CANDIDATES + 1), devices)
    samples: dict[str, list[float]] = {}
    if audit and len(rivals) > 1:
        plans = {name: candidate.plan for name, candidate in rivals.items()}
        samples = time_plans(network, plans, setting, on_round=lambda i, n: on_stage("timing plans", i, n))
    chosen = _chosen(samples, rivals) if samples else next(n for n, c in rivals.items() if c.keeps_request)
    rows = [_row(name, c.plan, c.prediction, samples) for name, c in rivals.items()]
    return {
        "plan": format_plan(replace(rivals[chosen].plan, scheduler=None)),
        "chosen": chosen,
        "search_s": found.seconds,
        "gap": found.gap,
        "notes": list(found.notes),
        "label": costs.label,
        "costs": path,
        "costs_json": format_costs(costs),
        "plans": rows,
    }


def time_plans(
    network: nn.Module,
    plans: Mapping[str, Plan],
    setting: StepSetting,
    *,
    rounds: int = _ROUNDS,
    budget_s: float = _AUDIT_S,
    on_round: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[float]]:
    """Seconds a step of each plan, one figure a round, the slowest rank's; all plans run in every round. Collective.

    Fewer rounds where they do not fit the budget, but at least eight.
    """
    world = next(iter(plans.values())).world_size
    device_type = next(network.parameters()).device.type
    meshes = {
        plan.branch: make_mesh(world // plan.branch, plan.branch, device_type) for plan in plans.values()
    }
    steps = {
        name: PlanStep(copy.deepcopy(network), plan, meshes[plan.branch], setting)
        for name, plan in plans.items()
    }
    for step in steps.values():
        step()
        step()
    samples: dict[str, list[float]] = {name: [] for name in plans}
    device, started = next(network.parameters()).device, time.perf_counter()
    for index in range(rounds):
        on_round(index, rounds)
        names = list(steps) if index % 2 == 0 else list(reversed(steps))
        mine = []
        for name in names:
            dist.barrier()
            mine.append(steps[name].timed())
        everyone = gather_json([mine, time.perf_counter() - started], device)
        for place, name in enumerate(names):
            samples[name].append(max(of_rank[0][place] for of_rank in everyone))
        if index + 1 >= _LEAST_ROUNDS and everyone[0][1] > budget_s:
            break
    return samples


def _chosen(samples: Mapping[str, Sequence[float]], rivals: Mapping[str, Candidate]) -> str:
    """The fastest whose interval against data parallelism lies below 1, else that.

    Where the request (pins, a mesh, memory) leaves no data parallelism, the fastest that keeps it.
    """
    others = [name for name, candidate in rivals.items() if name != DATA and candidate.keeps_request]
    if DATA in rivals and rivals[DATA].keeps_request:
        others = [name for name in others if _ratio(samples, name)[2] < 1.0]
    return min(others, key=lambda name: median(samples[name])) if others else DATA


def _ratio(samples: Mapping[str, Sequence[float]], name: str) -> tuple[float, float, float]:
    return median_interval([a / b for a, b in zip(samples[name], samples[DATA], strict=True)])


def _rivals(found: Sequence[Candidate], devices: Sequence[str]) -> dict[str, Candidate]:
    """Candidates that run on these ranks as they stand, by name, best first; data parallelism is "data"."""
    rivals: dict[str, Candidate] = {}
    for candidate in found:
        plan = candidate.plan
        if [name for row in plan.devices or () for name in row] != list(devices):
            continue
        mesh = f"{plan.data}x{plan.branch}"
        same = sum(name.partition(" ")[0] == mesh for name in rivals)
        is_plain = plan.branch == 1 and plan.samples is None  # with weights of samples it is no baseline
        name = DATA if is_plain else mesh + (f" #{same + 1}" if same else "")
        if name == DATA and not candidate.keeps_request and len(found) > 1:
            continue  # too large, or not what was asked for: not even timed
        rivals.setdefault(name, candidate)
    if not any(candidate.keeps_request for candidate in rivals.values()):
        raise PlanError(
            f"the plan file's devices are not in the order in which the workers stand, {', '.join(devices)}: "
            "start them in its order, or leave devices out"
        )
    return rivals


def _row(name: str, plan: Plan, prediction: Any, samples: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": name,
        "plan": format_plan(replace(plan, scheduler=None)),
        "predicted_step_s": prediction.total_s,
        "exposed_s": prediction.exposed_s,
        "memory_bytes": list(prediction.memory_bytes),
    }
    if name in samples:
        measured = median(samples[name])
        row |= {
            "measured_step_s": measured,
            "error": prediction.total_s / measured - 1,
            "samples_s": list(samples[name]),
        }
        if DATA in samples:
            ratio, low, high = _ratio(samples, name)
            row |= {"ratio": ratio, "interval_95": [low, high]}
    return row


def _costs(
    network: nn.Module,
    setting: StepSetting,
    cluster: Cluster,
    devices: Sequence[str],
    key: Mapping[str, str],
    costs_file: str,
    remeasure: bool,
    budget_s: float,
    on_stage: OnStage,
) -> tuple[Costs, str]:
    """The costs and the file that holds them: the user's, the cache's, or newly measured. Agreed on by all ranks.

    "" where what was measured could not be kept.
    """
    device = next(network.parameters()).device
    if costs_file and not remeasure:
        costs = read_costs(costs_file)
        costs.check_key(key, costs_file)
        return costs, costs_file
    digest = sha256(repr(sorted(key.items())).encode()).hexdigest()[:16]
    path = cache_folder() / f"costs-{digest}.json"
    leads = dist.get_rank() == 0
    if not remeasure:
        kept = broadcast_json(_kept(path) if leads else None, device)
        if kept is not None:
            return parse_costs(kept, path), str(path)
    costs = measure_costs(
        network, setting, cluster, devices, budget_s=budget_s,
        on_trial=lambda done, total: on_stage("measuring", done, total),
    )  # fmt: skip
    is_kept = broadcast_json(leads and keep(path, format_costs(costs).encode()), device)
    return costs, str(path) if is_kept else ""


def _kept(path: Path) -> str | None:
    """The text of a cost file, if there is one that can be read."""
    try:
        text = path.read_text(encoding="utf-8")
        parse_costs(text, path)
    except (OSError, ValueError):
        return None
    return text
