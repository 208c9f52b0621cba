"""`anabranch profile`: that its figures are true, add up, and are written as documented."""

from __future__ import annotations

import gzip
import io
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from profile_ranks import SLOW_S, SMALL, profile_on_rank
from ranks import run_ranks
from rich.console import Console
from torch import distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from anabranch.benchmarks.two_hosts import two_hosts, why_not
from anabranch.blocks import build
from anabranch.cluster import WorkerContext
from anabranch.runtime import profile_command
from anabranch.runtime.assemble import make_data, make_network
from anabranch.runtime.cli import parse
from anabranch.runtime.config import Config
from anabranch.runtime.errors import ConfigError
from anabranch.runtime.measure import SPEEDS
from anabranch.runtime.profile_advice import predicted, profile_costs, suggestion
from anabranch.runtime.profile_build import build_profile
from anabranch.runtime.profile_clock import ClockOffset, aligned, clock_offset
from anabranch.runtime.profile_command import profile_rank
from anabranch.runtime.profile_file import read_profile, write_profile
from anabranch.runtime.profile_flops import ElementFlops
from anabranch.runtime.profile_kernels import MOST_OPS, Running, kernels_of, shortened
from anabranch.runtime.profile_merge import Merged
from anabranch.runtime.profile_steps import RankSteps, profile_steps
from anabranch.runtime.profile_table import lines, print_profile
from anabranch.runtime.profile_trace import trace_events, write_trace
from anabranch.runtime.recorder import Recorder, Span
from anabranch.runtime.report import write_report
from anabranch.runtime.trainer import Trainer
from anabranch.schedulers import BlockSpec, BranchPlacement, Cluster, Device, ModelSpec, Plan, PlanError
from anabranch.schedulers.cluster import Link
from anabranch.schedulers.cost_file import write_costs
from anabranch.schedulers.costs import Batch
from anabranch.schedulers.predict import predict

SLOW = "stage2.block1"
BATCH = Batch(32, 16)
Profiled = tuple[list[RankSteps], Plan, ModelSpec, dict[str, Any]]


@pytest.fixture(scope="module")
def slowed() -> Profiled:
    """Two branch ranks; the last sleeps 20 ms in one block's branches, and its clock is 5 s ahead.

    The processes call themselves `here`; where they are is the plan's word.
    """
    for _ in range(12):  # another process on the machine delays a rank too: then once more
        ranks, plan, model = run_ranks(2, profile_on_rank, (1, 2), 24, SLOW, 5.0, (("a:3", "a:1"),))[0]
        profile = build_profile(ranks, plan, model, BATCH)
        (worst, *_), wait_s = profile["stragglers"] or [{"rank": -1}], waits_at(SLOW, profile)
        if worst["rank"] == 1 and abs(wait_s[0] - SLOW_S) <= 0.002 and wait_s[1] <= 0.002:
            break
    return ranks, plan, model, profile


def profiled(mesh: tuple[int, int], steps: int, slow: str) -> dict[str, Any]:
    """A profile of two ranks."""
    ranks, plan, model = run_ranks(2, profile_on_rank, mesh, steps, slow)[0]
    return build_profile(ranks, plan, model, BATCH)


def waits_at(name: str, profile: dict[str, Any]) -> list[float]:
    """What each rank waits for the others in a block, in half of the steps."""
    (block,) = [e for e in profile["elements"] if e["name"] == name]
    return [row["wait_s"]["p50"] for row in block["ranks"]]


def test_a_slow_rank_is_named_with_its_block_and_its_delay_is_the_others_wait(slowed: Profiled) -> None:
    *_, profile = slowed
    worst = profile["stragglers"][0]
    assert (worst["rank"], worst["element"], worst["part"]) == (1, SLOW, "forward")
    assert (worst["branches"], worst["waiting"]) == ([2, 3], 0)
    wait_s = waits_at(SLOW, profile)
    assert abs(wait_s[0] - SLOW_S) <= 0.002
    assert wait_s[1] <= 0.002


def test_ranks_are_called_as_in_the_plan(slowed: Profiled) -> None:
    """On Ray each process sees one GPU and numbers it 0."""
    ranks, *_, profile = slowed
    assert [(rank["host"], rank["device"]) for rank in profile["ranks"]] == [("a", "cpu:3"), ("a", "cpu:1")]
    worst = profile["stragglers"][0]
    assert (worst["host"], worst["device"]) == ("a", "cpu:1")
    named = [e["args"]["name"] for e in trace_events(ranks) if e["name"] == "process_name"]
    assert named == ["rank 0 (a cpu:3)", "rank 1 (a cpu:1)"]


