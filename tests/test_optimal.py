"""The search: as good as the best of all plans, fast on large clusters, honest where it cannot be exact."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from time import process_time

import pytest
from plan_cases import every_plan, random_request

from anabranch.schedulers import (
    BlockSpec,
    BranchPlacement,
    Cluster,
    Device,
    ModelSpec,
    PlanError,
    PlanFile,
    Request,
    schedule,
)
from anabranch.schedulers.costs import Batch, Costs, Curve, ElementCost, ModelCosts, Work
from anabranch.schedulers.optimal import candidates
from anabranch.schedulers.plan_file import BlockRule
from anabranch.schedulers.predict import Predictor
from anabranch.schedulers.search import search
from anabranch.schedulers.synthetic import synthetic_request

NUM_INSTANCES = 500
MOST_PLANS = 150


def limited(request: Request, needs: dict[str, list[float]], random: Random) -> Request:
    """Memory limits that some plans keep and others do not."""
    devices = tuple(
        replace(device, memory_bytes=int(random.choice(needs[str(device)])) + 1)
        for device in request.cluster.devices
    )
    cluster = request.cluster
    return replace(request, cluster=Cluster(devices, cluster.local, cluster.across))


def check(seed: int) -> tuple[int, str]:
    """Compares one instance, with and without memory limits; how many plans there are, and what happened."""
    random = Random(seed)
    request = random_request(random)
    plans = list(every_plan(request))
    while len(plans) > MOST_PLANS:
        request = random_request(random)
        plans = list(every_plan(request))
    assert request.costs is not None
    assert request.batch is not None
    predict = Predictor(request.model, request.cluster, request.costs, request.batch)
    timed = [(predict(plan), plan) for plan in plans]
    result = search(request)
    result.plan.check(request.model)
    best = min(prediction.total_s for prediction, _ in timed)
    assert result.gap == 0.0
    assert result.prediction.total_s == pytest.approx(best, rel=1e-9), (seed, "without limits")
    needs: dict[str, list[float]] = {}
    used = []
    for prediction, plan in timed:
        assert plan.devices is not None
        names = [name for row in plan.devices for name in row]
        used.append(dict(zip(names, prediction.memory_bytes, strict=True)))
        for name, num_bytes in used[-1].items():
            needs.setdefault(name, []).append(num_bytes)
    request = limited(request, needs, random)
    room = {str(device): device.memory_bytes or 0 for device in request.cluster.devices}
    fitting = [
        prediction.total_s
        for (prediction, _), each in zip(timed, used, strict=True)
        if all(num_bytes <= room[name] for name, num_bytes in each.items())
    ]
    if not fitting:
        with pytest.raises(PlanError, match=r"lacks [\d,]+ bytes on [ab]:\d"):
            search(request)
        return len(plans), "nothing fits"
    fitted = search(request)
    assert fitted.gap == 0.0
    assert fitted.prediction.total_s == pytest.approx(min(fitting), rel=1e-9), (seed, "with limits")
    return len(plans), "binding" if min(fitting) > best * (1 + 1e-9) else "loose"


@pytest.mark.parametrize("part", range(4))
def test_optimal_is_the_best_of_all_plans(part: int) -> None:
    """Unequal devices, overlap, shared parameters, binding memory limits: never worse than brute force."""
    seen: dict[str, int] = {}
    for seed in range(part, NUM_INSTANCES, 4):
        _, what = check(seed)
        seen[what] = seen.get(what, 0) + 1
    assert seen["binding"] > NUM_INSTANCES // 16


def slowness() -> float:
    """How many times half a second, which a quiet core takes for this, it takes here; at least 1."""
    start = process_time()
    assert len({i: str(i) for i in range(2_000_000)}) == 2_000_000
    return max(1.0, (process_time() - start) / 0.5)


@pytest.mark.parametrize(
    ("num_blocks", "num_devices", "most_s"), [(1000, 64, 1.0), (200, 4096, 10.0)], ids=["deep", "wide"]
)
def test_search_time(num_blocks: int, num_devices: int, most_s: float) -> None:
    """Large networks and clusters in the time asked for (four times that here: machines are shared, and slower)."""
    start = process_time()
    free = search(synthetic_request(num_blocks, num_devices))
    assert process_time() - start < 4 * most_s * slowness()
    assert free.gap == 0.0
    assert {placement.split for placement in free.plan.blocks.values()} == {"sample", "branch"}
    limit = int(0.8 * max(free.prediction.memory_bytes))
    start = process_time()
    bound = search(synthetic_request(num_blocks, num_devices, memory_bytes=limit))
    assert process_time() - start < 4 * most_s * slowness()
    assert max(bound.prediction.memory_bytes) <= limit
    assert bound.prediction.total_s >= free.prediction.total_s
    assert 0.0 <= bound.gap < 0.05
    assert bound.notes


def unequal_request(num_branches: int, speeds: tuple[float, ...]) -> Request:
    """One block of branches of many lengths, free exchanges."""
    random = Random(num_branches)

    def work(seconds: float) -> Work:
        return Work(Curve.line(0.0, seconds), Curve.line(0.0, 2 * seconds))

    lengths = [random.randint(1, 30) for _ in range(num_branches)]
    block = ElementCost(work(0.0), tuple(map(work, lengths)), unequal=True, input_bytes=1e9)
    edge = ElementCost(work(0.0), input_bytes=1e9)
    costs = Costs((ModelCosts("cpu", {"stem": edge, "b": block, "head": edge}),))
    devices = tuple(Device("a", i, "cpu", None, speed) for i, speed in enumerate(speeds))
    links = random_request(Random(0)).cluster
    cluster = Cluster(devices, links.local, links.across)
    return Request(
        ModelSpec((BlockSpec("b", num_branches),)), cluster, (1, len(speeds)), costs=costs, batch=Batch(1, 1)
    )


def test_unequal_branches_to_unequal_devices() -> None:
    """Beyond what is listed: branch and bound meets the bound of a perfect division, or says that it gave up."""
    result = search(unequal_request(12, (1.0, 0.5, 1.0)))
    assert result.gap == 0.0
    many = search(unequal_request(60, (1.0, 0.5, 0.7, 0.3, 0.9)))
    assert many.notes == ("unequal branches were placed longest first: too many to place exactly",)
    assert 0.0 < many.gap < 0.5
    held = result.plan.blocks["b"].branches
    assert held is not None
    assert sum(map(len, held)) == 12


def test_more_branches_to_faster_devices() -> None:
    """Half the speed, about half the branches."""
    random = Random(5)
    request = random_request(random)
    one = [Work(Curve.line(0.0, j), Curve.line(0.0, 2.0 * j)) for j in range(1, 7)]
    edge = ElementCost(Work())
    block = ElementCost(Work(), tuple(one))
    costs = Costs((ModelCosts("cpu", {"stem": edge, "b": block, "head": edge}),))
    cluster = Cluster(
        (Device("a", 0, "cpu"), Device("a", 1, "cpu", None, 0.5)),
        request.cluster.local,
        request.cluster.across,
    )
    model = ModelSpec((BlockSpec("b", 6),))
    file = PlanFile(1, 2, (BlockRule("stem", "replicated"), BlockRule("head", "replicated")))
    plan = schedule("optimal", model, cluster, partial=file, costs=costs, batch=Batch(2, 1))
    assert plan.blocks["b"] == BranchPlacement.from_counts([4, 2])
    assert schedule("greedy", model, cluster, partial=file).blocks["b"].branches is not None
    assert [len(held) for held in schedule("greedy", model, cluster).blocks["b"].branches or ()] == [4, 2]


def test_candidates() -> None:
    """Distinct, best first, the optimum first and data parallelism among them."""
    for seed in range(20):
        request = random_request(Random(seed))
        found = candidates(request, 4)
        seconds = [candidate.prediction.total_s for candidate in found]
        assert seconds == sorted(seconds)
        assert seconds[0] == pytest.approx(search(request).prediction.total_s, rel=1e-9)
        assert 1 <= len(found) <= 4
        plain = [c for c in found if c.plan.branch == 1 and c.plan.samples is None]
        assert plain
        assert len({repr(replace(candidate.plan, scheduler=None)) for candidate in found}) == len(found)


def test_no_costs() -> None:
    """The search says what it lacks."""
    request = replace(random_request(Random(0)), costs=None)
    with pytest.raises(PlanError, match="the search needs costs and a batch size"):
        search(request)
