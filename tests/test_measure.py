"""Costs measured on real ranks: what they say of the network, and of plans that no trial ran."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn

from anabranch.benchmarks.plan_case import Case
from anabranch.blocks import MultiResidual
from anabranch.blocks.convert import prepare
from anabranch.blocks.multi_resnet import PreactResidual
from anabranch.runtime import audit, measure, measure_links
from anabranch.runtime.config import Config
from anabranch.runtime.launch import alone
from anabranch.runtime.measure import cost_key, with_speeds, workers_key
from anabranch.runtime.measure_elements import Seen, _unequal_work, without_waiting
from anabranch.runtime.measure_trial import Trial, trial_plans
from anabranch.runtime.model_shape import model_shape, traffic
from anabranch.runtime.model_spec import spec_of
from anabranch.runtime.process_group import process_group
from anabranch.runtime.recorder import Span
from anabranch.schedulers import (
    BlockSpec,
    Cluster,
    Device,
    Link,
    ModelSpec,
    Plan,
    PlanError,
    parse_plan,
    schedule,
)
from anabranch.schedulers.analytic import analytic_costs
from anabranch.schedulers.cost_file import read_costs, write_costs
from anabranch.schedulers.costs import Batch, Costs
from anabranch.schedulers.optimal import Candidate, candidates
from anabranch.schedulers.predict import predict
from anabranch.schedulers.registry import make_request

WIDE = Case(
    "multi_resnet", {"depth": 8, "num_branches": 4, "width": 4}, 8, 8, 1
)  # parameters, not activations
CASE = Case("multi_resnet", {"depth": 14, "num_branches": 3}, 16, 8, 1)
SHORT = Case("multi_resnet", {"depth": 8, "num_branches": 3}, 16, 8, 1)


def cluster_of(num: int) -> Cluster:
    return Cluster(tuple(Device("localhost", rank, "cpu") for rank in range(num)))


def measured(
    rank: int, world_size: int, folder: str, slow: float = 0.0, case: Case = SHORT
) -> dict[str, Any]:
    """Costs of a case; rank 1 sleeps `slow` times as long as each block's branches take."""
    torch.set_num_threads(1)
    cluster = cluster_of(world_size)
    devices = [str(device) for device in cluster.devices]
    whole, exchanges = PreactResidual.branches, Trial.exchanges
    alike = set[bool]()

    def slowed(self: PreactResidual, h: Tensor) -> Tensor:
        begun = time.perf_counter()
        s = whole(self, h)
        if rank == 1 and slow and torch.is_grad_enabled():
            time.sleep(slow * (time.perf_counter() - begun) + 0.02)
        return s

    def told(self: Trial, **options: bool) -> Iterator[tuple[int, float]]:
        alike.update(options.values())
        return exchanges(self, **options)

    fewest = mock.patch.object(measure, "_MOST", measure._LEAST)
    sizes = mock.patch.object(measure_links, "_SIZES", (1024, 16_384, 65_536, 2**20))
    branches = mock.patch.object(PreactResidual, "branches", slowed)
    with fewest, sizes, branches, mock.patch.object(Trial, "exchanges", told):
        costs = measure.measure_costs(case.network(), case.setting(), cluster, devices, budget_s=8)
    path = Path(folder, f"costs-{rank}.json")
    write_costs(costs, path)
    return {
        "path": str(path),
        "speeds": [d.speed for d in with_speeds(cluster, devices, costs).devices],
        "alike": alike,
    }