def test_moving_branches_off_the_slow_rank_is_suggested(slowed: Profiled) -> None:
    *_, profile = slowed
    suggestion = profile["suggestion"]
    assert {move["source"] for move in suggestion["moves"]} == {1}
    assert SLOW in {move["block"] for move in suggestion["moves"]}
    assert suggestion["predicted_s"] < suggestion["now_s"]
    assert "from rank 1 to rank 0: predicted −" in suggestion["text"]


def two_ranks() -> tuple[list[RankSteps], Plan, ModelSpec]:
    """Synthetic: rank 0 takes twice as long as rank 1 in each of four blocks, for as many branches."""
    plan, model = synthetic_plan(2, 4, branches=4)
    return synthetic_ranks(5, 2, 4), replace(plan, devices=(("a:3", "a:1"),)), model


def two_devices(*speeds: float, kinds: tuple[str, str] = ("A", "B")) -> Cluster:
    """Those of `two_ranks`, in order of the ranks, each of a kind of its own."""
    both = zip((3, 1), kinds, speeds or (1.0, 1.0), strict=True)
    devices = tuple(Device("a", index, kind, speed=speed) for index, kind, speed in both)
    return Cluster(devices, Link(0, 1e12), Link(0, 1e12))


def test_the_suggested_moves_are_predicted_to_take_what_is_printed() -> None:
    """The moves made by hand, and the plan then asked of the simulator; so with the plan as it stands."""
    ranks, plan, model = two_ranks()
    profile = build_profile(ranks, plan, model, BATCH)
    suggestion = profile["suggestion"]
    costs = profile_costs(profile, plan, two_devices(), model, BATCH)
    blocks = dict(plan.blocks)
    for move in suggestion["moves"]:
        held = [set(of_rank) for of_rank in blocks[move["block"]].branches or ()]
        held[move["source"]].remove(move["branch"])
        held[move["target"]].add(move["branch"])
        blocks[move["block"]] = BranchPlacement("branch", tuple(tuple(sorted(each)) for each in held))
    before, after = (
        predict(replace(plan, blocks=b), model, two_devices(), costs, BATCH).total_s
        for b in (plan.blocks, blocks)
    )
    assert suggestion["now_s"] == pytest.approx(before)
    assert suggestion["predicted_s"] == pytest.approx(after)
    assert suggestion["text"].endswith(f"predicted −{100 * (1 - after / before):.0f} %")


def test_of_unequal_branches_the_right_one_is_moved() -> None:
    """Rank 0's second branch takes three times as long as its first: moved, it would only make rank 1 the slow one."""
    ranks, plan, model = two_ranks()
    timed = ([["block1", 0, 1.0], ["block1", 1, 3.0]], [["block1", 2, 0.5], ["block1", 3, 0.5]])
    ranks = [
        replace(rank, facts={**rank.facts, "branches": own}) for rank, own in zip(ranks, timed, strict=True)
    ]
    profile = build_profile(ranks, plan, model, BATCH)
    worst = {one["element"]: one["branch"] for one in profile["stragglers"] if one["rank"] == 0}
    assert worst == {"block0": None, "block1": 1, "block2": None, "block3": None}
    found = profile["suggestion"]
    assert {move["block"]: move["branch"] for move in found["moves"]} == {
        "block0": 1, "block1": 0, "block2": 1, "block3": 1
    }  # fmt: skip
    assert found["text"].startswith("move the quickest branch of * from rank 0 to rank 1: predicted −")
    alone = build_profile(ranks, plan, model, BATCH)
    for one in alone["elements"][1:-1]:  # only block1 is waited for
        if one["name"] != "block1":
            one["ranks"][0] |= {key: one["ranks"][1][key] for key in ("forward_s", "backward_s")}
    alone["stragglers"] = [one for one in alone["stragglers"] if one["element"] == "block1"]
    (move,) = (suggestion(alone, plan, model, BATCH) or {})["moves"]
    assert (move["block"], move["branch"], move["source"], move["target"]) == ("block1", 0, 0, 1)


def test_a_prediction_is_of_the_devices_kinds_and_speeds() -> None:
    ranks, plan, model = two_ranks()
    costs = profile_costs(build_profile(ranks, plan, model, BATCH), plan, two_devices(), model, BATCH)
    for cluster, expected in (
        (two_devices(), 0.1),
        (two_devices(1.0, 0.25), 0.2),  # rank 1's 0.05 s, four times as long
        (two_devices(kinds=("B", "B")), 0.05),
    ):
        found = build_profile(ranks, plan, model, BATCH, costs, cluster)["prediction"]
        assert found["elements"]["block1"][0] == pytest.approx(expected)
    profile = build_profile(ranks, plan, model, BATCH)
    with pytest.raises(PlanError, match='the costs are for A, B, a device is "C": measure on the devices'):
        predicted(profile, plan, model, BATCH, costs, two_devices(kinds=("A", "C")))
    alone = replace(costs, models=costs.models[1:])  # no other kind can be meant
    found = predicted(profile, plan, model, BATCH, alone, two_devices(kinds=("torch's word", "Ray's")))
    assert found["elements"]["block1"][0] == pytest.approx(0.05)


