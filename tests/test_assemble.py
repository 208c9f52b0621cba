"""Which devices of a cluster a run takes where the user says how many; what a scheduler is given."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from anabranch.blocks import build
from anabranch.blocks.convert import prepare
from anabranch.runtime import worker
from anabranch.runtime.assemble import (
    make_data,
    make_network,
    make_plan,
    provisional_plan,
    settle,
    with_memory,
)
from anabranch.runtime.config import Config
from anabranch.runtime.deal import deal_step
from anabranch.runtime.errors import ConfigError
from anabranch.runtime.job import Job
from anabranch.runtime.model_shape import model_shape
from anabranch.runtime.model_spec import spec_of
from anabranch.schedulers import BlockSpec, Cluster, Device, Link, ModelSpec, PlanError, read_plan, schedule
from anabranch.schedulers.analytic import analytic_costs
from anabranch.schedulers.cost_file import write_costs
from anabranch.schedulers.registry import make_request

SPEC = ModelSpec(tuple(BlockSpec(f"stage1.block{i}", 4) for i in (1, 2)))


def cluster(**hosts: int) -> Cluster:
    return Cluster(tuple(Device(host, index, "cpu") for host, num in hosts.items() for index in range(num)))


@pytest.mark.parametrize(
    ("hosts", "mesh", "expected"),
    [
        ({"a": 4, "b": 4}, {"num_workers": 4, "plan": "data"}, ["a:0", "a:1", "b:0", "b:1"]),
        ({"a": 4, "b": 4}, {"num_workers": 4, "plan": "even"}, ["a:0", "a:1", "a:2", "a:3"]),  # one branch group
        ({"a": 4, "b": 4}, {"num_workers": 4, "plan": "even", "shape": "2x2"}, ["a:0", "a:1", "b:0", "b:1"]),
        ({"a": 4, "b": 4}, {"num_workers": 4, "plan": "auto", "shape": "2x2"}, ["a:0", "a:1", "b:0", "b:1"]),
        ({"a": 4, "b": 4}, {"num_workers": 4, "plan": "auto", "shape": "1x4"}, ["a:0", "a:1", "a:2", "a:3"]),
        ({"a": 4, "b": 4}, {"num_workers": 4, "plan": "auto"}, ["a:0", "a:1", "a:2", "a:3"]),  # may become 1x4
        ({"a": 4, "b": 2}, {"num_workers": 5, "plan": "data"}, ["a:0", "a:1", "a:2", "b:0", "b:1"]),
        ({"a": 1, "b": 4}, {"num_workers": 4, "plan": "auto", "shape": "2x2"}, ["b:0", "b:1", "b:2", "b:3"]),
        ({"a": 3, "b": 2, "c": 3}, {"num_workers": 6, "plan": "auto", "shape": "3x2"},
         ["a:0", "a:1", "b:0", "b:1", "c:0", "c:1"]),
    ],
)  # fmt: skip
def test_replicas_are_on_several_hosts(
    hosts: dict[str, int], mesh: dict[str, Any], expected: list[str]
) -> None:
    config = replace(Config(), mesh=replace(Config().mesh, **mesh))
    make = provisional_plan if mesh["plan"] == "auto" else make_plan
    plan = make(config, SPEC, cluster(**hosts))
    assert sorted(name for row in plan.devices or () for name in row) == expected


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "workers", "group", "dealt"),
    [
        (64, 1, 2, 32, [32, 32]),
        (64, 1, 3, 22, [22, 21, 21]),  # 21 would be four groups, two of them one worker's
        (100, 2, 3, 17, [17, 17, 17]),
        (65, 2, 1, 33, [33]),
        (9, 1, 8, 1, [2, 1, 1, 1, 1, 1, 1, 1]),  # groups of two would be five
        (3, 1, 4, 1, [1, 0, 1, 1]),
    ],
)
def test_by_default_each_worker_has_a_bn_group(
    batch_size: int, accumulation: int, workers: int, group: int, dealt: list[int]
) -> None:
    train = replace(Config().train, batch_size=batch_size, accumulation=accumulation)
    plan = schedule("data", SPEC, cluster(a=workers))
    settled = settle(replace(Config(), train=train), plan).train
    assert settled.bn_batch_size == group
    first = deal_step(batch_size, bn_batch_size=group, data=workers, branch=1, accumulation=accumulation)[0]
    assert [row[0].stop - row[0].start for row in first.ranks] == dealt


@pytest.mark.parametrize(
    ("hosts", "mesh", "more", "expected"),
    [
        ({"a": 4, "b": 4}, (1, 2), 'devices = [["b:3", "b:1"]]', ["b:3", "b:1"]),
        ({"a": 4, "b": 4}, (2, 2), 'devices = [["b:0", "a:0"], ["b:1", "a:1"]]', ["b:0", "a:0", "b:1", "a:1"]),
        ({"a": 4, "b": 4}, (1, 2), "", ["a:0", "a:1"]),
        ({"a": 4, "b": 4}, (1, 2), "b", ["b:0", "b:1"]),
        ({"a": 4, "b": 4, "c": 4}, (2, 2), "c", ["c:0", "c:1", "a:0", "a:1"]),
        ({"a": 1, "b": 4}, (1, 2), "a", ["a:0", "b:0"]),  # the whole group fits b, but not a
        ({"a": 3, "b": 2, "c": 3}, (4, 2), "", ["a:0", "a:1", "b:0", "b:1", "c:0", "c:1", "a:2", "c:2"]),
    ],
)  # fmt: skip
def test_workers_of_an_automatic_plan_are_where_its_file_says(
    hosts: dict[str, int], mesh: tuple[int, int], more: str, expected: list[str], tmp_path: Path
) -> None:
    """By rank: on its devices, or on its pins' hosts, in the order of its mesh; so that there is a plan for them."""
    pin = f'[[pins]]\nmatch = "stage1.block1"\nbranch = 0\nhost = "{more}"\n' if len(more) == 1 else ""
    file, here = tmp_path / "plan.toml", cluster(**hosts)
    text = f'[mesh]\ndata = {mesh[0]}\nbranch = {mesh[1]}\nscheduler = "auto"\n'
    file.write_text(text + (pin or more + "\n"))
    plan = provisional_plan(replace(Config(), mesh=replace(Config().mesh, plan=str(file))), SPEC, here)
    assert (plan.data, plan.branch) == (len(expected), 1)
    assert [name for row in plan.devices or () for name in row] == expected
    taken = replace(here, devices=tuple(here.by_name[name] for name in expected))
    make_request(SPEC, taken, partial=read_plan(file))


