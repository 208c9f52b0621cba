"""Group-size series: Ψ, telescoping, Eq. 8, the layer at every size, and the fit of block terms."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch
from gross_cases import dense_of, drawn_sizes
from ranks import run_ranks
from torch import Tensor
from torch.nn import functional as F

from anabranch.blocks import ModelError
from anabranch.blocks.batch import BatchLayout, batch_layout
from anabranch.blocks.block_term import BlockTerms
from anabranch.blocks.block_term_fit import Fit, fit_block_terms, fit_series
from anabranch.blocks.group_series import (
    Bottleneck,
    GroupSeriesConv,
    check_group_sizes,
    differences,
    expand_groups,
    powers_of_two,
    sample_group_size,
    size_probabilities,
)
from anabranch.blocks.random import fold

SIZES = (1, 2, 4, 8)


def whole_numbers(*shape: int, seed: int = 0) -> Tensor:
    """Small integers in float64: sums of their products are exact in any order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, shape, generator=generator).double()


def random_layers(size: int, channels: int = 8, out_channels: int = 6) -> Bottleneck:
    shapes = [(channels, channels, 1, 1), (channels, size, 3, 3), (out_channels, channels, 1, 1)]
    return Bottleneck(*(whole_numbers(*shape, seed=10 * size + i) for i, shape in enumerate(shapes)))


def random_series(**options: Any) -> GroupSeriesConv:
    layer = GroupSeriesConv(8, 6, (3, 3), SIZES, padding=1, layer="conv", **options).double()
    layer.load([random_layers(size) for size in SIZES])
    return layer