def test_a_cost_file_is_read_with_its_kinds_and_speeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks, plan, model = two_ranks()
    costs = profile_costs(build_profile(ranks, plan, model, BATCH), plan, two_devices(), model, BATCH)
    file = tmp_path / "costs.json"
    speeds = [replace(each, key={SPEEDS: "1 0.25"}) for each in costs.models]  # as measured, by rank
    write_costs(replace(costs, models=tuple(speeds)), file)
    called = list[int]()

    def steps(trainer: Trainer, num: int) -> list[RankSteps]:
        called.append(num)
        return ranks

    monkeypatch.setattr(profile_command, "profile_steps", steps)

    def found(cluster: Cluster) -> dict[str, Any]:
        context = WorkerContext(0, 2, 0, "here", "cpu", 1, "", "gloo")
        trainer: Any = SimpleNamespace(plan=plan)
        told = profile_rank(
            trainer, model, Config.from_dict(SMALL), 24, str(file), tmp_path, context, cluster
        )
        return dict(told["profile"]["prediction"])

    assert found(two_devices())["elements"]["block1"][0] == pytest.approx(0.2)
    assert called == [24]
    with pytest.raises(PlanError, match='a device is "C"'):
        found(two_devices(kinds=("A", "C")))
    assert called == [24]  # told before anything is measured


def test_the_parts_of_a_step_add_up_on_every_rank(slowed: Profiled) -> None:
    ranks, plan, _, profile = slowed
    for rank in profile["ranks"]:
        assert abs(rank["unattributed"]) <= 0.02
    merged = Merged(ranks, plan.branch)
    for rank in range(2):
        parts = merged.parts(rank)
        np.testing.assert_allclose(sum(parts.values()), merged.step_s(rank), rtol=1e-9)
        transfer_and_wait = sum(
            float((e.wait + e.transfer)[rank].sum()) for e in merged.exchanges if not e.reduction
        )
        assert transfer_and_wait == pytest.approx(float(parts["exchange"].sum()))
        assert min(float(e.wait.min()) for e in merged.exchanges) >= 0
    *_, last = plan.blocks  # before a head on own rows
    found = {(e["part"], e["op"]) for e in profile["exchanges"] if e["element"] == last}
    assert found == {("forward", "reduce_scatter"), ("backward", "all_gather"), ("backward", "all_reduce")}


def test_recording_costs_less_than_allowed(slowed: Profiled) -> None:
    overhead = slowed[3]["overhead"]
    assert 0 < overhead["records"]["light"] < overhead["records"]["detailed"]
    assert overhead["share"]["light"] <= 0.01
    assert overhead["share"]["detailed"] <= 0.10
    one = overhead["records"]["light"] * overhead["record_s"] + overhead["told_s"]
    assert overhead["share"]["light"] == pytest.approx(one / slowed[3]["steps"]["step_s"]["p50"])
    assert overhead["told_s"] > overhead["record_s"]  # the times of all ranks, in a line of JSON


def test_what_recording_adds_is_a_median_and_where_it_may_lie() -> None:
    """Of each round the slowest rank; a round in which another process was at work moves neither far."""
    ranks, plan, model = two_ranks()
    light = [1.0, 1.02, 1.01, 1.03, 9.0, 1.0, 1.02, 1.01, 1.03]
    taken = (
        {"off": [2.0] * 9, "light": [0.5] * 9, "detailed": [2.2] * 9},
        {"off": [1.0] * 9, "light": [2 * ratio for ratio in light], "detailed": [2.1] * 9},
    )
    ranks = [
        replace(rank, facts={**rank.facts, "overhead_s": own}) for rank, own in zip(ranks, taken, strict=True)
    ]
    overhead = build_profile(ranks, plan, model, BATCH)["overhead"]
    low, middle, high = overhead["measured"]["light"]
    assert middle == pytest.approx(1.02)
    assert 1.0 <= low < middle < high <= 1.03
    assert overhead["measured"]["detailed"] == pytest.approx([1.1] * 3)
    # 10 and 20 records of 1e-6 s, 1e-5 s to tell, in a step of 1 s
    assert overhead["share"] == pytest.approx({"light": 2e-5, "detailed": 3e-5})


def clock_error_s(ranks: Sequence[RankSteps]) -> float:
    """As stated, and a rounding."""
    return sum(float(rank.facts["clock_error_s"]) for rank in ranks) + 1e-6