def test_ranks_that_torchrun_started_find_an_automatic_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever they are to do under it: verify and profile as well as train."""
    config = Config.from_dict({"model": {"options": {"depth": 8}}, "mesh": {"plan": "auto"}})
    found = '[mesh]\ndata = 1\nbranch = 2\n[[blocks]]\nmatch = "*"\nsplit = "branch"\ncounts = [3, 1]\n'
    monkeypatch.setattr(worker, "_devices", lambda context: cluster(a=2).devices)
    monkeypatch.setattr(worker, "_automatic", lambda *_: {"plan": found})
    kept: list[tuple[int, int]] = []
    monkeypatch.setattr(worker, "make_mesh", lambda data, branch, device: (data, branch))
    monkeypatch.setattr(worker, "leave_meshes", lambda but: kept.append(but))
    context: Any = SimpleNamespace(world_size=2, device="cpu")
    plan = worker._agreed_plan(Job("verify", config, None), make_data(config), context)
    assert (plan.data, plan.branch) == (1, 2)
    assert kept == [(1, 2)], "of the meshes that were tried"


def test_devices_that_are_not_there_are_told(tmp_path: Path) -> None:
    file = tmp_path / "plan.toml"
    file.write_text('[mesh]\ndata = 1\nbranch = 2\nscheduler = "auto"\ndevices = [["b:0", "b:1"]]\n')
    config = replace(Config(), mesh=replace(Config().mesh, plan=str(file)))
    with pytest.raises(PlanError, match="the plan's devices b:0, b:1 are not in the cluster, which has a:0"):
        provisional_plan(config, SPEC, cluster(a=4))


def test_workers_tell_their_gpus_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """By which an automatic plan is limited unless mesh.memory_gb says how much; also where nobody told the cluster."""
    monkeypatch.setattr(worker, "gather_json", lambda value, device: [value])
    gpu = SimpleNamespace(name="NVIDIA L4", total_memory=24 * 10**9)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: gpu)
    context: Any = SimpleNamespace(device="cuda:0", local_rank=3)
    plan = schedule("data", SPEC, Cluster((Device("a", 5, "L4"),)))
    told: Any = SimpleNamespace(cluster=Cluster((Device("a", 5, "L4"),)))
    assert worker._cluster(told, plan, context).devices == (Device("a", 5, "L4", 24 * 10**9),)
    (device,) = worker._cluster(cast("Any", SimpleNamespace(cluster=None)), plan, context).devices
    assert (device.index, device.kind, device.memory_bytes) == (3, "NVIDIA L4", 24 * 10**9)
    assert with_memory(Cluster((device,)), 0).devices[0].memory_bytes == 24 * 10**9
    assert with_memory(Cluster((device,)), 0.5).devices[0].memory_bytes == 5 * 10**8


def test_fewer_classes_than_the_data_has_are_refused() -> None:
    options = {"depth": 8, "num_branches": 1, "num_classes": 9}
    config = Config.from_dict(
        {"model": {"name": "multi_resnet", "options": options}, "data": {"name": "digits"}}
    )
    data = make_data(config)
    with pytest.raises(ConfigError, match=r"num_classes is 9, data\.name = digits has 10 classes"):
        make_network(config, data)
    for given in ({"train": {"loss": "mine:loss"}}, {"model": {"options": {**options, "num_classes": 12}}}):
        make_network(Config.from_dict(config.to_dict(), given), data)


def test_a_users_network_has_the_input_shape_of_the_data() -> None:
    chosen = Config.from_dict(
        {"model": {"name": "parity_cases:plain_row_net"}, "data": {"name": "synthetic"}},
        {"data": {"options": {"in_channels": 2, "image_size": 8}}},
    )
    network = prepare(make_network(chosen, make_data(chosen)))
    assert network.input_shape == (2, 8, 8)
    assert set(model_shape(network, spec_of(network))) == {"stem", "0", "head"}


def test_a_scheduler_that_predicts_is_given_the_cost_file(tmp_path: Path) -> None:
    network = prepare(build("multi_resnet", depth=8, num_branches=2))
    spec, path = spec_of(network), tmp_path / "costs.json"
    write_costs(analytic_costs(model_shape(network, spec), ("cpu",)), path)
    mesh, here = (
        replace(Config().mesh, plan="optimal", num_workers=2),
        replace(cluster(a=2), local=Link(1e-5, 1e9)),
    )
    with pytest.raises(PlanError, match="the search needs costs"):
        make_plan(replace(Config(), mesh=mesh), spec, here)
    plan = make_plan(replace(Config(), mesh=replace(mesh, costs=str(path))), spec, here)
    assert (plan.scheduler, plan.world_size) == ("optimal", 2)
    partial = tmp_path / "plan.toml"
    partial.write_text(
        '[mesh]\ndata = 1\nbranch = 2\nscheduler = "optimal"\n'
        '[[blocks]]\nmatch = "stage1.*"\nsplit = "branch"\nbranches = "even"\n'
    )
    mesh = replace(mesh, plan=str(partial), costs=str(path))
    plan = make_plan(replace(Config(), mesh=mesh), spec, here)
    assert plan.blocks["stage1.block1"].split == "branch"
    path.unlink()  # kept with a run, and no concern of a plan that predicts nothing
    for plain in ("data", "even"):
        make_plan(replace(Config(), mesh=replace(mesh, plan=plain)), spec, here)
    write_costs(analytic_costs(model_shape(network, spec), ("cpu",)), path)
    with pytest.raises(PlanError, match=r"costs\.json: there is .*they are the costs of another network"):
        make_plan(replace(Config(), mesh=mesh), SPEC, here)
