"""CRU-Net: its integers, the unit against a plain torch one, shared factors, the parallel form."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import cru_cases
import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn import functional as F

from anabranch.blocks import ModelError, Network, count
from anabranch.blocks.block_term import BlockTerms
from anabranch.blocks.branch_sum import branch_sums
from anabranch.blocks.cru_net import READY, cru_net, model_size_mb, preact_resnext
from anabranch.blocks.cru_unit import ColumnSum, PreConv, ResidualUnit, TermSum, cru_unit, plain_unit
from anabranch.runtime.model_spec import spec_of
from anabranch.schedulers import BranchPlacement, Plan, PlanError

# name, params, MACs, the paper's model size in MB
COUNTS = [
    ("cru_net_56", 25_609_384, 5_634_153_472, 98),
    ("cru_net_116", 43_656_136, 12_645_923_328, 168),
    ("resnext50_nx1d", 24_854_432, 4_245_629_888, 96),
]
# family options, the paper's model size in MB (Tables 2-5)
SIZES: list[tuple[Any, dict[str, Any], int]] = [
    (preact_resnext, {}, 96),
    (preact_resnext, {"cardinality": 2, "base_width": 40}, 98),
    (preact_resnext, {"cardinality": 136, "base_width": 1}, 97),
    (preact_resnext, {"cardinality": 1, "base_width": 64}, 98),
    (preact_resnext, {"depth": 101}, 170),
    (preact_resnext, {"depth": 101, "cardinality": 64}, 320),
    (preact_resnext, {"depth": 101, "num_classes": 365}, 165),
    (cru_net, {"depth": 116, "num_classes": 365}, 163),
    # Table 3's 98 MB; D = 640, as with 32×4d, makes 99: the largest multiple of 8 that fits
    (cru_net, {"cardinality": 136, "base_width": 1, "cru_widths": (0, 0, 632, 0)}, 98),
    # Table 4's wider net: the paper does not give D; this one fits
    (cru_net, {"depth": 116, "cardinality": 64, "cru_widths": (0, 576, 1152, 0)}, 318),
]


def ready(name: str) -> Network:
    family, options = READY[name]
    families: dict[str, Callable[..., Network]] = {"cru_net": cru_net, "preact_resnext": preact_resnext}
    return families[family](**options)


@pytest.mark.parametrize(("name", "params", "macs", "size"), COUNTS)
def test_counts(name: str, params: int, macs: int, size: int) -> None:
    with torch.device("meta"):
        network = ready(name)
        counted = count(network)
    assert (counted.params, counted.macs, model_size_mb(network)) == (params, macs, size)


def test_counts_of_the_plain_network() -> None:
    with torch.device("meta"):
        counted = count(preact_resnext())
    assert (counted.params, counted.macs) == (25_025_064, 4_230_479_872)


@pytest.mark.parametrize(("family", "options", "size"), SIZES)
def test_model_sizes(family: Any, options: dict[str, Any], size: int) -> None:
    with torch.device("meta"):
        assert model_size_mb(family(**options)) == size


def test_three_pairs_of_factors() -> None:
    """CRU-Net-116: units 1-6 of conv3 share a pair; 1-6, 7-12, 13-18 of conv4 three others; 32 branches."""
    with torch.device("meta"):
        network = ready("cru_net_116")
    users: dict[int, list[str]] = {}
    for stage, rows in network.blocks.items():
        for block, unit in rows.items():  # type: ignore[operator]
            core = unit.residual[0].core.weight
            assert len(unit.residual) == (2 if core.shape[1] == 1 else 1)
            users.setdefault(id(core), []).append(f"{stage}.{block}")
    shared = [names for names in users.values() if len(names) > 1]
    groups = [("stage2", range(1, 7)), *(("stage3", range(a, a + 6)) for a in (1, 7, 13))]
    assert shared == [[f"{stage}.block{i}" for i in units] for stage, units in groups]
    spec = spec_of(network)
    assert {(b.num_branches, b.num_sums) for b in spec.blocks} == {(32, 1), (32, 2)}
    assert all(len(b.shares) == (2 if b.num_sums == 2 else 0) for b in spec.blocks)


def by_hand(unit: ResidualUnit, x: Tensor) -> Tensor:
    """The unit from SEEDS' words, in functional torch, training-mode statistics over the whole batch."""

    def pre(norm: Any, a: Tensor) -> Tensor:
        return F.relu(F.batch_norm(a, None, None, norm.weight, norm.bias, True))

    d = skip = x
    first = unit.residual[0]
    assert isinstance(first, TermSum)
    if isinstance(unit.widen, PreConv):
        d = F.conv2d(pre(unit.widen.norm, x), unit.widen.conv.weight)
    if isinstance(unit.shortcut, PreConv):
        weight = (unit.widen if isinstance(unit.widen, PreConv) else unit.shortcut).conv.weight
        skip = F.conv2d(pre(unit.shortcut.norm, x), weight, stride=first.core.stride)
    a = F.conv2d(pre(first.norm, d), first.reduce.weight)
    if first.inner_norm is not None:
        a = pre(first.inner_norm, a)
    groups = first.core.weight.shape[0] // first.core.weight.shape[1]
    a = F.conv2d(a, first.core.weight, stride=first.core.stride, padding=1, groups=groups)
    a = F.conv2d(pre(first.core_norm, a), first.expand.weight)
    if len(unit.residual) == 2:
        second = unit.residual[1]
        assert isinstance(second, ColumnSum)
        a = F.conv2d(pre(second.norm, a), second.expand.weight)
    return skip + a


