"""MobileNetV2 as the paper on shared bases builds it: a 1×1 expansion in the t = 1 block too, biases in the stem's and
the head's convolution.

An inverted residual sums over its expanded channels: a branch is one row of the expansion, its depthwise filter and its
column of the projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from anabranch.blocks.dropout import Dropout
from anabranch.blocks.errors import ModelError, at_least_one
from anabranch.blocks.filter_basis import FilterBasis, kaiming_
from anabranch.blocks.filter_sum import FilterSum
from anabranch.blocks.network import Network
from anabranch.blocks.norm import BatchNorm
from anabranch.blocks.stacked import StackedConv2d

_STAGES = (  # expansion t, channels, blocks, stride
    (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
)  # fmt: skip


class InvertedResidual(FilterSum):
    """BN(project(ReLU6(BN(depthwise(ReLU6(BN(expand(x)))))))), plus x where the shape stays."""

    def __init__(self, channels: int, expansion: int, out_channels: int, stride: int) -> None:
        width = expansion * channels
        super().__init__(
            FilterBasis(channels, width, kernel=1),
            out_channels,
            activation="relu6",
            inner=StackedConv2d("each", width, 1, 1, 3, stride),
            combine="add" if stride == 1 and channels == out_channels else "none",
            rectify=False,
        )


class _ConvHead(nn.Module):
    """1×1 convolution, BN, ReLU6, global average pool, dropout 0.2, linear."""

    def __init__(self, channels: int, width: int, num_classes: int) -> None:
        super().__init__()
        self.conv = _biased(nn.Conv2d(channels, width, 1))
        self.norm, self.act = BatchNorm(width), nn.ReLU6()
        self.dropout = Dropout(0.2)
        self.fc = nn.Linear(width, num_classes)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.conv(x)))
        y: Tensor = self.fc(self.dropout(x.mean((2, 3))))
        return y


def mobilenet_v2(
    width: float = 1.0,
    num_classes: int = 1000,
    in_channels: int = 3,
    blocks_per_stage: Sequence[int] | None = None,
) -> Network:
    """MobileNetV2 for 224 × 224 images, seven stages.

    width: multiplier of all channels, rounded to multiples of 8 (the head's 1280 grow only).
    blocks_per_stage: seven numbers instead of 1, 2, 3, 4, 3, 3, 1. Raises ModelError for an option that does not
    fit.
    """
    if not width > 0:
        raise ModelError(f"width is above 0, got {width}")
    at_least_one(num_classes=num_classes, in_channels=in_channels)
    counts = tuple(blocks_per_stage or (count for _, _, count, _ in _STAGES))
    if len(counts) != len(_STAGES) or min(counts) < 1:
        raise ModelError(f"blocks_per_stage {list(counts)} must be {len(_STAGES)} numbers of at least 1")
    channels = _rounded(32 * width)
    stem = nn.Sequential()
    stem.add_module("conv", _biased(nn.Conv2d(in_channels, channels, 3, 2, 1)))
    stem.add_module("norm", BatchNorm(channels))
    stem.add_module("relu", nn.ReLU6())
    blocks: dict[str, dict[str, nn.Module]] = {}
    for stage, ((expansion, out, _, stride), count) in enumerate(zip(_STAGES, counts, strict=True)):
        rows = blocks[f"stage{stage + 1}"] = {}
        for index in range(count):
            step = stride if index == 0 else 1
            rows[f"block{index + 1}"] = InvertedResidual(channels, expansion, _rounded(out * width), step)
            channels = _rounded(out * width)
    head = _ConvHead(channels, _rounded(1280 * max(width, 1.0)), num_classes)
    return Network(stem, blocks, head, input_shape=(in_channels, 224, 224))


def _rounded(channels: float) -> int:
    """The nearest multiple of 8, at least 8 and at least 0.9 of the number."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * channels else nearest + 8


def _biased(conv: nn.Conv2d) -> nn.Conv2d:
    kaiming_(conv.weight)
    assert conv.bias is not None, "built with a bias"
    nn.init.zeros_(conv.bias)
    return conv


READY: dict[str, tuple[str, dict[str, Any]]] = {"mobilenetv2": ("mobilenet_v2", {})}
