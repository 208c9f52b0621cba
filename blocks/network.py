"""A network: `stem`, an ordered list of named `blocks`, `head`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from anabranch.blocks.errors import ModelError
from anabranch.blocks.norm import BatchNorm


class Network(nn.Module):
    """head(block_n(… block_1(stem(x)))).

    blocks: {"stage1": {"block1": module, …}, …}; block names are "stage1.block1", … in order.
    input_shape: (C, H, W) of one sample, for counting; the network itself takes any that its layers take.
    """

    def __init__(
        self,
        stem: nn.Module,
        blocks: Mapping[str, Mapping[str, nn.Module]],
        head: nn.Module,
        *,
        input_shape: tuple[int, int, int],
    ) -> None:
        super().__init__()
        self.stem = stem
        self.blocks = nn.ModuleDict({stage: nn.ModuleDict(dict(rows)) for stage, rows in blocks.items()})
        self.head = head
        self.input_shape = input_shape

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, classes)."""
        x = self.stem(x)
        for _, block in named_blocks(self):
            x = block(x)
        y: Tensor = self.head(x)
        return y


def named_blocks(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """The blocks of a network in order, named as plans name them.

    Any module with `stem`, `blocks`, `head` is a network; `blocks` is a ModuleList, Sequential or ModuleDict,
    a ModuleDict's or ModuleList's members may be such containers again. Raises ModelError for a module that
    is none.
    """
    parts = ("stem", "blocks", "head")
    if missing := [part for part in parts if not isinstance(getattr(network, part, None), nn.Module)]:
        raise ModelError(
            f"{type(network).__name__} has no {', '.join(missing)}: a network to be spread has the modules "
            "stem, blocks (a ModuleList, Sequential or ModuleDict of blocks) and head"
        )
    blocks: nn.Module = network.blocks  # type: ignore[assignment]
    named = _children(blocks) if isinstance(blocks, nn.Sequential) else _leaves(blocks)
    if not named:
        raise ModelError(f"{type(network).__name__}.blocks is empty: it needs at least one block")
    return named


def _leaves(container: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]]:
    found: list[tuple[str, nn.Module]] = []
    for name, child in _children(container):
        if isinstance(child, nn.ModuleDict | nn.ModuleList):
            found += _leaves(child, f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", child))
    return found


def _children(container: nn.Module) -> list[tuple[str, nn.Module]]:
    # named_children would leave out a block that comes a second time
    return [(name, child) for name, child in container._modules.items() if child is not None]


def conv2d(channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """A convolution without bias, padded to keep the size, init N(0, √(2 / (kernel² · out_channels)))."""
    conv = nn.Conv2d(channels, out_channels, kernel, stride, kernel // 2, bias=False)
    nn.init.normal_(conv.weight, std=math.sqrt(2.0 / (kernel * kernel * out_channels)))
    return conv


def make_stem(kind: Literal["cifar", "imagenet"], in_channels: int, out_channels: int) -> nn.Sequential:
    """The stem "cifar": a 3×3 convolution without BN; "imagenet": 7×7/2, BN, ReLU, 3×3/2 max pool."""
    stem = nn.Sequential()
    if kind == "cifar":
        stem.add_module("conv", conv2d(in_channels, out_channels, 3))
        return stem
    stem.add_module("conv", conv2d(in_channels, out_channels, 7, 2))
    stem.add_module("norm", BatchNorm(out_channels))
    stem.add_module("relu", nn.ReLU())
    stem.add_module("pool", nn.MaxPool2d(3, 2, 1))
    return stem


class Head(nn.Module):
    """BN, ReLU, global average pool, linear: (N, C, H, W) → (N, classes)."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.norm = BatchNorm(channels)
        self.fc = nn.Linear(channels, num_classes)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(F.relu_(self.norm(x)).mean((2, 3)))
        return y