def shaken(unit: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(11)
    for parameter in unit.double().parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data += 0.1 * noise
    return unit


UNITS = {
    "cru": lambda: cru_unit(4, 8, 12, 8, 12),
    "cru first": lambda: cru_unit(4, 6, 12, 8, 12, 2),
    "cru groups": lambda: cru_unit(2, 8, 12, 8, 4),
    "standard": lambda: cru_unit(4, 8, 12, 8, 12, form="standard"),
    "standard first": lambda: cru_unit(4, 6, 12, 8, 12, 2, form="standard"),
    "plain": lambda: plain_unit(4, 8, 8, 8, 4, 1),
    "plain first": lambda: plain_unit(2, 6, 8, 8, 4, 2),
    "plain widening": lambda: plain_unit(2, 6, 8, 8, 4, 1),
}


@pytest.mark.parametrize("name", UNITS)
def test_unit_is_the_papers(name: str) -> None:
    """Both forms of Figure 3, first units and plain ones, against functional torch: output and gradients."""
    unit = shaken(UNITS[name]())
    assert isinstance(unit, ResidualUnit)
    x = torch.randn(3, 8 if "first" not in name and "wid" not in name else 6, 6, 6, dtype=torch.float64)
    parameters = list(unit.parameters())
    results = []
    for forward in (unit, lambda x: by_hand(unit, x)):
        y = forward(x)
        results.append([y, *torch.autograd.grad((y * y).sum(), parameters)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", UNITS)
def test_looped_is_fused(name: str) -> None:
    unit = shaken(UNITS[name]())
    x = torch.randn(3, 8 if "first" not in name and "wid" not in name else 6, 6, 6, dtype=torch.float64)
    looped = copy.deepcopy(unit)
    for _, block_sum in branch_sums(looped):
        block_sum.execution = "looped"
    torch.testing.assert_close(looped(x), unit(x), rtol=1e-12, atol=1e-12)
    for (key, a), (_, b) in zip(looped.named_buffers(), unit.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=key)


def test_bundling_changes_nothing() -> None:
    """num_branches is only how the terms are dealt: same initialisation, same function."""
    made = []
    for num_branches in (1, 2, 4):
        torch.manual_seed(0)
        network = cru_net(
            **cru_cases.SMALL, blocks_per_stage=(1, 2), cru_widths=(0, 12), units_per_group=2,
            num_branches=num_branches,
        )  # fmt: skip
        made.append(network.double())
    x = torch.randn(2, 2, 8, 8, dtype=torch.float64)
    assert {s.num_branches for _, s in branch_sums(made[2])} == {4}
    for other in made[1:]:
        torch.testing.assert_close(other(x), made[0](x), rtol=1e-12, atol=1e-12)


def test_gradients_of_shared_factors_add_up() -> None:
    """The gradient of a shared factor is the sum of what each unit alone would give it."""
    tied = shaken(cru_cases.NETWORKS["cru"]())
    free = copy.deepcopy(tied)
    for _, block_sum in branch_sums(free):
        if isinstance(block_sum, TermSum):
            for conv in (block_sum.reduce, block_sum.core):
                conv.weight = nn.Parameter(conv.weight.detach().clone())
    x = torch.randn(4, 2, 8, 8, dtype=torch.float64)
    for network in (tied, free):
        y = network(x)
        (y * y).sum().backward()
    checked = 0
    for first in (1, 3):
        for name in ("reduce", "core"):
            path = "blocks.stage2.block{}.residual.0.{}.weight"
            together = tied.get_parameter(path.format(first, name))
            assert together is tied.get_parameter(path.format(first + 1, name))
            mine, next_ = (free.get_parameter(path.format(first + i, name)).grad for i in (0, 1))
            assert mine is not None
            assert next_ is not None
            assert min(mine.abs().max(), next_.abs().max()) > 0
            torch.testing.assert_close(together.grad, mine + next_, rtol=1e-10, atol=1e-12)
            checked += 1
    assert checked == 4


def test_a_group_is_one_collective_factorization() -> None:
    """The standard units of a sharing group, read as factors: Eq. 12's X⁺ with one core and one A3."""
    network = cru_net(
        **cru_cases.SMALL, blocks_per_stage=(1, 6), cru_widths=(0, 12), cru_cardinality=4, form="standard"
    ).double()
    units = [s.terms() for name, s in branch_sums(network) if "stage2" in name and isinstance(s, TermSum)]
    collective = BlockTerms.collect_units(units)
    assert (collective.num_terms, tuple(collective.core.shape[3:])) == (4, (3, 3))
    assert collective.a4.shape[1] == 6 * 16
    x = torch.randn(2, 16, 4, 4, dtype=torch.float64)
    parts = collective.convolve(x).chunk(6, 1)
    for unit, part in zip(units, parts, strict=True):
        dense = F.conv2d(x, unit.kernel(), padding=1)
        torch.testing.assert_close(dense, part, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cru_net(57), r"no CRU-Net of depth 57: use one of \[56, 116\]"),
        (lambda: preact_resnext(52), "no pre-activated ResNeXt of depth 52"),
        (lambda: cru_net(56, units_per_group=4), "stage3 has 6 CRUs, which are no whole groups"),
        (lambda: cru_net(56, cru_widths=(0, 352, 640, 0)), "stage2 has 4 CRUs"),
        (lambda: cru_net(56, cru_widths=(0, 640)), "must be 4 numbers"),
        (lambda: cru_net(blocks_per_stage=(3, 6)), "blocks_per_stage needs cru_widths"),
        (lambda: cru_net(56, cru_widths=(0, 0, 640, 0), cru_cardinality=48), "stage3: 640 channels do not"),
        (lambda: cru_net(56, num_branches=24), "stage1: 32 terms do not make 24 equal branches"),
        (lambda: cru_net(56, cardinality=24, num_branches=3), "stage3: 640 terms do not make 3"),
        (lambda: cru_net(56, num_branches=0), "do not make 0 equal branches"),
        (lambda: cru_net(56, form="left"), "form is 'improved' or 'standard', got 'left'"),  # type: ignore[arg-type]
        (lambda: cru_net(56, units_per_group=0), "units_per_group is at least 1, got 0"),
        (lambda: cru_net(56, cardinality=0), "cardinality is at least 1, got 0"),
        (lambda: preact_resnext(doubles="depth"), "doubles is"),  # type: ignore[arg-type]
        (lambda: preact_resnext(stem="mnist"), "stem is"),  # type: ignore[arg-type]
        (lambda: preact_resnext(blocks_per_stage=()), "blocks_per_stage"),
        (lambda: ColumnSum(5, 12, 8), "12 channels do not make 5 equal branches"),
        (
            lambda: cru_unit(4, 8, 12, 8, 12, shares=cru_unit(4, 8, 16, 8, 16)),
            "shared factors of shapes .* do not fit",
        ),
    ],
)
def test_bad_input(make: Any, message: str) -> None:
    with torch.device("meta"), pytest.raises(ModelError, match=message):
        make()


def plan_of(data: int, branch: int, **rows: tuple[tuple[int, ...], ...] | None) -> Plan:
    """A plan of the small CRU-Nets; rows: branches by rank of "plain", "first", "second" (None: sample)."""
    names = {"plain": ["stage1.block1"], "first": ["stage2.block1", "stage2.block2"]}
    names["second"] = ["stage2.block3", "stage2.block4"]
    placed = {
        name: BranchPlacement("sample") if held is None else BranchPlacement("branch", held)
        for key, held in rows.items()
        for name in names[key]
    }
    return Plan(data, branch, placed, "sample", "sample")


EVEN, UNEVEN, MIXED, ALL = ((0, 1), (2, 3)), ((0, 1, 3), (2,)), ((3, 0), (1, 2)), ((0, 1, 2, 3), ())


def plans(data: int) -> dict[str, Plan]:
    return {
        "even": plan_of(data, 2, plain=EVEN, first=EVEN, second=EVEN),
        "uneven": plan_of(data, 2, plain=MIXED, first=UNEVEN, second=ALL),
        "mixed": plan_of(data, 2, plain=None, first=MIXED, second=None),
        "mixed2": plan_of(data, 2, plain=UNEVEN, first=None, second=UNEVEN),
    }


@pytest.mark.parametrize("data", [1, 2])
def test_parity(data: int) -> None:
    """CRUs of both sums and shared factors, plain units, the other forms: one trajectory under every plan."""
    by_name = plans(data)
    cases: list[tuple[str, Plan, dict[str, Any]]] = [("cru", plan, {}) for plan in by_name.values()]
    cases += [("standard", by_name["uneven"], {}), ("grouped", by_name["mixed2"], {})]
    cases.append(("cru", by_name["uneven"], {"execution": "looped", "bn_batch_size": 8, "accumulation": 1}))
    rows = {"stage1.block1": MIXED, "stage2.block1": UNEVEN}
    placed = {name: BranchPlacement("branch", held) for name, held in rows.items()}
    cases.append(("plain", Plan(data, 2, placed, "sample", "sample"), {}))
    reports = run_ranks(2 * data, cru_cases.parity, cases)[0]
    for (network, plan, options), report in zip(cases, reports, strict=True):
        where = f"{network} {plan.blocks} {options}: {report.worst}"
        assert report.max_relative_difference <= 1e-9, where
        assert report.num_compared > 100, where


def test_parity_sees_factors_that_came_apart() -> None:
    report = run_ranks(2, cru_cases.untied, plans(1)["even"])[0]
    assert report.max_relative_difference > 1e-6


def test_an_owner_stores_shared_factors_once() -> None:
    """Four units, two pairs of factors: each rank has its rows of each pair once, used by two units."""
    held = run_ranks(2, cru_cases.stored, plan_of(1, 2, plain=EVEN, first=UNEVEN, second=EVEN))
    path = "blocks.stage2.block{}.residual.0.{}.weight"
    for rank, share in enumerate((9, 3)):  # channels of the first group's branches, 3 to a branch
        assert held[rank][path.format(1, "reduce")] == (share * 16, 2)
        assert held[rank][path.format(1, "core")] == (share * 9, 2)
        assert held[rank][path.format(3, "reduce")] == (6 * 16, 2)
        assert path.format(2, "core") not in held[rank]


def test_units_that_share_are_placed_alike() -> None:
    network = cru_cases.NETWORKS["cru"]()
    plan = plans(1)["even"]
    plan.check(spec_of(network))
    for other in (BranchPlacement("branch", UNEVEN), BranchPlacement("sample")):
        blocks = {**plan.blocks, "stage2.block2": other}
        with pytest.raises(PlanError, match=r"stage2\.block1.*stage2\.block2|stage2\.block2.*stage2\.block1"):
            Plan(1, 2, blocks, "sample", "sample").check(spec_of(network))
