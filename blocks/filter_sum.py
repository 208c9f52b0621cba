"""Sums over the elements of a filter basis, Σ_r α_r·(x ∗ W_r).

    x ─► before ─► h ─┬─► W_0 ∗ h ─► BN, act ─► α_0 ─┐
                      ├─► W_1 ∗ h ─► BN, act ─► α_1 ─┼─► Σ ─► BN ─► add or concatenate ─► ReLU
                      └─► …          (R = u + s)     ┘

After "Learning Shared Filter Bases for Efficient ConvNets" (Kang and Kim), Equations 1, 2 and 8. A branch is one
element of the basis (or `per_branch` neighbouring ones): its filter, its BatchNorm channel, its coefficients. The
elements of a block are its u own ones, then the s shared ones; a shared tensor is one `nn.Parameter` of several
sums. Plain networks are the same sum with all elements own and coefficients of any kernel size: a basic block sums
over the filters of its first convolution, a bottleneck over those of its second.

Shapes: N samples, S channels in, R elements, T channels out.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anabranch.blocks.branch_sum import BranchSum, BranchTensor, Hidden
from anabranch.blocks.errors import ModelError
from anabranch.blocks.filter_basis import FilterBasis, kaiming_
from anabranch.blocks.norm import BatchNorm
from anabranch.blocks.stacked import StackedConv2d

Activation = Literal["none", "relu", "relu6"]
Part = Literal["first", "basis", "coefficients"]
"""A convolution of a FilterSum that blocks can share: in `before`, the elements, after them."""

_PARTS: dict[Part, str] = {
    "first": "before.conv.weight", "basis": "basis.shared", "coefficients": "coefficients.weight",
}  # fmt: skip


class FilterSum(BranchSum):
    """A sum over filters: h = before(x), s = Σ_r α_r·act(BN(W_r ∗ h)), y = combine(x, BN(s)).

    basis: the filters W. out_channels, kernel: of the coefficients α, a convolution (T, R, kernel, kernel).
    before: replicated layers in front; a convolution that blocks share has the name `conv`.
    inner: a convolution of each branch for itself between filters and coefficients, followed by BN and act
        (MobileNetV2's depthwise one, a ResNeXt path's).
    combine: "add" the shortcut (x itself if None), "concat" to x, or "none". normalise: BN after the sum.
    rectify: ReLU at the end.
    own_in_basis: the own elements are rows of the stage's regularized basis too.
    """

    def __init__(
        self,
        basis: FilterBasis,
        out_channels: int,
        kernel: int = 1,
        *,
        before: nn.Module | None = None,
        activation: Activation = "relu",
        inner: StackedConv2d | None = None,
        shortcut: nn.Module | None = None,
        combine: Literal["add", "concat", "none"] = "add",
        normalise: bool = True,
        rectify: bool = True,
    ) -> None:
        width, per_branch = basis.num_elements, basis.per_branch
        super().__init__(width // per_branch)
        self.per_branch, self.activation = per_branch, activation
        self.combine, self.rectify, self.own_in_basis = combine, rectify, False
        self.before, self.basis, self.norm = before, basis, BatchNorm(width)
        self.inner, self.inner_norm = inner, None if inner is None else BatchNorm(width)
        self.coefficients = StackedConv2d("sum", self.num_branches, per_branch, out_channels, kernel)
        self.after = BatchNorm(out_channels) if normalise else None
        self.shortcut = shortcut
        self.tied: tuple[Part, ...] = ()
        for conv in (inner, self.coefficients):
            if conv is not None:
                kaiming_(conv.weight)

    def enter(self, x: Tensor) -> Tensor:
        return x if self.before is None else self.before(x)

    def branches(self, h: Hidden) -> Tensor:
        assert isinstance(h, Tensor), "`enter` gives one tensor"
        if self.execution != "looped":
            a = self._act(self.norm(self.basis(h, self.held)))
            if self.inner is not None and self.inner_norm is not None:
                a = self._act(self.inner_norm(self.inner(a)))
            y: Tensor = self.coefficients(a)
            return y
        total = self._branch(h, 0)
        for index in range(1, len(self.held)):
            total = total + self._branch(h, index)
        return total

    def _branch(self, h: Tensor, index: int) -> Tensor:
        rows = slice(index * self.per_branch, (index + 1) * self.per_branch)
        a = self._act(self.norm(self.basis(h, self.held, self.held[index]), rows))
        if (conv := self.inner) is not None and self.inner_norm is not None:
            groups = self.per_branch // conv.channels
            a = F.conv2d(a, conv.weight[rows], None, conv.stride, conv.padding, 1, groups)
            a = self._act(self.inner_norm(a, rows))
        return self.coefficients.one(a, index)

    def _act(self, x: Tensor) -> Tensor:
        if self.activation == "none":
            return x
        return F.relu_(x) if self.activation == "relu" else F.hardtanh_(x, 0.0, 6.0)

    def join(self, x: Tensor, h: Hidden, s: Tensor) -> Tensor:
        y = s if self.after is None else self.after(s)
        if self.combine == "concat":
            y = torch.cat([x, y], 1)
        elif self.combine == "add":
            y = y + (x if self.shortcut is None else self.shortcut(x))
        return F.relu_(y) if self.rectify else y

    def branch_tensors(self) -> dict[str, BranchTensor]:
        own, shared = self.basis.held_parts(self.held)
        norms = ["norm"] if self.inner is None else ["norm", "inner_norm"]
        dims = {"coefficients.weight": 1} | ({} if self.inner is None else {"inner.weight": 0})
        dims |= {f"{n}.{t}": 0 for n in norms for t in ("weight", "bias", "running_mean", "running_var")}
        tensors = {name: BranchTensor(self.held, dim) for name, dim in dims.items()}
        for name, branches in (("own", own), ("shared", shared)):
            if getattr(self.basis, name) is not None:
                tensors[f"basis.{name}"] = BranchTensor(branches, 0)
        return tensors

    def bases(self) -> list[tuple[Part, list[str]]]:
        """The shared bases that this sum uses: (which convolution, parameter names relative to this module).

        One element a row of dim 0; the shared parameter first, then own elements that belong to the same basis.
        """
        found: list[tuple[Part, list[str]]] = []
        if self.basis.shared is not None:
            own = self.own_in_basis and self.basis.own is not None
            found.append(("basis", ["basis.shared", *(["basis.own"] if own else [])]))
        return found + [(part, [_PARTS[part]]) for part in self.tied if part != "basis"]

    def tie(self, part: Part, source: FilterSum) -> None:
        """Uses a convolution of `source` instead of the own one, as a shared basis of both.

        The basis must be wholly own before. Raises ModelError where the two differ in shape.
        """
        theirs = source.part(part)
        if theirs.shape != self.part(part).shape:
            raise ModelError(
                f"cannot share {part}: shapes {tuple(theirs.shape)} and {tuple(self.part(part).shape)} differ"
            )
        for block in (source, self):
            if part == "basis":
                basis = block.basis
                basis.own, basis.shared = None, theirs
                basis.num_own, basis.num_shared = 0, theirs.shape[0]
            else:
                owner, _, name = _PARTS[part].rpartition(".")
                setattr(block.get_submodule(owner), name, theirs)
            block.tied = tuple(dict.fromkeys((*block.tied, part)))

    def part(self, part: Part) -> nn.Parameter:
        """The weight of one of the convolutions; ModelError if the block has no such."""
        names = [_PARTS[part]] if part != "basis" else ["basis.shared", "basis.own"]
        held = dict(self.named_parameters(remove_duplicate=False))
        for name in names:
            if name in held:
                return held[name]
        raise ModelError(f"a {type(self).__name__} has no convolution {part!r} to share")

    def shared_coefficients(self) -> Tensor:
        """The held coefficients of shared elements: (T, number of them), a view."""
        own, _ = self.basis.held_parts(self.held)
        return self.coefficients.weight.detach()[:, len(own) * self.per_branch :].flatten(1)