def test_costs_are_the_networks_and_the_same_on_all_ranks(tmp_path: Path) -> None:
    first, *others = run_ranks(4, measured, str(tmp_path))  # several branch groups, each with its own timings
    assert all(Path(first["path"]).read_text() == Path(other["path"]).read_text() for other in others)
    costs = read_costs(first["path"])
    network = SHORT.network()
    spec = spec_of(network)
    costs.check(spec, frozenset({"cpu"}))
    (model,) = costs.models
    total = 0
    for name in ("stem", *spec.by_name, "head"):
        element = model.elements[name]
        total += element.parameters.replicated + sum(element.parameters.branches)
        assert element.replicated.forward_s(16) >= 0
        if element.branches:
            seconds = [work.forward_s(16) + work.backward_s(16) for work in element.branches]
            assert seconds[2] > 0
            assert element.branches[2].saved_bytes(16) == pytest.approx(
                3 * element.branches[0].saved_bytes(16), rel=0.35
            )
    assert total == sum(p.numel() * p.element_size() for p in network.parameters())
    assert model.label == "measured"
    assert {group.collective for group in costs.groups} == {"all_reduce", "reduce_scatter", "all_gather"}
    assert all(group.seconds(2**20) > 0 for group in costs.groups)
    block = model.elements["stage1.block1"]
    assert (block.sum_bytes, block.hidden_bytes, block.input_bytes) == (16 * 64 * 4,) * 3
    plan = schedule("even", spec, cluster_of(4), mesh=(2, 2))
    assert predict(plan, spec, cluster_of(4), costs, Batch(16, 4)).total_s > 0


def test_a_slow_worker_is_found(tmp_path: Path) -> None:
    """And exchanges are then not what both took for them."""
    case = replace(SHORT, options={"depth": 8, "num_branches": 4})  # of which both can have equally many
    found = run_ranks(2, measured, str(tmp_path), 3.0, case)[0]
    assert found["speeds"][0] == 1.0
    assert found["speeds"][1] < 0.7
    assert found["alike"] == {False}


