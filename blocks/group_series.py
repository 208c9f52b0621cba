"""The group-size series of a convolution (Howard-Jenkins et al., "GroSS: Group-Size Series Decomposition for
Grouped Architecture Search"): one layer that is a grouped convolution of every size at once.

        x ──► P_n, 1×1 ──► R_n, k×k in groups of s_n channels ──► Q_n, 1×1 ──► + bias ──► y

        P_n = p_1 + … + p_n          R_n = Ψ(… Ψ(Ψ(r_1) + r_2) …) + r_n          Q_n = q_1 + … + q_n

for sizes s_1 | s_2 | … | s_N. The parameters are the differences p_i, r_i, q_i (Eq. 7), so a step at size s_n
trains every smaller size with it. Ψ rewrites the weight of groups of g channels as one of groups of h (Eq. 5);
it composes, so adding the terms from the inside out is Eq. 6.

Branches. With groups of s_n channels the k×k layer couples s_n of them, so no cut of the channels is one for
every size. Its *outputs* are independent, though, whatever the size: y is the sum, over those d1 channels, of
one channel's row of R_n and column of Q_n. A branch is s_1 neighbouring channels, a group at the smallest size:
the groups of every size are unions of branches, and a copy may hold any of them. P_n, which feeds them all, is
replicated, as is the bias.

Shapes: N samples, d1 channels in and in the middle, d2 out, J held middle channels, k × k pixels.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import accumulate, groupby, pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anabranch.blocks.batch import layout_for
from anabranch.blocks.branch_sum import BranchSum, BranchTensor, Hidden
from anabranch.blocks.channels import take_groups
from anabranch.blocks.errors import ModelError
from anabranch.blocks.random import fold

GroupSize = int | Literal["sampled"]


class Bottleneck(NamedTuple):
    """Weights of the three layers: p (d1, d1, 1, 1); r (d1, s, k, k), groups of s channels; q (d2, d1, 1, 1)."""

    p: Tensor
    r: Tensor
    q: Tensor


def expand_groups(weight: Tensor, size: int, channels: int | None = None) -> Tensor:
    """Ψ: a grouped convolution's weight for larger groups, with the same outputs (Eq. 5).

    weight: (t, g, k, k), in groups of g input channels → (t, size, k, k). Group r's filters go to the columns
    from r·g mod size on; the others are 0. channels: the layer's input channels s, t unless given. Raises
    ModelError unless g | size | s and t is a multiple of the s ÷ g groups.
    """
    num_rows, old = weight.shape[:2]
    channels = num_rows if channels is None else channels
    if size % old or channels % size or num_rows % (channels // old):
        raise ModelError(
            f"{channels} channels in groups of {old} with {num_rows} outputs cannot be put in groups of {size}: {old} "
            f"must divide {size}, {size} the {channels} channels, and the number of groups the outputs"
        )
    per_group = num_rows * old // channels
    return _expand(weight, size, tuple(row // per_group for row in range(num_rows)))


def _expand(weight: Tensor, size: int, groups: tuple[int, ...]) -> Tensor:
    """Ψ for rows that lie in these groups."""
    old = weight.shape[1]
    if size == old:
        return weight
    wide = weight.new_zeros((len(groups), size // old, *weight.shape[1:]))
    wide[_places(groups, size // old, weight.device)] = weight
    return wide.flatten(1, 2)


@cache  # a copy to the device in every pass would wait for all that is to be computed before
def _places(groups: tuple[int, ...], ratio: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(row, place) of each row: that of its group among the `ratio` groups that become one."""
    with torch.inference_mode(False):  # else they could not be used in training later
        places = torch.tensor([group % ratio for group in groups], device=device)
        return torch.arange(len(groups), device=device), places


def check_group_sizes(sizes: Sequence[int], channels: int) -> None:
    """Raises ModelError unless s_1 | s_2 | … | s_N | channels, ascending."""
    chain = [*sizes, channels]
    if not sizes or min(sizes) < 1 or any(b % a for a, b in pairwise(chain)) or len({*sizes}) < len(sizes):
        raise ModelError(
            f"group sizes {list(sizes)} are no series for {channels} channels: each must divide the next, and the "
            f"last one {channels}, such as {powers_of_two(channels)}"
        )


