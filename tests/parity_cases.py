"""Networks and trials of the parity table, importable by the ranks."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from anabranch.blocks import BranchSum, MultiResidual, build
from anabranch.blocks.branch_sum import Hidden
from anabranch.blocks.convolution import WeightGradients
from anabranch.blocks.norm import BatchNorm
from anabranch.runtime import compiling
from anabranch.runtime.config import OptimizerConfig
from anabranch.runtime.loss import cross_entropy
from anabranch.runtime.mesh import make_mesh
from anabranch.runtime.model_spec import spec_of
from anabranch.runtime.parallel_network import ParallelNetwork, Role
from anabranch.runtime.rank_batch import RankBatch
from anabranch.runtime.reducer import GradientReducer
from anabranch.runtime.verify import Report, Trial, verify_plan
from anabranch.schedulers import BranchPlacement, Plan
from anabranch.schedulers.plan import EdgeSplit

S = "sample"
Placement = str | tuple[int, ...]


class Chain(nn.Module):
    """stem, blocks in a row, head, as a user writes it."""

    def __init__(self, stem: nn.Module, blocks: Sequence[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = stem, nn.ModuleList(blocks), head

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(x)
        return y


def thin(channels: int = 6) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, channels, 1), nn.ReLU())


def wide(channels: int = 6) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, 9, 3, padding=1), nn.BatchNorm2d(9), nn.ReLU(), nn.Conv2d(9, channels, 1)
    )


def random(channels: int = 6) -> nn.Module:
    return nn.Sequential(
        nn.BatchNorm2d(channels), nn.Dropout(0.3), nn.Conv2d(channels, channels, 3, padding=1)
    )


def classifier(channels: int = 6) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(channels, 5))


def unequal_net() -> nn.Module:
    """Plain torch layers: unequal branches, dropout, parameters in `enter` and `join`, two sums in a block, one layer
    shared by two blocks, a BatchNorm with a cumulative average."""
    shared = nn.Conv2d(6, 6, 1)
    twice = nn.Sequential(
        MultiResidual([wide(), random()], before=shared, shortcut=nn.Conv2d(6, 6, 1)),
        MultiResidual([thin(), thin()], after=nn.Sequential(nn.BatchNorm2d(6, momentum=None), nn.ReLU())),
    )
    return Chain(
        nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()),
        [
            MultiResidual([thin(), wide(), random()], before=nn.BatchNorm2d(6), after=nn.BatchNorm2d(6)),
            twice,
            MultiResidual(
                [random(), wide()], before=nn.Sequential(shared, nn.BatchNorm2d(6)), shortcut_reads="h"
            ),
        ],
        classifier(),
    )


def bare_net() -> nn.Module:
    """Nothing before the first branches has parameters, one block is no sum at all, one comes twice."""
    again = MultiResidual([thin(2), random(2)])
    return Chain(
        nn.Identity(),
        [MultiResidual([wide(2), thin(2)]), nn.Conv2d(2, 2, 3, padding=1), again, again],
        classifier(2),
    )


class Choice(nn.Module):
    """Layers of which a forward pass uses some: those that `used` names."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Conv2d(2, 2, 1) for name in ("all", "one", "none")})
        self.used = ["all"]

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.layers[name](x) for name in self.used]).sum(0)


class PairSum(BranchSum):
    """A BranchSum whose hidden form is a tuple, with an own normalisation in `join`."""

    def __init__(self, channels: int, num_branches: int) -> None:
        super().__init__(num_branches)
        self.split = nn.Conv2d(channels, 2 * channels, 1)
        terms = {str(i): nn.Conv2d(channels, channels, 3, padding=1) for i in range(num_branches)}
        self.branch = nn.ModuleDict(terms)
        self.norm = BatchNorm(channels)

    def enter(self, x: Tensor) -> Hidden:
        a, b = self.split(x).chunk(2, 1)
        return a, b

    def branches(self, h: Hidden) -> Tensor:
        a, b = h
        return torch.stack([f(a if int(i) % 2 else b) for i, f in self.branch.items()]).sum(0)

    def join(self, x: Tensor, h: Hidden, s: Tensor) -> Tensor:
        y: Tensor = self.norm(x + s)
        return y + h[0]


