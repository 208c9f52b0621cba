"""The GroSS network: its integers, decomposition, configurations, response reconstruction, the parallel form."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import gross_cases
import pytest
import torch
from gross_cases import SMALL, Case, seeded, small_series
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn import functional as F

from anabranch.blocks import ModelError, MultiResidual, count
from anabranch.blocks.batch import BatchLayout, batch_layout
from anabranch.blocks.block_term_fit import fit_series
from anabranch.blocks.gross import (
    ChannelSumConv,
    convolutions,
    gross_net,
    response_loss,
    series_network,
    train_series_only,
)
from anabranch.blocks.group_search import (
    configuration_macs,
    configurations,
    group_sizes,
    series_layers,
    set_group_sizes,
)
from anabranch.blocks.network import Network
from anabranch.blocks.random import fold
from anabranch.runtime.model_spec import spec_of

LAYERS = [f"blocks.stage{i}.block1.conv" for i in (1, 2, 3)]
# Tables 2 and 3: group sizes, million multiply-adds
PUBLISHED = [
    ((32, 32, 32), 4.28), ((16, 16, 16), 2.66), ((4, 4, 4), 1.44), ((1, 1, 1), 1.14),
    ((2, 32, 64), 2.36), ((8, 16, 64), 2.51), ((2, 4, 8), 1.33), ((2, 8, 8), 1.41),
]  # fmt: skip


@pytest.fixture(scope="module")
def series() -> nn.Module:
    with torch.device("meta"):
        return series_network(gross_net())


def test_counts(series: nn.Module) -> None:
    with torch.device("meta"):
        network = gross_net()
    counted = count(network)
    assert (counted.params, counted.macs) == (133_930, 5_081_600)
    assert list(convolutions(network)) == list(series_layers(series)) == LAYERS
    assert {name: layer.sizes for name, layer in series_layers(series).items()} == dict(
        zip(LAYERS, [(1, 2, 4, 8, 16, 32)] * 2 + [(1, 2, 4, 8, 16, 32, 64)], strict=True)
    )
    assert [spec.num_branches for spec in spec_of(series).blocks] == [32, 32, 64]


def test_multiply_adds_are_the_papers_but_for_a_constant(series: nn.Module) -> None:
    """The eight published figures have our slopes and one constant; the structure in the text has another."""
    offsets = []
    for sizes, millions in PUBLISHED:
        macs = configuration_macs(series, sizes)
        assert macs == 1_804_800 + 73_728 * sizes[0] + 18_432 * sizes[1] + 9_216 * sizes[2]
        offsets.append(millions * 1e6 - macs)
    assert max(offsets) - min(offsets) <= 10_000, "the two figures' rounding"
    assert sum(offsets) / len(offsets) + 1_804_800 == pytest.approx(1.037e6, abs=1e3)
    fixed = [configuration_macs(series, (size,) * 3) for size in (32, 16, 4, 1)]
    assert [a - b for a, b in pairwise(fixed)] == [1_622_016, 1_216_512, 304_128]


def test_configurations(series: nn.Module) -> None:
    found = configurations(series)
    assert len(found) == len({c.sizes for c in found}) == 6 * 6 * 7
    assert [c.macs for c in found] == sorted(c.macs for c in found)
    for configuration in found[::25]:
        assert configuration.macs == configuration_macs(series, configuration.sizes)
    limit = configuration_macs(series, (16, 16, 16))
    limited = configurations(series, limit)
    assert {c.sizes for c in limited} == {c.sizes for c in found if c.macs <= limit}
    assert {(16, 16, 16), (2, 32, 64), (8, 16, 64)} <= {c.sizes for c in limited}
    assert all(layer.group_size == layer.sizes[-1] for layer in series_layers(series).values()), "as before"
    with pytest.raises(ModelError, match="at most 1000 multiply-adds: the smallest has 1906176"):
        configurations(series, 1000)


def test_a_space_that_cannot_be_searched_is_refused() -> None:
    layers = nn.Sequential(*(nn.Conv2d(32, 32, 3, padding=1) for _ in range(7)))
    network = Network(
        nn.Conv2d(3, 32, 1), {"stage1": {"block1": layers}}, nn.Identity(), input_shape=(3, 8, 8)
    )
    series = series_network(network)
    with pytest.raises(
        ModelError, match=r"7 layers of 6 .* have 279,936 configurations, .* 100,000 .*gross\.sizes"
    ):
        configurations(series)


def test_multiply_adds_are_what_runs() -> None:
    """A fixed configuration's network has the count of the series at its sizes."""
    with torch.device("meta"):
        network = gross_net(**SMALL)
        series = series_network(network)
        fixed = series_network(network, dict(zip(LAYERS, [[2], [4]], strict=False)))
    assert count(fixed).macs == configuration_macs(series, (2, 4))
    assert [layer.num_branches for layer in series_layers(fixed).values()] == [2, 2]


