"""ResNeXt's block y = ReLU(shortcut(x) + BN(Σ_i T_i(x))) in the three forms of Figure 3.

    (a) split branches          (b) early concatenation         (c) grouped convolution
    1×1, d   1×1, d   …         1×1, d   1×1, d   …             1×1, C·d
    3×3, d   3×3, d   …         3×3, d   3×3, d   …             3×3, C·d, C groups
    1×1, out 1×1, out …  Σ      concatenate; 1×1, out           1×1, out

T_i is a path of width d: 1×1-BN-ReLU-3×3-BN-ReLU-1×1, the stride on the 3×3. One BN follows the *sum*, in every form:
with a BN of each path before it, the forms would not be equal. Path i is channels [i·d, (i+1)·d) of form (c): these
rows of conv1, norm1, conv2 and norm2, these columns of conv3 (resnext_forms.py converts). A branch is a path.
"""

from __future__ import annotations

import math
import operator
from functools import reduce
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anabranch.blocks.branch_sum import BranchSum, BranchTensor, Hidden
from anabranch.blocks.errors import ModelError
from anabranch.blocks.network import conv2d
from anabranch.blocks.norm import BatchNorm
from anabranch.blocks.shared_resnet import conv_norm
from anabranch.blocks.stacked import StackedConv2d

Form = Literal["a", "b", "c"]

_STATISTICS = ("weight", "bias", "running_mean", "running_var")


class _Block(BranchSum):
    """What the forms share: BN after the sum, the shortcut (1×1 convolution and BN where shapes differ), ReLU."""

    def __init__(self, num_branches: int, channels: int, out_channels: int, stride: int) -> None:
        super().__init__(num_branches)
        self.norm3 = BatchNorm(out_channels)
        changes = stride != 1 or channels != out_channels
        self.shortcut = conv_norm(channels, out_channels, 1, stride, relu=False) if changes else None

    def join(self, x: Tensor, h: Hidden, s: Tensor) -> Tensor:
        return F.relu_(self.norm3(s) + (x if self.shortcut is None else self.shortcut(x)))


class GroupedBlock(_Block):
    """Form (c): all paths in each tensor; a bottleneck of a plain ResNet with `cardinality` 1."""

    def __init__(
        self, channels: int, cardinality: int, path_width: int, out_channels: int, stride: int = 1
    ) -> None:
        super().__init__(cardinality, channels, out_channels, stride)
        width = cardinality * path_width
        self.conv1 = StackedConv2d("spread", cardinality, channels, path_width, 1)
        self.norm1 = BatchNorm(width)
        self.conv2 = StackedConv2d("each", cardinality, path_width, path_width, 3, stride)
        self.norm2 = BatchNorm(width)
        self.conv3 = StackedConv2d("sum", cardinality, path_width, out_channels, 1)
        _init(width, self.conv1, self.conv2)

    def branches(self, h: Hidden) -> Tensor:
        assert isinstance(h, Tensor), "`enter` gives one tensor"
        if self.execution == "looped":
            return reduce(operator.add, (self._path(h, index) for index in range(len(self.held))))
        a = F.relu_(self.norm1(self.conv1(h)))
        y: Tensor = self.conv3(F.relu_(self.norm2(self.conv2(a))))
        return y

    def _path(self, h: Tensor, index: int) -> Tensor:
        width = self.conv1.out_channels
        rows = slice(index * width, (index + 1) * width)
        a = F.relu_(self.norm1(self.conv1.one(h, index), rows))
        return self.conv3.one(F.relu_(self.norm2(self.conv2.one(a, index), rows)), index)

    def branch_tensors(self) -> dict[str, BranchTensor]:
        dims = {f"{conv}.weight": getattr(self, conv).dim for conv in ("conv1", "conv2", "conv3")}
        dims |= {f"{norm}.{name}": 0 for norm in ("norm1", "norm2") for name in _STATISTICS}
        return {name: BranchTensor(self.held, dim) for name, dim in dims.items()}


class Path(nn.Module):
    """1×1-BN-ReLU-3×3-BN-ReLU of one path and, given `out_channels`, its own last 1×1. width: of all paths."""

    def __init__(
        self, channels: int, path_width: int, width: int, stride: int, out_channels: int | None
    ) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv2d(channels, path_width, 1), BatchNorm(path_width)
        self.conv2, self.norm2 = conv2d(path_width, path_width, 3, stride), BatchNorm(path_width)
        self.conv3 = None if out_channels is None else conv2d(path_width, out_channels, 1)
        _init(width, self.conv1, self.conv2)

    def forward(self, h: Tensor) -> Tensor:
        a = F.relu_(self.norm1(self.conv1(h)))
        a = F.relu_(self.norm2(self.conv2(a)))
        return a if self.conv3 is None else self.conv3(a)