def test_one_clock_for_all_ranks(slowed: Profiled) -> None:
    """Nobody leaves an exchange before its last rank arrived, as far as clocks are known, though one is 5 s ahead."""
    ranks, plan, *_ = slowed
    merged = Merged(ranks, plan.branch)
    blocking = [e for e in merged.exchanges if not e.reduction]
    assert blocking
    for e in blocking:
        start = np.stack([merged.start[r][c] for r, c in zip(e.ranks, e.columns, strict=True)])
        end = np.stack([merged.end[r][c] for r, c in zip(e.ranks, e.columns, strict=True)])
        assert float((start.max(0) - end.min(0)).max()) <= clock_error_s(ranks)
    assert clock_error_s(ranks) < 1


def test_the_trace_nests_and_has_all_ranks_on_one_clock(slowed: Profiled, tmp_path: Path) -> None:
    ranks, *_ = slowed
    write_trace(ranks, tmp_path / "trace.json.gz")
    events = json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))["traceEvents"]
    assert events == list(trace_events(ranks))
    _assert_trace_events(events)
    spans = [e for e in events if e["ph"] == "X"]
    for rank in (0, 1):
        assert {"part", "element", "exchange", "op"} <= {e["cat"] for e in spans if e["pid"] == rank}
        for thread in {e["tid"] for e in spans if e["pid"] == rank}:
            _assert_nested([e for e in spans if (e["pid"], e["tid"]) == (rank, thread)])
    # an exchange's span is the same moment on both ranks; its profiler's events lie inside the step's
    ends = [
        [
            e["ts"] + e["dur"]
            for e in spans
            if e["pid"] == rank and e["cat"] == "exchange" and e["name"] == "all_reduce"
        ]
        for rank in (0, 1)
    ]
    starts = [
        [e["ts"] for e in spans if e["pid"] == rank and e["cat"] == "exchange" and e["name"] == "all_reduce"]
        for rank in (0, 1)
    ]
    for k in range(len(ends[0])):
        assert max(starts[0][k], starts[1][k]) - min(ends[0][k], ends[1][k]) <= 1e6 * clock_error_s(ranks)
    for rank in (0, 1):
        outer = [e for e in spans if e["pid"] == rank and e["cat"] == "part" and e["name"] == "backward"]
        inner = [e for e in spans if e["pid"] == rank and e["name"] == "aten::convolution_backward"]
        assert inner
        for event in inner:
            assert any(o["ts"] - 1e3 <= event["ts"] <= o["ts"] + o["dur"] + 1e3 for o in outer)


# The Trace Event Format (JSON, of Chrome's tracing, which Perfetto reads): what an event of each phase has to have.
# "M" metadata names a process or thread; "X" is a complete event, ts and dur in microseconds.
TRACE_KEYS = {
    "M": {"ph": str, "name": str, "pid": int, "tid": int, "args": dict},
    "X": {"ph": str, "name": str, "pid": int, "tid": int, "cat": str, "ts": float, "dur": float},
}
TRACE_ARGS: dict[str, dict[str, type]] = {
    "process_name": {"name": str}, "process_sort_index": {"sort_index": int}, "thread_name": {"name": str},
    "part": {"part": str}, "element": {"part": str}, "exchange": {"part": str, "element": str, "bytes": int},
    "op": {}, "kernel": {}, "copy": {},
}  # fmt: skip


def _assert_trace_events(events: list[dict[str, Any]]) -> None:
    for event in events:
        keys = TRACE_KEYS[event["ph"]]
        args = TRACE_ARGS[event["name"] if event["ph"] == "M" else event["cat"]]
        assert {*event} - {"args"} == {*keys} - {"args"}, event
        assert all(isinstance(event[key], kind) for key, kind in keys.items()), event
        found = event.get("args", {})
        assert {name: type(value) for name, value in found.items()} == args, event
        assert event["name"]
        assert event.get("ts", 0.0) >= 0
        assert event.get("dur", 0.0) >= 0


def _assert_nested(events: list[dict[str, Any]]) -> None:
    open_until: list[float] = []
    for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        while open_until and open_until[-1] <= event["ts"] + 0.002:
            open_until.pop()
        end = event["ts"] + event["dur"]
        assert not open_until or end <= open_until[-1] + 0.002, event  # two roundings to a nanosecond
        open_until.append(end)


def test_the_costs_of_a_profile_predict_its_step(slowed: Profiled) -> None:
    """The simulator on the profile's own blocks."""
    ranks, plan, model = two_ranks()
    profile = build_profile(ranks, plan, model, BATCH)
    found = predict(
        plan, model, two_devices(), profile_costs(profile, plan, two_devices(), model, BATCH), BATCH
    )
    assert profile["steps"]["step_s"]["p50"] == pytest.approx(1.0)
    assert found.total_s == pytest.approx(1.0)
    _, plan, model, profile = slowed
    devices = (Device("a", 0, "rank 0"), Device("a", 1, "rank 1"))
    cluster = Cluster(devices, Link(0, 1e12), Link(0, 1e12))
    placed = Plan(1, 2, plan.blocks, plan.stem, plan.head, (("a:0", "a:1"),))
    costs = profile_costs(profile, placed, cluster, model, BATCH)
    assert predict(placed, model, cluster, costs, BATCH).total_s > SLOW_S
    of_kind = replace(costs, models=(replace(costs.models[0], kind="cpu"),))
    shown = predicted(profile, plan, model, BATCH, of_kind)
    block = profile["elements"][2]
    assert shown["elements"][block["name"]][0] == pytest.approx(block["ranks"][0]["forward_s"]["p50"])
    assert shown["source"] == "measured"
    assert {span[0] for span in shown["timeline"]} == {0, 1}


