"""Fewer replicas: the plan on some of its ranks, what each rank stands for, and wrong wishes."""

from __future__ import annotations

from typing import Any

import pytest

from anabranch.runtime.config import Config
from anabranch.runtime.errors import ConfigError
from anabranch.runtime.recovery_policy import check_replicas_wanted, recovery_of
from anabranch.schedulers import BlockSpec, BranchPlacement, ModelSpec, Plan

MODEL = ModelSpec((BlockSpec("s1.a", 4), BlockSpec("s1.b", 3)))
PLAN = Plan(
    3,
    2,
    {"s1.a": BranchPlacement("branch", ((0, 3), (1, 2))), "s1.b": BranchPlacement("sample")},
    stem="sample",
    head="sample",
    devices=(("a:0", "a:1"), ("b:0", "b:1"), ("c:0", "c:1")),
    samples=(3, 1, 2),
)


@pytest.mark.parametrize(
    ("ranks", "devices", "samples"),
    [
        ((0, 1, 2, 3, 4, 5), PLAN.devices, (3, 1, 2)),
        ((2, 3), (("b:0", "b:1"),), (1,)),
        ((4, 5, 0, 3), (("c:0", "c:1"), ("a:0", "b:1")), (2, 3)),
    ],
)
def test_a_plan_on_some_of_its_ranks(ranks: tuple[int, ...], devices: Any, samples: Any) -> None:
    found = PLAN.on_ranks(ranks)
    found.check(MODEL)
    assert (found.data, found.branch, found.blocks) == (len(ranks) // 2, 2, PLAN.blocks)
    assert (found.devices, found.samples) == (devices, samples)


def test_a_plan_without_devices() -> None:
    plan = Plan(2, 1, {}, stem="sample", head="sample")
    assert plan.on_ranks([1]) == Plan(1, 1, {}, stem="sample", head="sample")


def config(**launch: Any) -> Config:
    return Config.from_dict({"launch": launch})


def test_what_each_rank_stands_for() -> None:
    """Over a loss without room, one with, and the return: the policy keeps count."""
    recovery = recovery_of(config(min_replicas=1), PLAN, "", lambda event: None)
    assert recovery is not None
    assert recovery.min_replicas == 1
    there = {"committed": 5, "prepared": 5, "tended": 5}
    new = {**there, "committed": None}
    order = recovery.decide([None, there, there, None, there, there])
    assert (order["ranks"], order["of_plan"], order["was"]) == ([4, 5, 2, 1], [4, 5, 2, 1], 3)
    order = recovery.decide([there, new, there, there])
    assert (order["of_plan"], order["was"], order["sources"]) == ([4, 5, 2, 1], 2, {1: 3})
    order = recovery.decide([there, there, None, None])
    assert (order["of_plan"], order["was"]) == ([4, 5], 2)
    order = recovery.decide([there, there, new, new, new, new])
    assert (order["of_plan"], order["was"]) == ([4, 5, 0, 1, 2, 3], 1)
    assert order["sources"] == {2: 0, 3: 1, 4: 0, 5: 1}


def test_all_replicas_by_default() -> None:
    recovery = recovery_of(config(), PLAN, "", lambda event: None)
    assert recovery is not None
    assert recovery.min_replicas is None


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        ({"min_replicas": 4}, "min_replicas is 4, the mesh 3x2 .* has 3 replicas: make it 3 or less"),
        ({"min_replicas": -1}, r"launch.min_replicas is -1: it must lie in \[0, inf\)"),
        ({"min_replicas": 1, "max_failures": 0}, "min_replicas is 1, and launch.max_failures is 0"),
    ],
)
def test_wrong_wishes(launch: dict[str, Any], message: str) -> None:
    def check() -> None:
        config(**launch).check()
        check_replicas_wanted(config(**launch), PLAN)

    with pytest.raises(ConfigError, match=message):
        check()
