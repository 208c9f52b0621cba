"""Every integer of the papers' tables (parameters and multiply-adds), counted without running the network."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from anabranch.blocks import build, count

# (family or ready name, options, params, MACs)
MULTI_RESNET: list[tuple[str, dict[str, Any], int, int]] = [
    ("pre_resnet_110", {}, 1_727_962, 252_887_680),
    ("pre_resnet", {"depth": 68}, 1_047_450, 153_797_248),
    ("pre_resnet", {"depth": 24, "blocks_per_stage": (4, 4, 3)}, 292_954, 49_988_224),
    ("multi_resnet", {"depth": 14, "num_branches": 10}, 1_713_018, 259_965_568),
    ("multi_resnet", {"depth": 8, "num_branches": 4}, 297_146, 47_628_928),
    ("multi_resnet", {"depth": 20, "num_branches": 4}, 1_074_874, 160_875_136),
    ("multi_resnet", {"depth": 30, "num_branches": 4, "blocks_per_stage": (5, 4, 5)}, 1_778_362, 255_246_976),
    ("multi_resnet_200_k5", {}, 10_187_354, 1_467_140_608),
    (
        "multi_resnet",
        {"depth": 26, "num_branches": 2, "width": 10, "shortcut": "A"},
        72_432_154,
        10_428_537_088,
    ),
    (
        "multi_resnet",
        {"depth": 26, "num_branches": 2, "width": 10, "shortcut": "B"},
        72_690_714,
        10_457_372_928,
    ),
    ("multi_resnet_26_k4_w10_a", {}, 144_855_194, 20_856_625_408),
    ("multi_resnet_26_k4_w10", {}, 145_113_754, 20_885_461_248),
    ("pre_resnet", {"depth": 218}, 3_477_850, 507_691_648),
    ("pre_resnet", {"depth": 434}, 6_977_626, 1_017_299_584),
    ("pre_resnet", {"depth": 650}, 10_477_402, 1_526_907_520),
    ("multi_resnet", {"depth": 110, "num_branches": 2}, 3_454_586, 505_332_352),
    ("multi_resnet_110_k4", {}, 6_907_834, 1_010_221_696),
    ("multi_resnet", {"depth": 110, "num_branches": 6}, 10_361_082, 1_515_111_040),
    ("resnet200_preact", {}, 64_666_152, 15_007_481_856),
]


@pytest.mark.parametrize(("name", "options", "params", "macs"), MULTI_RESNET)
def test_counts(name: str, options: dict[str, Any], params: int, macs: int) -> None:
    with torch.device("meta"):
        network = build(name, **options)
    counted = count(network)
    assert (counted.params, counted.macs) == (params, macs)
