"""Plans and plan files: every rule has its error, and what is written is read back."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anabranch.schedulers import (
    BlockSpec,
    BranchPlacement,
    Cluster,
    Device,
    ModelSpec,
    Plan,
    PlanError,
    format_plan,
    read_plan,
    write_plan,
)
from anabranch.schedulers.plan import check_placements

SAMPLE = BranchPlacement("sample")
MODEL = ModelSpec(
    (
        BlockSpec("stage1.block1", 4),
        BlockSpec("stage1.block2", 4),
        BlockSpec("stage2.block1", 5),
        BlockSpec("stage2.block2", 5),
    )
)
MESH = "[mesh]\ndata = 1\nbranch = 2\n"  # rules start on line 4


def rule(**keys: object) -> str:
    """One [[blocks]] table; strings and lists of numbers are written alike in Python and TOML."""
    return "[[blocks]]\n" + "".join(f"{key} = {value!r}\n" for key, value in keys.items())


ALL = rule(match="*", split="sample")


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Plan]:
    """Text of a plan file -> plan; errors name the file plan.toml without its folder."""

    def run(text: str, model: ModelSpec = MODEL, cluster: Cluster | None = None, **keys: Any) -> Plan:
        path = tmp_path / "plan.toml"
        path.write_text(text, encoding="utf-8")
        try:
            return read_plan(path).resolve(model, cluster, **keys)
        except PlanError as error:
            raise PlanError(str(error).replace(str(path), "plan.toml")) from None

    return run


def test_design_example(read: Callable[..., Plan]) -> None:
    """A file with every key gives the plan it says; stem and head follow their neighbours."""
    plan = read(
        """
