"""The objective against timelines computed by hand; every number below is worked out in the comments."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest

from anabranch.schedulers import (
    BlockSpec,
    BranchPlacement,
    Cluster,
    Device,
    Link,
    ModelSpec,
    Plan,
    PlanError,
)
from anabranch.schedulers.cost_file import read_costs, write_costs
from anabranch.schedulers.costs import (
    Batch,
    Costs,
    Curve,
    ElementCost,
    GroupCost,
    ModelCosts,
    ParameterBytes,
    Work,
)
from anabranch.schedulers.predict import Prediction, predict
from anabranch.schedulers.synthetic import synthetic_request

SAMPLE = BranchPlacement("sample")
SPLIT = BranchPlacement.from_counts([1, 1])


def work(forward: float, backward: float, saved: float = 0.0, peak: float = 0.0) -> Work:
    """By sample."""
    return Work(*(Curve.line(0.0, slope) for slope in (forward, backward, saved, peak)))


MODEL = ModelSpec((BlockSpec("b", 2),))
ELEMENTS = {
    "stem": ElementCost(work(1, 2, 7, 1), parameters=ParameterBytes(100)),
    "b": ElementCost(
        work(0.5, 1, 3, 2),
        (work(1, 2, 5, 1), work(2, 4, 10, 3)),
        sum_bytes=10,
        hidden_bytes=20,
        input_bytes=5,
        parameters=ParameterBytes(50, (30, 30)),
    ),
    "head": ElementCost(work(1, 1, 1, 0), input_bytes=5, parameters=ParameterBytes(200)),
}
COSTS = Costs((ModelCosts("cpu", ELEMENTS, step_s=0.5, optimizer_s_per_byte=0.01, parameter_copies=4),))
BATCH = Batch(4, 2, bucket_bytes=1)  # every element's gradients leave alone


def cluster(*speeds: float, occupancy: float = 0.0) -> Cluster:
    devices = tuple(Device("a", i, "cpu", None, speed) for i, speed in enumerate(speeds))
    return Cluster(devices, Link(1.0, 100.0, occupancy))


def branch_plan(stem: str = "sample", head: str = "sample") -> Plan:
    return Plan(1, 2, {"b": SPLIT}, stem, head, (("a:0", "a:1"),))  # type: ignore[arg-type]


DATA_PLAN = Plan(2, 1, {"b": SAMPLE}, "sample", "sample", (("a:0",), ("a:1",)))


def of(plan: Plan, where: Cluster, batch: Batch = BATCH, costs: Costs = COSTS) -> Prediction:
    return predict(plan, MODEL, where, costs, batch)


def test_branches_between_samples() -> None:
    """Stem and head on own samples (2), the block by branch on the group's (4), n = 2: all-reduce 2 + B/100."""
    found = of(branch_plan(), cluster(1.0, 1.0))
    forward = 2 + (1 + 20 / 200) + 4 * 1.5 + (2 + 40 / 100) + 2  # stem, gather, block, sums, head
    backward = 2 + (1 + 20 / 200) + 4 * 3 + (2 + 80 / 100) + 4  # head, its scatter, block, hidden, stem
    # world: head 200 B: 4 s, hidden behind the block's 12; block 50 of its bucket's 110 B: 50/110 · 3.1 s
    # (its branches: no other replica), hidden behind the stem's 4; stem 100 B: 3 s, hidden by nothing
    backlog = 3.0
    optimizer = (200 + 50 + 30 + 100) * 0.01
    assert found.total_s == pytest.approx(forward + backward + backlog + optimizer + 0.5)
    assert found.exposed_s == pytest.approx(1.1 + 2.4 + 1.1 + 2.8 + 3.0)
    assert found.hidden_s == pytest.approx(4 + 50 / 110 * 3.1)
    assert found.wait_s == (0.0, 0.0)
    # always: 4 copies of 380 B, and 350 in buckets (its branch nobody else has); saved: stem 7·2, block (3 + 5)·4
    # and what it gathers, 5·4; most while the head runs backward, with its gradients
    assert found.memory_bytes == pytest.approx((4 * 380 + 350 + 14 + 32 + 20 + 200,) * 2)
    traffic = {(t.axis, t.collective): t.num_bytes for t in found.traffic}
    assert traffic == {
        ("branch", "all_gather"): 40,
        ("branch", "all_reduce"): 120,
        ("world", "all_reduce"): 350,
    }