@pytest.mark.parametrize(("channels", "outputs"), [(12, 12), (12, 24), (12, 36)])
@pytest.mark.parametrize(("small", "large"), [(1, 2), (1, 12), (2, 6), (3, 6), (4, 4), (6, 12)])
def test_expansion_is_the_same_convolution(channels: int, outputs: int, small: int, large: int) -> None:
    """Eq. 5, to the bit: outputs, the input's gradient, the weight's gradient."""
    weight = whole_numbers(outputs, small, 3, 3).requires_grad_()
    x = whole_numbers(2, channels, 5, 5, seed=1).requires_grad_()
    plain = F.conv2d(x, weight, padding=1, groups=channels // small)
    wide = F.conv2d(x, expand_groups(weight, large, channels), padding=1, groups=channels // large)
    assert torch.equal(plain, wide)
    pull = whole_numbers(*plain.shape, seed=2)
    for a, b in zip(*(torch.autograd.grad(y, (x, weight), pull) for y in (plain, wide)), strict=True):
        assert torch.equal(a, b)


def test_expansion_places_and_composes() -> None:
    weight = whole_numbers(12, 2, 3, 3)
    wide = expand_groups(weight, 6)
    for row in range(12):
        start = row // 2 * 2 % 6
        assert torch.equal(wide[row, start : start + 2], weight[row])
        assert int(wide[row].count_nonzero()) == int(weight[row].count_nonzero())
    assert torch.equal(expand_groups(wide, 12), expand_groups(weight, 12))
    assert torch.equal(expand_groups(weight, 12), dense_of(weight, 12))


@pytest.mark.parametrize(
    ("shape", "size", "channels"),
    [((12, 4), 6, None), ((12, 4), 2, None), ((12, 2), 8, None), ((9, 2), 4, 8), ((12, 3), 3, 10)],
)
def test_expansion_refuses_sizes_that_do_not_chain(
    shape: tuple[int, int], size: int, channels: int | None
) -> None:
    with pytest.raises(ModelError, match=f"in groups of {shape[1]} with {shape[0]} outputs"):
        expand_groups(torch.zeros(*shape, 3, 3), size, channels)


def test_telescoping() -> None:
    """Eqs. 6-7, with Ψ from every s_i to s_n directly: the first n terms are (P_n, R_n, Q_n), to the bit."""
    approximations = [random_layers(size) for size in SIZES]
    terms = differences(approximations)
    for n, wanted in enumerate(approximations, 1):
        assert torch.equal(sum(t.p for t in terms[:n]), wanted.p)  # type: ignore[arg-type]
        assert torch.equal(sum(t.q for t in terms[:n]), wanted.q)  # type: ignore[arg-type]
        assert torch.equal(sum(expand_groups(t.r, SIZES[n - 1]) for t in terms[:n]), wanted.r)  # type: ignore[arg-type]
    layer = random_series()
    parameters = dict(layer.named_parameters())
    for i, term in enumerate(terms):
        for name, value in term._asdict().items():
            assert torch.equal(parameters[f"{name}.{i}"], value), "the parameters are the differences"
    for size, wanted in zip(SIZES, approximations, strict=True):
        for given, expected in zip(layer.approximation(size), wanted, strict=True):
            assert torch.equal(given, expected)


@pytest.mark.parametrize("execution", ["fused", "looped"])
@pytest.mark.parametrize("size", SIZES)
def test_the_layer_at_each_size_is_the_bottleneck(size: int, execution: Any) -> None:
    layer = random_series()
    torch.nn.init.normal_(layer.bias)  # type: ignore[arg-type]
    layer.execution, layer.group_size = execution, size
    p, r, q = random_layers(size)
    x = whole_numbers(3, 8, 6, 6, seed=9)
    wanted = F.conv2d(F.conv2d(F.conv2d(x, p), r, padding=1, groups=8 // size), q, layer.bias)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-14, atol=1e-9)


def test_stride_and_dilation_are_the_middle_layers() -> None:
    layer = GroupSeriesConv(8, 6, (3, 3), [2], stride=2, padding="valid", dilation=2, bias=False).double()
    layers = random_layers(2)
    layer.load([layers])
    x = whole_numbers(2, 8, 9, 9)
    p, r, q = layers
    assert torch.equal(layer(x), F.conv2d(F.conv2d(F.conv2d(x, p), r, None, 2, 0, 2, 4), q))
    assert layer.num_branches == 4


def test_a_step_at_one_size_trains_the_smaller_ones_only() -> None:
    layer = random_series()
    layer.group_size = 4
    layer(whole_numbers(2, 8, 5, 5)).square().sum().backward()
    used = {name for name, p in layer.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert used == {f"{name}.{i}" for name in "prq" for i in range(3)} | {"bias"}
    sizes = {name: p.grad for name, p in layer.named_parameters() if name.startswith("p.")}
    assert sizes["p.3"] is None
    assert torch.equal(sizes["p.0"], sizes["p.2"])  # type: ignore[arg-type]


@pytest.mark.parametrize("held", [(0,), (3, 4, 5), (0, 2, 7), (1, 3, 4, 5, 6, 7), range(8)])
@pytest.mark.parametrize("size", SIZES)
def test_any_branches_make_a_part(size: int, held: tuple[int, ...]) -> None:
    """Held and other branches' sums make the layer, wherever groups are cut."""
    layer = random_series()
    layer.group_size = size
    rest = tuple(branch for branch in range(8) if branch not in held)
    h = layer.enter(whole_numbers(2, 8, 5, 5))
    parts = [layer.shard(branches).partial_sum(h) for branches in (held, rest)]
    assert torch.equal(parts[0] + parts[1], layer.partial_sum(h))


def test_probabilities() -> None:
    """Eq. 8, N = 6, α = 4, to the digits of its closed form."""
    given = [f"{p:.5g}" for p in size_probabilities(6, 4.0)]
    assert given == ["0.98168", "0.01798", "0.00032932", "6.0317e-06", "1.1047e-07", "2.0234e-09"]
    assert size_probabilities(4, 0.0) == [0.25] * 4
    assert sum(size_probabilities(7, 1.5)) == pytest.approx(1.0, abs=1e-15)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 4.0])
def test_sampling_follows_the_probabilities(temperature: float) -> None:
    drawn = Counter(sample_group_size(1, step, "conv", SIZES, temperature) for step in range(20_000))
    for size, p in zip(SIZES, size_probabilities(4, temperature), strict=True):
        assert abs(drawn[size] - 20_000 * p) <= 4 * (20_000 * p * (1 - p)) ** 0.5 + 1


def test_sampling_is_a_function_of_seed_step_and_layer() -> None:
    def sequence(seed: int, layer: str) -> list[int]:
        return [sample_group_size(seed, step, layer, SIZES, 0.0) for step in range(64)]

    assert sequence(5, "a") == sequence(5, "a")
    assert len({tuple(s) for s in (sequence(5, "a"), sequence(6, "a"), sequence(5, "b"))}) == 3
    assert sequence(5, "a")[:6] == [1, 2, 8, 2, 4, 8], "the same on every machine and in every version"
    ranks = run_ranks(2, drawn_sizes, 40)
    assert ranks[0] == ranks[1]


def test_the_layer_draws_by_the_steps_key() -> None:
    layer = random_series()
    layer.group_size, layer.temperature = "sampled", 0.5
    drawn = []
    for step in range(30):
        with batch_layout(BatchLayout((4,), 4, random_key=fold(9, step))):
            drawn.append(layer.active_size())
    assert drawn == [sample_group_size(9, step, "conv", SIZES, 0.5) for step in range(30)]
    assert len(set(drawn)) > 2
    with pytest.raises(ModelError, match="conv draws its group size by the step's key"):
        layer(torch.zeros(1, 8, 4, 4, dtype=torch.float64))
    assert layer.eval().active_size() == 8
    layer.group_size = 16
    with pytest.raises(ModelError, match=r"conv has no group size 16: set one of \[1, 2, 4, 8\]"):
        layer.active_size()


@pytest.mark.parametrize("sizes", [(), (0, 1), (2, 1), (1, 1), (2, 3, 12), (4, 8), (1, 24)])
def test_sizes_that_do_not_chain(sizes: tuple[int, ...]) -> None:
    with pytest.raises(
        ModelError, match=r"no series for 12 channels: each must divide the next.*\[1, 2, 4\]"
    ):
        check_group_sizes(sizes, 12)
    with pytest.raises(ModelError, match="no series for 12"):
        GroupSeriesConv(12, 3, (3, 3), sizes)
    assert powers_of_two(64) == [1, 2, 4, 8, 16, 32, 64]


def test_load_wants_one_approximation_a_size() -> None:
    with pytest.raises(ModelError, match=r"group sizes \[1, 2\], the layer \[1, 2, 4, 8\]"):
        random_series().load([random_layers(1), random_layers(2)])


# ----------------------------------------------------------------------------------------------- block terms


def kernel_of(fit: Fit) -> Tensor:
    return BlockTerms.from_layers(*fit.layers).kernel()


def check_errors(fit: Fit, weight: Tensor) -> None:
    """The history never rises and ends at the error of the layers that came out."""
    assert all(after <= before + 1e-14 for before, after in pairwise(fit.errors))
    actual = float((kernel_of(fit) - weight).norm() / weight.norm())
    assert fit.error == pytest.approx(actual, abs=1e-12)


@pytest.mark.parametrize(("outputs", "channels"), [(16, 16), (24, 16), (10, 16)])
def test_errors_fall_step_by_step_and_with_the_size(outputs: int, channels: int) -> None:
    weight = torch.randn(
        outputs, channels, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    fits = fit_series(weight, powers_of_two(channels), max_components=40, max_als=60)
    for fit in fits:
        check_errors(fit, weight)
    errors = [fit.error for fit in fits]
    assert all(larger < smaller or larger < 1e-14 for smaller, larger in pairwise(errors)), errors
    polished = [fit for fit in fits[:-1] if fit.components]
    assert all(fit.error < fit.errors[fit.components - 1] for fit in polished), (
        "ALS goes on from the components"
    )


@pytest.mark.parametrize(("outputs", "exact"), [(16, True), (9, True), (17, False)])
def test_one_term_is_a_tucker_decomposition(outputs: int, exact: bool) -> None:
    """Exact where d2 ≤ d1; else what the truncated singular vectors of the outputs leave."""
    weight = torch.randn(outputs, 16, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    fit = fit_block_terms(weight, 16)
    values = torch.linalg.svdvals(weight.flatten(1))
    rest = float(values[16:].norm() / values.norm())
    assert (rest == 0.0) == exact
    assert fit.error == pytest.approx(rest, abs=1e-13)
    check_errors(fit, weight)


def test_terms_that_are_there_are_found() -> None:
    """Terms of different size over factors that are all at right angles."""
    generator = torch.Generator().manual_seed(2)
    core, a3, a4 = (
        torch.randn(*shape, dtype=torch.float64, generator=generator)
        for shape in [(2, 3, 3, 4, 4), (8, 8), (12, 8)]
    )
    core[0] *= 10.0
    a3, a4 = (torch.linalg.qr(a).Q.unflatten(1, (2, 4)).transpose(0, 1) for a in (a3, a4))
    kernel = BlockTerms(core, a3, a4).kernel()
    fit = fit_block_terms(kernel, 4, tolerance=1e-12)
    assert fit.error < 1e-9
    check_errors(fit, kernel)


def test_the_layer_of_a_fit_is_the_fitted_convolution() -> None:
    """Stride, padding and bias included; a float32 kernel gives float32 layers."""
    weight = torch.randn(10, 8, 3, 3, generator=torch.Generator().manual_seed(3))
    fits = fit_series(weight, SIZES, max_components=5, max_als=5)
    layer = GroupSeriesConv(8, 10, (3, 3), SIZES, stride=2, padding=1)
    layer.load([fit.layers for fit in fits])
    x = torch.randn(2, 8, 7, 7)
    for size, fit in zip(SIZES, fits, strict=True):
        layer.group_size = size
        assert fit.layers.r.dtype == torch.float32
        torch.testing.assert_close(layer(x), F.conv2d(x, kernel_of(fit), None, 2, 1), rtol=1e-4, atol=1e-4)


def test_fits_are_functions_of_the_kernel() -> None:
    weight = torch.randn(8, 8, 3, 3, generator=torch.Generator().manual_seed(4))
    first, second = (fit_block_terms(weight, 2, max_components=5, max_als=5) for _ in range(2))
    assert first.errors == second.errors
    assert all(torch.equal(a, b) for a, b in zip(first.layers, second.layers, strict=True))
    told: list[tuple[str, int]] = []
    fit_block_terms(
        weight, 2, max_components=3, max_als=2, on_step=lambda phase, n, e: told.append((phase, n))
    )
    assert told == [("components", 1), ("components", 2), ("components", 3), ("als", 1), ("als", 2)]
    assert len(fit_block_terms(weight, 2, max_components=3, max_als=0).errors) == 3


@pytest.mark.parametrize("channels_read", [1, 8])
def test_a_kernel_of_lower_rank_ends_the_fit_quietly(channels_read: int) -> None:
    """Terms beyond the kernel's rank make the normal equations singular; rounding does not make a larger size worse."""
    generator = torch.Generator().manual_seed(5)
    mixed = torch.randn(1, 8, 1, 1, dtype=torch.float64, generator=generator)
    mixed[:, channels_read:] = 0.0
    weight = torch.randn(8, 1, 3, 3, dtype=torch.float64, generator=generator) * mixed
    fits = fit_series(weight, SIZES)
    for fit in fits:
        assert fit.error < 1e-12
        check_errors(fit, weight)
        assert all(bool(layer.isfinite().all()) for layer in fit.layers)
    assert all(larger.error <= smaller.error for smaller, larger in pairwise(fits))


def test_kernels_that_cannot_be_fitted() -> None:
    with pytest.raises(ModelError, match="no series for 8 channels"):
        fit_block_terms(torch.ones(4, 8, 3, 3), 3)
    for value in (0.0, float("nan")):
        with pytest.raises(ModelError, match="must be finite and not zero"):
            fit_block_terms(torch.full((4, 8, 3, 3), value), 4)
