"""The units of a CRU-Net, as sums of Tucker terms (Chen et al., Figure 3). "pre(f)" is BN, ReLU, then f; no
convolution has a bias.

    plain unit:   x ─ pre(1×1) ─ pre(3×3, R groups) ─ pre(1×1) ─ + x
    CRU:          x ─ pre(1×1, shared) ─ 3×3 in R groups, shared ─ pre(1×1 D→D) ─ pre(1×1 D→o) ─ + x
                  └──────────── sum 1: TermSum ───────────────────────────────┘└─ sum 2: ColumnSum ─┘

The terms of Eq. 6 are what is summed: a branch is a bundle of R ÷ num_branches of them: rows of the first 1×1,
groups of the 3×3, channels of the BN behind it, columns of the next 1×1. Sum 2 is the last 1×1 over the same
slices of D channels. "standard" is Figure 3's left form, one sum, without the 1×1 D→D (and with one BN-ReLU
fewer than a bottleneck has).

Where a stage begins, a plain unit's shortcut is its own pre(1×1) over x. A CRU needs o channels in: d = pre(1×1
i→o) of x, at the full size; the residual reads d, its 3×3 has the stride, and the shortcut is pre(the same 1×1
weight) at that stride with a second BN over i. All BNs are a unit's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anabranch.blocks.block_term import BlockTerms
from anabranch.blocks.branch_sum import BranchSum, BranchTensor, Hidden
from anabranch.blocks.errors import ModelError
from anabranch.blocks.network import conv2d
from anabranch.blocks.norm import BatchNorm
from anabranch.blocks.stacked import StackedConv2d

Form = Literal["improved", "standard"]

_STACKED_NORM = ("weight", "bias", "running_mean", "running_var")


class _BundleSum(BranchSum):
    """A sum over equal slices of `width` channels, the same slices in each stacked tensor; no skip."""

    def __init__(self, num_branches: int, width: int) -> None:
        super().__init__(num_branches)
        if width % num_branches:
            raise ModelError(
                f"{width} channels do not make {num_branches} equal branches: give a number that divides {width}"
            )
        self.slice_width = width // num_branches

    def branches(self, h: Hidden) -> Tensor:
        assert isinstance(h, Tensor), "`enter` gives one tensor"
        if self.execution != "looped":
            return self.bundle(h, slice(0, len(self.held) * self.slice_width), self.held)
        total: Tensor | None = None
        for index, branch in enumerate(self.held):
            rows = slice(index * self.slice_width, (index + 1) * self.slice_width)
            part = self.bundle(h, rows, (branch,))
            total = part if total is None else total + part
        assert total is not None, "at least one branch is held"
        return total

    def bundle(self, h: Tensor, rows: slice, branches: tuple[int, ...]) -> Tensor:
        """The sum over some of the held branches, whose stacked channels are `rows`."""
        raise NotImplementedError

    def join(self, x: Tensor, h: Hidden, s: Tensor) -> Tensor:
        return s


class TermSum(_BundleSum):
    """Σ of R Tucker terms (Eq. 6) of pre(x): (N, channels, H, W) → (N, out_channels, H', W').

    width: D, channels of the middle layer, in `num_terms` groups; num_branches divides num_terms.
    stride: of the middle layer.
    factors: "own" is a plain pre-activated bottleneck, with BN-ReLU between the first two layers; "new" the
        CRU's, without; a TermSum lends this one its two layers' weights. Raises ModelError if sizes don't fit.
    """

    def __init__(
        self,
        num_branches: int,
        channels: int,
        width: int,
        out_channels: int,
        *,
        num_terms: int,
        stride: int = 1,
        factors: Literal["own", "new"] | TermSum = "own",
    ) -> None:
        if num_terms < 1 or width % num_terms:
            raise ModelError(
                f"{width} channels do not make {num_terms} equal terms: give a divisor of {width}"
            )
        if num_branches < 1 or num_terms % num_branches:
            raise ModelError(
                f"{num_terms} terms do not make {num_branches} equal branches: give a divisor of {num_terms}"
            )
        super().__init__(num_branches, width)
        rank = width // num_terms
        self.norm = BatchNorm(channels)
        self.reduce = StackedConv2d("spread", num_branches, channels, self.slice_width, 1)
        self.inner_norm = BatchNorm(width) if factors == "own" else None
        self.core = StackedConv2d("each", num_terms, rank, rank, 3, stride)
        self.core_norm = BatchNorm(width)
        self.expand = StackedConv2d("sum", num_branches, self.slice_width, out_channels, 1)
        if isinstance(factors, TermSum):
            theirs, mine = ([s.reduce.weight, s.core.weight] for s in (factors, self))
            if [w.shape for w in theirs] != [w.shape for w in mine]:
                raise ModelError(
                    f"shared factors of shapes {[tuple(w.shape) for w in theirs]} do not fit a unit of "
                    f"{[tuple(w.shape) for w in mine]}: units that share have the same channels and width"
                )
            self.reduce.weight, self.core.weight = theirs
        else:  # ResNeXt's rule: all outputs count, whatever the groups and bundles
            for conv in (self.reduce, self.core):
                nn.init.normal_(conv.weight, std=math.sqrt(2.0 / (conv.weight.shape[-1] ** 2 * width)))

    def enter(self, x: Tensor) -> Tensor:
        return F.relu_(self.norm(x))

    def bundle(self, h: Tensor, rows: slice, branches: tuple[int, ...]) -> Tensor:
        a = _conv(self.reduce, h, rows)
        if self.inner_norm is not None:
            a = F.relu_(self.inner_norm(a, rows))
        return _conv(self.expand, F.relu_(self.core_norm(_conv(self.core, a, rows), rows)), rows)

    def terms(self) -> BlockTerms:
        """The held terms' factors (views of the weights)."""
        return BlockTerms.from_layers(self.reduce.weight, self.core.weight, self.expand.weight)

    def branch_tensors(self) -> dict[str, BranchTensor]:
        norms = ["core_norm"] if self.inner_norm is None else ["inner_norm", "core_norm"]
        dims = {f"{norm}.{name}": 0 for norm in norms for name in _STACKED_NORM}
        dims |= {"reduce.weight": 0, "core.weight": 0, "expand.weight": 1}
        return {name: BranchTensor(self.held, dim) for name, dim in dims.items()}


