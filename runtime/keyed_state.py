"""A network's and its optimizer's state as tensors by key, the same keys under every plan.

    network/stem.conv.weight
    network/blocks.stage1.block1.convs.0.weight@2                    branch 2's slice of a stacked tensor
    network/blocks.1.branch.0.2.weight                               a tensor of a branch's own module
    optimizer.exp_avg/blocks.stage1.block1.convs.0.weight@2          shaped as the parameter: sliced like it
    optimizer.step/blocks.stage1.block1.convs.0.weight@2             a number of the parameter: once a branch

A tensor with several names (a tied parameter) goes by the first of them in alphabetical order, whatever order the
modules are in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.blocks.branch_sum import BranchTensor, branch_sums
from anabranch.runtime.branch_state import by_branch, entries
from anabranch.runtime.parallel_network import ParallelNetwork, branch_tensors


class StateError(ValueError):
    """State that cannot be kept by key, or stored state that is not this network's."""


_NUMBER = ":number"  # ends the kind of a state that is a Python number, not a tensor


def written_by_this_rank(network: ParallelNetwork, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """This rank's part of a checkpoint (views): over all ranks, every key once.

    Replicated tensors are the first rank's, branches those of the first replica. Raises StateError for state that is
    not tensors, or cannot be cut into branches.
    """
    tensors, owners, mesh = network_tensors(network), branch_tensors(network), network.mesh
    writes = {"data": mesh.data_rank == 0, "world": mesh.rank == 0}
    over = _held_over(network)
    mine = {name: tensor for name, tensor in tensors.items() if writes[over[id(tensor)]]}
    found = {f"network/{key}": part for key, part in entries(mine, owners).items()}
    for name, tensor in mine.items():
        for slot, value in optimizer.state.get(tensor, {}).items():
            if value is not None:
                found |= _slot_entries(name, tensor, slot, value, owners)
    return found


def held_elsewhere_too(network: ParallelNetwork) -> dict[str, Tensor]:
    """What other ranks hold too, and must hold alike (views): replicated tensors; branches where there are replicas."""
    num_holders = {"data": network.mesh.data, "world": network.mesh.world_size}
    over = _held_over(network)
    mine = {n: t for n, t in network_tensors(network).items() if num_holders[over[id(t)]] > 1}
    return {f"network/{key}": part for key, part in entries(mine, branch_tensors(network)).items()}


def _held_over(network: ParallelNetwork) -> dict[int, str]:
    """By a tensor's id the mesh axis over which its copies lie."""
    tensors = network.state_dict(keep_vars=True).items()
    return {id(tensor): network.roles[name].over for name, tensor in tensors if name in network.roles}


def load_network(stored: Mapping[str, Tensor], network: nn.Module) -> Callable[[], None]:
    """Checks that the stored tensors are this network's (or this rank's part of it); the returned function fills it.

    Raises StateError naming keys that are missing, unexpected, or of another shape or dtype.
    """
    targets = {
        f"network/{k}": v for k, v in entries(network_tensors(network), branch_tensors(network)).items()
    }
    keys = {key for key in stored if key.startswith("network/")}
    missing = [key for key in targets if key not in keys]
    unexpected = sorted(_not_elsewhere(keys - targets.keys(), network))
    values = {key: stored[key] for key in targets if key in keys}
    reshaped = [
        f"{key}: {tuple(value.shape)} stored, {tuple(targets[key].shape)} here"
        for key, value in values.items()
        if value.shape != targets[key].shape
    ]
    found = [("are missing", missing), ("are unexpected", unexpected), ("have another shape", reshaped)]
    if problems := [f"{len(names)} tensors {what} ({_some(names)})" for what, names in found if names]:
        raise StateError(
            f"it is of another network: {', '.join(problems)}; build the network that its config.toml describes"
        )
    for key, value in values.items():
        if value.dtype != targets[key].dtype:
            raise StateError(
                f"{key} is {_dtype(value)} there and {_dtype(targets[key])} here: "
                "go on with the precision that the run began with"
            )
    return lambda: _copy(values, targets)


def load_optimizer(
    stored: Mapping[str, Tensor], network: nn.Module, optimizer: torch.optim.Optimizer
) -> Callable[[], None]:
    """The same for the state of an optimizer of the network's parameters; what it held before is forgotten."""
    names = {id(tensor): name for name, tensor in network_tensors(network).items()}
    owners = branch_tensors(network)
    kinds: dict[str, list[str]] = {}
    for key in stored:
        kind, _, entry = key.partition("/")
        if kind.startswith("optimizer."):
            kinds.setdefault(entry, []).append(kind)
    state: dict[int, dict[str, Any]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, parameter in enumerate(parameters):
        name = names[id(parameter)]
        parts = by_branch(name, parameter, owners)
        for kind in sorted({kind for entry in parts for kind in kinds.get(entry, ())}):
            values = {f"{kind}/{entry}": stored.get(f"{kind}/{entry}") for entry in parts}
            slot = kind.removeprefix("optimizer.").removesuffix(_NUMBER)
            whole = _whole(name, parameter, values, owners)
            state.setdefault(index, {})[slot] = whole.item() if kind.endswith(_NUMBER) else whole
    # Its own way in: it knows what lies on which device, and in which precision.
    filled = {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    return lambda: optimizer.load_state_dict(filled)


def network_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers of stem, blocks and head, each once.

    Nothing else of a user's network is trained. Raises StateError for a module's extra state.
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in sorted(network.state_dict(keep_vars=True).items(), key=lambda item: item[0]):
        if name.partition(".")[0] not in ("stem", "blocks", "head") or id(tensor) in seen:
            continue
        if not isinstance(tensor, Tensor):
            raise StateError(
                f"{name} is a {type(tensor).__name__}, checkpoints hold tensors: make it a buffer"
            )
        seen.add(id(tensor))
        found[name] = tensor
    return found


def _slot_entries(
    name: str, parameter: Tensor, slot: str, value: Any, owners: Mapping[str, BranchTensor]
) -> dict[str, Tensor]:
    """One state of one parameter, by key."""
    kind = f"optimizer.{slot}"
    if isinstance(value, bool | int | float):
        kind, value = (
            kind + _NUMBER,
            torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None),
        )
    parts = by_branch(name, parameter, owners)
    if not isinstance(value, Tensor) or (
        value.dim() and value.shape != parameter.shape and name not in parts
    ):
        what = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise StateError(
            f"the optimizer's {slot} of {name} is {what}, which cannot be kept by branch: a state is a number, or a "
            f"tensor of the parameter's shape {tuple(parameter.shape)}"
        )
    by_key = by_branch(name, value, owners) if value.shape == parameter.shape else dict.fromkeys(parts, value)
    return {f"{kind}/{entry}": part for entry, part in by_key.items()}


def _whole(
    name: str, parameter: Tensor, values: Mapping[str, Tensor | None], owners: Mapping[str, BranchTensor]
) -> Tensor:
    """One state of one parameter from its stored parts, in memory of its own."""
    if missing := [key for key, value in values.items() if value is None]:
        raise StateError(f"{_some(missing)} is missing, though other branches of {name} have that state")
    parts = [value for value in values.values() if value is not None]
    shapes = [part.shape for part in by_branch(name, parameter, owners).values()]
    if [part.shape for part in parts] != shapes:  # a number
        if any(not torch.equal(part, parts[0]) for part in parts):
            raise StateError(f"{_some(list(values))} differ, and this rank needs one value for all")
        return parts[0].clone()
    whole = torch.empty_like(parameter, dtype=parts[0].dtype, requires_grad=False)
    for target, part in zip(by_branch(name, whole, owners).values(), parts, strict=True):
        target.copy_(part)
    return whole


def _not_elsewhere(keys: Iterable[str], network: nn.Module) -> list[str]:
    """The keys that are not of branches which other ranks hold."""
    elsewhere = {p: set(range(b.num_branches)) - set(b.held) for p, b in branch_sums(network)}

    def is_elsewhere(key: str) -> bool:
        name, _, branch = key.removeprefix("network/").partition("@")
        for prefix, branches in elsewhere.items():
            if branches and name.startswith(f"{prefix}."):
                path = name.removeprefix(f"{prefix}.").split(".")
                number = branch or (path[1] if path[0] == "branch" else "")
                return number.isdecimal() and int(number) in branches
        return False

    return [key for key in keys if not is_elsewhere(key)]


@torch.no_grad()
def _copy(values: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> None:
    for key, value in values.items():
        targets[key].copy_(value)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
