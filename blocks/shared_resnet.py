"""Post-activation ResNets and ResNeXts as sums over filters, plain and with shared bases.

A basic block sums over the filters of its first 3×3 convolution; a bottleneck over those of its 3×3, with the first
1×1 replicated; a ResNeXt block over its paths. With a shared basis a basic block becomes two sums, one for each
convolution: conv by the basis, BN without ReLU, 1×1 coefficients, BN, ReLU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from anabranch.blocks.errors import ModelError, at_least_one
from anabranch.blocks.filter_basis import FilterBasis, new_basis
from anabranch.blocks.filter_sum import FilterSum
from anabranch.blocks.network import Network, conv2d, make_stem
from anabranch.blocks.norm import BatchNorm
from anabranch.blocks.stacked import StackedConv2d

_BLOCKS = {
    18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3),
}  # fmt: skip
_PATH_ELEMENTS = 4  # elements of a branch, and of a group of own elements, in a ResNeXt's shared basis


class BasicBlock(FilterSum):
    """ReLU(shortcut(x) + BN(conv3×3(ReLU(BN(conv3×3(x)))))); a branch is a filter of the first convolution."""

    def __init__(
        self, channels: int, out_channels: int, stride: int, shortcut: nn.Module | None, per_branch: int
    ) -> None:
        basis = FilterBasis(channels, out_channels, stride=stride, per_branch=per_branch)
        super().__init__(basis, out_channels, 3, shortcut=shortcut)

    def new_basis(self, num_elements: int) -> nn.Parameter:
        return new_basis(num_elements, self.basis.channels)

    def with_basis(self, bases: Sequence[nn.Parameter], num_own: int) -> nn.Module:
        return SharedBasicBlock(self.basis.channels, bases[0], bases[-1], num_own, self.per_branch)


class SharedBasicBlock(nn.Module):
    """ReLU(x + second(first(x))): both convolutions by a shared basis and own elements, each with coefficients."""

    def __init__(
        self, channels: int, basis1: nn.Parameter, basis2: nn.Parameter, num_own: int, per_branch: int
    ) -> None:
        super().__init__()

        def make(shared: nn.Parameter, rectify: bool) -> FilterSum:
            basis = FilterBasis(channels, num_own, shared, per_branch=per_branch)
            return FilterSum(basis, channels, activation="none", combine="none", rectify=rectify)

        self.first, self.second = make(basis1, True), make(basis2, False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.second(self.first(x))
        return F.relu_(y)


class Bottleneck(FilterSum):
    """ReLU(shortcut(x) + BN(1×1(ReLU(BN(3×3(h)))))), h = ReLU(BN(1×1(x))); a branch is a filter of the 3×3."""

    def __init__(
        self,
        channels: int,
        width: int,
        out_channels: int,
        stride: int,
        shortcut: nn.Module | None,
        per_branch: int,
    ) -> None:
        basis = FilterBasis(width, width, stride=stride, per_branch=per_branch)
        super().__init__(basis, out_channels, before=conv_norm(channels, width, 1), shortcut=shortcut)

    def new_basis(self, num_elements: int) -> nn.Parameter:
        return new_basis(num_elements, self.basis.channels)

    def with_basis(self, bases: Sequence[nn.Parameter], num_own: int) -> nn.Module:
        out_channels, width = self.coefficients.out_channels, self.basis.channels
        basis = FilterBasis(width, num_own, bases[0], per_branch=self.per_branch)
        return FilterSum(basis, out_channels, before=conv_norm(out_channels, width, 1))


class PathBottleneck(FilterSum):
    """A ResNeXt block of `cardinality` paths of one width (form (b)): a branch is a path."""

    def __init__(
        self,
        channels: int,
        cardinality: int,
        path_width: int,
        out_channels: int,
        stride: int,
        shortcut: nn.Module | None,
        scale: int,
    ) -> None:
        width = cardinality * path_width
        basis = FilterBasis(channels, width, kernel=1, per_branch=path_width)
        inner = StackedConv2d("each", cardinality, path_width, path_width, 3, stride)
        super().__init__(basis, out_channels, inner=inner, shortcut=shortcut)
        self.cardinality, self.width, self.scale = cardinality, width, scale

    @property
    def shared_groups(self) -> int:
        """Groups of the shared convolution: half the cardinality (16 in ResNeXt50-S64U4)."""
        return max(self.cardinality // 2, 1)

    def new_basis(self, num_elements: int) -> nn.Parameter:
        return new_basis(num_elements, self.width // self.shared_groups)

    def with_basis(self, bases: Sequence[nn.Parameter], num_own: int) -> nn.Module:
        basis = FilterBasis(
            self.width, num_own, bases[0], own_groups=max(num_own // _PATH_ELEMENTS, 1),
            shared_groups=self.shared_groups, per_branch=_PATH_ELEMENTS * self.scale,
        )  # fmt: skip
        channels = self.basis.channels
        return FilterSum(basis, self.coefficients.out_channels, before=conv_norm(channels, self.width, 1))


class PadShortcut(nn.Module):
    """Shortcut A: every `stride`-th pixel, new channels zero. (N, C, H, W) → (N, out, H/stride, W/stride)."""

    def __init__(self, out_channels: int, stride: int) -> None:
        super().__init__()
        self.out_channels, self.stride = out_channels, stride

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, 0, self.out_channels - x.shape[1]))


class PoolHead(nn.Module):
    """Global average pool, linear: (N, C, H, W) → (N, classes)."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, num_classes)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x.mean((2, 3)))
        return y