@pytest.mark.parametrize("num_sums", [1, 2])
def test_a_fused_edge(num_sums: int) -> None:
    """Of the last sum each rank receives its own rows only: 1 + B/200 for an all-reduce's 2 + B/100."""
    model = ModelSpec((BlockSpec("b", 2, num_sums, ends_in_sum=True),))
    plain = ModelSpec((BlockSpec("b", 2, num_sums),))
    where, each = cluster(1.0, 1.0), 40 / num_sums  # sums of 10 B a sample
    found, before = (predict(branch_plan(), m, where, COSTS, BATCH) for m in (model, plain))
    assert before.total_s - found.total_s == pytest.approx(1 + each / 200)
    assert before.exposed_s - found.exposed_s == pytest.approx(1 + each / 200)
    traffic = {t.collective: t.num_bytes for t in found.traffic if t.axis == "branch"}
    assert traffic == {"all_gather": 40, "reduce_scatter": each, "all_reduce": 80 + 40 - each}
    assert found.memory_bytes == before.memory_bytes
    head = branch_plan(head="replicated")  # all rows go on
    assert predict(head, model, where, COSTS, BATCH) == predict(head, plain, where, COSTS, BATCH)
    twice = replace(BATCH, accumulation=2, bn_batch_size=1)  # sums of half as many bytes, twice
    a, b = (predict(branch_plan(), m, where, COSTS, twice).total_s for m in (model, plain))
    assert b - a == pytest.approx(2 * (1 + each / 400))


def test_edges_with_the_group() -> None:
    """Replicated stem and head: no transitions, all on 4 samples."""
    found = of(branch_plan("replicated", "replicated"), cluster(1.0, 1.0))
    assert found.total_s == pytest.approx((4 + 6 + 2.4 + 4) + (4 + 12 + 2.8 + 8) + 3.0 + 3.8 + 0.5)


def test_the_slower_device_sets_the_pace() -> None:
    """Half the speed: twice the seconds; the other waits for it in every element."""
    found = of(DATA_PLAN, cluster(1.0, 0.5))
    # own 2 samples at speed 1: stem 2 + 4, block (0.5 + 2)·2 + (1 + 4)·2, head 2 + 2
    compute = 6 + 15 + 4
    # q: head 4 → block drains 20 → 3.1 (110 B) → stem drains 8 → 3
    optimizer = 2 * 410 * 0.01
    assert found.total_s == pytest.approx(2 * compute + 3 + optimizer + 0.5)
    assert found.wait_s == pytest.approx((compute, 0.0))
    waits = [span for span in found.timeline(0) if span.kind == "wait"]
    assert [(s.element, s.phase, s.end_s - s.start_s) for s in waits[:3]] == [
        ("stem", "forward", 2.0),
        ("b", "forward", 5.0),
        ("head", "forward", 2.0),
    ]
    for rank in (0, 1):
        spans = found.timeline(rank)
        assert spans[0].start_s == 0.0
        assert all(a.end_s == b.start_s for a, b in itertools.pairwise(spans))
        assert spans[-1].end_s == pytest.approx(found.total_s)


def test_the_optimizer_by_element() -> None:
    """A rank without branches has less to update; the step waits for the one that holds most."""
    plan = replace(branch_plan(), blocks={"b": BranchPlacement.from_counts([2, 0])})
    found, even = of(plan, cluster(1.0, 1.0)), of(branch_plan(), cluster(1.0, 1.0))
    # the block: branches 2·4 and 4·4 instead of 4 and 8; 30 B more to update
    assert found.total_s == pytest.approx(even.total_s + 4 + 8 + 0.3)
    assert found.wait_s == pytest.approx((0.0, 8.0 + 16.0))
    assert found.memory_bytes[0] - found.memory_bytes[1] == pytest.approx(4 * 60 + 10 * 4)


