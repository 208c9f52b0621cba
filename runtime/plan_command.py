"""`anabranch plan`: the plan for a network on the cluster that stands, or on machines that are not here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from anabranch.runtime.config import Config
from anabranch.runtime.config_rules import is_plan_file
from anabranch.runtime.driver import Driver
from anabranch.runtime.errors import ConfigError
from anabranch.runtime.plan_report import print_candidates, print_explanation, print_picture, print_traffic
from anabranch.runtime.progress import RunProgress, print_placement
from anabranch.schedulers import Cluster, ModelSpec, Plan, PlanFile, format_plan, parse_plan, read_plan
from anabranch.schedulers.cluster_file import parse_devices, read_cluster
from anabranch.schedulers.cost_file import read_costs
from anabranch.schedulers.costs import PREDICTED, Batch, Costs
from anabranch.schedulers.predict import Prediction, predict
from anabranch.schedulers.registry import make_request, schedule


def plan_here(config: Config, explained: bool, output: Path, console: Console) -> dict[str, Any] | None:
    """Measures on the workers of the cluster (or takes kept costs), searches, times the best plans."""
    from anabranch.runtime.measure import with_speeds

    if not is_plan_file(config.mesh.plan):
        config = replace(config, mesh=replace(config.mesh, plan="auto"))
    with Driver(config, console) as driver:
        if driver.plan is None:
            raise ConfigError(
                "plan measures through Ray: without it (torchrun, srun) use `train --plan auto`"
            )
        outcome = driver.find_plan() if driver.is_auto else None
        if outcome is None:
            print_placement(console, driver.plan, driver.model)
            console.print("one worker, or a complete plan file: there is nothing to choose", highlight=False)
            _write(output, driver.plan, _partial(config), console)
            return {"plan": format_plan(driver.plan), "predicted_step_s": None, "measured_step_s": None,
                    "data_parallel_step_s": None, "search_s": 0.0, "memory_bytes": None}  # fmt: skip
        cluster, costs = driver.cluster, driver.costs
        assert cluster is not None, "with a plan"
        assert costs is not None, "with an automatic one"
        by_rank = [name for row in driver.plan.devices or () for name in row]
        cluster = with_speeds(cluster, by_rank, costs)
        train = driver.config.train
        batch = Batch(train.batch_size, train.bn_batch_size, train.accumulation)
        rows = {row["name"]: row for row in outcome["plans"]}
        rows |= _references(rows, driver.model, cluster, costs, batch)
        outcome["plans"] = list(rows.values())
        print_candidates(console, outcome)
        chosen = predict(driver.plan, driver.model, cluster, costs, batch)
        result = _shown(console, driver.plan, driver.model, cluster, costs, batch, chosen, explained)
        _write(output, driver.plan, _partial(config), console)
        mine, data = rows[outcome["chosen"]], rows["data"]
        return {
            "plan": outcome["plan"],
            "predicted_step_s": mine["predicted_step_s"],
            "measured_step_s": mine.get("measured_step_s"),
            "data_parallel_step_s": data.get("measured_step_s", data["predicted_step_s"]),
            "search_s": outcome["search_s"],
            "memory_bytes": mine["memory_bytes"],
            "label": outcome["label"],
            "gap": outcome["gap"],
            "costs": outcome["costs"],
            "plans": outcome["plans"],
            **result,
        }


def plan_elsewhere(
    config: Config,
    devices: str,
    interconnect: str,
    cluster_file: str,
    explained: bool,
    output: Path,
    console: Console,
) -> dict[str, Any]:
    """Searches for machines that are not here: from a cost file, else from data sheets (labelled so). No Ray."""
    from anabranch.blocks.convert import prepare
    from anabranch.runtime.assemble import bn_batch_size, make_data, make_network, with_memory
    from anabranch.runtime.config_rules import mesh_axes
    from anabranch.runtime.model_shape import model_shape, shared_bytes
    from anabranch.runtime.model_spec import spec_of
    from anabranch.schedulers.analytic import analytic_costs
    from anabranch.schedulers.search import search

    cluster = read_cluster(cluster_file) if cluster_file else parse_devices(devices, interconnect)
    cluster = with_memory(cluster, config.mesh.memory_gb)

    def told(phase: str, done: int = 0, total: int = 0) -> None:
        progress.watch([{"phase": phase, "step": done, "num_steps": total} if total else {"phase": phase}])

    with RunProgress(console, "planning") as progress:
        told("loading")
        data = make_data(config)
        network = prepare(make_network(config, data))
        data.close()
        spec = spec_of(network)
        told("counting")
        kinds = tuple(sorted({device.kind for device in cluster.devices}))
        if config.mesh.costs:
            costs = read_costs(config.mesh.costs)
            costs.check(spec, frozenset(kinds), config.mesh.costs)
        else:
            precision: Literal["fp32", "half"] = "half" if config.train.precision == "bf16" else "fp32"
            shapes = model_shape(network, spec, config.train.precision, half_wire=config.mesh.wire == "bf16")
            costs = analytic_costs(
                shapes, kinds, shared=shared_bytes(network, spec), precision=precision,
                fused=config.mesh.execution != "looped",
            )  # fmt: skip
        train = config.train
        group = bn_batch_size(config, len(cluster.devices))
        batch = Batch(train.batch_size, group, train.accumulation)
        partial = _partial(config)
        request = make_request(
            spec, cluster, mesh=mesh_axes(config.mesh.shape), partial=partial, costs=costs, batch=batch
        )
        found = search(request, lambda done, total: told("searching", done, total))
        told("predicting")
        rows: dict[str, dict[str, Any]] = {"best": row("best", found.plan, found.prediction)}
        rows |= _references(rows, spec, cluster, costs, batch)
    notes = [*found.notes]
    if costs.label == PREDICTED and _num_groups(batch) < len(cluster.devices):
        notes.append(
            f"BN groups of {group} samples lie on several devices where samples are split: exchanging their statistics "
            "is not counted"
        )
    outcome = {"label": costs.label, "chosen": "best", "plans": list(rows.values()), "gap": found.gap,
               "search_s": found.seconds, "notes": notes}  # fmt: skip
    print_candidates(console, outcome)
    shown = _shown(console, found.plan, spec, cluster, costs, batch, found.prediction, explained)
    _write(output, found.plan, partial, console)
    return {
        "plan": format_plan(replace(found.plan, scheduler=None)),
        "predicted_step_s": found.prediction.total_s,
        "measured_step_s": None,
        "data_parallel_step_s": rows["data"]["predicted_step_s"] if "data" in rows else None,
        "search_s": found.seconds,
        "memory_bytes": list(found.prediction.memory_bytes),
        "label": costs.label,
        "gap": found.gap,
        "plans": list(rows.values()),
        **shown,
    }


def _num_groups(batch: Batch) -> int:
    """BN groups of a step's largest micro-batch."""
    num_groups = -(-batch.num_samples // batch.bn_batch_size)
    return -(-num_groups // min(batch.accumulation, num_groups))


def row(name: str, plan: Plan, prediction: Prediction) -> dict[str, Any]:
    """A plan with its prediction, as `plan --json` lists it."""
    return {
        "name": name,
        "plan": format_plan(replace(plan, scheduler=None)),
        "predicted_step_s": prediction.total_s,
        "exposed_s": prediction.exposed_s,
        "wait_s": max(prediction.wait_s),
        "memory_bytes": list(prediction.memory_bytes),
    }


def _references(
    rows: dict[str, dict[str, Any]], spec: ModelSpec, cluster: Cluster, costs: Costs, batch: Batch
) -> dict[str, dict[str, Any]]:
    """All samples split, all branches split in one group, and the paper's even split of two by two."""
    num = len(cluster.devices)
    wanted = {"data": ("data", (num, 1)), "all-branch": ("even", (1, num))}
    if num % 2 == 0 and num > 2:
        wanted["even"] = ("even", (num // 2, 2))
    found = {}
    for name, (scheduler, mesh) in wanted.items():
        if name not in rows:
            plan = schedule(scheduler, spec, cluster, mesh=mesh)
            found[name] = row(name, plan, predict(plan, spec, cluster, costs, batch))
    return found


def _shown(
    console: Console,
    plan: Plan,
    spec: ModelSpec,
    cluster: Cluster,
    costs: Costs,
    batch: Batch,
    prediction: Prediction,
    explained: bool,
) -> dict[str, Any]:
    from anabranch.schedulers.explain import explain

    if plan.world_size <= 16:
        print_placement(console, plan, spec)
    print_picture(console, plan, spec)
    console.print(
        f"predicted ({prediction.label}): compute {_ms(max(prediction.compute_s))}, exposed communication "
        f"{_ms(prediction.exposed_s)}, longest wait {_ms(max(prediction.wait_s))}, hidden {_ms(prediction.hidden_s)}",
        highlight=False,
    )
    traffic = [dict(one._asdict()) for one in prediction.traffic]
    print_traffic(console, traffic)
    stages: Sequence[Any] = []
    if explained:
        stages = explain(plan, make_request(spec, cluster, costs=costs, batch=batch))
        print_explanation(console, stages, batch)
    return {"traffic": traffic, "explain": [asdict(stage) for stage in stages]}


def _partial(config: Config) -> PlanFile | None:
    """The plan file that the search began with."""
    from anabranch.runtime.assemble import auto_partial

    return read_plan(Path(config.mesh.plan)) if is_plan_file(config.mesh.plan) else auto_partial(config)[1]


def _write(output: Path, plan: Plan, partial: PlanFile | None, console: Console) -> None:
    """The plan file, which must read back; with the pins that the plan keeps."""
    asked = partial is not None and partial.asks_devices
    text = format_plan(replace(plan, scheduler=None), partial.pins if partial else (), filled_in=not asked)
    parse_plan(text)
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{output} cannot be written: {error.strerror}; give another --output") from error
    console.print(f"written: {output}", highlight=False, soft_wrap=True)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f} ms"