def tuple_net() -> nn.Module:
    return Chain(nn.Conv2d(2, 4, 3, padding=1), [PairSum(4, 3), PairSum(4, 3)], classifier(4))


class WithoutSkip(MultiResidual):
    """The sum alone: what it adds to that is one number, for all samples."""

    def skip_term(self, x: Tensor, h: Hidden) -> Tensor:
        return x.new_zeros(())


def row_net() -> nn.Module:
    """Blocks that end in their last sum: two in a row, with parameters before and beside them; one without a skip."""
    twice = nn.Sequential(
        MultiResidual([wide(2), thin(2)], before=nn.BatchNorm2d(2)),
        MultiResidual([thin(2), random(2)], shortcut=nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))),
    )
    return Chain(nn.Conv2d(2, 2, 3, padding=1), [twice, WithoutSkip([thin(2), wide(2)])], classifier(2))


def plain_row_net() -> nn.Module:
    """Two sums in a row, and nothing but their branches."""
    row = nn.Sequential(*(MultiResidual([thin(), thin()]) for _ in range(2)))
    stem = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6))
    return Chain(stem, [row], classifier())


class Checkpointed(nn.Module):
    """Layers whose activations a user makes again in backward."""

    def __init__(self, layers: nn.Module, *, use_reentrant: bool) -> None:
        super().__init__()
        self.layers, self.use_reentrant = layers, use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.layers, x, use_reentrant=self.use_reentrant)
        return y


def checkpointed_net() -> nn.Module:
    """A user's own checkpoints: of a row of layers, in branches, around a whole block."""
    around = MultiResidual([thin(), random()], before=nn.BatchNorm2d(6), after=nn.BatchNorm2d(6))
    return Chain(
        nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), Checkpointed(random(), use_reentrant=True)),
        [
            MultiResidual(
                [Checkpointed(wide(), use_reentrant=True), Checkpointed(random(), use_reentrant=False)]
            ),
            Checkpointed(around, use_reentrant=False),
        ],
        classifier(),
    )


def checkpointed_row_net() -> nn.Module:
    """A user's own checkpoint around several sums."""
    row = nn.Sequential(*(MultiResidual([thin(), thin()]) for _ in range(2)))
    stem = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6))
    return Chain(stem, [Checkpointed(row, use_reentrant=False)], classifier())


def tied_net() -> nn.Module:
    """Two blocks with one parameter in their last convolutions, which may leave weight gradients for later."""
    return build(
        "shared_basis",
        base="cifar_resnet",
        tied=("coefficients",),
        blocks_per_stage=(3, 1, 1),
        width=4,
        bundled=True,
        in_channels=2,
        num_classes=5,
    )


def _multi_resnet(num_branches: int, blocks_per_stage: Sequence[int], **options: Any) -> nn.Module:
    return build(
        "multi_resnet",
        depth=0,
        num_branches=num_branches,
        blocks_per_stage=blocks_per_stage,
        in_channels=2,
        num_classes=5,
        **options,
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "basic": lambda: _multi_resnet(5, (2, 1, 1)),
    "basic4": lambda: _multi_resnet(4, (1, 2, 1)),
    "shared": lambda: _multi_resnet(3, (1, 2, 1), preact="shared", shortcut="B"),
    "bottleneck": lambda: _multi_resnet(3, (2, 1, 1), block="bottleneck"),
    "imagenet": lambda: _multi_resnet(2, (2, 1, 1, 1), stem="imagenet"),
    "unequal": unequal_net,
    "tuple": tuple_net,
    "bare": bare_net,
    "row": row_net,
    "plain row": plain_row_net,
    "tied": tied_net,
    "checkpointed": checkpointed_net,
    "checkpointed row": checkpointed_row_net,
    "choice": lambda: Chain(nn.Identity(), [Choice()], classifier(2)),
}