def test_overlap_takes_from_compute() -> None:
    """occupancy: that part of each transfer is paid at once, the rest drains."""
    free, busy = (of(DATA_PLAN, cluster(1.0, 1.0, occupancy=o)) for o in (0.0, 0.25))
    # all transfers: 4 + 3.1 + 3 s; of the last, 3 s or 2.25 s are left at the end
    assert busy.total_s - free.total_s == pytest.approx(0.25 * 10.1 + 0.75 * 3 - 3)


def test_buckets_wait_to_be_full() -> None:
    """In one bucket (410 B) nothing leaves before the last gradient: nothing is hidden, one latency."""
    one = of(DATA_PLAN, cluster(1.0, 1.0), replace(BATCH, bucket_bytes=1000))
    assert one.hidden_s == pytest.approx(0.0)
    assert one.exposed_s == pytest.approx(2 + 4.1)
    two = of(DATA_PLAN, cluster(1.0, 1.0), replace(BATCH, bucket_bytes=1000, first_bucket_bytes=200))
    assert (two.hidden_s, two.exposed_s) == pytest.approx((4.0, 2 + 2.1))


def test_accumulation() -> None:
    """Two micro-batches of one group each: half the samples twice; only the last hides gradients."""
    batch = replace(BATCH, bn_batch_size=1, num_samples=4, accumulation=2)
    found = of(DATA_PLAN, cluster(1.0, 1.0), batch)
    # a micro-batch: own 1 sample: 12.5 s; twice. q: 4 → 0 (5) + 3.1 → 1.1 (2) + 3
    assert found.total_s == pytest.approx(2 * 12.5 + (3.1 - 2 + 3) + 4.1 + 0.5)


def test_memory_follows_the_backward() -> None:
    """Activations go while gradients come: how long these stay decides where the peak is."""
    always = 4 * 410 + 410
    early = of(DATA_PLAN, cluster(1.0, 1.0))  # fullest while the head runs: stem 7·2, block (3 + 10)·2, 200 B
    assert early.memory_bytes[0] == pytest.approx(always + 14 + 26 + 200)
    late = of(
        DATA_PLAN, cluster(1.0, 1.0), replace(BATCH, bucket_bytes=1000)
    )  # all leave together: at the stem's end
    assert late.memory_bytes[0] == pytest.approx(always + 200 + 110 + 100)
    batch = replace(BATCH, bn_batch_size=1, accumulation=2)  # an earlier micro-batch's are there all the time
    assert of(DATA_PLAN, cluster(1.0, 1.0), batch).memory_bytes[0] == pytest.approx(always + 410 + 7 + 13 + 1)


def test_owned_gradients_go_over_the_data_axis() -> None:
    """2 × 2: branches are summed over 2 ranks, what is replicated over 4."""
    where = cluster(1.0, 1.0, 1.0, 1.0)
    plan = replace(branch_plan(), data=2, devices=(("a:0", "a:1"), ("a:2", "a:3")))
    found = of(plan, where, replace(BATCH, num_samples=8))
    traffic = {(t.axis, t.collective): t.num_bytes for t in found.traffic}
    assert (traffic["data", "all_reduce"], traffic["world", "all_reduce"]) == (30, 350)
    # of 4 ranks: 4 + 1.5 B/100; the stem's 100 B are not hidden
    two = of(branch_plan(), cluster(1.0, 1.0))
    assert found.total_s - two.total_s == pytest.approx((4 + 1.5) - 3)


