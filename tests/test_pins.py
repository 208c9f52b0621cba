"""Pins, planned-for clusters, costs without hardware, explanations."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from anabranch.schedulers import (
    BlockSpec,
    Cluster,
    Device,
    ModelSpec,
    PlanError,
    format_plan,
    parse_plan,
    read_plan,
    schedule,
)
from anabranch.schedulers.analytic import ElementShape, PartShape, analytic_costs
from anabranch.schedulers.cluster_file import parse_bandwidth, parse_devices, read_cluster
from anabranch.schedulers.costs import Batch, ParameterBytes
from anabranch.schedulers.explain import explain
from anabranch.schedulers.plan_writer import format_plan_file
from anabranch.schedulers.request import Request
from anabranch.schedulers.search import search
from anabranch.schedulers.synthetic import synthetic_request

MODEL = ModelSpec((BlockSpec("s1.a", 4), BlockSpec("s2.a", 4), BlockSpec("s2.b", 3)))
HOSTS = Cluster(tuple(Device(host, i, "cpu") for host in ("a", "b") for i in range(2)))
MESH = "[mesh]\ndata = 1\nbranch = 4\n"
BATCH = Batch(16, 4)


def shapes() -> dict[str, ElementShape]:
    """Four branches, heavy on parameters: branches pay."""
    edge = ElementShape(PartShape(1e6, 1e4), input_bytes=1e4)
    found = {"stem": edge}
    for block in MODEL.blocks:
        found[block.name] = ElementShape(
            PartShape(1e5, 1e4),
            (PartShape(1e8, 1e5),) * block.num_branches,
            1e3,
            1e3,
            1e4,
            ParameterBytes(100, (10**7,) * block.num_branches),
        )
    return {**found, "head": edge}


def pinned(
    tmp_path: Path, text: str, scheduler: str = "optimal"
) -> dict[str, tuple[tuple[int, ...], ...] | None]:
    path = tmp_path / "plan.toml"
    path.write_text(MESH + f'scheduler = "{scheduler}"\n' + text)
    cluster = replace(
        HOSTS, local=parse_devices("2xcpu").local, across=parse_devices("2x1xcpu", "1Gbit/s").across
    )
    plan = read_plan(path).resolve(MODEL, cluster, costs=analytic_costs(shapes(), ("cpu",)), batch=BATCH)
    return {name: placement.branches for name, placement in plan.blocks.items()}


def test_partial_files_are_written_as_they_were_read() -> None:
    """Rules, pins and the scheduler for the rest; a resolved plan takes the pins along."""
    text = (
        MESH + 'scheduler = "optimal"\n\n[[blocks]]\nmatch = "s1.*"\nsplit = "branch"\nbranches = "even"\n'
        '\n[[blocks]]\nmatch = "s2.b"\nsplit = "branch"\ncounts = [1, 1, 1, 0]\n'
        '\n[[pins]]\nmatch = "s2.*"\nbranch = 0\nhost = "b"\n'
    )
    file = parse_plan(text)
    assert format_plan_file(file) == text
    plan = schedule("even", MODEL, HOSTS, mesh=(1, 4))
    again = parse_plan(format_plan(plan, file.pins))
    assert [(pin.match, pin.branch, pin.host) for pin in again.pins] == [("s2.*", 0, "b")]
    assert again.pins[0].line > 0


@pytest.mark.parametrize("scheduler", ["optimal", "greedy"])
def test_pins_are_kept(tmp_path: Path, scheduler: str) -> None:
    """Branches 0 and 1 of stage 2 on host b, whatever is best otherwise."""
    pins = "".join(f'[[pins]]\nmatch = "s2.*"\nbranch = {branch}\nhost = "b"\n' for branch in (0, 1))
    placed = pinned(tmp_path, pins, scheduler)
    for name in ("s2.a", "s2.b"):
        held = placed[name]
        assert held is not None
        assert {0, 1} <= {*held[2], *held[3]}  # the ranks on b


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '[[pins]]\nmatch = "s2.*"\nbranch = 0\nhost = "a"\n\n[[pins]]\nmatch = "s2.a"\nbranch = 0\nhost = "b"\n',
            'plan.toml:10: branch 0 of s2.a is pinned to "b", and {0}plan.toml:5 pins it to "a"; a branch has one '
            "branch rank, and no branch rank of the mesh 1x4 has devices on both: drop one of them",
        ),
        ('[[pins]]\nmatch = "s2.b"\nbranch = 3\nhost = "a"\n', "which has branches 0 to 2: name one of them"),
        ('[[pins]]\nmatch = "s2.b"\nbranch = 0\nhost = "c"\n', 'pinned to "c", the cluster has a, b'),
        ('[[pins]]\nmatch = "s3.*"\nbranch = 0\nhost = "a"\n', 'the pin\'s match = "s3.*" is for no block'),
        (
            '[[blocks]]\nmatch = "s1.a"\nsplit = "sample"\n[[pins]]\nmatch = "s1.a"\nbranch = 0\nhost = "a"\n',
            'and a [[blocks]] rule splits it "sample": drop one of them',
        ),
        (
            '[[blocks]]\nmatch = "*"\nsplit = "branch"\nbranches = "even"\n'
            '[[pins]]\nmatch = "s1.a"\nbranch = 0\nhost = "b"\n',
            "the plan has it on branch rank 0 on a: place it there",
        ),
        (
            '[[pins]]\nmatch = "s1.a"\nbranch = -1\nhost = "a"\n',
            "plan.toml:7: branch is -1: write the number of",
        ),
        ('[[pins]]\nmatch = "s1.a"\nhost = "a"\n', "plan.toml:5: [[pins]] has no branch"),
    ],
)
def test_pins_that_cannot_hold(tmp_path: Path, text: str, message: str) -> None:
    """One message with the pins, where they stand, and the remedy."""
    with pytest.raises(PlanError, match=re.escape(message.format(f"{tmp_path}/"))):
        pinned(tmp_path, text)


def test_a_scheduler_that_breaks_a_pin(tmp_path: Path) -> None:
    """`even` knows nothing of pins: its plan is refused by the pin it breaks."""
    with pytest.raises(
        PlanError, match=r'branch 3 of s1\.a is pinned to "a", the plan has it on branch rank 3 on b'
    ):
        pinned(tmp_path, '[[pins]]\nmatch = "s1.a"\nbranch = 3\nhost = "a"\n', "even")


def test_manual(tmp_path: Path) -> None:
    """It places nothing by itself."""
    with pytest.raises(
        PlanError, match=r'"manual" places only what the plan file says, "s1\.a" is in no rule'
    ):
        pinned(tmp_path, "", "manual")
    with pytest.raises(PlanError, match="there is none: give a plan file"):
        schedule("manual", MODEL, HOSTS)


def test_clusters_that_are_not_here(tmp_path: Path) -> None:
    """Hosts × devices × kind, bandwidths, and a file of hosts."""
    cluster = parse_devices("4x8xH200", "200Gbit/s")
    assert (len(cluster.devices), cluster.devices[-1].host, cluster.devices[0].memory_bytes) == (
        32,
        "host3",
        141 * 10**9,
    )
    assert cluster.across is not None
    assert cluster.across.bandwidth_bytes_per_s == 25e9
    assert len(parse_devices("8xNVIDIA A100").devices) == 8
    assert [parse_bandwidth(text) for text in ("25GB/s", "100 Mbit/s", "1.5Gbps")] == [25e9, 1.25e7, 1.875e8]
    for text, message in (
        ("8xH300", "no figures for a device"),
        ("H200", "names no devices"),
        ("0xH200", "names no"),
    ):
        with pytest.raises(PlanError, match=message):
            parse_devices(text)
    with pytest.raises(PlanError, match="has 2 hosts: give the link between them"):
        parse_devices("2x1xL4")
    path = tmp_path / "cluster.toml"
    path.write_text(
        '[[hosts]]\nname = "a"\nkind = "L4"\nspeeds = [1.0, 0.5]\n'
        '[[hosts]]\nname = "b"\nkind = "P100"\ndevices = 1\nmemory_gb = 12\n'
        '[links]\nacross = "10Gbit/s"\nocculancy = 1.0\n'
    )
    with pytest.raises(
        PlanError, match=r'cluster.toml: \[links\] has no key "occulancy" \(did you mean "occupancy"'
    ):
        read_cluster(path)
    path.write_text(path.read_text().replace("occul", "occup"))
    cluster = read_cluster(path)
    assert [(str(d), d.kind, d.speed) for d in cluster.devices] == [
        ("a:0", "L4", 1.0),
        ("a:1", "L4", 0.5),
        ("b:0", "P100", 1.0),
    ]
    assert cluster.devices[2].memory_bytes == 12 * 10**9
    path.write_text('[[hosts]]\nname = "a"\nkind = "L4"\n')
    with pytest.raises(PlanError, match="either devices or speeds"):
        read_cluster(path)


def test_a_plan_without_hardware() -> None:
    """Costs from data sheets, labelled; a faster device is faster."""
    seconds = []
    for kind in ("K80", "V100", "H200"):
        cluster = parse_devices(f"2x4x{kind}", "100Gbit/s")
        result = search(Request(MODEL, cluster, costs=analytic_costs(shapes(), (kind,)), batch=BATCH))
        assert result.prediction.label == "predicted, not calibrated"
        seconds.append(result.prediction.total_s)
    assert seconds == sorted(seconds, reverse=True)


def test_explain() -> None:
    """Data-heavy early stages pay by sample from a small batch on; late ones need little bandwidth."""
    request = synthetic_request(8, 8)
    request = replace(request, mesh=(2, 4))
    result = search(request)
    rows = explain(result.plan, request)
    assert [row.stage for row in rows] == ["stage1", "stage2", "stage3", "stage4"]
    for row in rows:
        best = row.sample_s if row.split == "sample" else row.branch_s
        assert result.prediction.total_s <= min(row.sample_s, row.branch_s) + 1e-12
        assert row.split == "mixed" or best == pytest.approx(result.prediction.total_s)
        assert request.batch is not None
        if row.break_even_batch is not None:
            assert (row.break_even_batch <= request.batch.num_samples) == (row.sample_s <= row.branch_s)
    assert (rows[0].break_even_batch or 0) < (rows[-1].break_even_batch or 10**9)
    assert explain(replace(result.plan, data=8, branch=1), request) == []


@pytest.mark.parametrize(("num_devices", "mesh"), [(8, (2, 4)), (16, (4, 4)), (16, (1, 16))])
def test_explained_bandwidths_are_of_the_branch_groups_link(num_devices: int, mesh: tuple[int, int]) -> None:
    """With that link, and no other, a little slower or faster than said, the stage's other split is the faster one."""
    request = replace(synthetic_request(8, num_devices), mesh=mesh)
    plan = search(request).plan
    link = "across" if mesh[1] > 8 else "local"

    def pays(bandwidth: float) -> list[bool]:
        known = getattr(request.cluster, link)
        changed = {link: replace(known, bandwidth_bytes_per_s=bandwidth)}
        rows = explain(plan, replace(request, cluster=replace(request.cluster, **changed)))
        return [row.branch_s < row.sample_s for row in rows]

    rows, at_lowest, at_highest = explain(plan, request), pays(1e3), pays(1e13)
    for number, row in enumerate(rows):
        least, most = row.needed_bytes_per_s, row.most_bytes_per_s
        assert at_lowest[number] == (least == 0.0)
        assert at_highest[number] == (least is not None and most is None)
        if least:
            assert not pays(0.99 * least)[number]
            assert pays(1.01 * least)[number]
        if most:
            assert pays(0.99 * most)[number]
            assert not pays(1.01 * most)[number]
    assert len({(row.needed_bytes_per_s is None, row.needed_bytes_per_s == 0.0) for row in rows}) > 1
