"""Parameters, multiply-adds, branches and paths of a network, without running it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from anabranch.blocks.branch_sum import branch_sums
from anabranch.blocks.errors import ModelError


@dataclass(frozen=True)
class Count:
    """What `count` found.

    params: unique trainable parameters. macs: multiply-adds of convolutions and linear layers, for one
        sample.
    num_branches: the most branches of any sum. log2_paths: log2 of the paper's multiplicity, the number of
    paths from input to output (2^(kn) for n sums of k branches).
    """

    params: int
    macs: int
    num_branches: int
    log2_paths: int


def count(network: nn.Module, input_shape: tuple[int, ...] | None = None) -> Count:
    """Counts a network for samples of `input_shape` (C, H, W), by default the network's own.

    Raises ModelError if the network names no input shape and none is given.
    """
    shape = input_shape or getattr(network, "input_shape", None)
    if shape is None:
        raise ModelError(f"{type(network).__name__} has no input_shape: give count(network, (C, H, W))")
    on_meta = all(tensor.is_meta for tensor in [*network.parameters(), *network.buffers()])
    meta = network if on_meta else copy.deepcopy(network).to("meta")
    training = [module for module in meta.modules() if module.training]
    meta.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter, _NoNorm():
        meta(torch.empty((1, *shape), device="meta", dtype=next(meta.parameters()).dtype))
    for module in training:
        module.training = True
    sums = [block_sum.num_branches for _, block_sum in branch_sums(network)]
    return Count(
        params=sum(p.numel() for p in network.parameters() if p.requires_grad),
        macs=counter.get_total_flops() // 2,
        num_branches=max(sums, default=1),
        log2_paths=sum(sums),
    )


class _NoNorm(TorchFunctionMode):
    """Leaves out batch norm: it is not counted, and what torch does for it on meta takes most of the time."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return torch.empty_like(args[0]) if func is torch.batch_norm else func(*args, **(kwargs or {}))
