"""Schedulers: what even and data decide, how devices are dealt, and what a plug-in may answer."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.schedulers import (
    BlockSpec,
    BranchPlacement,
    Cluster,
    Device,
    ModelSpec,
    Plan,
    PlanError,
    PlanFile,
    Request,
    read_plan,
    register,
    registry,
    schedule,
    schedulers,
    write_plan,
)
from anabranch.schedulers.plan_file import BlockRule

SAMPLE = BranchPlacement("sample")
MODEL = ModelSpec((BlockSpec("s1.a", 4), BlockSpec("s1.b", 4), BlockSpec("s2.a", 5)))


def cluster(**hosts: int) -> Cluster:
    """Hosts by name with their numbers of devices."""
    return Cluster(tuple(Device(host, index, "cpu") for host, num in hosts.items() for index in range(num)))


@pytest.fixture
def empty_registry() -> Iterator[None]:
    """What a test registers is gone after it."""
    before = dict(registry._registered)
    yield
    registry._registered.clear()
    registry._registered.update(before)


def test_even() -> None:
    """One branch group of all devices, 5 over 2 is 3 + 2."""
    assert schedule("even", MODEL, cluster(a=2)) == Plan(
        1,
        2,
        {
            "s1.a": BranchPlacement("branch", ((0, 1), (2, 3))),
            "s1.b": BranchPlacement("branch", ((0, 1), (2, 3))),
            "s2.a": BranchPlacement("branch", ((0, 1, 2), (3, 4))),
        },
        stem="replicated",
        head="replicated",
        devices=(("a:0", "a:1"),),
        scheduler="even",
    )
    alone = schedule("even", MODEL, cluster(a=2), mesh=(2, 1))
    assert set(alone.blocks.values()) == {SAMPLE}
    assert (alone.stem, alone.head) == ("sample", "sample")


def test_data() -> None:
    """Every device a replica; on another mesh the branch group deals samples."""
    plan = schedule("data", MODEL, cluster(a=2, b=1))
    assert plan == Plan(
        3,
        1,
        dict.fromkeys(MODEL.by_name, SAMPLE),
        "sample",
        "sample",
        (("a:0",), ("a:1",), ("b:0",)),
        None,
        "data",
    )
    assert schedule("data", MODEL, cluster(a=4), mesh=(2, 2)).devices == (("a:0", "a:1"), ("a:2", "a:3"))


def test_parts_of_a_plan_file() -> None:
    """What the file settles stays, the rest is the scheduler's."""
    rules = (BlockRule("s1.a", "sample"), BlockRule("head", "sample"))
    file = PlanFile(2, 2, rules, (("a:3", "a:2"), ("a:1", "a:0")), (3, 1), "even")
    plan = file.resolve(MODEL, cluster(a=4))
    assert plan == schedule("even", MODEL, cluster(a=4), partial=file)
    assert plan.blocks == {
        "s1.a": SAMPLE,
        "s1.b": BranchPlacement.from_counts([2, 2]),
        "s2.a": BranchPlacement.from_counts([3, 2]),
    }
    assert (plan.stem, plan.head, plan.devices, plan.samples) == ("sample", "sample", file.devices, (3, 1))
    with pytest.raises(
        PlanError, match=r's1\.b, s2\.a are left to the scheduler "even", which needs a cluster'
    ):
        file.resolve(MODEL)
    with pytest.raises(PlanError, match="its mesh is 2x2, 1x4 was asked for"):
        schedule("even", MODEL, cluster(a=4), mesh=(1, 4), partial=file)


def test_a_plan_without_open_blocks_needs_no_scheduler() -> None:
    """A plan written by a plug-in is read where the plug-in is not installed."""
    assert PlanFile(1, 1, (BlockRule("*", "sample"),), scheduler="gone").resolve(MODEL).scheduler == "gone"