def seeded(network: str) -> nn.Module:
    """The network from a fixed seed, moved a little off zeros and ones so that no gradient vanishes by symmetry."""
    torch.manual_seed(3)
    made = NETWORKS[network]()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return made


@dataclass(frozen=True)
class Case:
    """One row of the table.

    blocks: by block S or counts by branch rank; one entry is for all blocks. edges: stem, head: "s" or "r".
    trial: fields of `Trial`, and those of `OptimizerConfig` under "optimizer".
    """

    network: str
    mesh: tuple[int, int]
    blocks: tuple[Placement, ...]
    edges: str = "ss"
    samples: tuple[int, ...] | None = None
    trial: dict[str, Any] = field(default_factory=dict)
    bound: float = 1e-9

    @property
    def world_size(self) -> int:
        return self.mesh[0] * self.mesh[1]

    @property
    def id(self) -> str:
        placed = "|".join("s" if b == S else "".join(map(str, b)) for b in self.blocks)
        options = ",".join(f"{key}={value}" for key, value in self.trial.items())
        data, branch = self.mesh
        return f"{data}x{branch} {self.network} {self.edges[0]}:{placed}:{self.edges[1]} {self.samples or ''} {options}"

    def plan(self) -> Plan:
        names = list(spec_of(NETWORKS[self.network]()).by_name)
        placements = self.blocks * len(names) if len(self.blocks) == 1 else self.blocks
        blocks = {
            name: BranchPlacement("sample") if isinstance(p, str) else BranchPlacement.from_counts(p)
            for name, p in zip(names, placements, strict=True)
        }
        edge: dict[str, EdgeSplit] = {"s": "sample", "r": "replicated"}
        return Plan(*self.mesh, blocks, edge[self.edges[0]], edge[self.edges[1]], samples=self.samples)

    def made_trial(self) -> Trial:
        """Three SGD steps in float64 on random samples unless `trial` says otherwise; the last batch is short."""
        options: dict[str, Any] = {
            "batch_size": 16, "bn_batch_size": 4, "precision": "fp64", "num_samples": 37, **self.trial,
        }  # fmt: skip
        optimizer = OptimizerConfig(**{"lr": 0.1, **options.pop("optimizer", {})})
        loss = cross_entropy(options.pop("label_smoothing", 0.0))
        num, size = options.pop("num_samples"), 32 if self.network == "imagenet" else 8
        generator = torch.Generator().manual_seed(7)
        x = torch.randn(num, 2, size, size, generator=generator, dtype=torch.float64)
        return Trial(
            x, torch.randint(5, (num,), generator=generator), optimizer=optimizer, loss=loss, **options
        )


