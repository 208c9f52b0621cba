"""A filter basis: convolution by elements of which some are a block's own and some shared by several blocks.

Shapes: N samples, S channels in, R = u + s elements, k × k kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anabranch.blocks.channels import take_groups
from anabranch.blocks.errors import ModelError


class FilterBasis(nn.Module):
    """Convolution by own and shared elements: (N, S, H, W) → (N, R, H', W').

    own: (u, S/own_groups, k, k), None where u is 0. shared: (s, S/shared_groups, k, k), a parameter of several
        modules, None where nothing is shared.
    per_branch: neighbouring elements of a branch; divides both numbers.

    Raises ModelError for numbers of elements that do not fit the groups or `per_branch`.
    """

    def __init__(
        self,
        channels: int,
        num_own: int,
        shared: nn.Parameter | None = None,
        *,
        kernel: int = 3,
        stride: int = 1,
        own_groups: int = 1,
        shared_groups: int = 1,
        per_branch: int = 1,
    ) -> None:
        super().__init__()
        self.channels, self.stride, self.padding, self.per_branch = channels, stride, kernel // 2, per_branch
        self.num_own, self.num_shared = num_own, 0 if shared is None else shared.shape[0]
        self.groups = (own_groups, shared_groups)
        for what, number, groups in (
            ("own", num_own, own_groups),
            ("shared", self.num_shared, shared_groups),
        ):
            if number % per_branch or (number and (number % groups or channels % groups)):
                raise ModelError(
                    f"{number} {what} elements over {channels} channels in {groups} groups, {per_branch} a branch: "
                    "the elements must be a multiple of the groups and of a branch's, the channels of the groups"
                )
        own = nn.Parameter(torch.empty(num_own, channels // own_groups, kernel, kernel)) if num_own else None
        self.own, self.shared = own, shared
        if own is not None:
            kaiming_(own)

    @property
    def num_elements(self) -> int:
        """R, of all copies together."""
        return self.num_own + self.num_shared

    def held_parts(self, held: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The held branches among the own and among the shared ones."""
        num_own = self.num_own // self.per_branch
        return tuple(b for b in held if b < num_own), tuple(b for b in held if b >= num_own)

    def forward(self, x: Tensor, held: Sequence[int], only: int | None = None) -> Tensor:
        """x by the elements of the branches `held`, which are those in the tensors; or by one of them, `only`."""
        parts: list[tuple[Tensor, tuple[int, ...], int, int]] = []
        own, shared = self.held_parts(held)
        first = self.num_own // self.per_branch
        for parameter, branches, start, groups, number in (
            (self.own, own, 0, self.groups[0], self.num_own),
            (self.shared, shared, first, self.groups[1], self.num_shared),
        ):
            if parameter is None:
                continue
            weight: Tensor = parameter
            if only is not None:
                row = branches.index(only) * self.per_branch if only in branches else 0
                branches = tuple(b for b in branches if b == only)
                weight = weight.narrow(0, row, self.per_branch * len(branches))
            parts.append((weight, tuple(b - start for b in branches), groups, number))
        if all(groups == 1 for _, _, groups, _ in parts):  # one convolution, not two: equal, and faster
            weights = [weight for weight, *_ in parts]
            both = weights[0] if len(weights) == 1 else torch.cat(weights)
            return F.conv2d(x, both, None, self.stride, self.padding)
        outputs = [self._grouped(x, *part) for part in parts if part[1]]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)

    def _grouped(
        self, x: Tensor, weight: Tensor, branches: tuple[int, ...], groups: int, number: int
    ) -> Tensor:
        """A grouped convolution of which only some branches' filters are here."""
        rows = [b * self.per_branch + i for b in branches for i in range(self.per_branch)]
        group_of = [row * groups // number for row in rows]
        used = sorted(set(group_of))
        inputs = x if len(used) == groups else take_groups(x, used, x.shape[1] // groups)
        counts = [group_of.count(group) for group in used]
        if len(set(counts)) == 1:
            return F.conv2d(inputs, weight, None, self.stride, self.padding, 1, len(used))
        pairs = zip(inputs.chunk(len(used), 1), weight.split(counts), strict=True)
        return torch.cat([F.conv2d(part, w, None, self.stride, self.padding) for part, w in pairs], 1)

    def extra_repr(self) -> str:
        return f"{self.channels}, own={self.num_own}, shared={self.num_shared}, stride={self.stride}"


def kaiming_(weight: Tensor) -> Tensor:
    """N(0, √(2 / (k²·T))) with all output channels T, whatever the groups; in place."""
    return nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")


def new_basis(num_elements: int, channels: int, kernel: int = 3) -> nn.Parameter:
    """Fresh orthonormal elements (num_elements, channels, kernel, kernel); columns are, where rows are too many."""
    basis = nn.Parameter(torch.empty(num_elements, channels, kernel, kernel))
    nn.init.orthogonal_(basis)
    return basis