[mesh]
data = 2
branch = 2
devices = [["a:0", "a:1"], ["b:0", "b:1"]]
samples = [3, 1]
[[blocks]]
match = "stage1.*"
split = "sample"
[[blocks]]
match = "stage2.block1"
split = "branch"
branches = [[2, 0, 1], [3, 4]]
[[blocks]]
match = "stage2.block2"
split = "branch"
branches = "even"
"""
    )
    uneven = BranchPlacement("branch", ((0, 1, 2), (3, 4)))
    assert plan == Plan(
        2,
        2,
        {"stage1.block1": SAMPLE, "stage1.block2": SAMPLE, "stage2.block1": uneven, "stage2.block2": uneven},
        stem="sample",
        head="replicated",
        devices=(("a:0", "a:1"), ("b:0", "b:1")),
        samples=(3, 1),
    )
    assert plan.world_size == 4
    assert list(plan.blocks) == [block.name for block in MODEL.blocks]
    assert plan.held(MODEL.blocks[2], 1) == (3, 4)
    assert plan.held(MODEL.blocks[0], 1) == (0, 1, 2, 3)


def test_edges(read: Callable[..., Plan]) -> None:
    """Stem and head can be named; a wildcard with split "branch" leaves them to their neighbours."""
    plan = read(MESH + rule(match="*", split="branch", branches="even"))
    assert (plan.stem, plan.head) == ("replicated", "replicated")
    plan = read(MESH + rule(match="*", split="branch", branches="even") + rule(match="stem", split="sample"))
    assert (plan.stem, plan.head) == ("sample", "replicated")
    plan = read(MESH + rule(match="stage*", split="sample") + rule(match="head", split="replicated"))
    assert (plan.stem, plan.head) == ("sample", "replicated")


def test_a_rank_may_hold_nothing(read: Callable[..., Plan]) -> None:
    """Counts of zero are a placement like any other."""
    plan = read(
        MESH
        + rule(match="stage1.*", split="branch", counts=[4, 0])
        + rule(match="stage2.*", split="branch", counts=[0, 5])
    )
    assert plan.blocks["stage1.block1"].branches == ((0, 1, 2, 3), ())
    assert plan.held(MODEL.blocks[2], 1) == (0, 1, 2, 3, 4)


def test_one_rank_keeps_what_is_written(read: Callable[..., Plan]) -> None:
    """With one branch rank all splits are the same; the words stay as written."""
    plan = read("[mesh]\ndata = 2\nbranch = 1\n" + rule(match="*", split="branch", branches="even"))
    assert plan.blocks["stage2.block1"] == BranchPlacement("branch", ((0, 1, 2, 3, 4),))


HEAD = rule(match="stage2.*", split="sample")
WRONG = [
    # rules and the network
    (
        MESH + ALL + HEAD,
        'plan.toml:7: stage2.block1 is matched twice, by "*" (plan.toml:4) and "stage2.*" (plan.toml:7)',
    ),
    (
        MESH + HEAD,
        "plan.toml: no rule matches stage1.block1, stage1.block2: add [[blocks]] rules, or name a scheduler",
    ),
    (
        MESH + HEAD + rule(match="stage11.*", split="sample"),
        'plan.toml:7: match = "stage11.*" is for no block (did you mean "stage1.*"',
    ),
    (
        MESH + rule(match="zzz", split="sample"),
        "is for no block; the blocks are stage1.block1, stage1.block2, stage2",
    ),
    (
        MESH + rule(match="stage2.*", split="branch", counts=[3, 3]),
        "plan.toml:4: stage2.block1 has 5 branches, its counts [3, 3] place 6: make them sum to 5",
    ),
    (
        MESH + rule(match="stage2.*", split="branch", counts=[5]),
        "counts [5] are for 1 ranks, the mesh has 2: give 2",
    ),
    (
        MESH + rule(match="stage2.*", split="branch", branches=[[0, 1, 2, 3, 4]]),
        "are for 1 branch ranks, the mesh has 2",
    ),
    (
        MESH + rule(match="stage2.*", split="branch", branches=[[0, 1], [3, 4]]),
        "stage2.block1 has 5 branches, its branches [[0, 1], [3, 4]] leave out 2: place each of 0 to 4 exactly once",
    ),
    (
        MESH + rule(match="stage2.*", split="branch", branches=[[0, 1, 2], [2, 3, 4]]),
        "place 2 more than once",
    ),
    (
        MESH + rule(match="stage2.*", split="branch", branches=[[0, 1, 2], [3, 4, 5]]),
        "place 5, which it has not",
    ),
    (MESH + rule(match="stem", split="branch", counts=[1, 1]), "plan.toml:4: stem has no branches"),
    (
        MESH + rule(match="stage1.*", split="replicated"),
        'stage1.block1 has split "replicated", which is for stem and head',
    ),
    (MESH + rule(match="*", split="branch"), 'plan.toml:4: split = "branch" with nothing'),
    (MESH + rule(match="*", split="sample", counts=[1]), 'plan.toml:4: split = "sample" with counts'),
    (MESH + rule(match="*", split="branch", counts=[1], branches="even"), "with branches and counts"),
    # keys and types
    ("", "plan.toml:1: a plan file has no mesh: write a table, [mesh]"),
    ("\n[mesh]\ndata = 1\n", "plan.toml:2: [mesh] has no branch: write a positive integer"),
    (
        MESH + 'sheduler = "even"\n' + ALL,
        'plan.toml:4: [mesh] has no key "sheduler" (did you mean "scheduler"?)',
    ),
    (MESH + "[[block]]\n", 'plan.toml:4: a plan file has no key "block" (did you mean "blocks"?)'),
    (MESH + ALL + "count = [4]\n", 'plan.toml:7: [[blocks]] has no key "count" (did you mean "counts"?)'),
    (MESH + rule(match="*"), "plan.toml:4: [[blocks]] has no split"),
    (MESH + HEAD + rule(match="x", split="brunch"), "plan.toml:9: split is"),
    (MESH + rule(match="*", split="brunch"), 'plan.toml:6: split is "brunch": write "sample" or "branch"'),
    (MESH + rule(match=3, split="sample"), "plan.toml:5: match is 3"),
    (MESH + rule(match="", split="sample"), 'plan.toml:5: match is ""'),
    (MESH + rule(match="*", split="branch", counts=[5, -1]), "plan.toml:7: counts is [5, -1]"),
    (MESH + rule(match="*", split="branch", counts="even"), 'plan.toml:7: counts is "even"'),
    (MESH + rule(match="*", split="branch", branches=[0, 1]), "plan.toml:7: branches is [0, 1]"),
    ("[mesh]\ndata = true\nbranch = 2\n", "plan.toml:2: data is true: write a positive integer"),
    ("[mesh]\ndata = 1\nbranch = 0\n", "plan.toml:3: branch is 0"),
    ('[mesh]\ndata = 1\nbranch = "2"\n', 'plan.toml:3: branch is "2"'),
    ("mesh = 2\n", "plan.toml:1: mesh is 2: write a table, [mesh]"),
    ("blocks = 3\n[mesh]\ndata = 1\nbranch = 2\n", "plan.toml:1: blocks is 3: write tables, [[blocks]]"),
    # devices and samples
    (MESH + "samples = [1, 2]\n", "plan.toml:4: samples is [1, 2], the mesh has 1 replicas: give 1 numbers"),
    (MESH + "samples = [0]\n", "plan.toml:4: samples is [0]"),
    (
        MESH + 'devices = [["a:0"]]\n',
        "plan.toml:4: devices has rows of [1] devices, the mesh is 1x2 (data x branch)",
    ),
    (MESH + 'devices = [["a:0", "a:0"]]\n', "plan.toml:4: devices names a:0 more than once"),
    (MESH + 'devices = [["a:0", "a1"]]\n', 'plan.toml:4: device "a1" is not "host:index"'),
    (MESH + 'devices = "a:0"\n', 'plan.toml:4: devices is "a:0"'),
    # torn files
    (MESH + "[[blocks]\n", "plan.toml:4: not valid TOML"),
    (MESH + "[[blocks]]\nmatch = 'stage", "plan.toml:5: not valid TOML"),
    ("[mesh]\ndata = " + "1" * 5000, "not valid TOML"),
    (MESH + "data = 2\n", "plan.toml:4: not valid TOML"),
]


@pytest.mark.parametrize(("text", "message"), WRONG, ids=range(len(WRONG)))
def test_wrong_files(read: Callable[..., Plan], text: str, message: str) -> None:
    """Each broken rule is one message with the file, the line and the user's own words."""
    with pytest.raises(PlanError, match=re.escape(message)):
        read(text)


