"""The network that is measured: every distinct block once."""

from __future__ import annotations

import copy
from itertools import pairwise

import torch
from torch import Tensor, nn

from anabranch.blocks.network import named_blocks


def alike_blocks(network: nn.Module, x: Tensor) -> dict[str, str]:
    """Each block's first alike block: of the same modules and shapes, on inputs of the same shape."""
    first: dict[str, str] = {}
    found: dict[str, str] = {}
    shapes: dict[str, str] = {}
    hooks = []
    for name, block in named_blocks(network):
        hooks.append(
            block.register_forward_pre_hook(
                lambda module, args, name=name: shapes.__setitem__(name, str(tuple(args[0].shape[1:])))
            )
        )
    was_training = network.training
    network.eval()
    with torch.no_grad():
        x = x.to(next(network.parameters()))
        for module in (network.stem, *(block for _, block in named_blocks(network)), network.head):
            x = module(x)  # type: ignore[operator]
    network.train(was_training)
    for hook in hooks:
        hook.remove()
    for name, block in named_blocks(network):
        parameters = [tuple(p.shape) for p in block.parameters()]
        key = f"{shapes[name]} {block!r} {parameters}"
        found[name] = first.setdefault(key, name)
    return found


def reduced_network(network: nn.Module, alike: dict[str, str]) -> nn.Module:
    """A copy with one block of each kind: alike blocks keep shapes, so that the rest still fit together.

    Only the second and later of alike *neighbours* go: others may feed what comes between.
    """
    reduced = copy.deepcopy(network)
    names = list(alike)
    for before, name in pairwise(names):
        if alike[name] == alike[before]:
            parent, _, last = f"blocks.{name}".rpartition(".")
            del reduced.get_submodule(parent)._modules[last]
    return reduced
