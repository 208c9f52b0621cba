"""The scheduler "optimal", and the best few plans for an audit."""

from __future__ import annotations

from dataclasses import dataclass, replace

from anabranch.schedulers.cluster import Cluster
from anabranch.schedulers.costs import Costs, Curve
from anabranch.schedulers.data import data as data_parallel
from anabranch.schedulers.plan import Plan
from anabranch.schedulers.predict import Prediction, Predictor, fits
from anabranch.schedulers.registry import register
from anabranch.schedulers.request import Request
from anabranch.schedulers.search import Search, search

_BELIEFS = (1.0, 0.6, 1.6)  # links as measured, and faster or slower than that


@dataclass(frozen=True)
class Candidate:
    """keeps_request: false of plain data parallelism where the request asks for something else."""

    plan: Plan
    prediction: Prediction
    keeps_request: bool = True


@register("optimal")
def optimal(request: Request) -> Plan:
    """The best plan under `predict`; see `search`."""
    return search(request).plan


def candidates(request: Request, num: int) -> list[Candidate]:
    """The best `num` distinct plans found, best first, plain data parallelism always among them.

    Looked at are the best plan of every mesh, device order (that of workers who stand) and sample weights, and those
    that would be best if links were faster or slower than measured. Of plans that differ in the weights of samples
    alone it is the best: there would be room for no others. Raises PlanError as `search` does.
    """
    if request.costs is None or request.batch is None:
        search(request)  # says what is missing
    found: dict[str, Candidate] = {}
    costs, batch = request.costs, request.batch
    assert costs is not None
    assert batch is not None
    predict = Predictor(request.model, request.cluster, costs, batch)
    for scale in _BELIEFS:
        run = Search(replace(request, costs=_scaled(costs, scale), cluster=_slower(request, scale)))
        run.run(leave_out=False)
        for _, plan in run.found:
            found.setdefault(_content(plan), Candidate(plan, predict(plan)))
    plain = Request(request.model, request.cluster, costs=costs, batch=batch, standing=request.standing)
    baseline = data_parallel(plain)
    is_open = request.mesh is None and not (request.fixed or request.edges or request.pins)
    keeps = _content(baseline) in found or (is_open and request.devices is None and request.samples is None)
    prediction = predict(baseline)
    keeps &= all(
        fits(request.cluster.by_name[row[0]], num_bytes)
        for row, num_bytes in zip(baseline.devices or (), prediction.memory_bytes, strict=True)
    )
    base = found.pop(_content(baseline), Candidate(baseline, prediction, keeps))
    distinct: dict[str, Candidate] = {}
    for candidate in sorted(found.values(), key=lambda candidate: candidate.prediction.total_s):
        distinct.setdefault(_content(replace(candidate.plan, samples=None)), candidate)
    ordered = [*distinct.values()]
    return sorted([*ordered[: num - 1], base], key=lambda candidate: candidate.prediction.total_s)


def _content(plan: Plan) -> str:
    return repr(replace(plan, scheduler=None))


def _scaled(costs: Costs, scale: float) -> Costs:
    groups = (
        replace(group, seconds=Curve(tuple((x, y * scale) for x, y in group.seconds.points)))
        for group in costs.groups
    )
    return replace(costs, groups=tuple(groups))


def _slower(request: Request, scale: float) -> Cluster:
    links = (
        link
        and replace(
            link, latency_s=link.latency_s * scale, bandwidth_bytes_per_s=link.bandwidth_bytes_per_s / scale
        )
        for link in (request.cluster.local, request.cluster.across)
    )
    local, across = links
    return replace(request.cluster, local=local, across=across)
