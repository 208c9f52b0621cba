"""Small CRU-Nets and their parity trials, importable by the ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from parity_cases import small_trial, verify_all
from torch import nn

from anabranch.blocks import branch_sum
from anabranch.blocks.cru_net import cru_net, preact_resnext
from anabranch.runtime.mesh import make_mesh
from anabranch.runtime.parallel_network import parallelize
from anabranch.runtime.verify import Report
from anabranch.schedulers import Plan

SMALL: dict[str, Any] = {
    "stem": "cifar", "in_channels": 2, "num_classes": 5, "channels": 8, "cardinality": 4, "base_width": 1
}  # fmt: skip
_CRU: dict[str, Any] = {**SMALL, "blocks_per_stage": (1, 4), "cru_widths": (0, 12), "units_per_group": 2}

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "cru": lambda: cru_net(**_CRU),  # two groups of two units; branches of 1 term (plain) and 3 (CRU)
    "standard": lambda: cru_net(**_CRU, form="standard"),
    "grouped": lambda: cru_net(**_CRU, cru_cardinality=4),
    "plain": lambda: preact_resnext(**SMALL, blocks_per_stage=(1, 1), doubles="cardinality", num_branches=4),
}


def seeded(network: str) -> nn.Module:
    """The network from a fixed seed, moved a little off its zeros and ones so that no gradient vanishes."""
    torch.manual_seed(3)
    made = NETWORKS[network]()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return made


def parity(rank: int, world_size: int, cases: list[tuple[str, Plan, dict[str, Any]]]) -> list[Report]:
    """Each case verified on these ranks."""
    return verify_all((seeded(network), plan, small_trial(**options)) for network, plan, options in cases)


def untied(rank: int, world_size: int, plan: Plan) -> Report:
    """One case with a planted defect: a sharded unit gets its own copy of the factors it shares."""
    shard = branch_sum.BranchSum.shard

    def without_memo(self: Any, held: Any, memo: Any = None) -> Any:
        return shard(self, held)

    branch_sum.BranchSum.shard = without_memo  # type: ignore[method-assign]
    try:
        return verify_all([(seeded("cru"), plan, small_trial())])[0]
    finally:
        branch_sum.BranchSum.shard = shard  # type: ignore[method-assign]


def stored(rank: int, world_size: int, plan: Plan) -> dict[str, tuple[int, int]]:
    """What this rank holds of the shared factors: parameter name → (numel, number of units that use it)."""
    mesh = make_mesh(plan.data, plan.branch)
    part = parallelize(seeded("cru"), plan, mesh)
    uses: dict[int, list[str]] = {}
    for name, parameter in part.named_parameters(remove_duplicate=False):
        uses.setdefault(id(parameter), []).append(name)
    sizes = dict(part.named_parameters())
    ties = [names for names in uses.values() if names[0].endswith(("reduce.weight", "core.weight"))]
    return {names[0]: (sizes[names[0]].numel(), len(names)) for names in ties}