class ColumnSum(_BundleSum):
    """pre(1×1) as the sum over slices of its input channels: (N, channels, H, W) → (N, out_channels, H, W)."""

    def __init__(self, num_branches: int, channels: int, out_channels: int) -> None:
        super().__init__(num_branches, channels)
        self.norm = BatchNorm(channels)
        self.expand = StackedConv2d("sum", num_branches, self.slice_width, out_channels, 1)

    def bundle(self, h: Tensor, rows: slice, branches: tuple[int, ...]) -> Tensor:
        if len(branches) < self.num_branches:
            parts = h.split(self.slice_width, 1)
            h = torch.cat([parts[branch] for branch in branches], 1)
        return _conv(self.expand, F.relu_(self.norm(h, rows)), rows)

    def branch_tensors(self) -> dict[str, BranchTensor]:
        dims = {f"norm.{name}": 0 for name in _STACKED_NORM} | {"expand.weight": 1}
        return {name: BranchTensor(self.held, dim) for name, dim in dims.items()}


class PreConv(nn.Module):
    """pre(1×1): (N, channels, H, W) → (N, out_channels, H', W')."""

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.norm = BatchNorm(channels)
        self.conv = conv2d(channels, out_channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(F.relu_(self.norm(x)))
        return y


class ResidualUnit(nn.Module):
    """shortcut(x) + residual(widen(x)), the residual one sum or two in a row."""

    def __init__(self, residual: Sequence[BranchSum], widen: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.widen, self.shortcut = widen, shortcut
        self.residual = nn.Sequential(*residual)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.shortcut(x) + self.residual(self.widen(x))
        return y


def plain_unit(
    num_branches: int, channels: int, width: int, out_channels: int, num_terms: int, stride: int
) -> ResidualUnit:
    """A pre-activated ResNeXt unit: R = num_terms groups in the 3×3 of `width` channels, nothing shared."""
    residual = TermSum(num_branches, channels, width, out_channels, num_terms=num_terms, stride=stride)
    same = channels == out_channels and stride == 1
    return ResidualUnit(
        [residual], nn.Identity(), nn.Identity() if same else PreConv(channels, out_channels, stride)
    )


def cru_unit(
    num_branches: int,
    channels: int,
    width: int,
    out_channels: int,
    num_terms: int,
    stride: int = 1,
    form: Form = "improved",
    shares: ResidualUnit | None = None,
) -> ResidualUnit:
    """A Collective Residual Unit (Figure 3).

    width: D. num_terms: R, groups of the 3×3 (the paper: R = D). form: "improved" is the figure's right form
    (two sums), "standard" its left one (one sum).
    shares: the unit whose first two layers this one uses too (of the same out_channels, width and terms).
    """
    factors: Literal["new"] | TermSum = "new"
    if shares is not None:
        lender = shares.residual[0]
        assert isinstance(lender, TermSum), "units are made here"
        factors = lender
    middle = width if form == "improved" else out_channels
    first = TermSum(
        num_branches, out_channels, width, middle, num_terms=num_terms, stride=stride, factors=factors
    )
    residual = [first, ColumnSum(num_branches, width, out_channels)] if form == "improved" else [first]
    if channels == out_channels and stride == 1:
        return ResidualUnit(residual, nn.Identity(), nn.Identity())
    widen, shortcut = PreConv(channels, out_channels, 1), PreConv(channels, out_channels, stride)
    shortcut.conv.weight = widen.conv.weight
    return ResidualUnit(residual, widen, shortcut)


def _conv(conv: StackedConv2d, x: Tensor, rows: slice) -> Tensor:
    """The part of a stacked convolution that belongs to the channels `rows` along its stacked dim."""
    weight = conv.weight[:, rows] if conv.role == "sum" else conv.weight[rows]
    groups = x.shape[1] // conv.channels if conv.role == "each" else 1
    return F.conv2d(x, weight, None, conv.stride, conv.padding, 1, groups)
