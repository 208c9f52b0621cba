"""Which devices of a cluster a run takes where the user says how many."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from anabranch.runtime.assemble import make_plan, provisional_plan
from anabranch.runtime.config import Config
from anabranch.schedulers import BlockSpec, Cluster, Device, ModelSpec

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