def test_data_parallel_ranks_wait_for_each_other_in_the_reduction() -> None:
    for again in range(3):  # another process on the machine delays a rank too: then once more
        profile = profiled((2, 1), 12, SLOW)
        found = [(each["rank"], each["element"]) for each in profile["stragglers"]]
        if again == 2 or found[:1] == [(1, SLOW)]:
            break
    worst = profile["stragglers"][0]
    assert (worst["rank"], worst["element"]) == (1, SLOW)
    assert worst["wait_s"] > SLOW_S / 2
    assert profile["suggestion"] is None


@pytest.mark.parametrize("name", ["multi_resnet", "c10_resnet32", "resnext29_8x64d"])
def test_flops_are_those_of_torch(name: str) -> None:
    """Forward and backward of whole networks: our count from shapes is FlopCounterMode's."""
    options: dict[str, Any] = {"multi_resnet": {"depth": 8, "num_branches": 3}}.get(name, {})
    network = build(name, **options)
    shape = (2, *tuple[int, ...](network.input_shape))  # type: ignore[arg-type]
    with FlopCounterMode(display=False) as theirs, ElementFlops(Recorder()) as ours:
        y = network(torch.ones(shape))
        if name != "resnext29_8x64d":  # see below
            y.sum().backward()
    assert sum(ours.flops.values()) == theirs.get_total_flops() > 0


def test_flops_of_a_grouped_convolution_are_those_of_its_groups() -> None:
    """FlopCounterMode counts the filters' gradient of g groups g times; the same as g convolutions it counts right."""
    x = torch.ones(2, 8, 6, 6, requires_grad=True)
    filters = torch.ones(12, 2, 3, 3, requires_grad=True)
    with ElementFlops(Recorder()) as ours:
        torch.conv2d(x, filters, groups=4).sum().backward()
    with FlopCounterMode(display=False) as theirs:
        for part, own in zip(x.split(2, 1), filters.split(3), strict=True):
            torch.conv2d(part, own).sum().backward()
    assert sum(ours.flops.values()) == theirs.get_total_flops() == 3 * 2 * (2 * 12 * 4 * 4) * (2 * 9)


def test_clock_offset_finds_a_shifted_clock() -> None:
    found = run_ranks(2, _shifted)
    assert found[0] == (0.0, 0.0)
    offset, error = found[1]
    assert abs(offset + 7.0) <= error
    assert 0 < error < 1
    assert aligned(10.0, ClockOffset(0.0, 1.0, 0.0), ClockOffset(20.0, 2.0, 0.0)) == pytest.approx(11.5)


def _shifted(rank: int, world_size: int) -> tuple[float, float]:
    dist.barrier()
    found = clock_offset(clock=lambda: time.perf_counter() + 7.0 * rank)
    return found.offset_s, found.error_s


def synthetic_ranks(
    num_steps: int, num_ranks: int, num_blocks: int, arrivals: Sequence[float] = ()
) -> list[RankSteps]:
    """Ranks with an exchange in each block, forward and backward, which all leave at 0.4 s ÷ num_blocks.

    arrivals: when each rank enters it, in the same unit; default: rank 0 at 0.3, the others at 0.1.
    """
    arrivals = arrivals or (0.3, *[0.1] * (num_ranks - 1))
    facts = {
        "host": "a", "device": "cpu", "kind": "cpu", "memory_bytes": 1, "peak_flops_per_s": 1e9, "clock_error_s": 0.0,
        "records": {"light": 10, "detailed": 20}, "record_s": 1e-6, "told_s": 1e-5, "flops": [], "ops": [],
        "kernels": {"": (0, 0.0)}, "branches": [],
        "overhead_s": {kind: [1.0, 1.0] for kind in ("off", "light", "detailed")},
    }  # fmt: skip
    ranks = []
    for rank in range(num_ranks):
        names: list[tuple[str, str, str, int]] = []
        rows: list[tuple[float, float]] = []
        for part, at in (("forward", 0.0), ("backward", 0.5)):
            for block in range(num_blocks):
                begun = at + 0.5 / num_blocks * block
                late, end = begun + arrivals[rank] / num_blocks, begun + 0.4 / num_blocks
                names += [(part, f"block{block}", "all_reduce", 1000), (part, f"block{block}", "", 0)]
                rows += [(late, end), (begun, begun + 0.5 / num_blocks)]
            names.append((part, "", "", 0))
            rows.append((at, at + 0.5))
        table = np.array([*rows, (0.0, 1.0)])
        ranks.append(RankSteps([(tuple(names), table + step) for step in range(num_steps)], facts))
    return ranks


