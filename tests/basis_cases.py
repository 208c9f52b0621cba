"""Networks with shared bases, and their parity with the regularizer on, importable by the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from anabranch.blocks.densenet import densenet
from anabranch.blocks.filter_sum import Part
from anabranch.blocks.mobilenet import mobilenet_v2
from anabranch.blocks.shared_resnet import cifar_resnet, resnet
from anabranch.blocks.shared_transform import share_bases, tie_convolutions
from anabranch.runtime.config import OptimizerConfig
from anabranch.runtime.mesh import make_mesh
from anabranch.runtime.model_spec import spec_of
from anabranch.runtime.regularizer import OrthogonalityPenalty, OrthogonalityRegularizer
from anabranch.runtime.verify import Report, Trial, verify_plan
from anabranch.schedulers import BranchPlacement, ModelSpec, Plan

_TINY: dict[str, Any] = {"in_channels": 2, "num_classes": 5}
_C10 = {"width": 4, "blocks_per_stage": (3, 2, 1), **_TINY}
_R50 = {"depth": 50, "stem": "cifar", "width": 4, "blocks_per_stage": (3, 1, 1, 1), **_TINY}
_X50 = {**_R50, "cardinality": 4, "blocks_per_stage": (2, 2, 1, 1)}
_PARTS: tuple[Part, ...] = ("first", "basis", "coefficients")

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: cifar_resnet(**_C10),
    "single": lambda: share_bases(cifar_resnet(**_C10), 4, 1, own_in_basis=True),
    "double": lambda: share_bases(cifar_resnet(bundled=True, **_C10), 4, 1, double=True),
    "tied": lambda: tie_convolutions(resnet(**_R50), ("basis", "coefficients")),
    "all": lambda: tie_convolutions(resnet(bundled=True, **_R50), _PARTS),
    "resnext": lambda: share_bases(resnet(bundled=True, **_X50), 8, 4),
    "resnext_fine": lambda: share_bases(resnet(**_X50), 16, 4),
    "densenet": lambda: share_bases(densenet(growth=4, blocks_per_stage=(2, 2), **_TINY), 4, 1),
    "plain_densenet": lambda: densenet(growth=2, blocks_per_stage=(2, 1), **_TINY),
    "mobilenet": lambda: tie_convolutions(
        mobilenet_v2(width=0.125, blocks_per_stage=(1, 1, 3, 1, 1, 1, 1), **_TINY), ("basis", "coefficients")
    ),
}

Layout = Literal["even", "strided", "none", "mixed"]


@dataclass(frozen=True)
class Case:
    """layout: "even"; "strided": branch b on rank b mod M; "none": all on the last rank; "mixed": stages 1, 3 … by
    sample, the others strided. edges: stem and head, s(ample) or r(eplicated). penalty: the regularizer's options, None
    for none. frozen: parameters whose names hold this are not trained."""

    network: str
    mesh: tuple[int, int]
    layout: Layout
    edges: str = "ss"
    trial: dict[str, Any] = field(default_factory=dict)
    penalty: dict[str, Any] | None = field(default_factory=dict)
    frozen: str = ""

    def made(self) -> nn.Module:
        """Its network, seeded."""
        network = seeded(self.network)
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(not self.frozen or self.frozen not in name)
        return network


def seeded(name: str) -> nn.Module:
    """The network from a fixed seed, moved a little off its zeros and ones."""
    torch.manual_seed(3)
    made = NETWORKS[name]()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return made


def plan_for(model: ModelSpec, case: Case) -> Plan:
    """The plan that a case's layout means for a network."""
    data, branch = case.mesh
    blocks: dict[str, BranchPlacement] = {}
    for spec in model.blocks:
        number = spec.num_branches
        if case.layout == "mixed" and spec.name[5] in "13":
            blocks[spec.name] = BranchPlacement("sample")
        elif case.layout == "even":
            blocks[spec.name] = BranchPlacement.even(number, branch)
        elif case.layout == "none":
            blocks[spec.name] = BranchPlacement.from_counts([0] * (branch - 1) + [number])
        else:
            held = tuple(tuple(range(rank, number, branch)) for rank in range(branch))
            blocks[spec.name] = BranchPlacement("branch", held)
    stem, head = ({"s": "sample", "r": "replicated"}[letter] for letter in case.edges)
    return Plan(data, branch, blocks, stem, head)  # type: ignore[arg-type]


def parity(rank: int, world_size: int, cases: Sequence[Case], defect: str = "") -> list[Report]:
    """Each case verified on these ranks, the penalty added to gradients on both sides."""
    reports = []
    for case in cases:
        network = case.made()
        plan = plan_for(spec_of(network), case)
        # five halvings leave 2x2; its three steps, the last one short, are of half the samples then
        size, scale = (64, 2) if case.network == "mobilenet" else (16, 1)
        generator = torch.Generator().manual_seed(7)
        number = case.trial.get("num_samples", 36 // scale)
        trial = Trial(
            torch.randn(number, 2, size, size, generator=generator, dtype=torch.float64),
            torch.randint(5, (number,), generator=generator),
            **{
                "batch_size": 16 // scale, "bn_batch_size": 8 // scale, "precision": "fp64",
                "optimizer": OptimizerConfig(lr=0.02),
                "penalty": None if case.penalty is None else OrthogonalityPenalty(**case.penalty),
                **{name: value for name, value in case.trial.items() if name != "num_samples"},
            },
        )  # fmt: skip
        mesh = make_mesh(plan.data, plan.branch)
        with _planted(defect):
            reports.append(verify_plan(network, plan, mesh, trial))
    return reports


@contextmanager
def _planted(defect: str) -> Iterator[None]:
    """An error in the parallel step: "scaled" counts the penalty twice, as one inside every rank's loss would."""
    plain = OrthogonalityRegularizer.add_gradients

    def twice(self: OrthogonalityRegularizer) -> Tensor:
        plain(self)
        return plain(self)

    if defect == "scaled":
        OrthogonalityRegularizer.add_gradients = twice  # type: ignore[method-assign]
    try:
        yield
    finally:
        OrthogonalityRegularizer.add_gradients = plain  # type: ignore[method-assign]
