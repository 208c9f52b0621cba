"""CRU-Net (Chen et al., "Sharing Residual Units Through Collective Tensor Factorization in Deep Neural
Networks") and the pre-activated ResNeXt it starts from. Their units: cru_unit.py.

Units 1-6, 7-12, … of a CRU stage (the first included) share one pair (1×1, 3×3): these are tied parameters, so a
plan must place such units alike, and a rank stores its part of the pair once.

    discrepancy                        paper                        here
    FLOPs, CRU-Net-56 and -116         4.9G, 13.3G (Table 1)        5.634G, 12.646G multiply-adds
    CRU-Net-56 136×1d, model size      98 MB (Table 3), D not given 99 MB with Table 1's D = 640; 98 with D = 632
    CRU-Net-116 wider 64×4d            318 MB (Table 4), D not given 318 with D = 576, 1152
    BN-ReLUs of Figure 3's left form   "loses one"                  two: before the first and the last 1×1
    initialization                     not given                    ResNeXt's: N(0, √(2 / (kernel² · outputs)))
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from anabranch.blocks.cru_unit import Form, ResidualUnit, cru_unit, plain_unit
from anabranch.blocks.errors import ModelError, at_least_one
from anabranch.blocks.network import Head, Network, make_stem

Stem = Literal["cifar", "imagenet"]

_MOST_BRANCHES = 32  # of a block by default: the papers' cardinality

_CRU_NETS = {56: ((3, 4, 6, 3), (0, 0, 640, 0)), 116: ((3, 6, 18, 3), (0, 352, 704, 0))}
_PLAIN_NETS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}

READY: dict[str, tuple[str, dict[str, Any]]] = {
    "cru_net_56": ("cru_net", {"depth": 56}),
    "cru_net_116": ("cru_net", {"depth": 116}),
    "resnext50_nx1d": (
        "preact_resnext",
        {"depth": 50, "cardinality": 136, "base_width": 1, "doubles": "cardinality"},
    ),
}


def cru_net(
    depth: int = 56,
    cardinality: int = 32,
    base_width: int = 4,
    num_classes: int = 1000,
    *,
    cru_widths: Sequence[int] | None = None,
    cru_cardinality: int | None = None,
    units_per_group: int = 6,
    form: Form = "improved",
    num_branches: int | None = None,
    blocks_per_stage: Sequence[int] | None = None,
    channels: int = 256,
    stem: Stem = "imagenet",
    in_channels: int = 3,
) -> Network:
    """A CRU-Net (Table 1): CRUs in some stages, pre-activated ResNeXt units in the others.

    depth: 56 or 116; any with `blocks_per_stage` and `cru_widths`, which then decide.
    cardinality, base_width: R × d of the plain units; d doubles from stage to stage.
    cru_widths: D of every stage, 0 for a plain one ("@14" of the 56: (0, 0, 640, 0)).
    cru_cardinality: R of the CRUs; None: R = D, a depthwise 3×3, as in the paper.
    units_per_group: consecutive CRUs that share a pair of layers; a CRU stage is whole groups. 1 shares nothing.
    num_branches: equal bundles of terms that a plan can place, in every block; it divides each R. None: the
        greatest common divisor of 32 and the block's R.
    channels: output channels of the first stage, doubling.
    stem: "imagenet" (64 channels, input 224×224) or "cifar" (16, 32×32).

    Raises ModelError for a depth or option that does not fit.
    """
    if blocks_per_stage is None:
        if depth not in _CRU_NETS:
            raise ModelError(
                f"no CRU-Net of depth {depth}: use one of {list(_CRU_NETS)}, or give blocks_per_stage and cru_widths"
            )
        blocks_per_stage, paper_widths = _CRU_NETS[depth]
        cru_widths = paper_widths if cru_widths is None else cru_widths
    elif cru_widths is None:
        raise ModelError("blocks_per_stage needs cru_widths: one D a stage, 0 for a plain stage")
    if form not in ("improved", "standard"):
        raise ModelError(f"form is 'improved' or 'standard', got {form!r}")
    if len(cru_widths) != len(blocks_per_stage) or min(cru_widths) < 0:
        raise ModelError(
            f"cru_widths {list(cru_widths)} must be {len(blocks_per_stage)} numbers, one a stage, 0 for a plain one"
        )
    at_least_one(cardinality=cardinality, base_width=base_width, units_per_group=units_per_group)
    stages = []
    for stage, (count, width) in enumerate(zip(blocks_per_stage, cru_widths, strict=True)):
        if width and count % units_per_group:
            raise ModelError(
                f"stage{stage + 1} has {count} CRUs, which are no whole groups of units_per_group "
                f"{units_per_group}: change either, or make the stage plain (cru_widths 0)"
            )
        if width:
            stages.append((width, width if cru_cardinality is None else cru_cardinality, units_per_group))
        else:
            stages.append((cardinality * base_width << stage, cardinality, 0))
    return _network(blocks_per_stage, stages, form, num_branches, channels, stem, in_channels, num_classes)


def preact_resnext(
    depth: int = 50,
    cardinality: int = 32,
    base_width: int = 4,
    num_classes: int = 1000,
    *,
    doubles: Literal["base_width", "cardinality"] = "base_width",
    num_branches: int | None = None,
    blocks_per_stage: Sequence[int] | None = None,
    channels: int = 256,
    stem: Stem = "imagenet",
    in_channels: int = 3,
) -> Network:
    """A pre-activated ResNeXt, CRU-Net's baseline (Tables 1-3).

    depth: 50 or 101; any with `blocks_per_stage`, which then decides.
    cardinality, base_width: R × d of the first stage. doubles: which of the two doubles from stage to stage;
        "N×1d" doubles the cardinality.
    The rest as in `cru_net`. Raises ModelError for a depth or option that does not fit.
    """
    if blocks_per_stage is None:
        if depth not in _PLAIN_NETS:
            raise ModelError(
                f"no pre-activated ResNeXt of depth {depth}: use one of {list(_PLAIN_NETS)}, or give blocks_per_stage"
            )
        blocks_per_stage = _PLAIN_NETS[depth]
    if doubles not in ("base_width", "cardinality"):
        raise ModelError(f"doubles is 'base_width' or 'cardinality', got {doubles!r}")
    at_least_one(cardinality=cardinality, base_width=base_width)
    grows = int(doubles == "cardinality")
    stages = [
        (cardinality * base_width << stage, cardinality << stage * grows, 0)
        for stage in range(len(blocks_per_stage))
    ]
    return _network(
        blocks_per_stage, stages, "improved", num_branches, channels, stem, in_channels, num_classes
    )


def model_size_mb(network: nn.Module) -> int:
    """The paper's model size: ⌈4 bytes · (parameters, shared ones once, and BN means and variances) ÷ 2²⁰⌉."""
    statistics = [b for name, b in network.named_buffers() if name.endswith(("running_mean", "running_var"))]
    return -(-4 * sum(t.numel() for t in [*network.parameters(), *statistics]) // 2**20)


def _network(
    blocks_per_stage: Sequence[int],
    stages: Sequence[tuple[int, int, int]],
    form: Form,
    num_branches: int | None,
    channels: int,
    stem: Stem,
    in_channels: int,
    num_classes: int,
) -> Network:
    """stages: (width, terms, CRUs in a group; 0: plain units) of each stage."""
    if stem not in ("cifar", "imagenet"):
        raise ModelError(f"stem is 'cifar' or 'imagenet', got {stem!r}")
    if not blocks_per_stage or min(blocks_per_stage) < 1:
        raise ModelError(f"blocks_per_stage {list(blocks_per_stage)} must be numbers of at least 1")
    at_least_one(channels=channels, in_channels=in_channels, num_classes=num_classes)
    size, stem_channels = (224, 64) if stem == "imagenet" else (32, 16)
    wide = stem_channels
    blocks: dict[str, dict[str, nn.Module]] = {}
    for stage, (count, (width, num_terms, group)) in enumerate(zip(blocks_per_stage, stages, strict=True)):
        bundles = math.gcd(_MOST_BRANCHES, num_terms) if num_branches is None else num_branches
        blocks[name := f"stage{stage + 1}"] = rows = {}
        lender: ResidualUnit | None = None
        for index in range(count):
            stride = 2 if index == 0 and stage > 0 else 1
            out = channels << stage
            try:
                if group:
                    lender = None if index % group == 0 else lender
                    unit = cru_unit(bundles, wide, width, out, num_terms, stride, form, lender)
                    lender = lender or unit
                else:
                    unit = plain_unit(bundles, wide, width, out, num_terms, stride)
            except ModelError as error:
                raise ModelError(f"{name}: {error}") from error
            rows[f"block{index + 1}"] = unit
            wide = out
    return Network(
        make_stem(stem, in_channels, stem_channels),
        blocks,
        Head(wide, num_classes),
        input_shape=(in_channels, size, size),
    )