@pytest.mark.parametrize(
    ("alike", "is_even", "expected"),
    [(True, True, [3.0, 4.0]), (False, True, [1.0, 3.0]), (True, False, [1.0, 3.0])],
)
def test_an_exchange_is_as_long_as_for_the_rank_that_waits_for_none(
    alike: bool, is_even: bool, expected: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where another is slower, or has more to do; else they wait by turns, and all of that is the exchange's."""
    everyone = [[[(8, 1.0), (8, 5.0)]], [[(8, 5.0), (8, 3.0)]]]  # two exchanges of one step, by rank
    spans = [Span("forward", "b", "all_reduce", num, 0.0, seconds) for num, seconds in everyone[0][0]]
    spans.append(Span("forward", "b", "all_gather", 8, 0.0, 9.0))

    def gathered(mine: Any, device: torch.device) -> Any:
        assert mine == everyone[0]
        return everyone

    monkeypatch.setattr("anabranch.runtime.measure_trial.gather_json", gathered)
    trial: Any = SimpleNamespace(
        spans=[spans],
        is_even=is_even,
        parallel=torch.nn.Linear(1, 1),
        mesh=SimpleNamespace(branch=2),
    )
    assert list(Trial.exchanges(trial, alike=alike)) == [(8, seconds) for seconds in expected]


def test_speeds_are_of_a_sample() -> None:
    """Eight BN groups on six ranks: who has two of them is not slow, who has none not the fastest."""

    def own(samples: int, per_sample_s: float) -> list[Seen]:
        return [Seen(name, samples, None, samples * per_sample_s, 0.0, 0.0, 0.0) for name in ("stem", "head")]

    dealt = [own(64, 1.0), own(64, 2.0), own(32, 1.0), own(0, 1.0), own(32, 4.0)]
    assert measure._speeds(dealt, ["cpu"] * 5) == [1.0, 0.5, 1.0, 1.0, 0.25]
    assert measure._speeds(dealt, ["a", "b", "a", "a", "b"]) == [1.0, 1.0, 1.0, 1.0, 0.5]


def test_a_network_with_unequal_branches_and_repeated_blocks(tmp_path: Path) -> None:
    costs = read_costs(run_ranks(2, unequal, str(tmp_path))[0])
    (model,) = costs.models
    first, second = model.elements["0"], model.elements["1"]
    assert first.unequal
    assert first == second, "alike blocks are measured once"
    light, heavy = (work.forward_s(8) + work.backward_s(8) for work in first.branches)
    assert heavy > 1.5 * light


@pytest.mark.parametrize("world", [2, 4, 6])
@pytest.mark.parametrize("whose", [(0,), (1,), None], ids=["first", "second", "all"])
def test_each_of_three_unequal_branches_is_told_apart(world: int, whose: tuple[int, ...] | None) -> None:
    """From what trials show of all ranks, or of one that is the only of its kind."""
    spec = ModelSpec((BlockSpec("b", 3),))
    takes = {0: 1.0, 1: 5.0, 2: 2.0}
    seen = []
    for plan in trial_plans(spec, frozenset({"b"}), world):
        plan.check(spec)
        for rank in range(world) if whose is None else whose:
            held, samples = plan.blocks["b"].branches, 12 // plan.data
            mine = None if held is None else held[rank % plan.branch]
            seconds = samples * (0.5 + sum(takes[b] for b in (takes if mine is None else mine)))
            seen.append(Seen("b", samples, mine, seconds, 2 * seconds, 8.0, 9.0))
    replicated, branches = _unequal_work(seen, 3)
    for samples in (12 // world, 6, 12) if whose is None else (12,):
        assert replicated.forward_s(samples) == pytest.approx(0.5 * samples)
        assert [work.backward_s(samples) for work in branches] == pytest.approx(
            [2 * takes[b] * samples for b in takes]
        )


def test_trials_of_networks_that_share_parameters_can_run() -> None:
    """Stem or head with blocks, and blocks of unequal numbers of branches, can only be split "sample"."""
    tied, alone = frozenset({"p"}), frozenset[str]()
    for counts, stem in (((3, 2), alone), ((3, 3), tied), ((3, 3), alone)):
        blocks = (*(BlockSpec(f"b{i}", k, shares=tied) for i, k in enumerate(counts)), BlockSpec("c", 4))
        spec = ModelSpec(blocks, stem)
        plans = list(trial_plans(spec, alone, 4))
        for plan in plans:
            plan.check(spec)
        is_tied = counts == (3, 2) or bool(stem)
        splits = {name: {plan.blocks[name].split for plan in plans[1:]} for name in ("b0", "b1", "c")}
        expected = "sample" if is_tied else "branch"
        assert splits == {"b0": {expected}, "b1": {expected}, "c": {"branch"}}
        assert {plan.stem for plan in plans[1:]} == {"sample" if stem else "replicated"}


def test_many_unequal_branches_take_few_trials() -> None:
    spec = ModelSpec((BlockSpec("b", 23),))
    assert len(list(trial_plans(spec, frozenset({"b"}), 2))) <= 10


def test_statistics_of_batchnorm_are_a_part_of_what_an_element_takes() -> None:
    """Other exchanges are taken off; of these sums what waiting for another rank added is."""

    def seen(waited_s: float) -> Seen:
        trial: Any = SimpleNamespace(
            spans=[
                [
                    Span("forward", "stem", "", 0, 0.0, 10.0 + waited_s),
                    Span("forward", "stem", "world_sum", 8, 2.0, 5.0 + waited_s),
                    Span("forward", "stem", "all_gather", 8, 8.0, 9.0),
                    Span("backward", "stem", "", 0, 20.0, 24.0),
                    Span("backward", "stem", "data_sum", 8, 20.0, 21.0),
                ]
            ],
            parallel=SimpleNamespace(elements=lambda: [("stem", None, "own")]),
            step=SimpleNamespace(batches=[mock.Mock(), mock.Mock()]),  # two micro-batches
            plan=SimpleNamespace(blocks={}),
            memory={"stem": (1.0, 2.0)},
            _whole_s=Trial._whole_s,
        )
        for batch in trial.step.batches:
            batch.rows.layout_of.return_value.group_sizes = (4, 4)
        (one,) = Trial.seen(trial)
        return one

    assert seen(6.0) == Seen("stem", 8, None, 3.0, 1.5, 1.0, 2.0, 4.5, 0.5)
    (first,), (second,) = without_waiting([[seen(0.0)], [seen(6.0)]])
    assert first == second
    assert (first.forward_sums_s, first.backward_sums_s) == (1.5, 0.5)
    slow = first.at_speed_1(0.5)
    assert (slow.forward_s, slow.backward_s) == (0.5 * 3.0 + 1.5, 0.5 * 1.5 + 0.5)


def test_exchanges_are_as_large_as_what_travels() -> None:
    """Sums and their gradients as the wire has them, inputs as autocast makes them."""
    network = SHORT.network()
    full, half_wire = (traffic(network, half_wire=half)["stage1.block1"] for half in (False, True))
    assert half_wire == (full[0] / 2, full[1] / 2, full[2])
    autocast = traffic(network, "bf16")["stage1.block1"]
    assert autocast == (full[0], full[1], full[2] / 2)
    assert traffic(network.double(), half_wire=True)["stage1.block1"] == tuple(2 * num for num in full)


class Heavy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 64, 3, padding=1), nn.Conv2d(64, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.a(x).relu())
        return y


class Net(nn.Module):
    input_shape = (8, 16, 16)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(8, 8, 1)
        self.blocks = nn.Sequential(*(MultiResidual([nn.Conv2d(8, 8, 1), Heavy()]) for _ in range(2)))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.blocks(self.stem(x)))
        return y


