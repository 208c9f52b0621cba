"""Shared filter bases: every integer of the paper's tables, the blocks' functions, the transformation, parity."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from basis_cases import Case, parity, seeded
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn import functional as F

from anabranch.blocks import build, count
from anabranch.blocks.branch_sum import branch_sums
from anabranch.blocks.densenet import DenseLayer, densenet
from anabranch.blocks.errors import ModelError
from anabranch.blocks.filter_basis import FilterBasis, new_basis
from anabranch.blocks.filter_sum import FilterSum
from anabranch.blocks.mobilenet import InvertedResidual, mobilenet_v2
from anabranch.blocks.multi_resnet import pre_resnet
from anabranch.blocks.network import named_blocks
from anabranch.blocks.resnext import resnext
from anabranch.blocks.shared_basis import basis_groups
from anabranch.blocks.shared_resnet import (
    BasicBlock,
    Bottleneck,
    PathBottleneck,
    SharedBasicBlock,
    cifar_resnet,
    resnet,
)
from anabranch.blocks.shared_transform import share_bases, shared_basis, tie_convolutions
from anabranch.runtime.config import OptimizerConfig
from anabranch.runtime.model_spec import spec_of
from anabranch.runtime.verify import Report
from anabranch.schedulers import BranchPlacement, Plan, PlanError

# ready name, params, MACs
COUNTS = [
    ("resnet34", 21_797_672, 3_663_761_408),
    ("resnet34_s48u1", 11_786_968, 3_249_508_352),
    ("resnet50_shared", 20_506_664, 4_089_184_256),
    ("resnet50_shared2", 18_262_056, 4_089_184_256),
    ("resnet50_shared_all", 16_017_448, 4_089_184_256),
    ("resnet101_shared", 29_471_784, 7_801_405_440),
    ("mobilenetv2", 3_507_272, 313_619_328),
    ("mobilenetv2_shared", 3_243_080, 313_619_328),
    ("mobilenetv2_shared2", 2_978_888, 313_619_328),
    ("c100_resnet34", 21_328_292, 1_159_448_576),
    ("c100_resnet34_s32u1", 7_726_676, 772_524_032),
    ("c100_densenet121", 7_048_548, 888_442_880),
    ("c100_densenet121_s16u1", 5_084_504, 704_212_992),
    ("c100_resnext50", 23_177_124, 1_344_151_552),
    ("c100_resnext50_s64u4", 19_333_380, 1_179_000_832),
    ("c10_resnet32", 464_154, 68_862_592),
    ("c10_resnet32_s16u1x2", 245_642, 79_086_208),
    ("c10_resnet56", 853_018, 125_485_696),
    ("c10_resnet56_s16u1", 270_842, 145_932_928),
    ("c10_resnet56_s16u1x2", 319_226, 145_932_928),
]


@pytest.mark.parametrize(("name", "params", "macs"), COUNTS)
def test_counts(name: str, params: int, macs: int) -> None:
    with torch.device("meta"):
        counted = count(build(name))
    assert (counted.params, counted.macs) == (params, macs)


def test_ready_names_take_options() -> None:
    with torch.device("meta"):
        small = build("c10_resnet56_s16u1x2", num_classes=3, in_channels=1, blocks_per_stage=(2, 1, 1))
    assert count(small).params < 100_000
    assert [block.num_branches for block in spec_of(small).blocks] == [16, 17, 32, 64]


def test_bundled_stages_have_equally_many_branches() -> None:
    with torch.device("meta"):
        shared = build("resnet34_s48u1", bundled=True)
        paths = build("c100_resnext50_s64u4", bundled=True)
    assert {spec.num_branches for spec in spec_of(shared).blocks if not spec.name.endswith("block1")} == {49}
    assert {spec.num_branches for spec in spec_of(paths).blocks if not spec.name.endswith("block1")} == {17}
    assert count(shared).params == 11_786_968


# --- one block, against the paper's layers written out ---


def stir(block: Any) -> Any:
    """Every parameter away from 0 and 1, so that none of them is without effect."""
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return block


def norm(x: Tensor, module: nn.Module) -> Tensor:
    assert isinstance(module, nn.modules.batchnorm._BatchNorm)
    return F.batch_norm(x, None, None, module.weight, module.bias, True)


def random_basis(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


def plain_basic() -> tuple[nn.Module, Tensor, Tensor]:
    block = stir(BasicBlock(6, 6, 1, None, 1))
    x = torch.randn(3, 6, 5, 5)
    a = F.relu(norm(F.conv2d(x, block.basis.own, padding=1), block.norm))
    return block, x, F.relu(x + norm(F.conv2d(a, block.coefficients.weight, padding=1), block.after))


def shared_basic() -> tuple[nn.Module, Tensor, Tensor]:
    block = stir(SharedBasicBlock(6, random_basis(4, 6, 3, 3), random_basis(4, 6, 3, 3), 2, 2))
    x = torch.randn(3, 6, 5, 5)
    y = x
    for one, rectify in ((block.first, True), (block.second, False)):
        maps = [F.conv2d(y, one.basis.own, padding=1), F.conv2d(y, one.basis.shared, padding=1)]
        y = norm(F.conv2d(norm(torch.cat(maps, 1), one.norm), one.coefficients.weight), one.after)
        y = F.relu(y) if rectify else y
    return block, x, F.relu(x + y)


def bottleneck() -> tuple[nn.Module, Tensor, Tensor]:
    shortcut = nn.Conv2d(5, 8, 1, 2)
    block = stir(Bottleneck(5, 4, 8, 2, shortcut, 1))
    x = torch.randn(3, 5, 6, 6)
    first, first_norm = block.before.get_submodule("conv"), block.before.get_submodule("norm")
    a = F.relu(norm(first(x), first_norm))
    a = F.relu(norm(F.conv2d(a, block.basis.own, stride=2, padding=1), block.norm))
    y = norm(F.conv2d(a, block.coefficients.weight), block.after)
    return block, x, F.relu(y + shortcut(x))


def paths() -> tuple[nn.Module, Tensor, Tensor]:
    block = stir(PathBottleneck(8, 4, 2, 8, 1, None, 1))
    x = torch.randn(3, 8, 5, 5)
    a = F.relu(norm(F.conv2d(x, block.basis.own), block.norm))
    a = F.relu(norm(F.conv2d(a, block.inner.weight, padding=1, groups=4), block.inner_norm))
    return block, x, F.relu(x + norm(F.conv2d(a, block.coefficients.weight), block.after))


def shared_paths() -> tuple[nn.Module, Tensor, Tensor]:
    block = stir(PathBottleneck(8, 8, 4, 8, 1, None, 1).with_basis([random_basis(32, 8, 3, 3)], 8))
    x = torch.randn(3, 8, 5, 5)
    a = F.relu(norm(block.before.get_submodule("conv")(x), block.before.get_submodule("norm")))
    own = F.conv2d(a, block.basis.own, padding=1, groups=2)
    shared = F.conv2d(a, block.basis.shared, padding=1, groups=4)
    a = F.relu(norm(torch.cat([own, shared], 1), block.norm))
    return block, x, F.relu(x + norm(F.conv2d(a, block.coefficients.weight), block.after))


def shared_dense() -> tuple[nn.Module, Tensor, Tensor]:
    block = stir(DenseLayer(6, 3).with_basis([random_basis(5, 12, 3, 3)], 1))
    x = torch.randn(3, 6, 5, 5)
    layers = dict(block.before.named_children())
    a = layers["conv"](F.relu(norm(x, layers["norm"])))
    a = F.relu(norm(a, layers["norm2"]))
    maps = [F.conv2d(a, block.basis.own, padding=1), F.conv2d(a, block.basis.shared, padding=1)]
    y = F.conv2d(norm(torch.cat(maps, 1), block.norm), block.coefficients.weight)
    return block, x, torch.cat([x, y], 1)


def inverted() -> tuple[nn.Module, Tensor, Tensor]:
    block = stir(InvertedResidual(4, 6, 4, 1))
    x = torch.randn(3, 4, 5, 5)
    a = F.relu6(norm(F.conv2d(x, block.basis.own), block.norm))
    a = F.relu6(norm(F.conv2d(a, block.inner.weight, padding=1, groups=24), block.inner_norm))
    return block, x, x + norm(F.conv2d(a, block.coefficients.weight), block.after)


BLOCKS = [plain_basic, shared_basic, bottleneck, paths, shared_paths, shared_dense, inverted]


@pytest.mark.parametrize("case", BLOCKS)
def test_a_block_is_the_papers_layers_looped_and_in_parts(case: Any) -> None:
    """Fused, looped, and as the sum of two copies that hold some of the branches, one of them looped."""
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(1)
        block, x, expected = case()
        torch.testing.assert_close(block(x), expected)
        for _, block_sum in branch_sums(block):
            block_sum.execution = "looped"
        torch.testing.assert_close(block(x), expected)
        for held in ((0, 2, 4), (1, 3, 4, 5, 6), (0, 1, 2, 3, 4, 7)):
            for _, block_sum in branch_sums(block):
                others = [b for b in range(block_sum.num_branches) if b not in held]
                mine = [b for b in held if b < block_sum.num_branches]
                parts = [block_sum.shard(mine), block_sum.shard(others)]
                parts[1].execution = "fused"
                block_sum.exchange = lambda _, h, parts=parts: sum(part.partial_sum(h) for part in parts)
            torch.testing.assert_close(block(x), expected)
            for _, block_sum in branch_sums(block):
                block_sum.exchange = None
    finally:
        torch.set_default_dtype(torch.float32)


# --- the transformation ---


def test_first_blocks_keep_their_filters_and_the_others_share() -> None:
    network = share_bases(cifar_resnet(20, width=4), 4, 1, double=True)
    for stage in ("stage1", "stage2", "stage3"):
        first, *others = [block for name, block in named_blocks(network) if name.startswith(stage)]
        assert isinstance(first, BasicBlock)
        assert first.basis.shared is None
        sums = [[s for _, s in branch_sums(block) if isinstance(s, FilterSum)] for block in others]
        for place in (0, 1):
            assert len({id(pair[place].basis.shared) for pair in sums}) == 1
        assert sums[0][0].basis.shared is not sums[0][1].basis.shared
        assert (
            len({id(found.norm) for pair in sums for found in pair}) == 4
        )  # BatchNorms are every block's own


def test_one_basis_serves_both_convolutions_unless_double() -> None:
    network = share_bases(cifar_resnet(14, width=4), 4, 1)
    sums = [found for _, found in branch_sums(network.blocks) if isinstance(found, FilterSum)]
    shared = {id(found.basis.shared) for found in sums if found.basis.shared is not None}
    assert len(shared) == 3
    assert len(basis_groups(network)) == 3


def test_every_layer_of_a_densenet_shares() -> None:
    network = share_bases(densenet(growth=4, blocks_per_stage=(2, 3)), 4, 1)
    sizes = [[spec.num_branches, len(spec.shares)] for spec in spec_of(network).blocks]
    assert sizes == [[5, 1], [5, 1], [1, 0], [5, 1], [5, 1], [5, 1]]


def test_bases_start_orthonormal() -> None:
    for network in (share_bases(cifar_resnet(14), 8, 1), tie_convolutions(mobilenet_v2(0.25), ("basis",))):
        held = dict(network.named_parameters())
        for group in basis_groups(network):
            rows = held[group.shared[0]].detach().flatten(1)
            gram = rows @ rows.T if rows.shape[0] <= rows.shape[1] else rows.T @ rows
            torch.testing.assert_close(gram, torch.eye(len(gram)), atol=1e-5, rtol=0)


def test_groups_follow_stages_and_places() -> None:
    double = seeded("double")
    assert [group.name for group in basis_groups(double)] == ["stage1.basis", "stage2.basis"]
    assert [len(group.shared) for group in basis_groups(double)] == [2, 2]
    separate = [group.name for group in basis_groups(double, joint=False)]
    assert separate == ["stage1.basis1", "stage1.basis2", "stage2.basis1", "stage2.basis2"]
    tied = [group.name for group in basis_groups(seeded("all"))]
    assert tied == ["stage1.basis", "stage1.first", "stage1.coefficients"]
    single = basis_groups(seeded("single"))[0]  # one basis; own elements of two blocks, two convolutions each
    assert (len(single.shared), len(single.own)) == (1, 4)


@pytest.mark.parametrize(("cardinality", "num_slices"), [(4, 1), (1, 1), (1, 2)])
def test_networks_of_the_resnext_family_can_share_too(cardinality: int, num_slices: int) -> None:
    torch.manual_seed(0)
    network = resnext(
        50, cardinality, 4, stem="cifar", num_slices=num_slices, num_classes=5, blocks_per_stage=(3, 1, 1)
    )
    x = torch.randn(2, 3, 8, 8)
    expected, params = network(x), count(network).params
    with pytest.raises(ModelError, match="nothing to tie"):  # after it became sums over filters
        tie_convolutions(network, ())
    torch.testing.assert_close(network(x), expected)
    assert count(network).params == params
    tie_convolutions(network, ("basis",) if cardinality == 1 else ("coefficients",))
    assert count(network).params < params


def test_tied_blocks_are_placed_alike() -> None:
    network = seeded("tied")
    spec = spec_of(network)
    blocks = {block.name: BranchPlacement.even(block.num_branches, 2) for block in spec.blocks}
    Plan(1, 2, blocks, "sample", "sample").check(spec)
    blocks["stage1.block3"] = BranchPlacement.from_counts([1, 3])
    with pytest.raises(PlanError, match=r"stage1\.block2 and stage1\.block3 share"):
        Plan(1, 2, blocks, "sample", "sample").check(spec)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: share_bases(pre_resnet(14), 4, 1), "PreactResidual, which cannot share"),
        (lambda: share_bases(mobilenet_v2(0.25), 4, 1), "InvertedResidual, which cannot share"),
        (lambda: share_bases(cifar_resnet(8), 4, 1), "nothing to share"),
        (lambda: share_bases(cifar_resnet(14), 0, 1), "at least 1 shared"),
        (
            lambda: shared_basis("densenet", shared=4, double=True, blocks_per_stage=(1,)),
            r"stage1\.block1 is a DenseLayer, .* leave double out",
        ),
        (lambda: share_bases(resnet(50, width=8), 4, 1, double=True), r"stage1\.block2 is a Bottleneck"),
        (lambda: tie_convolutions(cifar_resnet(14), ("basis",)), "nothing to tie"),
        (lambda: tie_convolutions(cifar_resnet(20), ("first",)), "no convolution 'first'"),
        (lambda: shared_basis("c10_resnet32"), "give a number of shared elements or convolutions"),
        (lambda: shared_basis("c10_resnet33", shared=4), "did you mean c10_resnet3"),
        (lambda: shared_basis("mobilenetv2", tied=("basis",), bundled=True), "no option 'bundled'"),
        (lambda: resnet(32), "no four-stage ResNet of depth 32"),
        (lambda: resnet(34, cardinality=4), "needs bottlenecks"),
        (lambda: resnet(50, width=6, cardinality=8), "cardinality 8 needs .* must divide 12"),
        (lambda: cifar_resnet(33), "use 32 or 38"),
        (lambda: resnet(34, width=0), "width is at least 1, got 0"),
        (lambda: cifar_resnet(32, width=0), "width is at least 1, got 0"),
        (lambda: densenet(growth=0), "growth is at least 1, got 0"),
        (lambda: densenet(120), "no DenseNet of depth 120"),
        (lambda: mobilenet_v2(blocks_per_stage=(1, 2)), "must be 7 numbers"),
        (lambda: mobilenet_v2(width=-1), "width is above 0, got -1"),
        (lambda: resnet(50, cardinality=0), "cardinality is at least 1, got 0"),
        (lambda: FilterBasis(8, 6, own_groups=4), "6 own elements over 8 channels in 4 groups"),
        (lambda: FilterBasis(8, 1, new_basis(4, 8), per_branch=2), "1 own elements"),
    ],
)
def test_errors_name_the_rule(make: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        make()


# --- parity, the regularizer on ---

CLIPPED = OptimizerConfig(lr=0.02, clip_norm=0.1)
PAIRS = [
    Case("plain", (1, 2), "strided", "sr", penalty=None),
    Case("single", (1, 2), "even", "ss"),
    Case("single", (1, 2), "none", "rs"),
    Case(
        "double",
        (1, 2),
        "mixed",
        "sr",
        penalty={"joint": False, "group_weights": {"stage2.basis1": 0.5}},
    ),
    Case("double", (1, 2), "strided", "rr", {"execution": "looped"}),
    Case("tied", (1, 2), "mixed", "ss"),
    Case("all", (1, 2), "strided", "rr", {"accumulation": 2}),
    Case("resnext", (1, 2), "strided", "rr"),
    Case("resnext_fine", (1, 2), "mixed", "ss", {"execution": "looped"}),
    Case("plain_densenet", (1, 2), "mixed", "sr", penalty=None),
    Case("densenet", (1, 2), "even", "ss"),
    Case("mobilenet", (1, 2), "strided", "sr"),
    Case("single", (1, 2), "strided", "ss", {"optimizer": CLIPPED}, frozen="shared"),
    Case("double", (1, 2), "even", "ss", frozen="basis"),
]
FOURS = [
    Case("single", (2, 2), "even", "rr"),
    Case("double", (2, 2), "mixed", "ss", penalty={"normalisation": "sum", "weight": 0.01}),
    Case("mobilenet", (2, 2), "mixed", "rs"),
    Case("tied", (1, 4), "strided", "sr", {"bn_batch_size": 4}),
    Case("resnext", (2, 2), "mixed", "sr"),
    Case("densenet", (2, 2), "strided", "ss"),
]


@cache
def reports(world_size: int) -> list[Report]:
    return run_ranks(world_size, parity, PAIRS if world_size == 2 else FOURS)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("index", range(len(PAIRS)), ids=[f"{c.network}-{c.layout}" for c in PAIRS])
def test_parity_on_two_ranks(index: int) -> None:
    report = reports(2)[index]
    assert report.max_relative_difference <= 1e-9, report


@pytest.mark.parametrize("index", range(len(FOURS)), ids=[f"{c.network}-{c.layout}" for c in FOURS])
def test_parity_on_four_ranks(index: int) -> None:
    report = reports(4)[index]
    assert report.max_relative_difference <= 1e-9, report


def test_a_penalty_counted_twice_is_found() -> None:
    case = Case("single", (2, 2), "even", "ss", {"steps": 1})
    assert run_ranks(4, parity, [case], "scaled")[0][0].max_relative_difference > 1e-6