def test_wait_and_transfer_of_known_spans() -> None:
    profile = synthetic_profile(num_steps=5, num_ranks=2, num_blocks=4)
    block = profile["elements"][1]
    assert block["ranks"][0]["wait_s"]["p50"] == pytest.approx(0.0, abs=1e-9)
    assert block["ranks"][1]["wait_s"]["p50"] == pytest.approx(2 * 0.2 / 4)
    for row in block["ranks"]:
        assert row["transfer_s"]["p50"] == pytest.approx(2 * 0.1 / 4)
    assert {one["rank"] for one in profile["stragglers"]} == {0}
    assert profile["ranks"][1]["parts"]["exchange"]["p50"] == pytest.approx(8 * 0.3 / 4)
    assert profile["ranks"][1]["unattributed"] == pytest.approx(0.0, abs=1e-9)


def test_middles_over_steps_and_spreads_over_ranks_are_those_numbers() -> None:
    """Three ranks of 1.1, 1.65, 2.2 s forward in the middle step of 21, which take 1, 2, …, 21 s, in no order."""
    arrivals, lengths = (0.3, 0.2, 0.1), [8 * i % 21 + 1 for i in range(21)]
    ranks = [
        RankSteps(
            [(names, k * table) for (names, table), k in zip(rank.steps, lengths, strict=True)], rank.facts
        )
        for rank in synthetic_ranks(21, 3, 2, arrivals)
    ]
    for rank, k in ((rank, k) for rank in ranks for k in range(21)):
        rank.steps[k][1][...] -= rank.steps[k][1][-1, 0]  # a step begins at 0
    profile = build_profile(ranks, *synthetic_plan(3, 2), Batch(9, 9))
    assert profile["steps"]["step_s"] == pytest.approx({"p50": 11.0, "p95": 20.0})
    for rank in profile["ranks"]:
        assert rank["step_s"] == pytest.approx({"p50": 11.0, "p95": 20.0})
        assert rank["unattributed"] == pytest.approx(0.0, abs=1e-9)
    block = profile["elements"][2]
    assert block["name"] == "block1"
    for row, a in zip(block["ranks"], arrivals, strict=True):
        forward, wait, transfer = (a + 0.1) / 2, 2 * (0.3 - a) / 2, 2 * 0.1 / 2
        for name, seconds in (
            ("forward_s", forward), ("backward_s", forward), ("wait_s", wait), ("transfer_s", transfer),
        ):  # fmt: skip
            assert row[name] == pytest.approx({"p50": 11 * seconds, "p95": 20 * seconds}, abs=1e-9), name
    assert block["over"] == {
        "forward_s": pytest.approx({"min": 1.1, "median": 1.65, "max": 2.2}),
        "backward_s": pytest.approx({"min": 1.1, "median": 1.65, "max": 2.2}),
        "transfer_s": pytest.approx({"min": 1.1, "median": 1.1, "max": 1.1}),
        "wait_s": pytest.approx({"min": 0.0, "median": 1.1, "max": 2.2}, abs=1e-9),
    }
    console = Console(width=100, record=True, file=io.StringIO())
    print_profile(console, profile)
    printed = [line.split() for line in console.export_text().splitlines()]
    least_to_most = ["1100–1650–2200", "1100–1650–2200", "1100", "0.00–1100–2200"]
    of_steps = ["2200", "(4000)", "2200", "(4000)", "1100", "(2000)", "2200", "(4000)"]
    assert ["block1", *least_to_most] in printed
    assert ["block1", *of_steps] in printed


def test_a_slow_link_is_transfer_and_nobody_waits() -> None:
    """Ranks that enter together and leave late."""
    ranks = synthetic_ranks(5, 2, 4, (0.1, 0.1))
    profile = build_profile(ranks, *synthetic_plan(2, 4), Batch(8, 8))
    for row in profile["elements"][1]["ranks"]:
        assert row["transfer_s"]["p50"] == pytest.approx(2 * 0.3 / 4)
        assert row["wait_s"]["p95"] == pytest.approx(0.0, abs=1e-9)
    for exchange in profile["exchanges"]:
        assert exchange["bytes_per_s"] == pytest.approx(1000 / (0.3 / 4))
        assert exchange["wait_s"] == pytest.approx([0.0, 0.0], abs=1e-9)
    assert all(one["share"] < 1e-9 for one in profile["stragglers"])
    assert "no rank is waited for more than 1 % of the step" in lines(profile)


