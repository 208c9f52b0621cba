"""Fits block terms to a kernel: principal component iteration, then joint alternating least squares.

        X (d2, d1, k, k) ≈ Σ_t Q_t · G_t · P_t        Q_t (d2, s), G_t (s, s, k, k), P_t (s, d1),  d1 ÷ s terms

1. *Principal component iteration* (the paper's decomposition): term after term becomes the best partial Tucker
   approximation, by alternating singular vectors, of what the others leave of X.
2. *Joint ALS* (a polish): all Q_t at once, all P_t at once, all G_t at once (a block-diagonal core): three linear
   least squares problems in turn.

No step of either makes the error larger. s = d1 is a single Tucker decomposition, exact if d2 ≤ d1. All is
float64, and a function of the kernel alone: no random start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from anabranch.blocks.errors import ModelError
from anabranch.blocks.group_series import Bottleneck, check_group_sizes, expand_groups

OnStep = Callable[[str, int, float], None]
"""Told ("components" or "als", steps done, relative error) after each step."""


@dataclass(frozen=True, eq=False)
class Fit:
    """A kernel's approximation by groups of one size.

    layers: in the kernel's dtype. errors: relative, ‖X − X̂‖ ÷ ‖X‖ (Frobenius), after each step of the two
    phases, in float64; components: how many of them are the first phase's.
    """

    layers: Bottleneck
    errors: tuple[float, ...]
    components: int

    @property
    def error(self) -> float:
        """The last one."""
        return self.errors[-1]


@dataclass(eq=False)
class _Terms:
    """q (T, d2, b), core (T, b, a, z), p (T, a, d1); q's columns and p's rows orthonormal, z pixels."""

    q: Tensor
    core: Tensor
    p: Tensor

    def kernel(self) -> Tensor:
        """The sum, (d2, d1, z)."""
        return torch.einsum("tob,tbaz,tac->ocz", self.q, self.core, self.p)


def fit_block_terms(
    weight: Tensor,
    size: int,
    *,
    tolerance: float = 1e-6,
    max_components: int = 100,
    max_als: int = 100,
    on_step: OnStep = lambda phase, step, error: None,
) -> Fit:
    """The weights of 1×1, grouped k×k and 1×1 layers whose composition approximates a convolution's.

    weight: (d2, d1, k, k). size: channels of a group, dividing d1. Each phase ends when a step (of all terms)
    lowers the relative error by less than `tolerance`, or after so many steps (0: without the phase, but the
    first phase makes at least one). Raises ModelError for a size that does not divide d1, or a kernel that is
    zero or not finite.
    """
    check_group_sizes([size], weight.shape[1])
    x = weight.detach().to("cpu", torch.float64).flatten(2)
    norm = float(x.norm())
    if not 0.0 < norm < math.inf:
        raise ModelError(f"a kernel of norm {norm} cannot be decomposed: it must be finite and not zero")
    terms, errors = _principal_components(x, size, norm, tolerance, max(max_components, 1), on_step)
    components = len(errors)
    if len(terms.core) > 1:
        terms, more = _joint_als(x, terms, norm, errors[-1], tolerance, max_als, on_step)
        errors += more
    return Fit(_layers(terms, size, weight), tuple(errors), components)


def fit_series(
    weight: Tensor,
    sizes: Sequence[int],
    *,
    tolerance: float = 1e-6,
    max_components: int = 100,
    max_als: int = 100,
) -> list[Fit]:
    """A fit for each group size, ascending, with errors that never rise (see `never_rising`)."""
    check_group_sizes(sizes, weight.shape[1])
    return never_rising(
        [
            fit_block_terms(weight, size, tolerance=tolerance, max_components=max_components, max_als=max_als)
            for size in sizes
        ]
    )


def never_rising(fits: Sequence[Fit]) -> list[Fit]:
    """Fits of one kernel for ascending sizes: one that ended in a worse minimum than the one before it takes over that
    one's terms, which Ψ makes terms of its own size."""
    kept: list[Fit] = []
    for fit in fits:
        if kept and fit.error > kept[-1].error:
            p, r, q = kept[-1].layers
            wide = expand_groups(r, fit.layers.r.shape[1])
            fit = Fit(Bottleneck(p, wide, q), (kept[-1].error,), 0)
        kept.append(fit)
    return kept


def _principal_components(
    x: Tensor, size: int, norm: float, tolerance: float, max_steps: int, on_step: OnStep
) -> tuple[_Terms, list[float]]:
    num_terms = x.shape[1] // size
    found: list[_Terms | None] = [None] * num_terms
    left, errors = x.clone(), list[float]()
    while len(errors) < max_steps and not _converged(errors, tolerance):
        for index, before in enumerate(found):
            if before is not None:
                left += before.kernel()
            found[index] = now = _partial_tucker(left, size, None if before is None else before.q[0])
            left -= now.kernel()
        errors.append(float(left.norm()) / norm)
        on_step("components", len(errors), errors[-1])
    whole = [term for term in found if term is not None]
    return _Terms(
        *(torch.cat(parts) for parts in zip(*((t.q, t.core, t.p) for t in whole), strict=True))
    ), errors


