"""ResNeXt (Xie et al., "Aggregated Residual Transformations for Deep Neural Networks") and the ResNets it is compared
with, its cardinality-1 form. The blocks: resnext_block.py.

    discrepancy                   paper                         here
    FLOPs of ResNeXt-101 32×4d    "~7.8 billion" (Figure 5)     7.970G multiply-adds (ResNet-101: 7.801G)
    FLOPs of ResNeXt-101 64×4d    "~15 billion" (Table 4)       15.460G
    template of conv2, C = 8      "~70k" (Table 2)              71,456: width 14 is the nearest, 13 makes 65,416
    input of a block              Figure 3's 256 channels       the first block of conv2 has 64, of the others half
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from anabranch.blocks.errors import ModelError, at_least_one
from anabranch.blocks.network import Network, make_stem
from anabranch.blocks.resnext_block import BLOCKS, Form, SlicedBlock
from anabranch.blocks.shared_resnet import PoolHead, conv_norm

Stem = Literal["imagenet", "cifar"]

_IMAGENET_BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def _ready(depth: int, cardinality: int, base_width: int, **options: Any) -> tuple[str, dict[str, Any]]:
    return "resnext", {"depth": depth, "cardinality": cardinality, "base_width": base_width, **options}


READY: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet50": _ready(50, 1, 64),
    "resnet101": _ready(101, 1, 64),
    "resnet152": _ready(152, 1, 64),
    "resnext50_32x4d": _ready(50, 32, 4),
    "resnext101_32x4d": _ready(101, 32, 4),
    "resnext101_32x8d": _ready(101, 32, 8),
    "resnext101_64x4d": _ready(101, 64, 4),
    "resnext29_8x64d": _ready(29, 8, 64, stem="cifar"),
}


def resnext(
    depth: int = 50,
    cardinality: int = 32,
    base_width: int = 4,
    num_classes: int | None = None,
    stem: Stem = "imagenet",
    form: Form = "c",
    *,
    num_slices: int = 1,
    in_channels: int = 3,
    channels: int = 256,
    blocks_per_stage: Sequence[int] | None = None,
) -> Network:
    """A ResNeXt (Tables 1, 3, 4 and 7).

    depth: ImageNet: 50, 101, 152; CIFAR: 9n+2; any with `blocks_per_stage`, which then decides.
    cardinality, base_width: C paths of width d in the first stage; d doubles from stage to stage. C = 1 is a ResNet,
        with d = 64 the usual one, with more a wide one.
    num_classes: 1000, or 10 with the CIFAR stem, unless given.
    stem: "imagenet" 7×7/2, BN, ReLU, max pool, four stages; "cifar" 3×3, BN, ReLU, three stages.
    form: of Figure 3, equal up to rounding: "a" split branches, "b" early concatenation, "c" grouped convolution.
    num_slices: branches of a network of one path, which has no others: slices of each 3×3's input channels.
    channels: output channels of the first stage, doubling; the stem has a quarter.

    Raises ModelError for a depth or option that does not fit.
    """
    if stem not in ("imagenet", "cifar"):
        raise ModelError(f'stem is "imagenet" or "cifar", got {stem!r}')
    if form not in BLOCKS:
        raise ModelError(f"form is one of {sorted(BLOCKS)}, got {form!r}")
    classes = num_classes if num_classes is not None else 1000 if stem == "imagenet" else 10
    at_least_one(cardinality=cardinality, base_width=base_width, num_slices=num_slices)
    at_least_one(in_channels=in_channels, channels=channels, num_classes=classes)
    if channels % 4:
        raise ModelError(f"channels {channels} must be a multiple of 4: the stem has a quarter of them")
    if num_slices > 1 and (cardinality > 1 or form != "c"):
        raise ModelError(
            f"num_slices {num_slices} is for networks of one path in form 'c', this has {cardinality} in form "
            f"{form!r}: leave it out, the paths are the branches"
        )
    counts = _blocks_per_stage(depth, stem, blocks_per_stage)
    wide = channels // 4
    entry = make_stem(stem, in_channels, wide) if stem == "imagenet" else conv_norm(in_channels, wide, 3)
    blocks: dict[str, dict[str, nn.Module]] = {}
    for stage, count in enumerate(counts):
        rows = blocks[f"stage{stage + 1}"] = {}
        path_width, out = base_width << stage, channels << stage
        for index in range(count):
            stride = 2 if index == 0 and stage > 0 else 1
            rows[f"block{index + 1}"] = (
                BLOCKS[form](wide, cardinality, path_width, out, stride)
                if num_slices == 1
                else SlicedBlock(wide, num_slices, path_width, out, stride)
            )
            wide = out
    size = 224 if stem == "imagenet" else 32
    return Network(entry, blocks, PoolHead(wide, classes), input_shape=(in_channels, size, size))


def template_params(cardinality: int, width: int, channels: int = 256) -> int:
    """Weights of a block's three convolutions, Eq. 4: C·(channels·d + 3·3·d·d + d·channels)."""
    return cardinality * (2 * channels * width + 9 * width * width)


def preserved_width(cardinality: int, base_width: int = 64, channels: int = 256) -> int:
    """The path width d with which C paths have as many weights as one path of `base_width`, nearly (Table 2).

    Of all widths the one whose `template_params` are nearest. Raises ModelError where that would be no channel at all.
    """
    at_least_one(cardinality=cardinality, base_width=base_width, channels=channels)
    budget = template_params(1, base_width, channels)
    width = min(range(base_width + 1), key=lambda d: abs(template_params(cardinality, d, channels) - budget))
    if width == 0:
        least = template_params(cardinality, 1, channels)
        raise ModelError(
            f"{cardinality} paths of width 1 have {least} weights, one of width {base_width} has {budget}: "
            "use a smaller cardinality or a larger base_width"
        )
    return width


def _blocks_per_stage(depth: int, stem: Stem, given: Sequence[int] | None) -> tuple[int, ...]:
    if given is not None:
        if not given or min(given) < 1:
            raise ModelError(f"blocks_per_stage {list(given)} must be numbers of at least 1, one a stage")
        return tuple(given)
    if stem == "imagenet":
        if depth not in _IMAGENET_BLOCKS:
            raise ModelError(
                f"no ImageNet ResNeXt of depth {depth}: use one of {list(_IMAGENET_BLOCKS)}, or give "
                "blocks_per_stage (depth 200 is pre-activated: pre_resnet)"
            )
        return _IMAGENET_BLOCKS[depth]
    num_blocks, rest = divmod(depth - 2, 9)
    if rest or num_blocks < 1:
        low = 9 * max(num_blocks, 1) + 2
        raise ModelError(
            f"a CIFAR ResNeXt has depth 9n+2, got {depth}: use {low} or {low + 9}, or give blocks_per_stage"
        )
    return (num_blocks,) * 3