def small_trial(**options: Any) -> Trial:
    """Three steps of Nesterov SGD in float64 on 20 random samples of 8 x 8; the last batch is short."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(20, 2, 8, 8, generator=generator, dtype=torch.float64)
    target = torch.randint(5, (20,), generator=generator)
    defaults: dict[str, Any] = {"batch_size": 8, "bn_batch_size": 4, "precision": "fp64"}
    return Trial(x, target, optimizer=OptimizerConfig(lr=0.1), **{**defaults, **options})


def verify_all(cases: Iterable[tuple[nn.Module, Plan, Trial]]) -> list[Report]:
    """Each network under its plan, verified on these ranks."""
    return [
        verify_plan(network, plan, make_mesh(plan.data, plan.branch), trial) for network, plan, trial in cases
    ]


def parity(rank: int, world_size: int, cases: Sequence[Case], device: str = "cpu") -> list[Report]:
    """Each case verified on these ranks."""
    os.environ[compiling.BACKEND] = "aot_eager"  # every graph that inductor would get, and no compiler
    warnings.filterwarnings("error", message=".*as it is|.*as they are")
    return [verify(case, device=device) for case in cases]


def verify(
    case: Case, sabotage: Callable[[ParallelNetwork], None] = lambda network: None, device: str = "cpu"
) -> Report:
    mesh = make_mesh(*case.mesh, torch.device(device).type)
    network = seeded(case.network)
    return verify_plan(network, case.plan(), mesh, case.made_trial(), device=device, sabotage=sabotage)


def with_small_buckets(rank: int, world_size: int, case: Case) -> Report:
    """The case with a gradient bucket for every few parameters, as a network of many MiB has them."""
    defaults = GradientReducer.__init__.__kwdefaults__
    assert defaults is not None
    with mock.patch.dict(defaults, bucket_bytes=256):
        return verify(case)


def sabotaged(rank: int, world_size: int, case: Case, defects: Sequence[str]) -> list[Report]:
    """The case once with each planted defect."""
    return [_sabotaged(rank, world_size, case, defect) for defect in defects]


def _sabotaged(rank: int, world_size: int, case: Case, defect: str) -> Report:
    runtime = sys.modules["anabranch.runtime.branch_exchange"]
    copied, with_samples, finish = runtime.copy_to_branches, RankBatch.with_samples, GradientReducer.finish
    to_samples = runtime.reduce_to_samples

    def summed_twice(h: Hidden, wire: Any, *queue: Any) -> Hidden:
        twice: Hidden = copied(copied(h, wire), wire, *queue)
        return twice

    def skip_of_own_rows(s: Tensor, skip: Tensor, h: Hidden, sizes: Any, wire: Any, *sums: Any) -> Tensor:
        y: Tensor = wire.own(skip, sizes) + to_samples(s, torch.zeros_like(skip), h, sizes, wire, *sums)
        return y

    def local_ids(self: RankBatch, own: Tensor, group: Tensor, key: int) -> RankBatch:
        return with_samples(self, torch.arange(len(own)), torch.arange(len(group)), key)

    def own_statistics(self: GradientReducer) -> None:
        before = [statistics.rows.clone() for statistics in self._statistics.values()]
        finish(self)
        for statistics, rows in zip(self._statistics.values(), before, strict=True):
            statistics.rows.copy_(rows)

    def wrong_factor(network: ParallelNetwork) -> None:
        for name, role in network.roles.items():
            network.roles[name] = Role(role.tensor, role.over, 1.0)

    def drift(network: ParallelNetwork) -> None:
        if rank == world_size - 1:
            with torch.no_grad():
                next(network.get_submodule("head").parameters()).add_(1e-6)

    def no_sync(network: ParallelNetwork) -> None:
        rank_batch = network.rank_batch

        def alone(*args: Any) -> RankBatch:
            batch = rank_batch(*args)
            return replace(batch, own=replace(batch.own, sync=None), group=replace(batch.group, sync=None))

        network.rank_batch = alone  # type: ignore[assignment,method-assign]

    changed: dict[str, tuple[object, str, object]] = {
        "gradient summed twice": (runtime, "copy_to_branches", summed_twice),
        "gradient summed twice, in bf16": (runtime, "copy_to_branches", summed_twice),
        "gradient summed twice, in fp32": (runtime, "copy_to_branches", summed_twice),
        "no copy_to_branches": (runtime, "copy_to_branches", lambda h, *others: h),
        "gradient of own rows only at a fused edge": (runtime, "reduce_to_samples", skip_of_own_rows),
        "dropout by local row": (RankBatch, "with_samples", local_ids),
        "statistics not reduced": (GradientReducer, "finish", own_statistics),
        "weight gradients left waiting": (WeightGradients, "run", lambda queue: None),
    }
    on_network = {"factor 1": wrong_factor, "one rank drifted": drift, "own rows' statistics": no_sync}
    if defect in on_network:
        return verify(case, on_network[defect])
    if defect == "none":
        return verify(case)
    with mock.patch.object(changed[defect][0], changed[defect][1], changed[defect][2]):
        return verify(case)