def test_unreadable_files(tmp_path: Path) -> None:
    """A missing file, a folder and bytes that are not text."""
    with pytest.raises(PlanError, match=r"none\.toml: cannot read the plan file: No such file"):
        read_plan(tmp_path / "none.toml")
    with pytest.raises(PlanError, match="cannot read the plan file: Is a directory"):
        read_plan(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b"[mesh]\n# \xe9\n")
    with pytest.raises(PlanError, match=r"latin\.toml:2: the plan file is not UTF-8"):
        read_plan(tmp_path / "latin.toml")


def test_lines_are_found_in_odd_files(tmp_path: Path) -> None:
    """Headers in a string or a comment are not rules; inline tables and odd spacing are."""
    path = tmp_path / "plan.toml"
    rules = (
        '  [[ blocks ]] # one\nmatch = "x"\nsplit = "sample"\n[["blocks"]]\nmatch = "y"\nsplit = "sample"\n'
    )
    scheduler = 'scheduler = """\n[[blocks]]\nmatch = 1\n"""\n#[[blocks]]\n'
    path.write_text(MESH + scheduler + rules)
    assert [rule.line for rule in read_plan(path).rules] == [9, 12]
    path.write_text('blocks = [{match = "x", split = "sample"}]\n' + MESH)
    assert [rule.line for rule in read_plan(path).rules] == [1]


def test_mesh_asked_for_is_the_files(read: Callable[..., Plan]) -> None:
    """A mesh on the command line and another in the file are a contradiction, not a choice."""
    assert read(MESH + ALL, mesh=(1, 2)).branch == 2
    with pytest.raises(
        PlanError, match=re.escape("plan.toml: its mesh is 1x2, 2x1 was asked for (data x branch)")
    ):
        read(MESH + ALL, mesh=(2, 1))


def test_devices_and_the_cluster(read: Callable[..., Plan]) -> None:
    """Absent devices are filled in, given ones must exist; without a cluster nothing is known."""
    cluster = Cluster(tuple(Device("a", index, "cpu") for index in range(3)))
    assert read(MESH + ALL).devices is None
    assert read(MESH + ALL, cluster=cluster).devices == (("a:0", "a:1"),)
    assert read(MESH + 'devices = [["a:2", "a:0"]]\n' + ALL, cluster=cluster).devices == (("a:2", "a:0"),)
    with pytest.raises(PlanError, match="devices b:0 are not in the cluster, which has a:0, a:1, a:2"):
        read(MESH + 'devices = [["a:2", "b:0"]]\n' + ALL, cluster=cluster)
    was = 'devices = [["a:2", "b:0"]]\nfilled_in = true\n'
    assert read(MESH + was + ALL, cluster=cluster).devices == (("a:0", "a:1"),), "no wish of anybody"
    auto = MESH + was.replace("b:0", "a:0") + 'scheduler = "even"\n'
    assert read(auto, cluster=cluster).devices == (("a:2", "a:0"),), "kept where it can be"
    auto = MESH + was + 'scheduler = "even"\n'
    assert read(auto, cluster=cluster).devices == (("a:0", "a:1"),)
    with pytest.raises(
        PlanError, match=r"plan\.toml: the mesh 4x2 needs 8 devices, the cluster has 3 \(a:0, a:1, a:2\)"
    ):
        read(MESH.replace("1", "4") + ALL, cluster=cluster)