class SplitBlock(_Block):
    """Form (a): every path is a module of its own, and the paths' results are added."""

    def __init__(
        self, channels: int, cardinality: int, path_width: int, out_channels: int, stride: int = 1
    ) -> None:
        super().__init__(cardinality, channels, out_channels, stride)
        width = cardinality * path_width
        paths = (Path(channels, path_width, width, stride, out_channels) for _ in range(cardinality))
        self.branch = nn.ModuleDict({str(i): path for i, path in enumerate(paths)})

    def branches(self, h: Hidden) -> Tensor:
        y: Tensor = reduce(operator.add, (path(h) for path in self.branch.values()))
        return y


class ConcatenatedBlock(_Block):
    """Form (b): every path is a module of its own up to the 3×3; one 1×1 reads their concatenation."""

    def __init__(
        self, channels: int, cardinality: int, path_width: int, out_channels: int, stride: int = 1
    ) -> None:
        super().__init__(cardinality, channels, out_channels, stride)
        width = cardinality * path_width
        paths = (Path(channels, path_width, width, stride, None) for _ in range(cardinality))
        self.branch = nn.ModuleDict({str(i): path for i, path in enumerate(paths)})
        self.conv3 = StackedConv2d("sum", cardinality, path_width, out_channels, 1)

    def branches(self, h: Hidden) -> Tensor:
        y: Tensor = self.conv3(torch.cat([path(h) for path in self.branch.values()], 1))
        return y

    def branch_tensors(self) -> dict[str, BranchTensor]:
        return {**super().branch_tensors(), "conv3.weight": BranchTensor(self.held, self.conv3.dim)}


class SlicedBlock(_Block):
    """A plain bottleneck whose 3×3 is a sum over its input channels: a branch is a slice of them.

    Branch b: its rows of conv1, its BN-ReLU, its columns of conv2; norm2, ReLU and conv3 follow the sum. Parameters
    are those of `GroupedBlock` with cardinality 1, under the same names.
    """

    def __init__(
        self, channels: int, num_slices: int, width: int, out_channels: int, stride: int = 1
    ) -> None:
        super().__init__(num_slices, channels, out_channels, stride)
        if width % num_slices:
            raise ModelError(
                f"num_slices {num_slices} does not divide the {width} channels of the 3×3: use a divisor of them"
            )
        slice_width = width // num_slices
        self.conv1 = StackedConv2d("spread", num_slices, channels, slice_width, 1)
        self.norm1 = BatchNorm(width)
        self.conv2 = StackedConv2d("sum", num_slices, slice_width, width, 3, stride)
        self.norm2 = BatchNorm(width)
        self.conv3 = conv2d(width, out_channels, 1)
        _init(width, self.conv1)

    def branches(self, h: Hidden) -> Tensor:
        assert isinstance(h, Tensor), "`enter` gives one tensor"
        if self.execution == "looped":
            return reduce(operator.add, (self._slice(h, index) for index in range(len(self.held))))
        y: Tensor = self.conv2(F.relu_(self.norm1(self.conv1(h))))
        return y

    def _slice(self, h: Tensor, index: int) -> Tensor:
        width = self.conv1.out_channels
        rows = slice(index * width, (index + 1) * width)
        return self.conv2.one(F.relu_(self.norm1(self.conv1.one(h, index), rows)), index)

    def join(self, x: Tensor, h: Hidden, s: Tensor) -> Tensor:
        return super().join(x, h, self.conv3(F.relu_(self.norm2(s))))

    def branch_tensors(self) -> dict[str, BranchTensor]:
        dims = {"conv1.weight": 0, "conv2.weight": 1, **{f"norm1.{name}": 0 for name in _STATISTICS}}
        return {name: BranchTensor(self.held, dim) for name, dim in dims.items()}


BLOCKS: dict[Form, type[GroupedBlock | SplitBlock | ConcatenatedBlock]] = {
    "a": SplitBlock, "b": ConcatenatedBlock, "c": GroupedBlock,
}  # fmt: skip


def _init(width: int, *convs: nn.Conv2d | StackedConv2d) -> None:
    """N(0, √(2 / (kernel² · outputs))) with the outputs of *all* paths, as one grouped convolution has them."""
    for conv in convs:
        kernel_area = math.prod(conv.weight.shape[2:])
        nn.init.normal_(conv.weight, std=math.sqrt(2.0 / (kernel_area * width)))
