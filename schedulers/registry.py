"""Schedulers by name: ours, those registered in code, and those of installed packages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from anabranch.schedulers.cluster import Cluster
from anabranch.schedulers.costs import Batch, Costs
from anabranch.schedulers.errors import PlanError
from anabranch.schedulers.model_spec import ModelSpec
from anabranch.schedulers.pins import check_pins
from anabranch.schedulers.plan import Plan, check_mesh, mesh_name
from anabranch.schedulers.request import Request
from anabranch.schedulers.wording import did_you_mean, quote

if TYPE_CHECKING:
    from anabranch.schedulers.plan_file import PlanFile

Scheduler = Callable[[Request], Plan]

_GROUP = "anabranch.schedulers"  # of entry points
_registered: dict[str, Scheduler] = {}


def register(name: str) -> Callable[[Scheduler], Scheduler]:
    """Decorator: make a function a scheduler under a name. Raises PlanError when the name is taken."""

    def add(scheduler: Scheduler) -> Scheduler:
        if name in _registered:
            raise PlanError(f"a scheduler {quote(name)} is registered already: choose another name")
        _registered[name] = scheduler
        return scheduler

    return add


def schedulers() -> list[str]:
    """The names `schedule` knows, sorted; entry points are listed without importing them."""
    return sorted({*_registered, *entry_points(group=_GROUP).names})


def schedule(
    name: str,
    model: ModelSpec,
    cluster: Cluster,
    *,
    mesh: tuple[int, int] | None = None,
    partial: PlanFile | None = None,
    costs: Costs | None = None,
    batch: Batch | None = None,
) -> Plan:
    """The plan of a scheduler, checked.

    mesh: (data, branch); None: the plan file's, else the scheduler's choice. partial: a plan file whose
    rules, devices, samples and pins the scheduler must keep. costs, batch: for those that predict.
    Raises PlanError when the name is unknown, the cluster too small, or the scheduler's plan breaks a rule
    (the message names the scheduler).
    """
    scheduler = _find(name)
    request = make_request(model, cluster, mesh=mesh, partial=partial, costs=costs, batch=batch)
    plan = scheduler(request)
    try:
        if not isinstance(plan, Plan):
            raise PlanError(f"it is a {type(plan).__name__}, not a Plan")
        _check_answer(plan, request)
        if plan.devices is None:
            plan = replace(plan, devices=request.place(plan.data, plan.branch))
        plan.check(model)
        cluster.check(plan.devices or ())
    except PlanError as error:
        raise PlanError(f"the scheduler {quote(name)} returned a wrong plan: {error}") from None
    check_pins(plan, request)
    return replace(plan, scheduler=name)


def make_request(
    model: ModelSpec,
    cluster: Cluster,
    *,
    mesh: tuple[int, int] | None = None,
    partial: PlanFile | None = None,
    costs: Costs | None = None,
    batch: Batch | None = None,
) -> Request:
    """What `schedule` asks a scheduler. Raises PlanError when the cluster is too small or has not its devices."""
    request = Request(model, cluster, mesh, costs=costs, batch=batch)
    if partial is not None:
        partial = partial.on(cluster)
        partial.check_mesh(mesh)
        fixed, edges = partial.placements(model)
        request = replace(
            request,
            mesh=partial.mesh,
            fixed=fixed,
            edges=edges,
            devices=partial.devices,
            samples=partial.samples,
            pins=partial.pinned(model, cluster),
        )
    if request.devices is not None:
        cluster.check(request.devices)
    elif request.mesh is not None:
        check_mesh(*request.mesh)
        cluster.place(*request.mesh)
    return request


def _check_answer(plan: Plan, request: Request) -> None:
    """The plan keeps what was settled."""
    check_mesh(plan.data, plan.branch)
    if request.mesh not in (None, (plan.data, plan.branch)):
        raise PlanError(
            f"its mesh is {mesh_name(plan.data, plan.branch)}, {mesh_name(*request.mesh)} was asked for"
        )
    edges = {"stem": plan.stem, "head": plan.head}
    for settled, answer in ((request.fixed, plan.blocks), (request.edges, edges)):
        for name, placement in settled.items():
            if answer.get(name) != placement:
                raise PlanError(
                    f"it has {name} as {answer.get(name)}, the plan file as {placement}: keep the file's"
                )
    if request.devices not in (None, plan.devices) and plan.devices is not None:
        raise PlanError(f"its devices are {plan.devices}, the plan file's {request.devices}: keep the file's")
    if request.samples not in (None, plan.samples):
        raise PlanError(f"its samples are {plan.samples}, the plan file's {request.samples}: keep the file's")


def _find(name: str) -> Scheduler:
    found = [_registered[name]] if name in _registered else []
    points = entry_points(group=_GROUP, name=name)
    for point in points:
        try:
            loaded = point.load()
        except (ImportError, AttributeError) as error:
            raise PlanError(
                f"the scheduler {quote(name)} (entry point {point.value}) cannot be imported: {error}"
            ) from error
        if loaded not in found:
            found.append(loaded)
    if not found:
        known = schedulers()
        raise PlanError(
            f"no scheduler is named {quote(name)}{did_you_mean(name, known)}; there are {', '.join(known)}. "
            f"Others register with an entry point in the group {_GROUP}"
        )
    if len(found) > 1:
        raise PlanError(
            f"{len(found)} schedulers are named {quote(name)} (entry points "
            f"{', '.join(point.value for point in points)}): uninstall or rename one"
        )
    return found[0]