BRANCH4 = BranchPlacement.from_counts([2, 2])


@pytest.mark.parametrize(
    ("blocks", "edges", "message"),
    [
        ({"a": SAMPLE, "b": SAMPLE, "c": SAMPLE}, {"stem": "sample", "head": "sample"}, None),
        ({"a": BRANCH4, "b": BRANCH4, "c": SAMPLE}, {"stem": "replicated", "head": "sample"}, None),
        (
            {"a": BRANCH4, "b": SAMPLE},
            {},
            'a and b share the parameter basis, and are placed apart ("branch" [[0, 1]',
        ),
        (
            {"a": BRANCH4, "b": BranchPlacement.from_counts([3, 1])},
            {},
            "a and b share the parameter basis, and are",
        ),
        (
            {"c": BranchPlacement.from_counts([3, 2])},
            {},
            "c and d share the parameter factors, and have 5 and 4 branches",
        ),
        ({"d": BRANCH4}, {}, "d and c share the parameter factors, and have 4 and 5 branches: make both"),
        (
            {"e": BRANCH4},
            {},
            'e and head share the parameter tied, and head has no branches: make both "sample"',
        ),
        (
            {"e": SAMPLE},
            {"head": "replicated"},
            "head and e share the parameter tied, and head has no branches",
        ),
    ],
)
def test_shared_parameters(
    blocks: dict[str, BranchPlacement], edges: dict[str, Any], message: str | None
) -> None:
    """What shares a parameter is placed alike, or the error names both and the parameter."""
    model = ModelSpec(
        (
            BlockSpec("a", 4, shares=frozenset({"basis"})),
            BlockSpec("b", 4, shares=frozenset({"basis"})),
            BlockSpec("c", 5, shares=frozenset({"factors"})),
            BlockSpec("d", 4, shares=frozenset({"factors"})),
            BlockSpec("e", 4, shares=frozenset({"tied"})),
        ),
        head_shares=frozenset({"tied"}),
    )
    assert model.units == (("stem",), ("a", "b"), ("c", "d"), ("e", "head"))
    if message is None:
        check_placements(model, 2, blocks, edges)
    else:
        with pytest.raises(PlanError, match=re.escape(message)):
            check_placements(model, 2, blocks, edges)


def test_one_rank_shares_everything() -> None:
    """With one branch rank unlike words mean the same placement."""
    model = ModelSpec((BlockSpec("a", 2, shares=frozenset("p")), BlockSpec("b", 3, shares=frozenset("p"))))
    plan = Plan(2, 1, {"a": BranchPlacement.even(2, 1), "b": SAMPLE}, "replicated", "sample")
    plan.check(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": 0}, "the mesh is 0x2 (data x branch): both axes need at least 1"),
        ({"blocks": {"a": SAMPLE}}, "no placement for b: place every block"),
        ({"blocks": {"a": SAMPLE, "b": SAMPLE, "c": SAMPLE}}, 'the network has no block "c"'),
        ({"blocks": {"a": SAMPLE, "b": BranchPlacement("branch")}}, 'b has split "branch" and no branches'),
        (
            {"blocks": {"a": SAMPLE, "b": BranchPlacement("sample", ((0,), (1,)))}},
            'b has split "sample" and branches',
        ),
        ({"blocks": {"a": SAMPLE, "b": BranchPlacement("both")}}, 'b has split "both"'),  # type: ignore[arg-type]
        ({"stem": "branch"}, 'stem has split "branch": it can be "sample" or "replicated"'),
        ({"samples": (1, 1)}, "samples is [1, 1], the mesh has 1 replicas"),
        ({"devices": (("a:0",), ("a:1",))}, "devices has rows of [1, 1] devices, the mesh is 1x2"),
    ],
)
def test_plan_check(change: dict[str, Any], message: str) -> None:
    """A plan made in code is held to the same rules."""
    right: dict[str, Any] = {"data": 1, "branch": 2, "blocks": {"a": SAMPLE, "b": SAMPLE}, "stem": "sample"}
    model = ModelSpec((BlockSpec("a", 2), BlockSpec("b", 2)))
    Plan(**right, head="sample").check(model)
    with pytest.raises(PlanError, match=re.escape(message)):
        Plan(**right | {"head": "sample"} | change).check(model)


