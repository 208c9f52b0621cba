"""Networks and trials of the parity table, importable by the ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from anabranch.blocks import BranchSum, MultiResidual, build
from anabranch.blocks.branch_sum import Hidden
from anabranch.blocks.norm import BatchNorm
from anabranch.runtime.config import OptimizerConfig
from anabranch.runtime.mesh import make_mesh
from anabranch.runtime.parallelize import ParallelNetwork
from anabranch.runtime.verify import Report, Trial, verify_plan
from anabranch.schedulers import Plan


class UnequalNet(nn.Module):
    """A user's network: plain torch layers, unequal branches, dropout, parameters in `enter` and `join`, two sums a block,
    one layer shared by two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())

        def thin() -> nn.Module:
            return nn.Sequential(nn.Conv2d(6, 6, 1), nn.ReLU())

        def wide() -> nn.Module:
            return nn.Sequential(nn.Conv2d(6, 9, 3, padding=1), nn.BatchNorm2d(9), nn.ReLU(), nn.Conv2d(9, 6, 1))

        def random() -> nn.Module:
            return nn.Sequential(nn.BatchNorm2d(6), nn.Dropout(0.3), nn.Conv2d(6, 6, 3, padding=1))

        shared = nn.Conv2d(6, 6, 1)
        self.blocks = nn.ModuleList(
            [
                MultiResidual([thin(), wide(), random()], before=nn.BatchNorm2d(6), after=nn.BatchNorm2d(6)),
                nn.Sequential(
                    MultiResidual([wide(), random()], before=shared, shortcut=nn.Conv2d(6, 6, 1)),
                    MultiResidual([thin(), thin()], after=nn.Sequential(nn.BatchNorm2d(6), nn.ReLU())),
                ),
                MultiResidual([random(), wide()], before=nn.Sequential(shared, nn.BatchNorm2d(6)), shortcut_reads="h"),
            ]
        )
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(6, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class PairSum(BranchSum):
    """A BranchSum whose hidden form is a tuple, with an own normalisation in `join`."""

    def __init__(self, channels: int, num_branches: int) -> None:
        super().__init__(num_branches)
        self.split = nn.Conv2d(channels, 2 * channels, 1)
        self.branch = nn.ModuleDict({str(i): nn.Conv2d(channels, channels, 3, padding=1) for i in range(num_branches)})
        self.norm = BatchNorm(channels)

    def enter(self, x: Tensor) -> Hidden:
        a, b = self.split(x).chunk(2, 1)
        return a, b

    def branches(self, h: Hidden) -> Tensor:
        a, b = h
        return torch.stack([f(a if int(i) % 2 else b) for i, f in self.branch.items()]).sum(0)

    def join(self, x: Tensor, h: Hidden, s: Tensor) -> Tensor:
        return self.norm(x + s) + h[0]


class TupleNet(nn.Module):
    """Blocks with a tuple as hidden form."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.blocks = nn.ModuleDict({"a": PairSum(4, 3), "b": PairSum(4, 3)})
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks.values():
            x = block(x)
        return self.head(x)


NETWORKS: dict[str, Any] = {
    "basic": lambda: build("multi_resnet", depth=14, num_branches=5, in_channels=2, num_classes=5, blocks_per_stage=[2, 1, 1]),
    "basic4": lambda: build("multi_resnet", depth=14, num_branches=4, in_channels=2, num_classes=5, blocks_per_stage=[1, 2, 1]),
    "shared": lambda: build(
        "multi_resnet", depth=8, num_branches=3, in_channels=2, num_classes=5, preact="shared", blocks_per_stage=[1, 2, 1], shortcut="B"
    ),
    "bottleneck": lambda: build(
        "multi_resnet", depth=11, num_branches=3, in_channels=2, num_classes=5, block="bottleneck", blocks_per_stage=[2, 1, 1]
    ),
    "imagenet": lambda: build(
        "multi_resnet", depth=18, num_branches=2, in_channels=2, num_classes=5, stem="imagenet", blocks_per_stage=[2, 1, 1, 1]
    ),
    "unequal": UnequalNet,
    "tuple": TupleNet,
}  # fmt: skip


def trial(network: str, **options: Any) -> Trial:
    """Three steps of Nesterov SGD in float64 on random samples; the last batch is short."""
    generator = torch.Generator().manual_seed(7)
    num, size = options.pop("num_samples", 40), 32 if network == "imagenet" else 8
    x = torch.randn(num, 2, size, size, generator=generator, dtype=torch.float64)
    target = torch.randint(5, (num,), generator=generator)
    clip = options.pop("clip_norm", 0.0)
    defaults: dict[str, Any] = {"batch_size": 16, "bn_batch_size": 4, "precision": "fp64"}
    return Trial(x, target, optimizer=OptimizerConfig(lr=0.1, clip_norm=clip), **{**defaults, **options})


def seeded(network: str) -> nn.Module:
    """The network from a fixed seed, moved a little off its zeros and ones so that no gradient vanishes by symmetry."""
    torch.manual_seed(3)
    made: nn.Module = NETWORKS[network]()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return made


def parity(rank: int, world_size: int, cases: list[tuple[str, Plan, dict[str, Any]]]) -> list[Report]:
    """Each case verified on these ranks."""
    reports = []
    for network, plan, options in cases:
        mesh = make_mesh(plan.data, plan.branch)
        reports.append(verify_plan(seeded(network), plan, mesh, trial(network, **options)))
    return reports


def sabotaged(rank: int, world_size: int, plan: Plan, defect: str) -> Report:
    """One case with a planted defect."""
    from anabranch.runtime import collectives, parallelize

    def copy_twice(h: Tensor, group: Any) -> Tensor:  # a second all-reduce in backward
        return collectives.copy_to_branches(collectives.copy_to_branches(h, group), group)

    def no_copy(h: Tensor, group: Any) -> Tensor:
        return h

    def wrong_factor(network: ParallelNetwork) -> None:
        for name, role in list(network.roles.items()):
            if role.factor != 1.0:
                network.roles[name] = parallelize.Role(role.tensor, role.over, 1.0)

    def drift(network: ParallelNetwork) -> None:
        if rank == world_size - 1:
            with torch.no_grad():
                next(network.head.parameters()).add_(1e-6)

    mesh = make_mesh(plan.data, plan.branch)
    sabotage = {"wrong_factor": wrong_factor, "drift": drift}.get(defect, lambda network: None)
    if defect == "copy_twice":
        parallelize.copy_to_branches = copy_twice  # type: ignore[assignment]
    if defect == "no_copy":
        parallelize.copy_to_branches = no_copy  # type: ignore[assignment]
    options = {"bn_batch_size": 16} if defect == "groups" else {}
    case = trial("basic4", **options)
    if defect == "groups":  # statistics of the own rows instead of the group's

        def sabotage(network: ParallelNetwork) -> None:
            network._sync_off = True  # type: ignore[assignment]

    return verify_plan(seeded("basic4"), plan, mesh, case, sabotage=sabotage)
