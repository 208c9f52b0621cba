"""The orthogonality regularizer of shared filter bases (Equation 7 of "Learning Shared Filter Bases …"):

    λ · Σ_g w_g · ‖B_g·B_gᵀ − I‖²_F          B_g: one basis element a row; g: a stage's basis

It depends on no sample, so its gradient is no part of the gradient reduction: it is added, whole, to gradients that
are whole already, after the reduction and before clipping.

    reducer.finish()  ──►  add_gradients()  ──►  clip, optimizer
                            branch group: every rank's rows ──► all rows, on every rank (one all-reduce)
                            every rank: ∂/∂B of the same B; keeps the rows that it holds

The authors run λ = 10 on the *mean* over Gram entries, Σ_g ‖·‖² ÷ Σ_g R_g²: the default here. Equation 7 as printed
is normalisation "sum", with a λ to match. Where a block shares convolutions at several places (a bottleneck's 3×3 and
1×1), each place has a mean of its own, and the means are added, as theirs are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from anabranch.blocks.shared_basis import BasisGroup, basis_groups
from anabranch.runtime import exchange
from anabranch.runtime.errors import ConfigError
from anabranch.runtime.parallel_network import ParallelNetwork
from anabranch.runtime.process_group import gather_json

Normalisation = Literal["mean", "sum"]


@dataclass(frozen=True)
class OrthogonalityPenalty:
    """The penalty as a function of the bases.

    weight: λ. normalisation: "mean" over Gram entries, or "sum". joint: a basic block's two bases are one matrix.
    group_weights: w_g by the group's name ("stage2.basis"), 1 where absent.
    """

    weight: float = 10.0
    normalisation: Normalisation = "mean"
    joint: bool = True
    group_weights: Mapping[str, float] | None = None

    def groups(self, network: nn.Module) -> list[BasisGroup]:
        """The bases of a network; raises ConfigError if it has none, or for a weight of a group it has not."""
        if self.normalisation not in ("mean", "sum"):
            raise ConfigError(f'normalisation is "mean" or "sum", got {self.normalisation!r}')
        groups = basis_groups(network, joint=self.joint)
        if not groups:
            raise ConfigError("the network shares no filter basis: there is nothing to keep orthogonal")
        names = [group.name for group in groups]
        if unknown := [name for name in self.group_weights or {} if name not in names]:
            raise ConfigError(f"group_weights has {', '.join(unknown)}; the groups are {', '.join(names)}")
        return groups

    def value(self, groups: list[BasisGroup], tensors: Mapping[str, Tensor]) -> Tensor:
        """The penalty, a scalar, from whole parameters by name."""
        by_kind: dict[str, tuple[list[Tensor], int]] = {}
        for group in groups:
            rows = torch.cat([tensors[name].flatten(1) for name in group.parameters])
            gram = rows @ rows.T
            square = (gram - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)).square().sum()
            terms, entries = by_kind.get(group.kind, ([], 0))
            scaled = square * (self.group_weights or {}).get(group.name, 1.0)
            by_kind[group.kind] = ([*terms, scaled], entries + len(rows) ** 2)
        mean = self.normalisation == "mean"
        totals = [torch.stack(terms).sum() / (entries if mean else 1) for terms, entries in by_kind.values()]
        return self.weight * torch.stack(totals).sum()

    def warnings(self, groups: list[BasisGroup], shapes: Mapping[str, torch.Size]) -> list[str]:
        """What a user should know: bases of more elements than dimensions, which cannot be orthonormal."""
        found = []
        for group in groups:
            num_rows = sum(shapes[name][0] for name in group.parameters)
            num_dims = shapes[group.parameters[0]][1:].numel()
            if num_rows > num_dims:
                found.append(
                    f"basis {group.name} has {num_rows} elements of {num_dims} numbers, which cannot be orthonormal: "
                    f"its ‖BBᵀ − I‖² is at least {num_rows - num_dims}, not 0"
                )
        return found


def penalty_warnings(network: nn.Module, penalty: OrthogonalityPenalty | None) -> list[str]:
    """What a user of a one-device network should know before training; raises ConfigError as `groups` does."""
    if penalty is None:
        return []
    shapes = {name: p.shape for name, p in network.named_parameters(remove_duplicate=False)}
    return penalty.warnings(penalty.groups(network), shapes)


class OrthogonalityRegularizer:
    """Adds the penalty's gradient on one rank of a plan; every rank makes one and calls it every step.

    warnings: see `OrthogonalityPenalty.warnings`. Making it is collective over the branch group.
    """

    def __init__(self, network: ParallelNetwork, penalty: OrthogonalityPenalty) -> None:
        self.penalty = penalty
        self.groups = self.penalty.groups(network)
        names = [name for group in self.groups for name in group.parameters]
        self.bases = GatheredTensors(network, names)
        self.warnings = self.penalty.warnings(self.groups, self.bases.shapes)

    def add_gradients(self) -> Tensor:
        """Adds to every held p.grad, which must be whole, of what is trained; returns the penalty, a scalar equal on
        every rank."""
        whole = {name: tensor.detach() for name, tensor in self.bases.gather().items()}
        # nobody would clear a frozen one's gradient: it would pile up, and count in the norm that is clipped
        trained = [name for name in whole if self.bases.parameters[name].requires_grad]
        with torch.enable_grad():
            leaves = [whole[name].requires_grad_() for name in trained]
            value = self.penalty.value(self.groups, whole)
        grads = torch.autograd.grad(value, leaves) if leaves else ()
        for name, grad in zip(trained, grads, strict=True):
            parameter, mine = self.bases.parameters[name], self.bases.own_part(name, grad)
            parameter.grad = mine if parameter.grad is None else parameter.grad.add_(mine)
        return value.detach()


def one_device_penalty(network: nn.Module, penalty: OrthogonalityPenalty) -> Tensor:
    """The penalty of a one-device network, differentiable: the reference adds it to its loss once a step."""
    return penalty.value(penalty.groups(network), dict(network.named_parameters(remove_duplicate=False)))


class GatheredTensors:
    """Parameters of a rank's part of a network, whole: those that are split over branches are put together.

    parameters: this rank's, by name. shapes: of the whole ones. Making it is collective over the branch group.
    """

    def __init__(self, network: ParallelNetwork, names: list[str]) -> None:
        held = dict(network.named_parameters(remove_duplicate=False))
        self.parameters = {name: held[name] for name in names}
        self.shapes = {name: parameter.shape for name, parameter in self.parameters.items()}
        self.group = network.mesh.branch_group
        self._where: dict[str, tuple[int, Tensor]] = {}  # dim, positions of the held slices along it
        mine = {
            name: (tuple(role.tensor.held), tuple(held[name].shape))
            for name in names
            if (role := network.roles[name]).tensor is not None
            and role.tensor.dim is not None
            and role.over == "data"
        }
        if not mine:
            return
        device = next(iter(held.values())).device
        everyone: list[dict[str, tuple[list[int], list[int]]]] = gather_json(mine, device, self.group)
        for name, (branches, shape) in mine.items():
            owner = network.roles[name].tensor
            assert owner is not None, "chosen so above"
            assert owner.dim is not None, "chosen so above"
            order = sorted(branch for part in everyone for branch in part[name][0])
            size = sum(part[name][1][owner.dim] for part in everyone)
            width = size // len(order)
            rows = [order.index(branch) * width + i for branch in branches for i in range(width)]
            positions = torch.tensor(rows, dtype=torch.long, device=held[name].device)
            self._where[name] = (owner.dim, positions)
            self.shapes[name] = torch.Size((*shape[: owner.dim], size, *shape[owner.dim + 1 :]))

    @torch.no_grad()
    def gather(self) -> dict[str, Tensor]:
        """Every parameter, whole, on every rank of the branch group: one all-reduce of slices among zeros."""
        whole: dict[str, Tensor] = dict(self.parameters)
        if not self._where:
            return whole
        names = list(self._where)
        like = self.parameters[names[0]]
        flat = like.new_zeros(sum(self.shapes[name].numel() for name in names))
        for name, part in zip(names, flat.split([self.shapes[n].numel() for n in names]), strict=True):
            dim, positions = self._where[name]
            whole[name] = part.view(self.shapes[name]).index_copy_(dim, positions, self.parameters[name])
        exchange.all_reduce(flat, self.group).wait()
        return whole

    def own_part(self, name: str, whole: Tensor) -> Tensor:
        """What this rank holds of a whole tensor."""
        if name not in self._where:
            return whole
        dim, positions = self._where[name]
        return whole.index_select(dim, positions)