@pytest.mark.parametrize("blocks", [(), (BlockSpec("a", 1), BlockSpec("a", 2)), (BlockSpec("stem", 1),)])
def test_model_spec(blocks: tuple[BlockSpec, ...]) -> None:
    """A network without blocks, or with two elements of one name, cannot be placed."""
    with pytest.raises(PlanError, match=r"no blocks|are named"):
        ModelSpec(blocks)
    with pytest.raises(PlanError, match="give at least 1 of each"):
        BlockSpec("a", 0)


def test_written_files_are_readable() -> None:
    """Neighbours placed alike are one rule where a glob is for exactly them."""
    two = BranchPlacement.from_counts([3, 2])
    blocks = {"s1.a": SAMPLE, "s1.b": SAMPLE, "s2.a": two, "s2.b": BranchPlacement("branch", ((0, 2), (1,)))}
    assert (
        format_plan(Plan(1, 2, blocks, "sample", "replicated", (("a:0", "a:1"),), (4,), "even"))
        == """[mesh]
data = 1
branch = 2
devices = [["a:0", "a:1"]]
samples = [4]
scheduler = "even"

[[blocks]]
match = "stem"
split = "sample"

[[blocks]]
match = "s1.*"
split = "sample"

[[blocks]]
match = "s2.a"
split = "branch"
counts = [3, 2]

[[blocks]]
match = "s2.b"
split = "branch"
branches = [[0, 2], [1]]

[[blocks]]
match = "head"
split = "replicated"
"""
    )
    everything = format_plan(Plan(2, 1, dict.fromkeys(blocks, SAMPLE), "sample", "sample"))
    assert everything == '[mesh]\ndata = 2\nbranch = 1\n\n[[blocks]]\nmatch = "*"\nsplit = "sample"\n'


# Names that look like globs, quotes, escapes, other groups' prefixes, stem and head with more.
NAMES = st.one_of(
    st.builds("{}.{}".format, st.sampled_from(["s1", "s2", "s1.x", "s*", "stem"]), st.sampled_from("abcd*")),
    st.sampled_from(["\x7f", '"\\', "\n", "[a]", "\u2028é"]),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=4),
).filter(lambda name: name not in ("stem", "head"))


@st.composite
def plans(draw: st.DrawFn) -> tuple[ModelSpec, Plan]:
    """A network and any right plan for it."""
    data, branch = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    names = draw(st.lists(NAMES, min_size=1, max_size=7, unique=True))
    if draw(st.booleans()):
        names.sort()  # neighbours of one group
    most = draw(st.integers(1, 4))
    specs, blocks = [], {}
    for name in names:
        num = draw(st.integers(1, most))
        ranks = draw(
            st.one_of(
                st.none(),
                st.just([0] * num),
                st.lists(st.integers(0, branch - 1), min_size=num, max_size=num),
            )
        )
        specs.append(BlockSpec(name, num))
        held = ranks and tuple(tuple(b for b in range(num) if ranks[b] == rank) for rank in range(branch))
        blocks[name] = BranchPlacement("branch", held) if held else SAMPLE
    edge: st.SearchStrategy[Any] = st.sampled_from(["sample", "replicated"])
    devices = tuple(tuple(f"host{row}:{column}" for column in range(branch)) for row in range(data))
    plan = Plan(
        data,
        branch,
        blocks,
        stem=draw(edge),
        head=draw(edge),
        devices=draw(st.sampled_from([None, devices])),
        samples=draw(
            st.one_of(st.none(), st.lists(st.integers(1, 9), min_size=data, max_size=data).map(tuple))
        ),
        scheduler=draw(st.one_of(st.none(), st.sampled_from(["even", 'o"d\\d']))),
    )
    return ModelSpec(tuple(specs)), plan


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plans())
def test_write_read_resolve_is_the_identity(tmp_path: Path, pair: tuple[ModelSpec, Plan]) -> None:
    """Any right plan survives its file, also under another order of rules, and needs no cluster for it."""
    model, plan = pair
    plan.check(model)
    write_plan(plan, tmp_path / "plan.toml")
    back = read_plan(tmp_path / "plan.toml").resolve(model)
    assert back == plan
    assert list(back.blocks) == list(plan.blocks)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 12), st.integers(1, 8))
def test_even_counts(num_branches: int, num_ranks: int) -> None:
    """Every branch once and in order; counts differ by at most one, larger first."""
    branches = BranchPlacement.even(num_branches, num_ranks).branches
    assert branches is not None
    assert [index for held in branches for index in held] == list(range(num_branches))
    counts = [len(held) for held in branches]
    assert counts == sorted(counts, reverse=True)
    assert max(counts) - min(counts) <= 1