def powers_of_two(channels: int) -> list[int]:
    """The paper's series: all powers of two that divide the number of channels, ascending."""
    return [2**i for i in range(channels.bit_length()) if channels % 2**i == 0]


def differences(approximations: Sequence[Bottleneck]) -> list[Bottleneck]:
    """Eq. 7: what each approximation adds to the one before it, the first as it is; sizes ascending."""
    terms = list(approximations[:1])
    for before, now in pairwise(approximations):
        expanded = expand_groups(before.r, now.r.shape[1])
        terms.append(Bottleneck(now.p - before.p, now.r - expanded, now.q - before.q))
    return terms


def size_probabilities(num_sizes: int, temperature: float = 4.0) -> list[float]:
    """Eq. 8: p(s_i) = exp(-α·i) ÷ Σ_j exp(-α·j), s_i the i-th smallest of the sizes; uniform at α = 0."""
    weights = [math.exp(-temperature * i) for i in range(num_sizes)]
    return [weight / sum(weights) for weight in weights]


def sample_group_size(
    seed: int, step: int, layer: str, sizes: Sequence[int], temperature: float = 4.0
) -> int:
    """A size drawn by Eq. 8, a function of (seed, step, layer) only: every rank and every resume draws the same."""
    return _draw(fold(seed, step), layer, sizes, temperature)


def _draw(step_key: int, layer: str, sizes: Sequence[int], temperature: float) -> int:
    drawn = fold(step_key, "group_size", layer) * 2.0**-63
    bounds = accumulate(size_probabilities(len(sizes), temperature))
    return next((size for size, bound in zip(sizes, bounds, strict=True) if drawn < bound), sizes[-1])


