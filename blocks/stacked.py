"""Layers of k branches in one tensor, branch-major along one dim: a branch is a slice.

Shapes: N samples, K branches held, C channels in and O channels out of one branch, H × W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anabranch.blocks.convolution import conv2d

Role = Literal["spread", "each", "sum"]
# Up to so many over all branches, a CPU is quicker with a copy of the input for each branch than with a broadcast over
# branches, whose inner loops are one branch's channels (16 channels of 32 × 32, k = 2: 17 against 36 us a sample).
_FEW_CHANNELS = 64


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

    def forward(self, x: Tensor, *, is_last: bool = False) -> Tensor:
        """All branches at once. is_last: the result is the block's partial sum as it travels."""
        groups = x.shape[1] // self.channels if self.role == "each" else 1
        return conv2d(x, self.weight, self.stride, self.padding, groups, is_last=is_last)

    def one_by_one(self, parts: Iterable[Tensor]) -> Tensor:
        """All branches of role "each", from one input (N, C, H, W) each: as `forward`, by a convolution a branch."""
        return torch.cat([self.one(part, index) for index, part in enumerate(parts)], 1)

    def one(self, x: Tensor, index: int) -> Tensor:
        """The index-th held branch alone, from its own input (N, C, H, W)."""
        width = self.channels if self.role == "sum" else self.out_channels
        weight = self.weight.narrow(self.dim, index * width, width)
        return F.conv2d(x, weight, None, self.stride, self.padding)

    def extra_repr(self) -> str:
        return f"{self.role}, weight={tuple(self.weight.shape)}, stride={self.stride}"


class StackedAffine(nn.Module):
    """The affine maps of K branches' BatchNorms over one normalised input, each followed by ReLU.

    (N, C, H, W) → (N, K·C, H, W), in the input's memory format.
    """

    def __init__(self, num_branches: int, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.weight = nn.Parameter(torch.ones(num_branches * channels))
        self.bias = nn.Parameter(torch.zeros(num_branches * channels))

    def forward(self, x: Tensor) -> Tensor:
        """All branches at once."""
        return _affine_relu(x, self.weight.to(x.dtype), self.bias.to(x.dtype))

    def one(self, x: Tensor, index: int) -> Tensor:
        """The index-th held branch alone."""
        rows = slice(index * self.channels, (index + 1) * self.channels)
        return _affine_relu(x, self.weight[rows].to(x.dtype), self.bias[rows].to(x.dtype))


class _AffineReLU(torch.autograd.Function):
    """ReLU(w_k·x + b_k) for all branches k; the pieces as autograd knows them take twice the time in backward.

    Works on (N, H·W, K, C) or (N, K, C, H·W), whichever the memory format gives without a copy.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x_view, k_dim = _branch_view(x, x.shape[1])
        num = weight.numel() // x.shape[1]
        if x.is_cpu and k_dim == 2 and num > 1 and weight.numel() <= _FEW_CHANNELS:
            y = torch.cat([x] * num, 1).mul_(weight.view(-1, 1, 1)).add_(bias.view(-1, 1, 1)).relu_()
        else:
            shape = (-1, x.shape[1]) if k_dim == 2 else (-1, x.shape[1], 1)
            y_view = torch.addcmul(bias.view(shape), x_view, weight.view(shape)).relu_()
            y = _image(y_view, (x.shape[0], weight.numel(), *x.shape[2:]), k_dim)
        ctx.save_for_backward(x, weight, y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight, y = ctx.saved_tensors
        if x.is_cpu and len(x):  # the kernel used there divides by the number of samples
            return _by_library(grads[0], x, weight, y)
        return _at_once(grads[0], x, weight, y)


def _at_once(grad_y: Tensor, x: Tensor, weight: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in few kernels, each over all branches: a GPU's time goes into starting them."""
    x_view, k_dim = _branch_view(x, x.shape[1])
    last = k_dim == 2
    grad = torch.ops.aten.threshold_backward(grad_y, y, 0)
    if last:
        grad = grad.contiguous(memory_format=torch.channels_last)
    grad_view, _ = _branch_view(grad, x.shape[1])
    dims = (0, 1) if last else (0, 3)
    grad_x = (grad_view * weight.view((-1, x.shape[1]) if last else (-1, x.shape[1], 1))).sum(k_dim)
    grad_weight, grad_bias = (grad_view * x_view).sum(dims), grad_view.sum(dims)
    return _image(grad_x, x.shape, k_dim), grad_weight.reshape(-1), grad_bias.reshape(-1)


def _by_library(grad_y: Tensor, x: Tensor, weight: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by the CPU library's kernels over all channels of all branches, whose inner loops are the longest."""
    channels = x.shape[1]
    grad = torch.ops.aten.threshold_backward(grad_y, y, 0)
    wide = x if weight.numel() == channels else torch.cat([x] * (weight.numel() // channels), 1)
    # BatchNorm's backward, of statistics that x has no part in: Σ grad·x and Σ grad in one pass
    mean, var = torch.zeros_like(weight), torch.ones_like(weight)
    _, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
        grad, wide, weight, mean, var, None, None, False, 0.0, [False, True, True]
    )
    grad_x, shape = None, (-1, *[1] * (x.dim() - 2))
    for grad_k, weight_k in zip(grad.split(channels, 1), weight.split(channels), strict=True):
        scale = weight_k.view(shape)
        grad_x = grad_k * scale if grad_x is None else grad_x.addcmul_(grad_k, scale)
    assert grad_x is not None, "a copy without branches does not come here"
    return grad_x, grad_weight, grad_bias


_affine_relu: Callable[[Tensor, Tensor, Tensor], Tensor] = _AffineReLU.apply


def _branch_view(x: Tensor, channels: int) -> tuple[Tensor, int]:
    """x (N, K·C, H, W) with a dim of its own for the branches, and which: (N, H·W, K, C) and 2 where the channels lie
    innermost in memory, else (N, K, C, H·W) and 1."""
    pixels, num = x.shape[2:].numel(), x.shape[1] // channels
    if x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).reshape(x.shape[0], pixels, num, channels), 2
    return x.reshape(x.shape[0], num, channels, pixels), 1


def _image(view: Tensor, size: Sequence[int], k_dim: int) -> Tensor:
    """`_branch_view` undone, as a tensor of `size` (N, channels, H, W)."""
    if k_dim == 1:
        return view.reshape(size)
    return view.reshape(size[0], *size[2:], size[1]).permute(0, 3, 1, 2)