def unequal(rank: int, world_size: int, folder: str) -> str:
    torch.set_num_threads(1)
    cluster = cluster_of(world_size)
    devices = [str(device) for device in cluster.devices]
    setting = Case("", {}, 8, 16, 8).setting()
    costs = measure.measure_costs(prepare(Net()), setting, cluster, devices, budget_s=8)
    path = Path(folder, f"costs-{rank}.json")
    write_costs(costs, path)
    return str(path)


def keys(rank: int, world_size: int) -> dict[str, Any]:
    """A mixed cluster's, with a machine of its own for each rank; and those of costs measured on part of the batch."""
    torch.set_num_threads(1)
    cluster = Cluster(tuple(Device(f"host-{r}", 0, f"kind-{r}") for r in range(world_size)))
    network, setting = SHORT.network(), SHORT.setting()
    with (
        mock.patch.object(measure, "processor", return_value=f"processor {rank}"),
        mock.patch.object(measure, "_MOST", measure._LEAST),
        mock.patch.object(measure_links, "_SIZES", (1024, 65_536)),
    ):
        workers = workers_key(cluster, cluster.names, torch.device("cpu"))
        setting = replace(
            setting, config=replace(setting.config, train=replace(setting.config.train, bn_batch_size=4))
        )
        costs = measure.measure_costs(network, setting, cluster, cluster.names, budget_s=0)
        costs.check_key({**cost_key(network, setting.config), **workers})
    return {"workers": workers, "label": costs.label}


def test_costs_are_of_all_workers_and_of_the_run_as_configured() -> None:
    first, second = run_ranks(2, keys)
    assert first == second
    assert first["label"] == "extrapolated", "on half of the batch"
    cores = first["workers"].pop("cores")
    assert first["workers"] == {
        "device": "processor 0, processor 1", "kind": "kind-0, kind-1", "threads": "1", "backend": "gloo",
        "workers": "2", "hosts": "0 1",
    }  # fmt: skip
    assert int(cores) >= 1