def conv_norm(
    channels: int, out_channels: int, kernel: int, stride: int = 1, relu: bool = True
) -> nn.Sequential:
    """Convolution `conv`, BatchNorm `norm` and, unless told otherwise, ReLU."""
    layers = nn.Sequential()
    layers.add_module("conv", conv2d(channels, out_channels, kernel, stride))
    layers.add_module("norm", BatchNorm(out_channels))
    if relu:
        layers.add_module("relu", nn.ReLU())
    return layers


def resnet(
    depth: int = 34,
    stem: Literal["cifar", "imagenet"] = "imagenet",
    cardinality: int = 1,
    width: int = 64,
    num_classes: int | None = None,
    in_channels: int = 3,
    blocks_per_stage: Sequence[int] | None = None,
    bundled: bool = False,
) -> Network:
    """A post-activation ResNet of four stages; with `cardinality` above 1 a ResNeXt.

    depth: 18, 34 (basic blocks), 50, 101, 152 (bottlenecks); `blocks_per_stage` overrides its numbers of blocks.
    stem: "imagenet" 7×7/2 and max pool, "cifar" a 3×3 convolution, BN and ReLU, no pool.
    width: channels of the stem; the 3×3 convolutions of stage i (from 0) have width·2^i, a ResNeXt's twice that.
    num_classes: 1000, or 100 with the CIFAR stem, unless given.
    bundled: 2^i neighbouring filters make one branch in stage i, so that all stages have equally many.

    Raises ModelError for an option that does not fit.
    """
    if depth not in _BLOCKS:
        raise ModelError(
            f"no four-stage ResNet of depth {depth}: use one of {list(_BLOCKS)}; cifar_resnet has others"
        )
    if stem not in ("cifar", "imagenet"):
        raise ModelError(f'stem is "cifar" or "imagenet", got {stem!r}')
    at_least_one(cardinality=cardinality)
    if cardinality > 1 and (depth < 50 or 2 * width % cardinality):
        raise ModelError(
            f"cardinality {cardinality} needs bottlenecks (depth 50 or more, not {depth}) and must divide {2 * width}"
        )
    classes = num_classes if num_classes is not None else 1000 if stem == "imagenet" else 100
    at_least_one(width=width, in_channels=in_channels, num_classes=classes)
    entry = (
        make_stem("imagenet", in_channels, width) if stem == "imagenet" else conv_norm(in_channels, width, 3)
    )
    size = 224 if stem == "imagenet" else 32
    counts = _counts(blocks_per_stage, _BLOCKS[depth])
    return _network(
        entry, width, counts, depth >= 50, cardinality, "B", bundled, classes, (in_channels, size, size)
    )


def cifar_resnet(
    depth: int = 32,
    width: int = 16,
    num_classes: int = 10,
    in_channels: int = 3,
    blocks_per_stage: Sequence[int] | None = None,
    bundled: bool = False,
) -> Network:
    """A post-activation CIFAR ResNet of three stages of basic blocks with shortcuts A: depth 6n+2.

    Options as in `resnet`. Raises ModelError for another depth.
    """
    num_blocks, rest = divmod(depth - 2, 6)
    if rest or num_blocks < 1:
        low = 6 * max(num_blocks, 1) + 2
        raise ModelError(f"a CIFAR ResNet has depth 6n+2, got {depth}: use {low} or {low + 6}")
    counts = _counts(blocks_per_stage, (num_blocks,) * 3)
    at_least_one(width=width, in_channels=in_channels, num_classes=num_classes)
    entry = conv_norm(in_channels, width, 3)
    return _network(entry, width, counts, False, 1, "A", bundled, num_classes, (in_channels, 32, 32))


def _counts(given: Sequence[int] | None, usual: tuple[int, ...]) -> tuple[int, ...]:
    counts = usual if given is None else tuple(given)
    if len(counts) != len(usual) or min(counts) < 1:
        raise ModelError(f"blocks_per_stage {list(counts)} must be {len(usual)} numbers of at least 1")
    return counts


def _network(
    stem: nn.Module,
    width: int,
    counts: Sequence[int],
    bottleneck: bool,
    cardinality: int,
    shortcut: Literal["A", "B"],
    bundled: bool,
    num_classes: int,
    input_shape: tuple[int, int, int],
) -> Network:
    channels = width
    blocks: dict[str, dict[str, nn.Module]] = {}
    for stage, count in enumerate(counts):
        rows = blocks[f"stage{stage + 1}"] = {}
        middle = width * 2**stage
        out = middle * (4 if bottleneck else 1)
        scale = 2**stage if bundled else 1
        for index in range(count):
            stride = 2 if index == 0 and stage > 0 else 1
            skip: nn.Module | None = None
            if stride != 1 or channels != out:
                skip = (
                    PadShortcut(out, stride)
                    if shortcut == "A"
                    else conv_norm(channels, out, 1, stride, relu=False)
                )
            rows[f"block{index + 1}"] = (
                PathBottleneck(channels, cardinality, 2 * middle // cardinality, out, stride, skip, scale)
                if cardinality > 1
                else Bottleneck(channels, middle, out, stride, skip, scale)
                if bottleneck
                else BasicBlock(channels, out, stride, skip, scale)
            )
            channels = out
    return Network(stem, blocks, PoolHead(channels, num_classes), input_shape=input_shape)


READY: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet34": ("resnet", {"depth": 34}),
    "c100_resnet34": ("resnet", {"depth": 34, "stem": "cifar"}),
    "c100_resnext50": ("resnet", {"depth": 50, "stem": "cifar", "cardinality": 32}),
    "c10_resnet32": ("cifar_resnet", {"depth": 32}),
    "c10_resnet56": ("cifar_resnet", {"depth": 56}),
}
