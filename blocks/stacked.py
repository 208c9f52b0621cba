"""Layers of k branches in one tensor, branch-major along one dim: a branch is a slice.

Shapes: N samples, K branches held, C channels in and O channels out of one branch, H × W pixels.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Role = Literal["spread", "each", "sum"]


class StackedConv2d(nn.Module):
    """The convolutions of K branches at one place in their chain, without bias.

    role:
      "spread"  all branches read one input: a dense convolution, (N, C, H, W) → (N, K·O, H', W'), stacked on
          dim 0
      "each"    each reads its own slice: a grouped convolution, (N, K·C, H, W) → (N, K·O, H', W'), stacked on
          dim 0
      "sum"     each reads its own slice and the results are added: a dense convolution whose weight
                concatenates the branches on its *input* dim, so that the sum disappears: (N, K·C, H, W) → (N,
                O, H', W'), on dim 1

    Init N(0, √(2 / (kernel² · O))).
    """

    def __init__(
        self, role: Role, num_branches: int, channels: int, out_channels: int, kernel: int, stride: int = 1
    ) -> None:
        super().__init__()
        self.role, self.channels, self.out_channels, self.stride, self.padding = (
            role, channels, out_channels, stride, kernel // 2,
        )  # fmt: skip
        shape = [out_channels, channels, kernel, kernel]
        shape[self.dim] *= num_branches
        self.weight = nn.Parameter(torch.empty(shape))
        nn.init.normal_(self.weight, std=math.sqrt(2.0 / (kernel * kernel * out_channels)))

    @property
    def dim(self) -> int:
        """The weight's dim along which branches are stacked."""
        return 1 if self.role == "sum" else 0

    def forward(self, x: Tensor) -> Tensor:
        """All branches at once."""
        groups = x.shape[1] // self.channels if self.role == "each" else 1
        return F.conv2d(x, self.weight, None, self.stride, self.padding, 1, groups)

    def one(self, x: Tensor, index: int) -> Tensor:
        """The index-th held branch alone, from its own input (N, C, H, W)."""
        width = self.channels if self.role == "sum" else self.out_channels
        weight = self.weight.narrow(self.dim, index * width, width)
        return F.conv2d(x, weight, None, self.stride, self.padding)

    def extra_repr(self) -> str:
        return f"{self.role}, weight={tuple(self.weight.shape)}, stride={self.stride}"


class StackedAffine(nn.Module):
    """The affine maps of K branches' BatchNorms over one normalised input: (N, C, H, W) → (N, K·C, H, W)."""

    def __init__(self, num_branches: int, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.weight = nn.Parameter(torch.ones(num_branches * channels))
        self.bias = nn.Parameter(torch.zeros(num_branches * channels))

    def forward(self, x: Tensor) -> Tensor:
        """All branches at once."""
        weight, bias = (p.view(-1, self.channels, 1, 1).to(x.dtype) for p in (self.weight, self.bias))
        return torch.addcmul(bias, x[:, None], weight).flatten(1, 2)

    def one(self, x: Tensor, index: int) -> Tensor:
        """The index-th held branch alone."""
        rows = slice(index * self.channels, (index + 1) * self.channels)
        weight, bias = (p[rows].view(-1, 1, 1).to(x.dtype) for p in (self.weight, self.bias))
        return torch.addcmul(bias, x, weight)