class GroupSeriesConv(BranchSum):
    """A convolution as a series of group sizes; (N, d1, H, W) → (N, d2, H', W').

    sizes: s_1 … s_N, ascending, each dividing the next and the last one `channels`; one size is a fixed grouped
        bottleneck. stride, padding, dilation: of the k×k layer, as `nn.Conv2d`'s.
    layer: its name, which keys the sampling.
    group_size: the size that runs, set at any time: one of `sizes`, or "sampled": training draws it for each
        step (Eq. 8), evaluation takes the largest. Drawing needs a `batch_layout`, whose random_key is
        fold(seed, step). Starts as the largest.
    temperature: α of the sampling.

    The parameters start at zero: see `load`. Raises ModelError if the sizes don't chain.
    """

    group_size: GroupSize

    def __init__(
        self,
        channels: int,
        out_channels: int,
        kernel: tuple[int, int],
        sizes: Sequence[int],
        *,
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        bias: bool = True,
        layer: str = "",
    ) -> None:
        check_group_sizes(sizes, channels)
        super().__init__(channels // sizes[0])
        self.sizes, self.layer = tuple(sizes), layer
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.group_size, self.temperature = sizes[-1], 4.0
        self.p = _zeros(len(sizes) * [(channels, channels, 1, 1)])
        self.r = _zeros([(channels, size, *kernel) for size in sizes])
        self.q = _zeros(len(sizes) * [(out_channels, channels, 1, 1)])
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None

    @torch.no_grad()
    def load(self, approximations: Sequence[Bottleneck]) -> None:
        """Makes the layer these approximations, one a size: the parameters become their differences."""
        if [layers.r.shape[1] for layers in approximations] != list(self.sizes):
            given = [layers.r.shape[1] for layers in approximations]
            raise ModelError(f"the approximations have group sizes {given}, the layer {list(self.sizes)}")
        for index, term in enumerate(differences(approximations)):
            for parameters, value in zip((self.p, self.r, self.q), term, strict=True):
                parameters[index].copy_(value)

    def series_parameters(self) -> list[nn.Parameter]:
        """The pointwise and grouped layers: what reconstruction and finetuning train."""
        return [*self.p, *self.r, *self.q]

    def active_size(self) -> int:
        """The size that a forward pass has now. Raises ModelError where it cannot be drawn."""
        if self.group_size != "sampled":
            if self.group_size not in self.sizes:
                raise ModelError(
                    f"{self.layer or 'the layer'} has no group size {self.group_size}: set one of "
                    f'{list(self.sizes)}, or "sampled"'
                )
            return self.group_size
        if not self.training:
            return self.sizes[-1]
        layout = layout_for(self)
        if layout is None:
            raise ModelError(
                f"{self.layer or 'the layer'} draws its group size by the step's key: run it inside batch_layout, or "
                f"set group_size to one of {list(self.sizes)}"
            )
        return _draw(layout.random_key, self.layer, self.sizes, self.temperature)

    def approximation(self, size: int) -> Bottleneck:
        """(P_n, R_n, Q_n), differentiable: the first n terms' sum (Eq. 6); of R and Q the held branches' part."""
        num_terms = self.sizes.index(size) + 1
        r, rows = self.r[0], self._rows(self.held)
        for old, index in zip(self.sizes, range(1, num_terms), strict=False):
            r = _expand(r, self.sizes[index], tuple(row // old for row in rows)) + self.r[index]
        return Bottleneck(_sum(self.p, num_terms), r, _sum(self.q, num_terms))

    def enter(self, x: Tensor) -> Tensor:
        num_terms = self.sizes.index(self.active_size()) + 1
        return F.conv2d(x, _sum(self.p, num_terms))

    def branches(self, h: Hidden) -> Tensor:
        assert isinstance(h, Tensor), "`enter` gives one tensor"
        _, r, q = self.approximation(self.active_size())
        if self.execution != "looped":
            return self._terms(h, r, q, self.held)
        width = self.sizes[0]
        parts = zip(r.split(width), q.split(width, 1), self.held, strict=True)
        total: Tensor | None = None
        for rows, columns, branch in parts:
            term = self._terms(h, rows, columns, (branch,))
            total = term if total is None else total + term
        assert total is not None, "at least one branch is held"
        return total

    def _terms(self, h: Tensor, r: Tensor, q: Tensor, held: Sequence[int]) -> Tensor:
        """The sum over some branches. A copy may hold parts of groups: groups of which it holds equally much form
        one grouped convolution, at most three of them where its branches are neighbours."""
        size, middle, start = r.shape[1], list[Tensor](), 0
        in_group = Counter(row // size for row in self._rows(held))
        for num_rows, members in groupby(in_group.items(), key=lambda item: item[1]):
            groups = [group for group, _ in members]
            stop = start + num_rows * len(groups)
            middle.append(self._grouped(take_groups(h, groups, size), r[start:stop], len(groups)))
            start = stop
        return F.conv2d(middle[0] if len(middle) == 1 else torch.cat(middle, 1), q)

    def _grouped(self, x: Tensor, weight: Tensor, groups: int) -> Tensor:
        return F.conv2d(x, weight, None, self.stride, self.padding, self.dilation, groups)

    def _rows(self, held: Sequence[int]) -> list[int]:
        """The middle channels that are those branches'."""
        width = self.sizes[0]
        return [branch * width + i for branch in held for i in range(width)]

    def join(self, x: Tensor, h: Hidden, s: Tensor) -> Tensor:
        return s if self.bias is None else s + self.bias.view(-1, 1, 1)

    def branch_tensors(self) -> dict[str, BranchTensor]:
        dims = {f"{name}.{i}": dim for name, dim in (("r", 0), ("q", 1)) for i in range(len(self.sizes))}
        return {name: BranchTensor(self.held, dim) for name, dim in dims.items()}

    def extra_repr(self) -> str:
        return f"sizes={list(self.sizes)}, group_size={self.group_size}, {super().extra_repr()}"


def _zeros(shapes: Sequence[tuple[int, ...]]) -> nn.ParameterList:
    return nn.ParameterList([nn.Parameter(torch.zeros(shape)) for shape in shapes])


def _sum(terms: nn.ParameterList, num_terms: int) -> Tensor:
    total: Tensor = terms[0]
    for index in range(1, num_terms):
        total = total + terms[index]
    return total
