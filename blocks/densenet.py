"""DenseNet-BC: every layer adds `growth` channels computed from all before it.

A plain layer sums over the filters of its 1×1 convolution, one with a shared basis over the elements of the 3×3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from anabranch.blocks.errors import ModelError, at_least_one
from anabranch.blocks.filter_basis import FilterBasis, new_basis
from anabranch.blocks.filter_sum import FilterSum
from anabranch.blocks.network import Head, Network, conv2d, make_stem
from anabranch.blocks.norm import BatchNorm

_BLOCKS = {121: (6, 12, 24, 16), 169: (6, 12, 32, 32), 201: (6, 12, 48, 32)}


class DenseLayer(FilterSum):
    """cat(x, conv3×3(ReLU(BN(conv1×1(h))))), h = ReLU(BN(x)); a branch is a filter of the 1×1 convolution."""

    shares_first, scales_with_stage = True, False

    def __init__(self, channels: int, growth: int) -> None:
        before = nn.Sequential()
        before.add_module("norm", BatchNorm(channels))
        before.add_module("relu", nn.ReLU())
        basis = FilterBasis(channels, 4 * growth, kernel=1)
        super().__init__(basis, growth, 3, before=before, combine="concat", normalise=False, rectify=False)
        self.growth = growth

    def new_basis(self, num_elements: int) -> nn.Parameter:
        return new_basis(num_elements, 4 * self.growth)

    def with_basis(self, bases: Sequence[nn.Parameter], num_own: int) -> nn.Module:
        """BN-ReLU-1×1-BN-ReLU, own and shared elements, BN, 1×1, concatenated to x; no BN after."""
        before = nn.Sequential()
        before.add_module("norm", BatchNorm(self.basis.channels))
        before.add_module("relu", nn.ReLU())
        before.add_module("conv", conv2d(self.basis.channels, 4 * self.growth, 1))
        before.add_module("norm2", BatchNorm(4 * self.growth))
        before.add_module("relu2", nn.ReLU())
        return FilterSum(
            FilterBasis(4 * self.growth, num_own, bases[0]), self.growth, before=before, activation="none",
            combine="concat", normalise=False, rectify=False,
        )  # fmt: skip


class Transition(nn.Module):
    """BN, ReLU, 1×1 convolution to half the channels, 2×2 average pool; replicated, it has no branches."""

    between_stages = True  # a stage's output, to a detector, is what comes before

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.conv = BatchNorm(channels), conv2d(channels, channels // 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(F.relu_(self.norm(x))), 2)


def densenet(
    depth: int = 121,
    growth: int = 32,
    num_classes: int = 100,
    in_channels: int = 3,
    blocks_per_stage: Sequence[int] | None = None,
) -> Network:
    """A CIFAR DenseNet-BC: stem 3×3 to 2·growth without BN, four dense blocks, transitions that halve.

    depth: 121, 169, 201; `blocks_per_stage` overrides its numbers of layers. A transition is the last block of its
    stage, "stage1.transition". Raises ModelError for an option that does not fit.
    """
    if depth not in _BLOCKS:
        raise ModelError(f"no DenseNet of depth {depth}: use one of {list(_BLOCKS)}")
    at_least_one(growth=growth, in_channels=in_channels, num_classes=num_classes)
    counts = _BLOCKS[depth] if blocks_per_stage is None else tuple(blocks_per_stage)
    if not counts or min(counts) < 1:
        raise ModelError(f"blocks_per_stage {list(counts)} must be numbers of at least 1")
    channels = 2 * growth
    blocks: dict[str, dict[str, nn.Module]] = {}
    for stage, count in enumerate(counts):
        rows = blocks[f"stage{stage + 1}"] = {}
        for index in range(count):
            rows[f"block{index + 1}"] = DenseLayer(channels, growth)
            channels += growth
        if stage + 1 < len(counts):
            rows["transition"] = Transition(channels)
            channels //= 2
    stem = make_stem("cifar", in_channels, 2 * growth)
    return Network(stem, blocks, Head(channels, num_classes), input_shape=(in_channels, 32, 32))


READY: dict[str, tuple[str, dict[str, Any]]] = {"c100_densenet121": ("densenet", {"depth": 121})}