def test_costs_hold_for_what_changes_a_step() -> None:
    network, config = SHORT.network(), Config()
    before = cost_key(network, config)
    assert cost_key(network, replace(config, optimizer=replace(config.optimizer, lr=7.0))) == before
    for section, change in (
        ("optimizer", {"momentum": 0.0}), ("optimizer", {"clip_norm": 1.0}), ("train", {"orthogonality": 1.0}),
        ("train", {"batch_size": 32}), ("mesh", {"wire": "bf16"}),
    ):  # fmt: skip
        other = replace(config, **{section: replace(getattr(config, section), **change)})
        assert cost_key(network, other) != before, change
    network.input_shape = (3, 64, 64)  # type: ignore[assignment]
    assert cost_key(network, config) != before


def automatic(
    rank: int, world_size: int, folder: str, limit: int, case: Case = SHORT, times: int = 2
) -> list[Any]:
    torch.set_num_threads(1)
    cluster = cluster_of(world_size)
    if limit:
        cluster = Cluster(tuple(Device("localhost", r, "cpu", limit) for r in range(world_size)))
    devices = [str(device) for device in cluster.devices]
    network = case.network()
    stages: list[set[str]] = []
    fewest = mock.patch.object(audit, "time_plans", partial(audit.time_plans, rounds=8))
    with fewest, mock.patch.dict("os.environ", {"XDG_CACHE_HOME": folder}):
        outcomes = []
        for _ in range(times):
            stages.append(set())
            outcomes.append(
                audit.automatic_plan(
                    network,
                    case.setting(),
                    cluster,
                    devices,
                    budget_s=8,
                    on_stage=lambda stage, done, total: stages[-1].add(stage),
                )
            )
    return [*outcomes, list(map(sorted, stages))]


def test_an_automatic_plan_is_timed_and_costs_are_kept(tmp_path: Path) -> None:
    first, again, stages = run_ranks(2, automatic, str(tmp_path), 0)[0]
    known = ["searching", "timing plans"]
    assert stages == [["measuring", *known], known], "measured once"
    for outcome in (first, again):
        rows = {row["name"]: row for row in outcome["plans"]}
        assert "data" in rows
        chosen = rows[outcome["chosen"]]
        parse_plan(outcome["plan"]).resolve(spec_of(SHORT.network()), cluster_of(2))
        assert chosen["measured_step_s"] == statistics.median(chosen["samples_s"])
        assert chosen["error"] == chosen["predicted_step_s"] / chosen["measured_step_s"] - 1
        if outcome["chosen"] != "data":
            assert chosen["interval_95"][1] < 1