@pytest.mark.parametrize(
    ("hosts", "mesh", "devices"),
    [
        ({"a": 2, "b": 2}, (2, 2), [["a:0", "a:1"], ["b:0", "b:1"]]),
        ({"a": 3, "b": 3}, (2, 2), [["a:0", "a:1"], ["b:0", "b:1"]]),
        ({"a": 3, "b": 3}, (3, 2), [["a:0", "a:1"], ["b:0", "b:1"], ["a:2", "b:2"]]),
        ({"a": 1, "b": 2}, (1, 2), [["b:0", "b:1"]]),
        ({"a": 1, "b": 3, "c": 3}, (1, 4), [["b:0", "b:1", "b:2", "c:0"]]),
        ({"a": 4}, (2, 1), [["a:0"], ["a:1"]]),
    ],
)
def test_devices_table(hosts: dict[str, int], mesh: tuple[int, int], devices: list[list[str]]) -> None:
    """A branch group is on one host where it fits, else on few."""
    assert [list(row) for row in cluster(**hosts).place(*mesh)] == devices


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 9), min_size=1),
    st.integers(1, 6),
    st.integers(1, 8),
    st.randoms(),
)
def test_devices(hosts: dict[str, int], data: int, branch: int, random: Random) -> None:
    """Every device at most once, and no group spans hosts while a host has room for it."""
    devices = list(cluster(**hosts).devices)
    random.shuffle(devices)
    if data * branch > len(devices):
        with pytest.raises(PlanError, match=f"the mesh {data}x{branch} needs {data * branch} devices"):
            Cluster(tuple(devices)).place(data, branch)
        return
    groups = Cluster(tuple(devices)).place(data, branch)
    assert [len(group) for group in groups] == [branch] * data
    names = [name for group in groups for name in group]
    assert len(set(names)) == len(names)
    whole = sum(len({name.split(":")[0] for name in group}) == 1 for group in groups)
    assert whole == min(data, sum(num // branch for num in hosts.values()))


@pytest.mark.parametrize(
    ("data", "branch", "expected"),
    [
        (2, 2, [["a:0", "a:1"], ["b:0", "b:1"]]),
        (3, 2, [["a:0", "a:1"], ["a:2", "a:3"], ["b:0", "b:1"]]),
        (2, 3, [["a:0", "a:1", "a:2"], ["b:0", "b:1", "b:2"]]),
        (3, 1, [["a:0"], ["b:0"], ["c:0"]]),
        (1, 4, [["a:0", "a:1", "a:2", "a:3"]]),
    ],
)
def test_replicas_are_spread_over_unequal_hosts(data: int, branch: int, expected: list[list[str]]) -> None:
    """A branch group on one host, the replicas on as many as there are."""
    assert cluster(a=4, b=3, c=1).place(data, branch) == tuple(map(tuple, expected))


def test_a_cluster_that_is_too_small() -> None:
    """The mesh, both numbers and the devices that are there."""
    message = (
        "the mesh 2x2 needs 4 devices, the cluster has 2 (a:0, a:1): choose a smaller mesh or add devices"
    )
    for name in ("even", "data"):
        with pytest.raises(PlanError, match=re.escape(message)):
            schedule(name, MODEL, cluster(a=2), mesh=(2, 2))
    with pytest.raises(PlanError, match="both axes need at least 1"):
        schedule("even", MODEL, cluster(a=2), mesh=(0, 2))
    with pytest.raises(PlanError, match="the cluster has no devices"):
        cluster()
    with pytest.raises(PlanError, match=r"names a device twice \(a:0, a:0\)"):
        Cluster((Device("a", 0, "cpu"), Device("a", 0, "cpu")))


@st.composite
def models(draw: st.DrawFn) -> ModelSpec:
    """Networks with parameters shared between any elements."""
    shares = st.frozensets(st.sampled_from(["p", "q", "r"]), max_size=1)
    blocks = [
        BlockSpec(f"b{i}", draw(st.integers(1, 5)), shares=draw(shares))
        for i in range(draw(st.integers(1, 5)))
    ]
    return ModelSpec(tuple(blocks), stem_shares=draw(shares), head_shares=draw(shares))


@settings(max_examples=150, deadline=None)
@given(models(), st.sampled_from(["even", "data"]), st.integers(1, 3), st.integers(1, 4), st.data())
def test_any_network_gets_a_right_plan(
    model: ModelSpec, name: str, data: int, branch: int, draw: st.DataObject
) -> None:
    """Both schedulers keep every rule, and what a right part of a plan file settles, whatever shares what."""
    plan = schedule(name, model, cluster(a=7, b=5), mesh=(data, branch))  # it checks the plan
    pinned = draw.draw(st.lists(st.sampled_from(model.blocks), unique=True))
    rules = tuple(BlockRule(block.name, "sample") for block in pinned)
    rest = schedule(name, model, cluster(a=7, b=5), partial=PlanFile(data, branch, rules))
    assert all(rest.blocks[block.name] == SAMPLE for block in pinned)
    tied = {name for unit in model.units if {block.name for block in pinned} & set(unit) for name in unit}
    for block in model.blocks:
        if block.name not in tied:
            assert rest.blocks[block.name] == plan.blocks[block.name]
    if name == "even" and branch > 1:
        free = [block for block in model.blocks if (block.name,) in model.units]
        assert all(
            plan.blocks[block.name] == BranchPlacement.even(block.num_branches, branch) for block in free
        )


def test_units_follow_what_is_fixed() -> None:
    """A block that shares a parameter with a fixed one is placed like it; one tied to the head is split by sample."""
    tied = frozenset({"basis"})
    model = ModelSpec(
        (
            BlockSpec("a", 4, shares=tied),
            BlockSpec("b", 4, shares=tied),
            BlockSpec("c", 4, shares=frozenset({"fc"})),
        ),
        head_shares=frozenset({"fc"}),
    )
    file = PlanFile(1, 2, (BlockRule("b", "branch", counts=(3, 1)),), scheduler="even")
    plan = file.resolve(model, cluster(a=2))
    assert plan.blocks["a"] == BranchPlacement.from_counts([3, 1])
    assert (plan.blocks["c"], plan.head) == (SAMPLE, "sample")


@pytest.mark.usefixtures("empty_registry")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": 2, "branch": 1}, "its mesh is 2x1, 1x2 was asked for"),
        ({"blocks": {"s1.a": SAMPLE}}, "no placement for s1.b, s2.a"),
        (
            {"blocks": dict.fromkeys(MODEL.by_name, BranchPlacement.from_counts([2, 2]))},
            'it has s1.a as "branch" [[0, 1], [2, 3]], the plan file as "sample": keep the file\'s',
        ),
        (
            {"blocks": dict.fromkeys(MODEL.by_name, SAMPLE) | {"s2.a": BranchPlacement.from_counts([2, 2])}},
            "s2.a has 5 branches, its branches [[0, 1], [2, 3]] leave out 4",
        ),
        ({"stem": "replicated"}, "it has stem as replicated, the plan file as sample"),
        ({"samples": (7,)}, "its samples are (7,), the plan file's (3,)"),
        (
            {"devices": (("a:1", "a:0"),)},
            "its devices are (('a:1', 'a:0'),), the plan file's (('a:0', 'a:1'),)",
        ),
    ],
)
def test_a_wrong_answer_names_the_scheduler(change: dict[str, object], message: str) -> None:
    """A plug-in's plan is checked, against the rules and against what was settled."""

    @register("mine")
    def mine(request: Request) -> Plan:
        return replace(request.complete(*(request.mesh or (1, 2)), lambda block: SAMPLE), **change)  # type: ignore[arg-type]

    rules = (BlockRule("s1.a", "sample"), BlockRule("stem", "sample"))
    file = PlanFile(1, 2, rules, (("a:0", "a:1"),), (3,))
    with pytest.raises(PlanError, match=re.escape(f'the scheduler "mine" returned a wrong plan: {message}')):
        schedule("mine", MODEL, cluster(a=2), partial=file)


