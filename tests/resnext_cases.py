"""Small ResNeXts and their parity trials, importable by the ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import nn

from anabranch.blocks.norm import BatchNorm
from anabranch.blocks.resnext import resnext
from anabranch.blocks.resnext_block import Form, GroupedBlock
from anabranch.runtime.config import OptimizerConfig
from anabranch.runtime.mesh import make_mesh
from anabranch.runtime.verify import Report, Trial, verify_plan
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


def trial(**options: Any) -> Trial:
    """Three steps of Nesterov SGD in float64 on random samples; the last batch is short."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(20, 2, 8, 8, generator=generator, dtype=torch.float64)
    target = torch.randint(5, (20,), generator=generator)
    defaults: dict[str, Any] = {"batch_size": 8, "bn_batch_size": 4, "precision": "fp64"}
    return Trial(x, target, optimizer=OptimizerConfig(lr=0.1), **{**defaults, **options})


def parity(rank: int, world_size: int, cases: list[tuple[str, Plan, dict[str, Any]]]) -> list[Report]:
    """Each case verified on these ranks."""
    reports = []
    for network, plan, options in cases:
        torch.manual_seed(3)
        made = shaken(NETWORKS[network]())
        reports.append(verify_plan(made, plan, make_mesh(plan.data, plan.branch), trial(**options)))
    return reports


def normed_too_early(rank: int, world_size: int, case: tuple[str, Plan, dict[str, Any]]) -> Report:
    """One case with a planted defect: each rank normalises its partial sum, not the whole one."""
    branches = GroupedBlock.branches

    def normed(self: GroupedBlock, h: Any) -> Any:
        norm = BatchNorm(self.norm3.num_features, affine=False, track_running_stats=False).double()
        return norm(branches(self, h))

    with mock.patch.object(GroupedBlock, "branches", normed):
        return parity(rank, world_size, [case])[0]