def synthetic_plan(num_ranks: int, num_blocks: int, branches: int = 0) -> tuple[Plan, ModelSpec]:
    branches = branches or num_ranks
    model = ModelSpec(tuple(BlockSpec(f"block{b}", branches) for b in range(num_blocks)))
    blocks = {block.name: BranchPlacement.even(branches, num_ranks) for block in model.blocks}
    return Plan(1, num_ranks, blocks, "replicated", "replicated"), model


def synthetic_profile(num_steps: int, num_ranks: int, num_blocks: int) -> dict[str, Any]:
    ranks = synthetic_ranks(num_steps, num_ranks, num_blocks)
    return build_profile(ranks, *synthetic_plan(num_ranks, num_blocks), Batch(8, 8))


def test_a_thousand_steps_of_eight_ranks_stay_small(tmp_path: Path) -> None:
    """With as many kernels in the trace as are kept; steps that differ, as real ones do."""
    random = np.random.default_rng(0)
    starts = np.sort(random.random(MOST_OPS))
    events = [[f"aten::op{i % 97}", "op", str(i % 3), start, 1e-5] for i, start in enumerate(starts.tolist())]
    ranks = []
    for rank in synthetic_ranks(num_steps=1000, num_ranks=8, num_blocks=16):
        steps = [(names, table * (1 + 0.01 * random.random())) for names, table in rank.steps]
        names, table = rank.steps[0]
        traced = [Span(*name, *times) for name, times in zip(names, table[:-1].tolist(), strict=True)]
        ranks.append(RankSteps(steps, rank.facts, events, traced))
    profile = build_profile(ranks, *synthetic_plan(8, 16), Batch(8, 8))
    write_profile(profile, tmp_path / "profile.json")
    write_trace(ranks, tmp_path / "trace.json.gz")
    write_report([tmp_path])
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert set(sizes) == {"profile.json", "trace.json.gz", "report.html"}
    assert sum(sizes.values()) <= 20e6, sizes
    assert read_profile(tmp_path / "profile.json")["steps"]["measured"] == 1000


def gpu_events() -> list[list[Any]]:
    """A kernel of 1 ms in every other ms of the first 0.1 s, a copy after them; the operators that launched them."""
    kernels = [["gemm", "kernel", "7", 0.002 * i, 0.001] for i in range(50)]
    ops = [["aten::mm", "op", "1", 0.0005 * i, 0.0004] for i in range(50)]
    return [*kernels, ["memcpy", "copy", "7", 0.100, 0.002], *ops]


def test_kernels_and_gaps_of_a_gpu() -> None:
    events = gpu_events()
    assert Running(events).during(0.0, 0.2) == pytest.approx((51, 0.052))
    assert Running(events).during(0.0005, 0.0025) == pytest.approx((2, 0.001))  # half of each of two
    spans = [
        Span("forward", "block0", "", 0, 0.0, 0.020),
        Span("forward", "block0", "all_reduce", 1000, 0.010, 0.014),
        Span("forward", "", "", 0, 0.0, 0.1),
        Span("sent", "", "data_bucket", 8, 0.1, 0.1),
        Span("reduction", "", "data_bucket", 8, 0.150, 0.160),
        Span("reduction", "", "", 0, 0.1, 0.2),
    ]
    found = kernels_of(events, spans, 0.0, 0.2)
    assert found["block0"] == pytest.approx((10 - 2, 0.010 - 0.002))
    # not in block0: the kernels of loss, reduction and optimizer; the waits for others are no gaps
    assert found[""] == pytest.approx((51, 0.2 - 0.052 - 0.002 - 0.010))


def test_kernels_are_counted_before_operators_are_left_out() -> None:
    ops = [["aten::mm", "op", "1", 1e-4 * i, 1e-3] for i in range(30_000)]
    kernels = [["gemm", "kernel", "7", 6e-4 * i, 1e-5] for i in range(5_000)]
    kept = shortened([*ops, *kernels])
    assert len(kept) == MOST_OPS + 5_000
    assert sum(kind == "kernel" for _, kind, *_ in kept) == 5_000
    assert kernels_of([*ops, *kernels], [], 0.0, 3.5)[""][0] == 5_000