@pytest.mark.usefixtures("empty_registry")
def test_register() -> None:
    """A registered function is a scheduler; a name is taken once; devices it left open are filled in."""

    @register("mine")
    def mine(request: Request) -> Plan:
        return replace(request.complete(1, 2, lambda block: SAMPLE), devices=None)

    assert schedulers() == ["data", "even", "greedy", "manual", "mine", "optimal"]
    plan = schedule("mine", MODEL, cluster(a=1, b=2))
    assert (plan.scheduler, plan.devices) == ("mine", (("b:0", "b:1"),))
    with pytest.raises(PlanError, match='a scheduler "even" is registered already'):
        register("even")(mine)
    register("none")(lambda request: None)  # type: ignore[arg-type, return-value]
    with pytest.raises(
        PlanError, match='the scheduler "none" returned a wrong plan: it is a NoneType, not a Plan'
    ):
        schedule("none", MODEL, cluster(a=1))


def test_unknown_name() -> None:
    """A wrong name is answered with the right ones."""
    with pytest.raises(
        PlanError, match=re.escape('named "evne" (did you mean "even"?); there are data, even')
    ):
        schedule("evne", MODEL, cluster(a=1))


@pytest.mark.usefixtures("empty_registry")
def test_entry_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package's scheduler is found by name, imported only when used, and refused when ambiguous."""
    (tmp_path / "theirs_for_test.py").write_text(
        "from anabranch.schedulers import BranchPlacement\n"
        "def place(request):\n"
        "    return request.complete(*(request.mesh or (1, 1)), lambda block: BranchPlacement('sample'))\n"
    )
    info = tmp_path / "theirs_for_test-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs_for_test\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[anabranch.schedulers]\n"
        "theirs = theirs_for_test:place\neven = theirs_for_test:place\n"
        "broken = theirs_for_test:nothing\nabsent = not_there_for_test:place\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert schedulers() == ["absent", "broken", "data", "even", "greedy", "manual", "optimal", "theirs"]
    assert "theirs_for_test" not in sys.modules
    assert schedule("theirs", MODEL, cluster(a=2), mesh=(1, 2)).scheduler == "theirs"
    with pytest.raises(
        PlanError, match=r'2 schedulers are named "even" \(entry points theirs_for_test:place\)'
    ):
        schedule("even", MODEL, cluster(a=2))
    for name in ("broken", "absent"):
        with pytest.raises(PlanError, match=rf'"{name}" \(entry point .*:.*\) cannot be imported: '):
            schedule(name, MODEL, cluster(a=2))
    register("theirs")(
        sys.modules["theirs_for_test"].place
    )  # the same function under both roads is one scheduler
    assert schedule("theirs", MODEL, cluster(a=2), mesh=(1, 2)).scheduler == "theirs"
    sys.modules.pop("theirs_for_test")


def test_plans_for_large_clusters_are_quick(tmp_path: Path) -> None:
    """4,096 devices and 300 blocks: written and read back with one rule a block."""
    blocks = tuple(BlockSpec(f"s{i}.b", 1 + i % 64) for i in range(300))
    machines = Cluster(tuple(Device(f"host{i // 8}", i % 8, "gpu") for i in range(4096)))
    plan = schedule("even", ModelSpec(blocks), machines, mesh=(512, 8))
    assert plan.devices is not None
    assert all(len({name.split(":")[0] for name in row}) == 1 for row in plan.devices)
    write_plan(plan, tmp_path / "plan.toml")
    assert read_plan(tmp_path / "plan.toml").resolve(ModelSpec(blocks), machines) == plan


def test_plain_python() -> None:
    """The package imports neither torch nor ray."""
    code = "import sys, anabranch.schedulers; sys.exit(' '.join({'torch', 'ray', 'numpy'} & {*sys.modules}) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
