"""Stage outputs for detectors: of every family, with the channels and strides that are stated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from anabranch.blocks import Features, ModelError, Network, build, families
from anabranch.blocks.features import StageOutput

_IMAGENET = {"stem": "imagenet", "blocks_per_stage": (1, 2, 1, 1)}

# options, (channels, stride) of every stage
CASES: dict[str, list[tuple[dict[str, Any], list[tuple[int, int]]]]] = {
    "multi_resnet": [
        ({"depth": 8, "num_branches": 2}, [(16, 1), (32, 2), (64, 4)]),
        ({"depth": 0, "num_branches": 2, **_IMAGENET}, [(64, 4), (128, 8), (256, 16), (512, 32)]),
    ],
    "pre_resnet": [
        ({"depth": 50, "block": "bottleneck", **_IMAGENET}, [(256, 4), (512, 8), (1024, 16), (2048, 32)])
    ],
    "resnext": [
        (
            {"cardinality": 4, "base_width": 2, "channels": 16, **_IMAGENET},
            [(16, 4), (32, 8), (64, 16), (128, 32)],
        ),
        (
            {"depth": 11, "cardinality": 2, "base_width": 4, "stem": "cifar"},
            [(256, 1), (512, 2), (1024, 4)],
        ),
    ],
    "preact_resnext": [
        (
            {"cardinality": 4, "base_width": 2, "channels": 16, **_IMAGENET},
            [(16, 4), (32, 8), (64, 16), (128, 32)],
        )
    ],
    "cru_net": [
        (
            {"cardinality": 4, "base_width": 2, "channels": 16, "stem": "imagenet", "units_per_group": 2,
             "blocks_per_stage": (1, 2, 1, 1), "cru_widths": (0, 8, 0, 0)},
            [(16, 4), (32, 8), (64, 16), (128, 32)],
        )
    ],
    "resnet": [
        ({"depth": 50, "width": 4, "blocks_per_stage": (1, 2, 1, 1)}, [(16, 4), (32, 8), (64, 16), (128, 32)]),
        ({"depth": 34, "width": 4, "stem": "cifar", "blocks_per_stage": (1, 1, 1, 1)},
         [(4, 1), (8, 2), (16, 4), (32, 8)]),
    ],
    "cifar_resnet": [({"depth": 8, "width": 4}, [(4, 1), (8, 2), (16, 4)])],
    "densenet": [({"growth": 4, "blocks_per_stage": (2, 1, 2)}, [(16, 1), (12, 2), (14, 4)])],
    "mobilenet_v2": [
        ({"width": 0.25}, [(8, 2), (8, 4), (8, 8), (16, 16), (24, 16), (40, 32), (80, 32)])
    ],
    "shared_basis": [
        ({"base": "resnet50", "tied": ("basis",), "blocks_per_stage": (3, 1, 1, 1)},
         [(256, 4), (512, 8), (1024, 16), (2048, 32)]),
        ({"base": "c10_resnet32", "shared": 4, "own": 1, "width": 4, "depth": 14}, [(4, 1), (8, 2), (16, 4)]),
    ],
    "gross_net": [({"channels": (4, 8, 16), "width": 8}, [(8, 4), (16, 8)])],
}  # fmt: skip


def test_every_family_has_a_case() -> None:
    assert set(CASES) == set(families())


@pytest.mark.parametrize("family", CASES)
def test_strides_and_channels_are_as_stated(family: str) -> None:
    for options, expected in CASES[family]:
        backbone = build(family, features=True, **options)
        assert isinstance(backbone, Features)
        stated = list(backbone.stage_outputs().values())
        assert all(module.training for module in backbone.modules())
        assert stated == [StageOutput(*pair) for pair in expected]
        outputs = backbone.eval()(torch.randn(1, 3, 64, 96))
        assert list(outputs) == list(backbone.stage_outputs())
        shapes = [tuple(y.shape) for y in outputs.values()]
        assert shapes == [(1, o.channels, 64 // o.stride, 96 // o.stride) for o in stated]


def test_the_head_of_the_last_output_is_the_network() -> None:
    torch.manual_seed(0)
    network = build("resnext", cardinality=2, base_width=2, channels=8, blocks_per_stage=(1, 1)).eval()
    x = torch.randn(2, 3, 32, 32)
    backbone = Features(network)
    assert not backbone.training
    torch.testing.assert_close(network.get_submodule("head")(backbone(x)["stage2"]), network(x))


def test_a_trained_networks_state_loads() -> None:
    """Tied parameters under every name, the head's left aside; a state of another network is refused."""
    options: dict[str, Any] = {"base": "c10_resnet32", "shared": 4, "own": 1, "width": 4, "depth": 14}
    trained = build("shared_basis", **options).eval()
    fresh = build("shared_basis", features=True, **options).eval()
    fresh.load_state_dict(trained.state_dict(), strict=True)
    x = torch.randn(1, 3, 32, 32)
    for name, y in Features(trained)(x).items():
        torch.testing.assert_close(fresh(x)[name], y, rtol=0, atol=0)
    with pytest.raises(
        RuntimeError, match=r"(?s)Missing key.*stage1\.block2.*Unexpected key.*stage1\.block3"
    ):
        fresh.load_state_dict(
            {name.replace("block2", "block3"): t for name, t in trained.state_dict().items()}, strict=True
        )


def test_a_users_network_states_its_outputs_too() -> None:
    convs = {"a": nn.Conv2d(2, 3, 3, 2, 1), "b": nn.Conv2d(3, 4, 3, 2, 1)}
    network = Network(nn.Identity(), {"s1": convs}, nn.Flatten(), input_shape=(2, 8, 8))
    assert Features(network).stage_outputs() == {"s1": StageOutput(4, 4)}
    del network.input_shape
    with pytest.raises(ModelError, match="has no input_shape"):
        Features(network).stage_outputs()
    with pytest.raises(ModelError, match="has no head"):
        Features(nn.ModuleDict({"stem": nn.Identity(), "blocks": nn.ModuleList()}))
