"""Generalized block term decomposition (Chen et al., "Sharing Residual Units Through Collective Tensor
Factorization", Eqs. 6-12): a kernel, its R Tucker terms (factors), and three layers are one thing.

        dense kernel  ◄── kernel() ──  BlockTerms  ── layers() ──►  1×1, grouped k×k in R groups, 1×1
                      ── decompose ──►             ◄── from_layers ──

        X = Σ_r G_r ×₃ A⁽³⁾_r ×₄ A⁽⁴⁾_r          (Eq. 6)

The middle layer of R terms is: R = 1 a dense k×k (ResNet and its wide relatives), R = cardinality ResNeXt's
grouped one, R = width (p = q = 1) a depthwise one. With σ = id the three layers are one convolution with X;
with any elementwise σ they are the sum of R independent bottlenecks (Eq. 7).

Erratum: in Eqs. 7 and 8 the index q of A⁽³⁾(m, q) and T⁽¹⁾(i, j, q) should be p, the index that Eq. 9 sums.

Shapes: R terms, k × k pixels, d3 channels in, d4 out, p and q the ranks d*₃ and d*₄ of one term.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from anabranch.blocks.errors import ModelError


class GroupedLayers(NamedTuple):
    """Weights of the three convolutions: w1 (R·p, d3, 1, 1); w2 (R·q, p, k, k), R groups; w3 (d4, R·q, 1, 1)."""

    w1: Tensor
    w2: Tensor
    w3: Tensor


@dataclass(frozen=True, eq=False)
class BlockTerms:
    """The factors of R Tucker terms: core (R, k, k, p, q), a3 (R, d3, p), a4 (R, d4, q).

    Raises ModelError if the shapes do not fit each other.
    """

    core: Tensor
    a3: Tensor
    a4: Tensor

    def __post_init__(self) -> None:
        core, a3, a4 = (tuple(t.shape) for t in (self.core, self.a3, self.a4))
        fits = len(core) == 5 and len(a3) == len(a4) == 3 and core[0] == a3[0] == a4[0]
        if not (fits and (core[3], core[4]) == (a3[2], a4[2]) and core[1] == core[2]):
            raise ModelError(
                f"factors {core}, {a3}, {a4} do not fit: give core (R, k, k, p, q), a3 (R, d3, p), a4 (R, d4, q)"
            )

    @property
    def num_terms(self) -> int:
        """R."""
        return self.core.shape[0]

    def kernel(self) -> Tensor:
        """The dense kernel X of Eq. 6 as a convolution's weight (d4, d3, k, k)."""
        return torch.einsum("rijab,rma,rcb->cmij", self.core, self.a3, self.a4)

    def layers(self) -> GroupedLayers:
        """The three convolutions; a term is p rows of w1, q rows of w2, q columns of w3."""
        w1 = self.a3.transpose(1, 2).flatten(0, 1)[..., None, None]
        w2 = self.core.permute(0, 4, 3, 1, 2).flatten(0, 1)
        w3 = self.a4.transpose(0, 1).flatten(1, 2)[..., None, None]
        return GroupedLayers(w1, w2, w3)

    @classmethod
    def from_layers(cls, w1: Tensor, w2: Tensor, w3: Tensor) -> BlockTerms:
        """The factors that three convolutions hold (views of their weights); undoes `layers`, exactly.

        Raises ModelError if the weights are not 1×1, grouped, 1×1 of matching widths.
        """
        rank = w2.shape[1]
        num_terms, rest = divmod(w1.shape[0], rank)
        shapes = [tuple(w.shape) for w in (w1, w2, w3)]
        one_by_one = all(w.dim() == 4 and tuple(w.shape[2:]) == (1, 1) for w in (w1, w3))
        if rest or not one_by_one or not num_terms or w2.shape[0] % num_terms or w3.shape[1] != w2.shape[0]:
            raise ModelError(
                f"weights {shapes} are no block terms: give (R·p, d3, 1, 1), (R·q, p, k, k), (d4, R·q, 1, 1)"
            )
        a3 = w1[..., 0, 0].unflatten(0, (num_terms, rank)).transpose(1, 2)
        core = w2.unflatten(0, (num_terms, -1)).permute(0, 3, 4, 2, 1)
        a4 = w3[..., 0, 0].unflatten(1, (num_terms, -1)).transpose(0, 1)
        return cls(core, a3, a4)

    @classmethod
    def decompose(cls, weight: Tensor, num_terms: int, p: int, q: int) -> BlockTerms:
        """R terms of ranks (p, q) of a dense kernel (d4, d3, k, k), by partial Tucker (truncated SVDs).

        A⁽³⁾ are the R·p leading left singular vectors of the mode-3 unfolding, p to a term; each term is then
        cut to rank q along mode 4. Exact (to rounding) if R·p is at least the kernel's mode-3 rank and q each
        term's mode-4 rank; otherwise an approximation, not the best of these ranks: no alternating fit
        follows. One term is the plain Tucker decomposition of the paper's Figure 1(b). Raises ModelError if
        R·p > min(d3, d4·k²) or q > min(d4, p·k²).
        """
        d4, d3, k = weight.shape[:3]
        most = min(d3, d4 * k * k), min(d4, p * k * k)
        if min(num_terms, p, q) < 1 or num_terms * p > most[0] or q > most[1]:
            raise ModelError(
                f"{num_terms} terms of ranks ({p}, {q}) do not fit a kernel {tuple(weight.shape)}: all at "
                f"least 1, num_terms·p at most {most[0]}, q at most {most[1]}"
            )
        left = torch.linalg.svd(weight.transpose(0, 1).flatten(1), full_matrices=False)[0]
        a3 = left[:, : num_terms * p].unflatten(1, (num_terms, p)).transpose(0, 1)
        projected = torch.einsum("cmij,rma->rcija", weight, a3)
        a4 = torch.linalg.svd(projected.flatten(2), full_matrices=False)[0][..., :q]
        return cls(torch.einsum("rcija,rcb->rijab", projected, a4), a3, a4)

    def convolve(self, u: Tensor, sigma: Callable[[Tensor], Tensor] = lambda t: t) -> Tensor:
        """Eqs. 8-10, stride 1, same size: (N, d3, H, W) → (N, d4, H, W), σ after the first two layers.

        Raises ModelError for an even k, which has no half-width δ.
        """
        k = self.core.shape[1]
        if k % 2 == 0:
            raise ModelError(f"kernels of {k}×{k} pixels have no middle: give an odd size")
        w1, w2, w3 = self.layers()
        t1 = sigma(F.conv2d(u, w1))
        t2 = sigma(F.conv2d(t1, w2, padding=k // 2, groups=self.num_terms))
        return F.conv2d(t2, w3)

    def terms(self) -> list[BlockTerms]:
        """Each term by itself, an independent bottleneck."""
        parts = zip(self.core.split(1), self.a3.split(1), self.a4.split(1), strict=True)
        return [BlockTerms(*part) for part in parts]

    def split_units(self, num_units: int) -> list[BlockTerms]:
        """Eq. 12: the rows of A⁽⁴⁾, cut into L units that share core and a3 (the very tensors).

        Raises ModelError if d4 is not a multiple of L.
        """
        if num_units < 1 or self.a4.shape[1] % num_units:
            raise ModelError(f"{self.a4.shape[1]} output channels do not make {num_units} equal units")
        return [BlockTerms(self.core, self.a3, rows) for rows in self.a4.chunk(num_units, 1)]

    @classmethod
    def collect_units(cls, units: Sequence[BlockTerms]) -> BlockTerms:
        """Eq. 12 the other way: X⁺ = [X_1, …, X_L] along the output channels of units that share core and a3.

        Raises ModelError if a unit's shared factors differ from the first one's.
        """
        first = units[0]
        for index, unit in enumerate(units):
            if not (torch.equal(unit.core, first.core) and torch.equal(unit.a3, first.a3)):
                raise ModelError(f"unit {index} has another core or a3 than unit 0: only a4 may differ")
        return cls(first.core, first.a3, torch.cat([unit.a4 for unit in units], 1))