def test_costs_are_taken_from_the_cache_without_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other jobs of the same network may take them at the same time; and a home that cannot be written is no error."""
    network, cluster = SHORT.network(), cluster_of(1)
    setting: Any = None  # for measuring
    costs = analytic_costs(model_shape(network, spec_of(network)), ("cpu",))
    measured = mock.Mock(return_value=costs)
    monkeypatch.setattr(audit, "measure_costs", measured)

    def take(home: Path) -> str:
        monkeypatch.setenv("XDG_CACHE_HOME", str(home))
        found, path = audit._costs(
            network, setting, cluster, cluster.names, {}, "", False, 1.0, lambda stage, done, total: None
        )
        assert found == costs
        return path

    with process_group(alone(environ={"OMP_NUM_THREADS": "1"})):
        path = Path(take(tmp_path / "home"))
        with mock.patch.multiple(Path, write_bytes=None, unlink=None):
            assert take(tmp_path / "home") == str(path)
        assert measured.call_count == 1
        path.write_text("torn")
        assert take(tmp_path / "home") == str(path)
        assert read_costs(path) == costs
        assert list(path.parent.iterdir()) == [path]
        (tmp_path / "file").write_text("in the way of a folder")
        assert take(tmp_path / "file") == ""
        assert measured.call_count == 3


@pytest.mark.optin  # test_peak_memory.py has a smaller one
def test_a_memory_limit_leaves_out_data_parallelism(tmp_path: Path) -> None:
    """With less room than every rank holding everything takes, branches are spread, and no data parallelism is run."""
    free = run_ranks(2, automatic, str(tmp_path), 0, WIDE, 1)[0][0]
    data = next(row for row in free["plans"] if row["name"] == "data")
    limit = int(0.97 * max(data["memory_bytes"]))
    tight = run_ranks(2, automatic, str(tmp_path), limit, WIDE, 1)[0][0]
    assert all(row["name"] != "data" for row in tight["plans"])
    chosen = next(row for row in tight["plans"] if row["name"] == tight["chosen"])
    assert max(chosen["memory_bytes"]) <= limit
    assert "branch" in tight["plan"]
    with pytest.raises(AssertionError, match=r"no plan fits the devices' memory: the closest one lacks"):
        run_ranks(2, automatic, str(tmp_path), 10_000, WIDE, 1)


def test_data_parallelism_is_left_only_where_surely_slower() -> None:
    spec = spec_of(CASE.network())
    plan = schedule("data", spec, cluster_of(2), mesh=(2, 1))
    rivals = {name: Candidate(plan, mock.Mock()) for name in ("1x2", "data")}
    noisy = {"data": [1.0, 1.1, 0.9, 1.0] * 4, "1x2": [0.8, 1.3, 1.0, 0.9] * 4}
    surely = {"data": [1.0, 1.1, 0.9, 1.0] * 4, "1x2": [0.9, 0.95, 0.8, 0.9] * 4}
    assert audit._chosen(noisy, rivals) == "data"
    assert audit._chosen(surely, rivals) == "1x2"


def test_plans_are_for_workers_as_they_stand() -> None:
    """A slow worker in the middle: every mesh has a plan for that order, and weighted samples are no baseline."""
    network = SHORT.network()
    spec = spec_of(network)
    devices = tuple(Device("a", rank, "cpu", speed=0.5 if rank == 1 else 1.0) for rank in range(4))
    cluster = Cluster(devices, Link(1e-6, 1e11))
    costs = analytic_costs(model_shape(network, spec), ("cpu",))
    request = make_request(spec, cluster, costs=costs, batch=Batch(64, 4))
    names = cluster.names
    found = candidates(replace(request, standing=tuple(names)), 8)
    rivals = audit._rivals(found, names)
    assert {"data", "1x4", "2x2", "4x1"} <= {*rivals}
    assert rivals["data"].plan.samples is None
    assert rivals["4x1"].plan.samples is not None
    (only,) = {c.plan.devices for c in found if c.plan.branch == 4}
    assert only == (tuple(names),)
    backwards = replace(request, mesh=(1, 4), devices=(tuple(reversed(names)),), standing=tuple(names))
    with pytest.raises(PlanError, match="the plan file's devices are not in the order"):
        audit._rivals(candidates(backwards, 8), names)


def test_costs_of_another_network_or_hardware_are_refused(tmp_path: Path) -> None:
    network = CASE.network()
    spec = spec_of(network)
    costs = analytic_costs(model_shape(network, spec), ("cpu",))
    other = spec_of(Case("multi_resnet", {"depth": 8, "num_branches": 3}, 16, 8, 1).network())
    with pytest.raises(PlanError, match="they are the costs of another network; measure this one"):
        costs.check(other, frozenset({"cpu"}))
    with pytest.raises(PlanError, match=r"measured with device = .cpu., this run has .H200.: measure again"):
        Costs(costs.models).check_key({"device": "H200"})
    plan: Plan = schedule("data", spec, cluster_of(2), mesh=(2, 1))
    assert (
        predict(plan, spec, Cluster(cluster_of(2).devices), costs_with_link(costs), Batch(16, 8)).total_s > 0
    )


def costs_with_link(costs: Costs) -> Costs:
    from anabranch.schedulers.costs import Curve, GroupCost

    return Costs(costs.models, (GroupCost("all_reduce", 2, False, Curve.line(1e-4, 1e-9)),))
