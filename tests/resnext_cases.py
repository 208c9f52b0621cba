"""Small ResNeXts and their parity trials, importable by the ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from parity_cases import small_trial, verify_all
from torch import nn

from anabranch.blocks.norm import BatchNorm
from anabranch.blocks.resnext import resnext
from anabranch.blocks.resnext_block import Form, GroupedBlock
from anabranch.runtime.verify import Report
from anabranch.schedulers import Plan

SMALL: dict[str, Any] = {
    "stem": "cifar", "in_channels": 2, "num_classes": 5, "channels": 8, "blocks_per_stage": (2, 1)
}  # fmt: skip


def _paths(cardinality: int, form: Form) -> Callable[[], nn.Module]:
    return lambda: resnext(cardinality=cardinality, base_width=2, form=form, **SMALL)


FORMS: tuple[Form, ...] = ("a", "b", "c")

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "32 paths": _paths(32, "c"),
    **{form: _paths(8, form) for form in FORMS},
    "sliced": lambda: resnext(cardinality=1, base_width=12, num_slices=4, **SMALL),
}


def shaken(module: nn.Module) -> nn.Module:
    """The module in float64, moved a little off its zeros and ones so that no gradient vanishes by symmetry."""
    generator = torch.Generator().manual_seed(11)
    for parameter in module.double().parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return module


def seeded(network: str) -> nn.Module:
    """The network from a fixed seed, shaken."""
    torch.manual_seed(3)
    return shaken(NETWORKS[network]())


def parity(rank: int, world_size: int, cases: list[tuple[str, Plan, dict[str, Any]]]) -> list[Report]:
    """Each case verified on these ranks."""
    return verify_all((seeded(network), plan, small_trial(**options)) for network, plan, options in cases)


def normed_too_early(rank: int, world_size: int, case: tuple[str, Plan, dict[str, Any]]) -> Report:
    """One case with a planted defect: each rank normalises its partial sum, not the whole one."""
    branches = GroupedBlock.branches

    def normed(self: GroupedBlock, h: Any) -> Any:
        norm = BatchNorm(self.norm3.num_features, affine=False, track_running_stats=False).double()
        return norm(branches(self, h))

    with mock.patch.object(GroupedBlock, "branches", normed):
        return parity(rank, world_size, [case])[0]
