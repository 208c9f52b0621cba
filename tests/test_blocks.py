"""The networks on one device: against plain torch, fused against looped, shards against the whole, errors."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import pytest
import torch
from parity_cases import NETWORKS, Chain, classifier, random, seeded, thin, wide
from torch import Tensor, nn
from torch.nn import functional as F

from anabranch.blocks import (
    BranchSum,
    ModelError,
    MultiResidual,
    build,
    count,
    families,
    models,
    named_blocks,
)
from anabranch.blocks.batch import BatchLayout, batch_layout
from anabranch.blocks.branch_sum import branch_sums, closing_sum
from anabranch.blocks.convert import prepare
from anabranch.blocks.convolution import WeightGradients, exchanging
from anabranch.blocks.multi_resnet import PreactResidual
from anabranch.blocks.norm import BatchNorm, StagedStatistics
from anabranch.blocks.stacked import StackedAffine, StackedConv2d, _at_once, _by_library
from anabranch.runtime.branch_state import branch_of, by_branch, entries
from anabranch.runtime.model_spec import spec_of
from anabranch.runtime.parallel_network import branch_tensors
from anabranch.schedulers import BranchPlacement, Plan, PlanError

# ---- the papers' structure, written once more with one nn.BatchNorm2d and nn.Conv2d a branch


class PlainBranch(nn.Module):
    """[BN-ReLU-]conv-BN-ReLU-…-conv, all its own."""

    def __init__(self, channels: int, chain: list[tuple[int, int, int]], own_preact: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.BatchNorm2d(channels), nn.ReLU()] if own_preact else []
        for index, (out, kernel, stride) in enumerate(chain):
            layers += [nn.BatchNorm2d(channels), nn.ReLU()] if index else []
            layers.append(nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False))
            channels = out
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y


class PlainBlock(nn.Module):
    """x + Σ f_i(x) as the paper draws it; stage-first blocks share one BN-ReLU, which the shortcut reads too."""

    def __init__(
        self,
        k: int,
        channels: int,
        chain: list[tuple[int, int, int]],
        preact: str,
        shortcut: str,
        reads_h: bool,
    ) -> None:
        super().__init__()
        self.k, self.preact, self.shortcut_kind, self.reads_h = k, preact, shortcut, reads_h
        self.stride, self.out = max(stride for _, _, stride in chain), chain[-1][0]
        self.bn = nn.BatchNorm2d(channels)
        self.fs = nn.ModuleList([PlainBranch(channels, chain, preact == "branch") for _ in range(k)])
        self.conv = nn.Conv2d(channels, self.out, 1, self.stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn(x)) if self.preact == "shared" else x
        source = h if self.reads_h else x
        if self.shortcut_kind == "B":
            source = self.conv(source)
        if self.shortcut_kind == "A":
            padding = torch.zeros(len(x), self.out - x.shape[1], *x.shape[2:], dtype=x.dtype)
            source = torch.cat([source, padding], 1)[:, :, :: self.stride, :: self.stride]
        for f in self.fs:
            source = source + f(h)
        return source


def copy_weights(ours: PreactResidual, plain: PlainBlock) -> list[tuple[Tensor, Tensor]]:
    """Copies ours into the plain block; returns pairs (slice of our tensor's name, plain tensor) to compare later."""
    pairs: list[tuple[Tensor, Tensor]] = []
    if ours.preact == "shared":
        pairs += [(getattr(ours.norm, n), getattr(plain.bn, n)) for n in _BN]
    if ours.shortcut_kind == "B":
        pairs.append((ours.shortcut.weight, plain.conv.weight))
    for branch in range(ours.num_branches):
        layers = [m for m in plain.fs[branch].modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
        norms = [m for m in layers if isinstance(m, nn.BatchNorm2d)]
        convs = [m for m in layers if isinstance(m, nn.Conv2d)]

        def part(tensor: Tensor, dim: int = 0, branch: int = branch) -> Tensor:
            return tensor.chunk(ours.num_branches, dim)[branch]

        if ours.preact == "branch":
            first = norms.pop(0)
            pairs += [(part(ours.affine.weight), first.weight), (part(ours.affine.bias), first.bias)]
            pairs += [(getattr(ours.norm, n), getattr(first, n)) for n in ("running_mean", "running_var")]
        for layer, conv in zip(ours._stacked(), convs, strict=True):
            pairs.append((part(layer.weight, layer.dim), conv.weight))
        for stacked, norm in zip(ours.norms, norms, strict=True):
            pairs += [(part(getattr(stacked, n)), getattr(norm, n)) for n in _BN]
    with torch.no_grad():
        for mine, theirs in pairs:
            theirs.copy_(mine)
    return pairs


_BN = ("weight", "bias", "running_mean", "running_var")

# channels, chain of (out, kernel, stride), preact, shortcut, whether the shortcut reads h
STRUCTURES: dict[str, tuple[int, list[tuple[int, int, int]], str, str, bool]] = {
    "own BN": (8, [(8, 3, 1), (8, 3, 1)], "branch", "identity", False),
    "first of stage 1": (8, [(8, 3, 1), (8, 3, 1)], "shared", "identity", True),
    "first of a stage, A": (8, [(16, 3, 2), (16, 3, 1)], "shared", "A", True),
    "first of a stage, B": (8, [(16, 3, 2), (16, 3, 1)], "shared", "B", True),
    "bottleneck": (16, [(4, 1, 1), (4, 3, 1), (16, 1, 1)], "branch", "identity", False),
    "bottleneck, first of a stage": (8, [(4, 1, 2), (4, 3, 1), (16, 1, 1)], "shared", "B", True),
    "ImageNet, first block": (8, [(4, 1, 1), (4, 3, 1), (16, 1, 1)], "none", "B", True),
}


@pytest.mark.parametrize("execution", ["fused", "mixed", "looped"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_blocks_are_the_papers(structure: str, execution: Any) -> None:
    channels, chain, preact, shortcut, reads_h = STRUCTURES[structure]
    torch.manual_seed(0)
    ours = PreactResidual(
        3, channels, chain, preact=preact, shortcut=shortcut, shortcut_reads_h=reads_h  # type: ignore[arg-type]
    ).double()  # fmt: skip
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours.execution = execution
    plain = PlainBlock(3, channels, chain, preact, shortcut, reads_h).double()
    pairs = copy_weights(ours, plain)
    x = torch.randn(6, channels, 8, 8, dtype=torch.float64).requires_grad_()
    same = x.detach().clone().requires_grad_()
    y, z = ours(x), plain(same)
    weight = torch.randn_like(y)
    (y * weight).sum().backward()
    (z * weight).sum().backward()

    def close(mine: Tensor | None, theirs: Tensor | None, what: str) -> None:
        assert mine is not None
        assert theirs is not None
        size = max(float(theirs.detach().abs().max()), 1.0)
        assert float((mine - theirs).detach().abs().max()) / size <= 2e-14, what

    close(y, z, "forward")
    close(x.grad, same.grad, "input gradient")
    ours_by_data = {p.data_ptr(): p for p in [*ours.parameters()]}
    assert len(pairs) > 5
    for mine, theirs in pairs:
        if not isinstance(theirs, nn.Parameter):
            close(mine, theirs, "running statistics")
            continue
        (whole,) = [p for p in ours_by_data.values() if _inside(mine, p)]
        assert whole.grad is not None
        grad = whole.grad.as_strided(mine.shape, mine.stride(), mine.storage_offset())
        close(grad, theirs.grad, f"gradient of {tuple(mine.shape)}")
    evaluated, reference = ours.eval()(x), plain.eval()(same)
    close(evaluated, reference, "evaluation")


def _inside(view: Tensor, whole: Tensor) -> bool:
    return view.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def test_the_network_is_made_of_these_blocks() -> None:
    """Which block has which structure, on CIFAR and ImageNet."""

    def blocks(**options: Any) -> list[tuple[str, str, bool]]:
        network = build("multi_resnet", num_branches=2, **options)
        made = [block for _, block in named_blocks(network) if isinstance(block, PreactResidual)]
        return [(b.preact, b.shortcut_kind, b.shortcut_reads_h) for b in made]

    own = ("branch", "identity", False)
    assert blocks(depth=14) == [
        ("shared", "identity", True), own, ("shared", "A", True), own, ("shared", "A", True), own,
    ]  # fmt: skip
    assert blocks(depth=11, block="bottleneck", width=1) == [("shared", "B", True)] * 3
    assert blocks(depth=20, block="bottleneck")[1::2] == [own] * 3
    assert blocks(depth=18, stem="imagenet")[:4] == [
        ("none", "identity", True),
        own,
        ("shared", "B", True),
        own,
    ]
    assert blocks(depth=50, stem="imagenet", block="bottleneck")[:2] == [("none", "B", True), own]
    assert {preact for preact, _, _ in blocks(depth=14, preact="shared")} == {"shared"}
    stem = build("multi_resnet", depth=8, num_branches=1).get_submodule("stem")
    assert [type(m) for m in stem.children()] == [nn.Conv2d], "no BN in the CIFAR stem"


# ---- fused and looped


def _trained(network: nn.Module, execution: Any, groups: tuple[int, ...] | None) -> dict[str, Tensor]:
    network = copy.deepcopy(network)
    for _, block_sum in branch_sums(network):
        block_sum.execution = execution
    norms = [m for m in network.modules() if isinstance(m, BatchNorm)]
    statistics = StagedStatistics(norms, torch.device("cpu"), torch.float64)
    size = 32 if "pool" in dict(network.get_submodule("stem").named_children()) else 8
    x = torch.randn(6, 2, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x.requires_grad_()
    layout = None if groups is None else BatchLayout(groups, 6, torch.arange(6))
    with batch_layout(layout):
        y = network(x)
    y.square().sum().backward()
    statistics.commit()
    assert x.grad is not None
    found = {"output": y.detach(), "input gradient": x.grad, **dict(network.named_buffers())}
    return found | {f"{n}.grad": p.grad for n, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("groups", [None, (6,), (2, 3, 1)], ids=str)
@pytest.mark.parametrize("name", ["basic", "bottleneck", "shared", "imagenet"])
def test_fused_equals_mixed_and_looped(name: str, groups: tuple[int, ...] | None) -> None:
    if name == "imagenet" and groups == (2, 3, 1):
        groups = (3, 3)  # one pixel is left at its end: a group of one sample has no variance there
    network = seeded(name).double()
    forms = {form for _, block_sum in branch_sums(network) for form in block_sum.executions}
    assert forms == {"fused", "looped"} | ({"mixed"} if name != "shared" else set())
    fused, *others = (_trained(network, execution, groups) for execution in sorted(forms))
    for other in others:
        assert fused.keys() == other.keys()
        for key, value in other.items():
            bound = 1e-12 * max(float(value.abs().max()), 1.0)
            assert float((fused[key] - value).abs().max()) <= bound, key


@pytest.mark.parametrize(("execution", "alone"), [("fused", 0), ("mixed", 2), ("looped", 3)])
def test_mixed_takes_grouped_convolutions_apart(execution: Any, alone: int) -> None:
    """A bottleneck's first two are grouped, its last is dense. alone: of the three, those run by branch."""
    block = dict(named_blocks(build("multi_resnet", depth=20, num_branches=3, block="bottleneck")))[
        "stage1.block2"
    ]
    assert isinstance(block, PreactResidual)
    block.execution = execution
    with mock.patch.object(StackedConv2d, "one", autospec=True, side_effect=StackedConv2d.one) as one:
        block(torch.randn(2, block.in_channels, 8, 8))
    assert one.call_count == 3 * alone


@pytest.mark.parametrize(
    "channels_last", [(False, False), (True, True), (True, False), (False, True)], ids=str
)
def test_affine_gradients_are_those_of_both_kinds_of_device(channels_last: tuple[bool, bool]) -> None:
    """`_by_library` is a CPU's, `_at_once` a GPU's; both against autograd. channels_last: of x and of the gradient."""
    x, weight, bias, grad_y = (
        torch.randn(size, dtype=torch.float64) for size in ((3, 4, 5, 6), (8,), (8,), (3, 8, 5, 6))
    )
    formats = [torch.channels_last if one else torch.contiguous_format for one in channels_last]
    x, grad_y = (one.contiguous(memory_format=kind) for one, kind in zip((x, grad_y), formats, strict=True))
    leaves = [one.clone().requires_grad_() for one in (x, weight, bias)]
    y = (leaves[0].repeat(1, 2, 1, 1) * leaves[1].view(-1, 1, 1) + leaves[2].view(-1, 1, 1)).relu()
    expected = torch.autograd.grad(y, leaves, grad_y)
    for gradients in (_by_library, _at_once):
        found = gradients(grad_y, x, weight, y.detach().contiguous(memory_format=formats[0]))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("channels", [16, 40])  # few over both branches, and many
def test_affine_maps_of_all_branches(channels: int, channels_last: bool) -> None:
    affine = StackedAffine(2, channels).double()
    for parameter in affine.parameters():
        torch.nn.init.normal_(parameter)
    kind = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(3, channels, 5, 6, dtype=torch.float64).contiguous(memory_format=kind)
    y, before = affine(x), x.clone()
    expected = x.repeat(1, 2, 1, 1) * affine.weight.view(-1, 1, 1) + affine.bias.view(-1, 1, 1)
    torch.testing.assert_close(y, expected.relu(), rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.cat([affine.one(x, 0), affine.one(x, 1)], 1), y, rtol=0, atol=1e-12)
    assert y.is_contiguous(memory_format=kind)
    assert torch.equal(x, before)


# ---- shards


@pytest.mark.parametrize("execution", ["fused", "mixed", "looped"])
@pytest.mark.parametrize("name", ["basic", "bottleneck", "shared", "unequal", "tuple"])
def test_shards_sum_to_the_whole(name: str, execution: Any) -> None:
    network = prepare(seeded(name).double()).eval()
    for path, block_sum in branch_sums(network):
        block_sum.execution = execution
        channels = next(p for n, p in block_sum.named_parameters() if p.dim() > 1).shape[1]
        if isinstance(block_sum, PreactResidual):
            channels = block_sum.in_channels
        h = block_sum.enter(torch.randn(2, channels, 8, 8, dtype=torch.float64))
        whole = block_sum.partial_sum(h)
        k = block_sum.num_branches
        held: list[tuple[int, ...]] = [tuple(range(0, k, 2)), tuple(range(1, k, 2)), ()]
        parts = [block_sum.shard(branches) for branches in held]
        assert [part.held for part in parts] == held
        sums = [part.partial_sum(h) for part in parts]
        assert all(s.shape == whole.shape for s in sums), path
        assert not sums[2].any()
        torch.testing.assert_close(sums[0] + sums[1], whole, rtol=0, atol=1e-12)
        owned = block_sum.branch_tensors()
        for name_, tensor in [*parts[0].named_parameters(), *parts[0].named_buffers()]:
            if name_ not in owned:
                original = dict([*block_sum.named_parameters(), *block_sum.named_buffers()])[name_]
                assert tensor is original, "replicated tensors are the original's own"
        again = parts[0].shard(held[0][:1])
        torch.testing.assert_close(again.partial_sum(h), block_sum.shard((0,)).partial_sum(h), rtol=0, atol=0)
        with pytest.raises(ModelError, match=r"cannot take branches \[1\]: this copy holds \[0"):
            parts[0].shard((1,))


def test_entries_by_branch_do_not_depend_on_who_holds_what() -> None:
    network = seeded("basic")
    owners = branch_tensors(network)
    whole = entries(dict(network.named_parameters()), owners)
    name = "blocks.stage1.block1.convs.1.weight"
    assert sorted(key for key in whole if key.startswith(name)) == [f"{name}@{b}" for b in range(5)]
    assert [branch_of(f"{name}@3", owners), branch_of("head.fc.weight", owners)] == [3, None]
    block = dict(named_blocks(network))["stage1.block1"]
    assert isinstance(block, BranchSum)
    part = block.shard((1, 4))
    local = {f"blocks.stage1.block1.{n}": t for n, t in part.branch_tensors().items()}
    found = by_branch(name, part.get_parameter("convs.1.weight"), local)
    assert list(found) == [f"{name}@1", f"{name}@4"]
    for key, value in found.items():
        assert torch.equal(value, whole[key])
    unequal = seeded("unequal")
    assert branch_of("blocks.0.branch.2.0.weight", branch_tensors(unequal)) == 2


# ---- a user's own branches


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: MultiResidual([thin(), nn.Sequential(nn.ReLU(inplace=True), thin())]),
            "branch 1 starts with ReLU",
        ),
        (
            lambda: MultiResidual([nn.Sequential(nn.Dropout(0.1), nn.Flatten(), nn.ReLU(inplace=True))]),
            r"branch 0 starts with ReLU\(inplace=True\)",
        ),
        (
            lambda: MultiResidual([thin()], before=nn.ReLU6(inplace=True)),
            r"before starts with ReLU6\(inplace=True\)",
        ),
        (
            lambda: MultiResidual([thin()], shortcut=nn.Dropout(0.1, inplace=True)),
            "shortcut starts with Dropout",
        ),
        (lambda: MultiResidual([]), "MultiResidual needs at least one branch, got 0"),
        (lambda: MultiResidual([thin()], shortcut_reads="y"), 'shortcut_reads is "x" or "h", got \'y\''),
    ],
)
def test_multi_residual_refuses(make: Any, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        make()


def test_multi_residual_is_its_equation() -> None:
    torch.manual_seed(0)
    fs, before, shortcut, after = [thin(), wide()], nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1), nn.Tanh()
    x = torch.randn(4, 6, 5, 5)
    h = before(x)
    with torch.no_grad():
        for reads, source in (("x", x), ("h", h)):
            made = MultiResidual(
                fs, before=before, shortcut=shortcut, after=after, shortcut_reads=reads
            ).eval()
            torch.testing.assert_close(made(x), after(shortcut(source) + fs[0](h) + fs[1](h)))
        plain = MultiResidual(fs).eval()
        torch.testing.assert_close(plain(x), x + fs[0](x) + fs[1](x))


# ---- what a scheduler is told


def test_spec_of_a_users_network() -> None:
    spec = spec_of(seeded("unequal"))
    assert [(b.name, b.num_branches, b.num_sums) for b in spec.blocks] == [
        ("0", 3, 1),
        ("1", 2, 2),
        ("2", 2, 1),
    ]
    shared = {"blocks.1.0.before.weight", "blocks.1.0.before.bias"}
    assert [b.shares for b in spec.blocks] == [frozenset(), shared, shared]
    assert spec.units == (("stem",), ("0",), ("1", "2"), ("head",))


def test_which_blocks_end_in_their_sum() -> None:
    """Alone or last in a row; not with anything behind or around it, or where the same sum also runs earlier."""

    class Doubled(MultiResidual):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Normalised(MultiResidual):
        def join(self, x: Tensor, h: Any, s: Tensor) -> Tensor:
            return super().join(x, h, s.tanh())

    class Around(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = x + super().forward(x)  # type: ignore[no-untyped-call]
            return y

    one, other = MultiResidual([thin(), wide()], shortcut=nn.Conv2d(6, 6, 1)), MultiResidual([thin(), thin()])
    ends: list[tuple[nn.Module, BranchSum | None]] = [
        (one, one),
        (nn.Sequential(other, nn.Sequential(nn.ReLU(), one)), one),
        (nn.Sequential(one, other, one), None),
        (nn.Sequential(one, nn.ReLU()), None),
        (Around(one), None),
        (MultiResidual([thin(), thin()], after=nn.ReLU()), None),
        (Doubled([thin(), thin()]), None),
        (Normalised([thin(), thin()]), None),
        (nn.Sequential(), None),
        (thin(), None),
    ]
    for block, expected in ends:
        assert closing_sum(block) is expected
    found = {
        name: [b.ends_in_sum for b in spec_of(NETWORKS[name]()).blocks]
        for name in ("shared", "tuple", "unequal")
    }
    assert found == {"shared": [True] * 4, "tuple": [False] * 2, "unequal": [False, False, True]}


def test_blocks_that_share_a_parameter_must_be_placed_alike() -> None:
    spec = spec_of(seeded("unequal"))
    sample, even = BranchPlacement("sample"), BranchPlacement.even(2, 2)
    three = BranchPlacement.even(3, 2)
    for second in (sample, BranchPlacement.from_counts((2, 0))):
        plan = Plan(1, 2, {"0": three, "1": even, "2": second}, "sample", "sample")
        with pytest.raises(PlanError, match=r"1 and 2 share the parameter blocks\.1\.0\.before\.\w+"):
            plan.check(spec)
    Plan(1, 2, {"0": three, "1": even, "2": even}, "sample", "sample").check(spec)


def test_spec_of_refuses() -> None:
    def chain(*blocks: nn.Module) -> Chain:
        return Chain(nn.Identity(), blocks, classifier())

    unequal_sums = nn.Sequential(MultiResidual([thin(), thin()]), MultiResidual([thin()]))
    with pytest.raises(ModelError, match=r"0 has sums of \[2, 1\] branches"):
        spec_of(chain(unequal_sums))
    stray = chain(MultiResidual([thin()]))
    stray.scale = nn.Parameter(torch.ones(1))
    with pytest.raises(ModelError, match="parameters outside stem, blocks and head: scale"):
        spec_of(stray)
    shared = thin()
    for network in (
        chain(MultiResidual([shared, shared])),  # in two branches
        chain(MultiResidual([shared, thin()]), MultiResidual([thin(), shared])),  # of two blocks
        chain(MultiResidual([shared, thin()]), MultiResidual([thin(), thin()], before=shared)),
        chain(nn.Sequential(shared, MultiResidual([shared, thin()]))),
    ):
        with pytest.raises(ModelError, match="are one parameter of different branches"):
            spec_of(network)
    spec_of(chain(MultiResidual([shared, thin()]), MultiResidual([shared, random()])))


def test_named_blocks() -> None:
    names = [name for name, _ in named_blocks(build("multi_resnet", depth=8, num_branches=2))]
    assert names == ["stage1.block1", "stage2.block1", "stage3.block1"]
    block = thin()
    assert [name for name, _ in named_blocks(Chain(nn.Identity(), [block, block], classifier()))] == [
        "0",
        "1",
    ]
    with pytest.raises(ModelError, match="Sequential has no stem, blocks, head"):
        named_blocks(nn.Sequential())
    with pytest.raises(ModelError, match="blocks is empty"):
        named_blocks(Chain(nn.Identity(), [], classifier()))


# ---- building and counting


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("multi_resent", {"depth": 8}, "no model 'multi_resent'; did you mean multi_resnet"),
        ("zzz", {}, "no model 'zzz'; known: multi_resnet, pre_resnet, "),
        ("multi_resnet", {"depht": 8}, "multi_resnet has no option 'depht'; did you mean depth?"),
        ("multi_resnet", {"depth": 8, "qqq": 8}, "no option 'qqq'; its options: depth, num_branches"),
        ("pre_resnet", {"depth": 8, "num_branches": 2}, "pre_resnet has no option 'num_branches'"),
        ("multi_resnet", {"num_branches": 8}, "multi_resnet: .*missing.*'depth'"),
        ("multi_resnet", {"depth": 15, "num_branches": 2}, r"depth 6n\+2, got 15: use 14 or 20"),
        ("multi_resnet", {"depth": 2, "num_branches": 2}, r"depth 6n\+2, got 2: use 8 or 14"),
        (
            "multi_resnet",
            {"depth": 14, "num_branches": 2, "block": "bottleneck"},
            r"9n\+2, got 14: use 11 or 20",
        ),
        (
            "multi_resnet",
            {"depth": 20, "num_branches": 2, "stem": "imagenet"},
            "of depth 20: use one of .18, 34.",
        ),
        (
            "multi_resnet",
            {"depth": 8, "num_branches": 2, "blocks_per_stage": [1, 2]},
            r"\[1, 2\] must be 3 numbers",
        ),
        ("multi_resnet", {"depth": 8, "num_branches": 0}, "num_branches is at least 1, got 0"),
        ("multi_resnet", {"depth": 8, "num_branches": 1, "block": "wide"}, "block is one of .*, got 'wide'"),
        ("multi_resnet_110_k4", {"widht": 2}, "did you mean width?"),
    ],
)
def test_build_says_what_is_wrong(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        build(name, **options)


@pytest.mark.parametrize("option", ["num_classes", "in_channels"])
@pytest.mark.parametrize("family", families())
def test_every_family_needs_classes_and_channels(family: str, option: str) -> None:
    required: dict[str, dict[str, Any]] = {
        "multi_resnet": {"depth": 8, "num_branches": 1}, "pre_resnet": {"depth": 8}, "shared_basis": {"shared": 1}
    }  # fmt: skip
    for number in (0, -1):
        options = {**required.get(family, {}), option: number}
        with pytest.raises(ModelError, match=f"{option} is at least 1, got {number}"):
            build(family, **options)


def test_ready_names_and_their_options() -> None:
    assert {"multi_resnet", "pre_resnet", "resnext", "cru_net", "shared_basis"} <= set(families())
    assert "multi_resnet_110_k4" in models()
    with torch.device("meta"):
        network = build("multi_resnet_110_k4", depth=8, num_classes=7)
    counted = count(network)
    assert counted.num_branches == 4
    assert counted.log2_paths == 4 * 3
    assert network(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 7)
    with pytest.raises(
        ModelError, match=r"Sequential has no input_shape: give count\(network, \(C, H, W\)\)"
    ):
        count(nn.Sequential())
    assert count(nn.Sequential(nn.Conv2d(1, 2, 1)), (1, 4, 4)).macs == 2 * 16


def test_counting_leaves_the_network_as_it_is() -> None:
    network = build("multi_resnet", depth=8, num_branches=2)
    before = copy.deepcopy(network.state_dict())
    count(network)
    assert network.training
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_every_table_network_runs() -> None:
    for name in NETWORKS:
        size = 32 if name == "imagenet" else 8
        assert seeded(name)(torch.randn(2, 2, size, size)).shape == (2, 5)


class Indexed(BranchSum):
    """Its hidden form begins with what is no number."""

    def __init__(self) -> None:
        super().__init__(2)
        self.branch = nn.ModuleDict({str(i): nn.Conv2d(2, 3, 1) for i in range(2)})

    def enter(self, x: Tensor) -> tuple[Tensor, ...]:
        return torch.arange(2), x

    def branches(self, h: Any) -> Tensor:
        order, x = h
        return torch.stack([one(x[:, order]) for one in self.branch.values()]).sum(0)


def test_a_copy_without_branches_gives_zeros_of_the_sums_precision() -> None:
    block, x = Indexed().double(), torch.randn(2, 2, 4, 4, dtype=torch.float64)
    nothing = block.shard(()).partial_sum(block.enter(x))
    assert torch.equal(nothing, torch.zeros_like(block.partial_sum(block.enter(x))))
    assert nothing.dtype == torch.float64


def test_a_weight_gradient_is_reported_after_its_last_use() -> None:
    conv, reported = StackedConv2d("spread", 1, 2, 2, 3), list[nn.Parameter]()
    plain, x = copy.deepcopy(conv), torch.randn(2, 2, 4, 4, requires_grad=True)
    queue = WeightGradients(reported.append)
    with exchanging(queue, None):
        conv(conv(x)).sum().backward()
    queue.run()
    plain(plain(x)).sum().backward()
    assert [id(one) for one in reported] == [id(conv.weight)]
    torch.testing.assert_close(conv.weight.grad, plain.weight.grad)


def test_a_weight_gradient_put_off_has_no_second_derivative() -> None:
    conv, x = StackedConv2d("spread", 1, 2, 2, 3), torch.randn(2, 2, 4, 4, requires_grad=True)
    with exchanging(WeightGradients(lambda parameter: None), None):
        y = conv(x).square().sum()
    (grad,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()
