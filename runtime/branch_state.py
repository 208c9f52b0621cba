"""Tensors keyed by branch: the form in which state is independent of plan and mesh.

A parameter stacked over branches appears as one entry a branch, "blocks.stage1.block1.convs.0.weight@2";
every other tensor under its own name. Whoever holds which branches, the keys of a network are the same.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from anabranch.blocks.branch_sum import BranchTensor

Owners = Mapping[str, BranchTensor]
"""Full tensor name → the branches it belongs to; `parallel_network.branch_tensors(network)` gives it."""


def by_branch(name: str, tensor: Tensor, owners: Owners) -> dict[str, Tensor]:
    """The entries of one tensor (views of it)."""
    owner = owners.get(name)
    if owner is None or owner.dim is None:
        return {name: tensor}
    return {f"{name}@{branch}": part for branch, part in owner.slices(tensor)}


def entries(tensors: Mapping[str, Tensor], owners: Owners) -> dict[str, Tensor]:
    """The entries of many tensors."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        found |= by_branch(name, tensor, owners)
    return found


def branch_of(key: str, owners: Owners) -> int | None:
    """The branch that an entry belongs to, None for a replicated one."""
    name, _, branch = key.partition("@")
    if branch:
        return int(branch)
    return owners[name].held[0] if name in owners else None