def test_the_figures_of_gpus_in_profile_and_trace() -> None:
    """Ranks with FLOPs, kernels and bytes that are known: what the profile makes of them."""
    ranks = []
    for number, rank in enumerate(synthetic_ranks(num_steps=5, num_ranks=2, num_blocks=4)):
        facts = {
            **rank.facts,
            "device": f"cuda:{number}",
            "peak_flops_per_s": 1e9 * (1 + number),  # the better one of a kind is what both could do
            "kernels": {"": (700 + number, 0.003), "block1": (12, 0.002)},
            "flops": [["forward", "block1", 2_000_000], ["backward", "block1", 4_000_000]],
        }
        ranks.append(RankSteps(rank.steps, facts, gpu_events()))
    profile = build_profile(ranks, *synthetic_plan(2, 4), Batch(8, 8))
    rows = profile["elements"][2]["ranks"]  # after stem and block0
    assert [(row["kernels"], row["gap_s"]) for row in rows] == [(12, 0.002)] * 2
    # forward and backward, without their exchanges
    for row, compute_s in zip(rows, (2 * (0.5 - 0.1) / 4, 2 * (0.5 - 0.3) / 4), strict=True):
        assert row["flops_per_s"] == pytest.approx(6e6 / compute_s)
        assert row["utilisation"] == pytest.approx(6e6 / compute_s / 2e9)
        assert row["bytes_per_s"] == pytest.approx(2 * 1000 / (2 * 0.1 / 4))
    assert [(rank["kernels"], rank["gap_s"]) for rank in profile["ranks"]] == [(700, 0.003), (701, 0.003)]
    assert not any("clock" in line for line in lines(profile))
    profile["ranks"][1]["clock_error_s"] = 0.0021
    assert any("clock of rank 1 is known to 2.10 ms only" in line for line in lines(profile))
    assert "kernels a step: 700–701; the host leaves rank 0's GPU idle for 3.00 ms" in lines(profile)
    events = list(trace_events(ranks))
    streams = [e["args"]["name"] for e in events if e["name"] == "thread_name" and e["pid"] == 1]
    assert streams == ["step", "GPU stream 7", "CPU 1"]
    kernels = [e for e in events if e.get("cat") == "kernel" and e["pid"] == 1]
    assert [(e["ts"], e["dur"]) for e in kernels[:2]] == [(0.0, 1000.0), (2000.0, 1000.0)]
    assert sum(e.get("cat") == "copy" for e in events) == 2


def test_tables(slowed: Profiled) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    print_profile(console, slowed[3])
    printed = console.export_text()
    text = " ".join(printed.split())  # titles are as wide as their tables
    for words in (
        "rank 1 (a cpu:1) is waited for in forward of stage2.block1 (it holds branches 2, 3): rank 0 waits",
        "unattributed: at most",
        "step (95 %)",
        "ms a step of the slowest rank, middle of the steps (95 % of them)",
        "MB/s",
        "suggestion: ",
    ):
        assert words in text
    assert "…" not in printed  # nothing cut off at 80 columns


def test_bad_input(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text('{"schema": 99}')
    with pytest.raises(ConfigError, match="schema 99, this version reads schema 4"):
        read_profile(path)
    path.write_text('{"schema": 4, "ra')
    with pytest.raises(ConfigError, match="not a profile"):
        read_profile(path)
    config = Config.from_dict(SMALL)
    trainer = Trainer(
        make_network(config, make_data(config)), make_data(config), config,
        context=WorkerContext(0, 1, 0, "here", "cpu", 1, "", "gloo"),
    )  # fmt: skip
    with pytest.raises(ConfigError, match="--steps is 181, the run has 180 steps"):
        profile_steps(trainer, 181)
    call = parse(["profile", "--steps", "7", "--quiet"])
    assert call is not None
    assert (call.function, call.arguments["steps"], call.quiet) == ("profile", 7, True)


@pytest.mark.optin
@pytest.mark.skipif(bool(why_not()), reason=why_not() or "can be made")
def test_a_slow_link_is_found_as_transfer(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """Two hosts on a wire of 40 Mbit/s: what is exchanged takes its bytes' time as transfer, and nobody waits."""
    if "optin" not in pytestconfig.getoption("markexpr"):
        pytest.skip("a minute and root: run it with -m optin")
    rate = 40e6 / 8
    command = [
        sys.executable, "-m", "anabranch.runtime", "profile", "--steps", "10", "--launch.run-dir", str(tmp_path),
        "--mesh.shape", "1x2", "--launch.launcher", "env", "--train.batch-size", "64",
    ]  # fmt: skip
    with two_hosts(40) as hosts:
        environ = {
            "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": hosts[0].address,
            "MASTER_PORT": "29511", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        running = [
            host.popen(command, {**environ, "RANK": str(r), "LOCAL_RANK": str(r)})
            for r, host in enumerate(hosts)
        ]
        said = [process.communicate(timeout=240)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    profile = read_profile(tmp_path / "profile.json")
    large = [e for e in profile["exchanges"] if e["op"] == "all_reduce" and e["bytes"] > 100_000]
    assert large
    for e in large:  # of two ranks each sends what it has, or half of it twice
        assert e["transfer_s"] > 0.7 * e["bytes"] / rate
        assert e["bytes_per_s"] < 1.4 * rate
    transfer = sum(e["over"]["transfer_s"]["median"] for e in profile["elements"])
    wait = sum(e["over"]["wait_s"]["median"] for e in profile["elements"])
    assert transfer > 3 * wait