def test_the_decomposition_of_a_network() -> None:
    """Fitted at every size: closer to the network as the size grows; equal where a term is a whole layer."""
    network = seeded(lambda: gross_net(**{**SMALL, "channels": (8, 8, 6)}))
    series = series_network(network)
    for name, layer in series_layers(series).items():
        weight = network.get_submodule(name).weight
        layer.load([fit.layers for fit in fit_series(weight, layer.sizes, max_components=20, max_als=20)])  # type: ignore[arg-type]
    x = torch.randn(4, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    network.eval(), series.eval()
    losses = []
    for size in (1, 2, 4, 8):
        with group_sizes(series, (size, size)):
            losses.append(float(response_loss(series, network, x).mean().detach()))
    assert losses[0] > 0.3
    assert all(larger < smaller for smaller, larger in pairwise(losses))
    assert losses[-1] < 1e-12
    torch.testing.assert_close(series(x), network(x), rtol=1e-10, atol=1e-10)
    kept = {name: p for name, p in series.named_parameters() if not re.search(r"\.[prq]\.\d$", name)}
    assert len(kept) == 8
    assert all(torch.equal(p, network.get_parameter(name)) for name, p in kept.items())
    assert not {p.data_ptr() for p in kept.values()} & {p.data_ptr() for p in network.parameters()}


def test_response_loss_is_equation_9() -> None:
    """Targets are the full network's responses to the images; the series' later layers read its earlier ones."""
    network, series = seeded(lambda: gross_net(**SMALL)).eval(), seeded(small_series).eval()
    x = torch.randn(3, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    full, mine, wanted = x, x, torch.zeros(3, dtype=torch.float64)
    for name in ["stem.conv", *LAYERS[:2]]:
        a, b = series.get_submodule(name)(mine), network.get_submodule(name)(full)
        if name in LAYERS:
            wanted += (a - b).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)
        mine, full = (F.max_pool2d(F.relu(y), 2) for y in (a, b))
    loss = response_loss(series, network, x)
    torch.testing.assert_close(loss, wanted)
    train_series_only(series)
    loss = response_loss(series, network, x)
    loss.sum().backward()
    moved = {name for name, p in series.named_parameters() if p.grad is not None}
    assert moved == {
        f"{layer}.{w}.{i}" for layer, n in zip(LAYERS, (3, 4), strict=False) for w in "prq" for i in range(n)
    }
    assert all(p.grad is None for p in network.parameters())
    with pytest.raises(ModelError, match="no decomposed layers"):
        response_loss(network, network, x)


def test_responses_are_those_before_a_relu_in_place() -> None:
    network, series = seeded(lambda: gross_net(**SMALL)).eval(), seeded(small_series).eval()
    x = torch.randn(3, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = response_loss(series, network, x)
    for module in [*series.modules(), *network.modules()]:
        if isinstance(module, nn.ReLU):
            module.inplace = True
    torch.testing.assert_close(response_loss(series, network, x), wanted)


def test_reconstruction_trains_pointwise_and_grouped_layers_only() -> None:
    series = seeded(small_series)
    parameters = train_series_only(series)
    named = {name for name, p in series.named_parameters() if p.requires_grad}
    assert {id(p) for p in parameters} == {id(series.get_parameter(name)) for name in named}
    frozen = {name for name, _ in series.named_parameters()} - named
    assert frozen == {
        *(f"stem.conv.{w}" for w in ("weight", "bias")), *(f"{layer}.bias" for layer in LAYERS[:2]),
        *(f"head.{fc}.{w}" for fc in ("fc1", "fc2") for w in ("weight", "bias")),
    }  # fmt: skip


def test_the_full_network_is_plain_convolutions() -> None:
    network = seeded(lambda: gross_net(**SMALL)).eval()
    x = torch.randn(3, 2, 8, 8, dtype=torch.float64)
    y = network.stem(x)  # type: ignore[operator]
    for name in LAYERS[:2]:
        conv = network.get_submodule(name)
        y = F.max_pool2d(F.relu(F.conv2d(y, conv.weight, conv.bias, padding=1)), 2)  # type: ignore[arg-type]
    head = network.get_submodule("head")
    y = head.fc2(F.relu(head.fc1(y.flatten(1))))  # type: ignore[operator]
    torch.testing.assert_close(network(x), y)
    for _, block_sum in [(n, m) for n, m in network.named_modules() if isinstance(m, ChannelSumConv)]:
        block_sum.execution = "looped"
    torch.testing.assert_close(network(x), y)


def test_initialization() -> None:
    torch.manual_seed(0)
    state = gross_net().state_dict()
    for name, tensor in state.items():
        if name.endswith("bias"):
            assert not tensor.any()
        else:
            wanted = 0.1 if "fc" in name else (2 / (9 * tensor.shape[0])) ** 0.5
            assert float(tensor.std()) == pytest.approx(wanted, rel=0.06), name


class UserNet(nn.Module):
    """A plain network: two decomposable convolutions, and one each of those that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.blocks = nn.ModuleList(
            [
                nn.Sequential(nn.Conv2d(8, 6, 5, stride=2, padding=2, bias=False), nn.Conv2d(6, 6, 1)),
                nn.Conv2d(6, 6, 3, padding="same", dilation=2),
                nn.Conv2d(6, 6, 3, groups=2),
                nn.Conv2d(6, 6, 3, padding=1, padding_mode="circular"),
                MultiResidual([nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1)]),
            ]
        )
        self.head = nn.Flatten()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(x)
        return y


def test_a_users_network() -> None:
    torch.manual_seed(0)
    network = UserNet()
    assert list(convolutions(network)) == ["blocks.0.0", "blocks.1"]
    series = series_network(network)
    layers = series_layers(series)
    assert {name: layer.sizes for name, layer in layers.items()} == {
        "blocks.0.0": (1, 2, 4, 8),
        "blocks.1": (1, 2),
    }
    for name, layer in layers.items():
        weight = network.get_submodule(name).weight
        layer.load([fit.layers for fit in fit_series(weight, layer.sizes, max_components=40, max_als=20)])  # type: ignore[arg-type]
    x = torch.randn(2, 3, 16, 16)
    assert series(x).shape == network(x).shape
    response = response_loss(series, network, x)
    assert response.shape == (2,)
    first = series_network(network, {"blocks.0.0": [8]})
    assert list(series_layers(first)) == ["blocks.0.0"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gross_net(channels=(8,)), "two or more layers' channels"),
        (lambda: gross_net(width=0), "width is at least 1, got 0"),
        (lambda: gross_net(image_size=8), "4 max pools leave nothing of 8 × 8 pixels: give images of at least 16"),
        (
            lambda: series_network(gross_net(**SMALL), {LAYERS[0]: [2], "blocks.stage9.conv": [1]}),
            r"no convolution blocks\.stage9\.conv to decompose: the network has blocks\.stage1",
        ),
        (lambda: series_network(gross_net(**SMALL), {LAYERS[0]: [3]}), "no series for 4 channels"),
        (lambda: series_network(small_series()), "no convolution to decompose"),
        (lambda: series_network(nn.Linear(1, 1)), "has no stem, blocks, head"),
        (lambda: set_group_sizes(small_series(), (1, 2, 4)), r"3 group sizes for 2 layers"),
        (lambda: set_group_sizes(small_series(), (8, 8)), r"conv has no group size 8: use one of \[1, 2, 4\]"),
    ],
)  # fmt: skip
def test_bad_input(make: Callable[[], Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(ModelError, match=message):
        make()


def test_group_sizes_are_set_at_run_time() -> None:
    series = seeded(small_series).eval()
    x = torch.randn(2, 2, 8, 8, dtype=torch.float64)
    set_group_sizes(series, (2, 8))
    before = series(x)
    with group_sizes(series, (1, 1)):
        assert not torch.allclose(series(x), before)
    assert torch.equal(series(x), before)
    set_group_sizes(series, "sampled")
    drawn = set()
    for step in range(20):
        with batch_layout(BatchLayout((2,), 2, random_key=fold(0, step))):
            series.train()
            for layer in series_layers(series).values():
                layer.temperature = 0.0
            drawn.add(tuple(layer.active_size() for layer in series_layers(series).values()))
    assert len(drawn) > 6


UNEVEN: tuple[gross_cases.Counts, ...] = ((3, 1), (5, 3))


@pytest.mark.parametrize("data", [1, 2])
def test_parity(data: int) -> None:
    """Three group sizes, groups cut by the plan among them, and drawn ones; a layer by sample; a rank with nothing."""
    cases = [
        Case((1, 1), data, UNEVEN),
        Case((2, 4), data, ((1, 3), (5, 3))),
        Case((4, 8), data, ((3, 1), (3, 5)), "replicated"),
        Case("sampled", data, UNEVEN),
        Case("sampled", data, ((3, 1), None), frozen=True),
        Case("sampled", data, (None, (0, 8)), options={"accumulation": 2, "bn_batch_size": 2}),
    ]
    if data == 1:
        cases += [
            Case((2, 4), 1, UNEVEN, options={"execution": "looped"}),
            Case(None, 1, UNEVEN),
            Case(None, 1, UNEVEN, options={"execution": "looped"}),
        ]
    reports = run_ranks(2 * data, gross_cases.parity, cases)[0]
    for case, report in zip(cases, reports, strict=True):
        assert report.max_relative_difference <= 1e-9, f"{case}: {report.worst}"
        assert report.num_compared > 40


def test_parity_sees_planted_errors() -> None:
    defects = ["rows counted from the copy's first", "each rank draws for itself"]
    reports = run_ranks(2, gross_cases.sabotaged, Case("sampled", 1, UNEVEN), defects)[0]
    assert [report.max_relative_difference > 1e-3 for report in reports] == [True, True], reports
