"""What a scheduler needs to know of a network, read off its modules."""

from __future__ import annotations

from torch import nn

from anabranch.blocks.branch_sum import branch_sums, closing_sum
from anabranch.blocks.errors import ModelError
from anabranch.blocks.network import named_blocks
from anabranch.schedulers import BlockSpec, ModelSpec


def spec_of(network: nn.Module) -> ModelSpec:
    """The plain-data description of a network with stem, blocks, head.

    Raises ModelError for a block whose sums have unequal numbers of branches, for a parameter that belongs to
    different branches at once, and for parameters outside stem, blocks and head.
    """
    blocks = named_blocks(network)
    elements = {"stem": network.stem, **dict(blocks), "head": network.head}
    users: dict[int, list[str]] = {}
    for element, module in elements.items():
        for parameter in {id(p) for p in module.parameters()}:  # type: ignore[union-attr]
            users.setdefault(parameter, []).append(element)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    if stray := [name for identity, name in names.items() if identity not in users]:
        raise ModelError(f"parameters outside stem, blocks and head: {', '.join(stray)}: move them into one")
    tied = {names[i]: used_by for i, used_by in users.items() if len(used_by) > 1}
    shares = {e: frozenset(name for name, used_by in tied.items() if e in used_by) for e in elements}
    _check_owners(network)
    specs = []
    for name, block in blocks:
        sums = branch_sums(block)
        sizes = [block_sum.num_branches for _, block_sum in sums]
        if len(set(sizes)) > 1:
            raise ModelError(f"{name} has sums of {sizes} branches: the sums of one block need equally many")
        ends_in_sum = closing_sum(block) is not None
        specs.append(BlockSpec(name, sizes[0] if sizes else 1, max(len(sizes), 1), shares[name], ends_in_sum))
    return ModelSpec(tuple(specs), shares["stem"], shares["head"])


def _check_owners(network: nn.Module) -> None:
    """A parameter with several names must belong to the same branches under each of them."""
    owned = {
        f"{prefix}.{name}": owner
        for prefix, block_sum in branch_sums(network)
        for name, owner in block_sum.branch_tensors().items()
    }
    first_names: dict[int, str] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        first = first_names.setdefault(id(parameter), name)
        if owned.get(first) != owned.get(name):
            raise ModelError(
                f"{first} and {name} are one parameter of different branches: give each branch its own, or move the "
                "shared layer into `enter` or `join`"
            )
