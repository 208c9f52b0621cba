"""Turns a network into one whose blocks share filter bases: the SsUu transformation and tied convolutions.

A sharing group is a stage. The first block of a stage keeps its own filters (DenseNet: all layers share).

    c10_resnet56 (u = 1, s = 16)        stage 1   block1   own 3×3 filters
                                                  block2 ┐
                                                  …      ├ 16 shared elements, 1 own element a convolution
                                                  block9 ┘
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast, runtime_checkable

from torch import nn

from anabranch.blocks.branch_sum import branch_sums
from anabranch.blocks.errors import ModelError
from anabranch.blocks.filter_sum import FilterSum, Part
from anabranch.blocks.network import Network, named_blocks
from anabranch.blocks.resnext_block import GroupedBlock, SlicedBlock
from anabranch.blocks.shared_resnet import Bottleneck, PathBottleneck


@runtime_checkable
class Shareable(Protocol):
    """A block that can be rebuilt on a shared basis.

    Class attributes `shares_first` (default False: the first block of a stage stays) and `scales_with_stage`
    (default True: stage i has 2^i times the elements) are read where present.
    """

    def new_basis(self, num_elements: int) -> nn.Parameter:
        """Fresh orthonormal elements for blocks of this shape, one a row of dim 0."""

    def with_basis(self, bases: Sequence[nn.Parameter], num_own: int) -> nn.Module:
        """A fresh block of this shape on one shared basis, or two, and `num_own` own elements a convolution."""


def share_bases(
    network: Network, shared: int, own: int, *, double: bool = False, own_in_basis: bool = False
) -> Network:
    """The SsUu transformation, in place: blocks get s·2^i shared and u·2^i own elements in stage i (from 0).

    shared, own: s and u. double: one basis for first and one for second convolutions of basic blocks, else one for
    both. own_in_basis: the regularizer sees the own elements as rows of the stage's basis too.
    Raises ModelError for a block that is not Shareable or cannot use two bases, and where no stage has one to share.
    """
    if shared < 1 or own < 0:
        raise ModelError(f"shared {shared}, own {own}: give at least 1 shared and 0 own elements")
    done = 0
    for index, (stage, rows) in enumerate(_stages(network).items()):
        candidates = [(name, block) for name, block in rows if branch_sums(block)]  # no transitions
        for name, block in candidates:
            if not isinstance(block, Shareable):
                raise ModelError(
                    f"{stage}.{name} is a {type(block).__name__}, which cannot share a basis: apply this to a "
                    "resnet, cifar_resnet, densenet, or blocks with new_basis and with_basis"
                )
        takers = candidates if getattr(candidates[0][1], "shares_first", False) else candidates[1:]
        if not takers:
            continue
        template = cast(Shareable, takers[0][1])
        factor = 2**index if getattr(template, "scales_with_stage", True) else 1
        bases = [template.new_basis(shared * factor) for _ in range(2 if double else 1)]
        for name, block in takers:
            made = cast(Shareable, block).with_basis(bases, own * factor)
            if not {id(basis) for basis in bases} <= {id(parameter) for parameter in made.parameters()}:
                raise ModelError(
                    f"{stage}.{name} is a {type(block).__name__}, which has one convolution to share, and double gives "
                    "it two bases: leave double out, it is for basic blocks"
                )
            for module in made.modules():
                if isinstance(module, FilterSum):
                    module.own_in_basis = own_in_basis
            cast(nn.ModuleDict, network.blocks[stage])[name] = made
            done += 1
    if not done:
        raise ModelError("no stage has a second block: there is nothing to share")
    return network


def tie_convolutions(network: Network, parts: Sequence[Part]) -> Network:
    """Ties whole convolutions of the blocks 2..n of every stage, in place, as orthogonal bases.

    parts: "basis" (a bottleneck's 3×3, MobileNetV2's expansion), "coefficients" (the last 1×1), "first" (a
    bottleneck's first 1×1). Stages with less than three blocks have nothing to tie. Raises ModelError for blocks
    without such a convolution.
    """
    done = 0
    for stage, rows in _stages(network).items():
        blocks = [block for _, block in rows[1:]]
        if len(blocks) < 2:
            continue
        for part in parts:
            for block in blocks[1:]:
                if not (isinstance(block, FilterSum) and isinstance(blocks[0], FilterSum)):
                    raise ModelError(
                        f"{stage} has blocks of {type(block).__name__}: only FilterSum blocks can be tied"
                    )
                block.tie(part, blocks[0])
                done += 1
            nn.init.orthogonal_(cast(FilterSum, blocks[0]).part(part))
    if not done:
        raise ModelError("no stage has three blocks: there is nothing to tie")
    return network


def shared_basis(
    base: str = "c10_resnet32",
    shared: int = 0,
    own: int = 0,
    double: bool = False,
    own_in_basis: bool = False,
    tied: Sequence[Part] = (),
    depth: int | None = None,
    num_classes: int | None = None,
    in_channels: int | None = None,
    blocks_per_stage: Sequence[int] | None = None,
    width: float | None = None,
    bundled: bool | None = None,
) -> Network:
    """A network of the registry with shared bases: by `share_bases`, or by `tie_convolutions` where `tied` is given.

    base: name of the network; depth … bundled override its own options. Raises ModelError as these do, and
    where neither is asked for.
    """
    from anabranch.blocks.registry import build  # the registry lists this family

    if bool(shared) == bool(tied):
        raise ModelError(
            f"shared {shared}, tied {list(tied)}: give a number of shared elements or convolutions to tie"
        )
    given: dict[str, Any] = {
        "depth": depth, "num_classes": num_classes, "in_channels": in_channels, "blocks_per_stage": blocks_per_stage,
        "width": width, "bundled": bundled,
    }  # fmt: skip
    network = build(base, **{name: value for name, value in given.items() if value is not None})
    if not isinstance(network, Network):
        raise ModelError(f"{base} is no Network with stages: give one of the registry's")
    if tied:
        return tie_convolutions(network, tied)
    return share_bases(network, shared, own, double=double, own_in_basis=own_in_basis)


def _stages(network: Network) -> dict[str, list[tuple[str, nn.Module]]]:
    """The blocks by stage, those of the resnext family as sums over filters from now on."""
    stages: dict[str, list[tuple[str, nn.Module]]] = {}
    for name, block in named_blocks(network):
        stage, _, row = name.rpartition(".")
        if isinstance(block, GroupedBlock | SlicedBlock):
            block = cast(nn.ModuleDict, network.blocks[stage])[row] = _filter_sum(block)
        stages.setdefault(stage, []).append((row, block))
    return stages


def _filter_sum(block: GroupedBlock | SlicedBlock) -> FilterSum:
    """The same block with the same parameters, all of them replicated or of one filter (or path)."""
    cardinality = block.num_branches if isinstance(block, GroupedBlock) else 1
    first, middle, last = block.conv1.weight, block.conv2.weight, block.conv3.weight
    sizes, stride = (first.shape[1], first.shape[0], last.shape[0]), block.conv2.stride
    made: FilterSum
    if cardinality > 1:
        width = sizes[1] // cardinality
        made = PathBottleneck(sizes[0], cardinality, width, sizes[2], stride, block.shortcut, 1)
        assert made.inner is not None, "a path has a convolution of its own"
        made.basis.own, made.norm = first, block.norm1
        made.inner.weight, made.inner_norm = middle, block.norm2
    else:
        made = Bottleneck(*sizes, stride, block.shortcut, 1)
        made.basis.own, made.norm = middle, block.norm2
        before = cast(nn.Sequential, made.before)
        before.norm, before.get_submodule("conv").weight = block.norm1, first
    made.coefficients.weight, made.after = cast(nn.Parameter, last), block.norm3
    return made


_C10 = {"shared": 16, "own": 1, "own_in_basis": True}

_OPTIONS: dict[str, dict[str, Any]] = {
    "resnet34_s48u1": {"base": "resnet34", "shared": 48, "own": 1, "double": True},
    "resnet50_shared": {"base": "resnet", "depth": 50, "tied": ("basis",)},
    "resnet50_shared2": {"base": "resnet", "depth": 50, "tied": ("basis", "coefficients")},
    "resnet50_shared_all": {"base": "resnet", "depth": 50, "tied": ("first", "basis", "coefficients")},
    "resnet101_shared": {"base": "resnet", "depth": 101, "tied": ("basis",)},
    "mobilenetv2_shared": {"base": "mobilenetv2", "tied": ("basis",)},
    "mobilenetv2_shared2": {"base": "mobilenetv2", "tied": ("basis", "coefficients")},
    "c100_resnet34_s32u1": {"base": "c100_resnet34", "shared": 32, "own": 1},
    "c100_densenet121_s16u1": {"base": "c100_densenet121", "shared": 16, "own": 1},
    "c100_resnext50_s64u4": {"base": "c100_resnext50", "shared": 64, "own": 4},
    "c10_resnet32_s16u1x2": {"base": "c10_resnet32", **_C10, "double": True},
    "c10_resnet56_s16u1": {"base": "c10_resnet56", **_C10},
    "c10_resnet56_s16u1x2": {"base": "c10_resnet56", **_C10, "double": True},
}

READY: dict[str, tuple[str, dict[str, Any]]] = {
    name: ("shared_basis", options) for name, options in _OPTIONS.items()
}