def test_measured_groups_come_first() -> None:
    """A measured curve is used for its size; other sizes follow the link, or the nearest measured."""
    group = GroupCost("all_reduce", 2, False, Curve.line(1.0, 0.0), occupancy=1.0)
    costs = replace(COSTS, groups=(group,))
    found = of(DATA_PLAN, cluster(1.0, 1.0), costs=costs)
    assert found.exposed_s == pytest.approx(3.0)  # three buckets of a second each, none hidden
    bare = Cluster(tuple(Device("a", i, "cpu") for i in range(4)))
    plan = replace(DATA_PLAN, data=4, devices=tuple((f"a:{i}",) for i in range(4)))
    assert of(plan, bare, replace(BATCH, num_samples=8), costs).exposed_s == pytest.approx(3 * 1.5)
    with pytest.raises(PlanError, match="no cost of an exchange of 2 ranks inside a host: measure it"):
        of(DATA_PLAN, Cluster(bare.devices[:2]))


def test_hosts_share_their_way_out() -> None:
    """Two branch groups across the same two hosts: each has half the bandwidth."""
    devices = tuple(Device(host, i, "cpu") for host in "ab" for i in range(2))
    where = Cluster(devices, Link(0.0, 1e9), Link(1.0, 100.0))
    inside = replace(branch_plan(), data=2, devices=(("a:0", "a:1"), ("b:0", "b:1")))
    across = replace(inside, devices=(("a:0", "b:0"), ("a:1", "b:1")))
    batch = replace(BATCH, num_samples=8)
    seconds = [of(plan, where, batch).phases[1].after_s for plan in (inside, across)]
    assert seconds == pytest.approx([40 / 1e9, 2 + 2 * 40 / 100])


def test_costs_of_something_else(tmp_path: Path) -> None:
    """Another network's or device's costs are refused by name; a torn file too."""
    with pytest.raises(
        PlanError, match=r"no cost of c, which the network has: they are the costs of another"
    ):
        predict(DATA_PLAN, ModelSpec((BlockSpec("b", 2), BlockSpec("c", 2))), cluster(1.0), COSTS, BATCH)
    with pytest.raises(PlanError, match="b has costs of 2 branches, the network's has 3"):
        predict(DATA_PLAN, ModelSpec((BlockSpec("b", 3),)), cluster(1.0), COSTS, BATCH)
    with pytest.raises(PlanError, match="measured on cpu, the cluster has NVIDIA H200: measure there"):
        predict(DATA_PLAN, MODEL, Cluster((Device("a", 0, "NVIDIA H200"),)), COSTS, BATCH)
    with pytest.raises(PlanError, match=r'c.json: measured with torch = "unknown", this run has "2.13"'):
        COSTS.check_key({"torch": "2.13"}, "c.json")
    path = tmp_path / "c.json"
    with pytest.raises(PlanError, match="cannot read the cost file"):
        read_costs(path)
    path.write_text("{")
    with pytest.raises(PlanError, match="not a cost file"):
        read_costs(path)
    write_costs(COSTS, path)
    content = json.loads(path.read_text())
    del content["models"][0]["alike"]
    path.write_text(json.dumps(content))
    with pytest.raises(PlanError, match="a damaged cost file"):
        read_costs(path)


def test_cost_files(tmp_path: Path) -> None:
    """Written and read back as they were; alike blocks once."""
    costs = synthetic_request(1000, 8).costs
    assert costs is not None
    costs = replace(costs, groups=(GroupCost("all_gather", 4, True, Curve.line(0.1, 2.0), 0.5),))
    write_costs(costs, tmp_path / "c.json")
    assert read_costs(tmp_path / "c.json") == costs
    assert (tmp_path / "c.json").stat().st_size < 200_000


def test_curves() -> None:
    """Straight between points, further at the ends, never below 0."""
    curve = Curve(((1.0, 1.0), (2.0, 3.0), (4.0, 3.0)))
    assert [curve(x) for x in (0, 1, 1.5, 3, 9)] == [0.0, 1.0, 2.0, 3.0, 3.0]
    assert (Curve()(5), Curve(((2.0, 7.0),))(5)) == (0.0, 7.0)
    with pytest.raises(PlanError, match="give each x once, ascending"):
        Curve(((2.0, 1.0), (1.0, 1.0)))
