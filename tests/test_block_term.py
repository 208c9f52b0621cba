"""Dense kernel ↔ factors ↔ layers: the identities of the generalized block term decomposition, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from anabranch.blocks.block_term import BlockTerms
from anabranch.blocks.errors import ModelError

# R, d3, p, q, d4, k: one dense bottleneck, ResNeXt's groups, unequal ranks, depthwise, other pixels
SHAPES = [
    (1, 6, 4, 4, 6, 3),
    (4, 10, 3, 3, 8, 3),
    (3, 5, 2, 4, 8, 5),
    (12, 7, 1, 1, 6, 3),
    (2, 4, 2, 3, 4, 1),
]
IDS = ["dense", "grouped", "unequal", "depthwise", "1x1"]


def random_terms(num: int, d3: int, p: int, q: int, d4: int, k: int) -> BlockTerms:
    generator = torch.Generator().manual_seed(5)

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return BlockTerms(make(num, k, k, p, q), make(num, d3, p), make(num, d4, q))


def pixels(d3: int) -> Tensor:
    return torch.randn(2, d3, 6, 5, generator=torch.Generator().manual_seed(6), dtype=torch.float64)


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def by_the_letter(terms: BlockTerms, u: Tensor, sigma: bool) -> Tensor:
    """Eqs. 8-10 index by index (with the erratum: p, not q, in the first line)."""
    act = F.relu if sigma else lambda t: t
    (num, k, _, _, q), (n, _, height, width) = terms.core.shape, u.shape
    delta = k // 2
    v = u.new_zeros(n, terms.a4.shape[1], height, width)
    for r in range(num):
        t1 = act(torch.einsum("nmyx,mp->npyx", u, terms.a3[r]))
        t2 = u.new_zeros(n, q, height, width)
        for y in range(height):
            for x in range(width):
                for i in range(max(0, y - delta), min(height, y + delta + 1)):
                    for j in range(max(0, x - delta), min(width, x + delta + 1)):
                        t2[:, :, y, x] += t1[:, :, i, j] @ terms.core[r, i - y + delta, j - x + delta]
        v += torch.einsum("nqyx,cq->ncyx", act(t2), terms.a4[r])
    return v


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_linear_layers_are_one_dense_convolution(shape: tuple[int, ...]) -> None:
    """(i) σ = id: the three layers, one convolution with Σ_r G_r ×₃ A3_r ×₄ A4_r, Eqs. 8-10: all equal."""
    terms = random_terms(*shape)
    u = pixels(shape[1])
    dense = F.conv2d(u, terms.kernel(), padding=shape[-1] // 2)
    assert difference(terms.convolve(u), dense) < 1e-12
    assert difference(by_the_letter(terms, u, False), dense) < 1e-12


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_layers_are_a_sum_of_bottlenecks(shape: tuple[int, ...]) -> None:
    """(ii) σ = ReLU: the grouped layers equal R independent bottlenecks, and Eqs. 8-10."""
    terms = random_terms(*shape)
    u = pixels(shape[1])
    whole = terms.convolve(u, F.relu)
    assert len(terms.terms()) == shape[0]
    assert difference(torch.stack([term.convolve(u, F.relu) for term in terms.terms()]).sum(0), whole) < 1e-12
    assert difference(by_the_letter(terms, u, True), whole) < 1e-12
    assert difference(whole, F.conv2d(u, terms.kernel(), padding=shape[-1] // 2)) > 1e-3  # σ matters


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_collective_form(shape: tuple[int, ...]) -> None:
    """(iii) Eq. 12: rows of the A4 stack are units that share w1 and w2; their kernels lie along mode 4."""
    terms = random_terms(*shape)
    u = pixels(shape[1])
    units = terms.split_units(2)
    assert all(unit.core is terms.core and unit.a3 is terms.a3 for unit in units)
    w1, w2, _ = terms.layers()
    assert all(torch.equal(unit.layers().w1, w1) and torch.equal(unit.layers().w2, w2) for unit in units)
    assert difference(torch.cat([unit.kernel() for unit in units]), terms.kernel()) < 1e-12
    outputs = torch.cat([unit.convolve(u, F.relu) for unit in units], 1)
    assert difference(outputs, terms.convolve(u, F.relu)) < 1e-12
    again = BlockTerms.collect_units(units)
    assert torch.equal(again.a4, terms.a4)
    assert again.core is terms.core


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_layers_and_factors_round_trip(shape: tuple[int, ...]) -> None:
    """Layers hold the factors entry by entry (SEEDS' index map), and give them back as they are."""
    num, d3, p, q, d4, k = shape
    terms = random_terms(*shape)
    w1, w2, w3 = terms.layers()
    assert [tuple(w.shape) for w in (w1, w2, w3)] == [
        (num * p, d3, 1, 1), (num * q, p, k, k), (d4, num * q, 1, 1)
    ]  # fmt: skip
    for r in range(num):
        for a in range(p):
            assert torch.equal(w1[r * p + a, :, 0, 0], terms.a3[r, :, a])
            for b in range(q):
                assert torch.equal(w2[r * q + b, a], terms.core[r, :, :, a, b])
        for b in range(q):
            assert torch.equal(w3[:, r * q + b, 0, 0], terms.a4[r, :, b])
    again = BlockTerms.from_layers(w1, w2, w3)
    for name in ("core", "a3", "a4"):
        assert torch.equal(getattr(again, name), getattr(terms, name))


@pytest.mark.parametrize(
    ("num", "p", "q"), [(1, 8, 10), (2, 4, 10), (4, 2, 10), (8, 1, 9)], ids=["R1", "R2", "R4", "R8"]
)
def test_full_ranks_decompose_exactly(num: int, p: int, q: int) -> None:
    """A dense kernel (10, 8, 3, 3) → factors → the same kernel, where the ranks suffice."""
    weight = torch.randn(10, 8, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    terms = BlockTerms.decompose(weight, num, p, q)
    assert (terms.num_terms, tuple(terms.core.shape[3:])) == (num, (p, q))
    assert difference(terms.kernel(), weight) < 1e-12
    assert difference(BlockTerms.from_layers(*terms.layers()).kernel(), weight) < 1e-12


def test_low_ranks_decompose_exactly_or_approximately() -> None:
    """A kernel of Tucker ranks (3, 4) comes back at those ranks, not below; the loss shrinks with the rank."""
    weight = random_terms(1, 8, 3, 4, 10, 3).kernel()
    assert difference(BlockTerms.decompose(weight, 1, 3, 4).kernel(), weight) < 1e-12
    lost = [
        float((BlockTerms.decompose(weight, 1, p, q).kernel() - weight).norm())
        for p, q in ((1, 1), (2, 2), (2, 4))
    ]
    assert lost == sorted(lost, reverse=True)
    assert lost[-1] > 1e-3


def test_gradients_reach_the_factors() -> None:
    """Through the dense kernel or through the layers: one gradient."""
    terms = random_terms(4, 5, 2, 2, 6, 3)
    for tensor in (terms.core, terms.a3, terms.a4):
        tensor.requires_grad_()
    u = pixels(5)
    seed = pixels(6)
    grads = [
        torch.autograd.grad((y * seed).sum(), (terms.core, terms.a3, terms.a4))
        for y in (terms.convolve(u), F.conv2d(u, terms.kernel(), padding=1))
    ]
    assert all(difference(a, b) < 1e-12 for a, b in zip(*grads, strict=True))


def test_bad_input() -> None:
    terms = random_terms(2, 4, 2, 3, 6, 3)
    with pytest.raises(ModelError, match="do not fit: give core"):
        BlockTerms(terms.core, terms.a3[:1], terms.a4)
    with pytest.raises(ModelError, match="do not fit: give core"):
        BlockTerms(terms.core, terms.a4, terms.a3)
    w1, w2, w3 = terms.layers()
    with pytest.raises(ModelError, match="are no block terms"):
        BlockTerms.from_layers(w1[:3], w2, w3)
    with pytest.raises(ModelError, match="are no block terms"):
        BlockTerms.from_layers(w1, w2, w3[:, 1:])
    with pytest.raises(ModelError, match="do not make 4 equal units"):
        terms.split_units(4)
    other = BlockTerms(terms.core, terms.a3 + 1, terms.a4)
    with pytest.raises(ModelError, match="unit 1 has another core or a3"):
        BlockTerms.collect_units([terms, other])
    with pytest.raises(ModelError, match="num_terms·p at most 4"):
        BlockTerms.decompose(terms.kernel(), 3, 2, 2)
    with pytest.raises(ModelError, match="give an odd size"):
        random_terms(1, 4, 2, 2, 4, 2).convolve(pixels(4))
