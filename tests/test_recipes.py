"""The papers' recipes: every shipped configuration is whole, and says what its paper says."""

from __future__ import annotations

import pytest
import torch

from anabranch.blocks import build, count, models
from anabranch.runtime.config import Config
from anabranch.runtime.config_file import load_config, shipped_configs
from anabranch.runtime.config_rules import DATASETS

_CLASSES = {"imagenet": 1000, "places365": 365, "cifar100": 100, "cifar10": 10, "digits": 10}
_OTHERS = [name for name in shipped_configs() if "multi-resnet" not in name and "pre-resnet" not in name]


@pytest.mark.parametrize("name", _OTHERS)
def test_a_recipe_builds_its_network_for_its_data(name: str) -> None:
    config = load_config(name)
    assert config.data.name in DATASETS
    options = dict(config.model.options)
    if config.data.name in ("imagenet", "places365"):
        options.setdefault("num_classes", _CLASSES[config.data.name])
    with torch.device("meta"):
        network = build(config.model.name, **options)
        assert count(network).params > 0
    if config.data.name != "digits":
        last = [p for _, p in network.named_parameters()][-1]
        assert last.shape[0] == _CLASSES[config.data.name]


def recipe(name: str) -> Config:
    return load_config(name)


def test_the_numbers_of_the_papers() -> None:
    """A few of each paper, as SEEDS.md has them."""
    resnext = recipe("imagenet-resnext-50-32x4d")
    assert (resnext.optimizer.lr, resnext.optimizer.weight_decay, resnext.train.batch_size) == (
        0.1,
        1e-4,
        256,
    )
    assert len(resnext.lr_schedule.milestones) == 3
    cru = recipe("imagenet-cru-net-116")
    assert cru.optimizer.lr == pytest.approx(0.1**0.5)
    assert cru.optimizer.weight_decay == 2e-4
    assert cru.lr_schedule.name == "plateau"
    assert cru.data.augment == "area_crop_hsl"
    assert cru.train.batch_size // cru.train.bn_batch_size == 8
    small = recipe("imagenet-cru-net-56")
    assert (small.optimizer.lr, small.optimizer.weight_decay) == (0.1, 5e-4)
    shared = recipe("imagenet-resnet-50-shared")
    assert (shared.train.epochs, shared.lr_schedule.milestones) == (150, (60, 100, 140))
    assert shared.train.orthogonality == 10.0
    mobile = recipe("imagenet-mobilenet-v2-shared")
    assert (mobile.train.epochs, mobile.lr_schedule.milestones) == (300, (150, 225, 285))
    assert mobile.optimizer.weight_decay == 1e-5
    cifar = recipe("cifar100-resnet-34-s32u1")
    assert (cifar.train.epochs, cifar.train.batch_size, cifar.lr_schedule.milestones) == (
        300,
        256,
        (150, 225),
    )
    assert recipe("cifar100-resnet-34").train.orthogonality == 0.0
    assert (shared.optimizer.momentum, shared.optimizer.nesterov) == (0.9, False)
    gross = recipe("cifar10-gross")
    assert gross.gross.temperature == 4.0
    assert (gross.optimizer.lr, gross.train.epochs, gross.lr_schedule.milestones) == (0.1, 100, (50, 75))
    assert (gross.data.augment, gross.data.crop_padding) == ("flip_crop", 2)


def test_every_ready_network_of_the_papers_has_a_recipe() -> None:
    used = {recipe(name).model.name for name in shipped_configs()}
    without = {  # other depths and forms of networks that have one
        "resnet152", "resnext101_32x8d", "resnext50_nx1d", "resnet34", "resnet200_preact", "pre_resnet_110",
        "multi_resnet_110_k4", "multi_resnet_200_k5", "multi_resnet_26_k4_w10", "multi_resnet_26_k4_w10_a",
    }  # fmt: skip
    assert set(models()) - used == without