def _partial_tucker(x: Tensor, size: int, q: Tensor | None) -> _Terms:
    """One alternation from the q at hand, which the result is never worse than; from x's own q without one."""
    rank = min(size, x.shape[0])
    if q is None:
        q = _leading(x.flatten(1), rank)
    p = _leading(torch.einsum("ocz,ob->cbz", x, q).flatten(1), size)
    q = _leading(torch.einsum("ocz,ca->oaz", x, p).flatten(1), rank)
    return _Terms(q[None], torch.einsum("ocz,ob,ca->baz", x, q, p)[None], p.T[None])


def _leading(matrix: Tensor, rank: int) -> Tensor:
    """Orthonormal columns: the left singular vectors of the `rank` largest singular values."""
    rows, columns = matrix.shape
    if columns > rows:  # the same vectors, from a small square
        matrix = torch.linalg.qr(matrix.T, mode="r").R.T
    left: Tensor = torch.linalg.svd(matrix, full_matrices=min(rows, columns) < rank).U
    return left[:, :rank]


def _joint_als(
    x: Tensor, terms: _Terms, norm: float, error: float, tolerance: float, max_steps: int, on_step: OnStep
) -> tuple[_Terms, list[float]]:
    errors: list[float] = []
    while len(errors) < max_steps and not _converged([error, *errors], tolerance):
        moved = _als_step(x, terms)
        now = float((x - moved.kernel()).norm()) / norm
        if not now <= (errors or [error])[-1]:  # NaN too: terms so nearly parallel that rounding decides
            break
        terms = moved
        errors.append(now)
        on_step("als", len(errors), now)
    return terms, errors


def _als_step(x: Tensor, terms: _Terms) -> _Terms:
    q, core, p = terms.q, terms.core, terms.p
    num_terms, (out_rank, in_rank) = len(core), core.shape[1:3]
    middle = torch.einsum("tbaz,tac->tbcz", core, p).flatten(0, 1).flatten(1)
    q = _least_squares(middle, x.flatten(1)).unflatten(0, (num_terms, out_rank)).transpose(1, 2)
    q, mixed = torch.linalg.qr(q)
    core = torch.einsum("txb,tbaz->txaz", mixed, core)
    middle = torch.einsum("tbaz,tob->taoz", core, q).flatten(0, 1).flatten(1)
    p = _least_squares(middle, x.transpose(0, 1).flatten(1)).unflatten(0, (num_terms, in_rank))
    p = torch.linalg.qr(p.transpose(1, 2)).Q.transpose(1, 2)
    # The core's normal equations are small: their matrix is made of products of the factors' Gram matrices.
    gram_q, gram_p = torch.einsum("tob,uoe->tbue", q, q), torch.einsum("tac,ufc->tauf", p, p)
    gram = torch.einsum("tbue,tauf->tbauef", gram_q, gram_p).flatten(3).flatten(0, 2)
    projected = torch.einsum("tob,ocz,tac->tbaz", q, x, p).flatten(0, 2)
    core = _solve(gram, projected).view_as(core)
    return _Terms(q, core, p)


def _least_squares(basis: Tensor, targets: Tensor) -> Tensor:
    """(n, m): coefficients of m targets (m, l) over n basis rows (n, l)."""
    return _solve(basis @ basis.T, basis @ targets.T)


def _solve(gram: Tensor, right: Tensor) -> Tensor:
    """gram⁻¹ · right; no numbers that make sense if gram is not positive definite."""
    return torch.cholesky_solve(right, torch.linalg.cholesky_ex(gram).L)


def _converged(errors: Sequence[float], tolerance: float) -> bool:
    return len(errors) > 1 and errors[-2] - errors[-1] < tolerance


def _layers(terms: _Terms, size: int, weight: Tensor) -> Bottleneck:
    """A term is `size` rows of p, a group of r, `size` columns of q; unused columns (d2 < size) are 0."""
    spare = size - terms.q.shape[2]
    core, q = F.pad(terms.core, (0, 0, 0, 0, 0, spare)), F.pad(terms.q, (0, spare))
    p = terms.p.flatten(0, 1)[..., None, None]
    r = core.flatten(0, 1).unflatten(-1, weight.shape[2:])
    return Bottleneck(
        *(t.to(weight).contiguous() for t in (p, r, q.transpose(0, 1).flatten(1)[..., None, None]))
    )
