"""Which branch a slow rank is waited for: single branches, each run alone with what goes before and after it."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import nn

from anabranch.blocks.branch_sum import BranchSum, branch_sums
from anabranch.runtime.countdown import OnProgress, silent
from anabranch.runtime.element_run import alone, input_shapes, run
from anabranch.runtime.parallel_network import ParallelNetwork
from anabranch.runtime.rank_batch import RankBatch

_ROUNDS = 3
_CLEARLY = 1.25  # times the others'


def branch_seconds(
    network: ParallelNetwork, image_shape: tuple[int, ...], rows: RankBatch, precision: str,
    on_progress: OnProgress = silent,
) -> dict[str, dict[int, float]]:  # fmt: skip
    """Seconds forward and backward by block and branch, where this rank runs several branches that may be unequal.

    Branches that are stacked in one tensor are equal work, they are not timed. In a block of several sums the branches
    of one number run together. Each figure is the best of some rounds, with `enter` and `join` and without exchanges;
    nothing of the network changes. image_shape: (C, H, W). rows: a micro-batch. on_progress: is told how many blocks
    are done.
    """
    like = next(network.parameters())
    found: dict[str, dict[int, float]] = {}
    elements = list(network.elements())
    for done, (name, block, wanted, shape) in enumerate(input_shapes(elements, image_shape, like)):
        on_progress(done, len(elements))
        num_rows = len(rows.range_of(wanted))
        with alone(block):
            sides = _single_branches(block)
        if not (sides and num_rows and shape):
            continue
        # at least two samples: BatchNorm refuses one number a channel
        x = torch.randn(max(num_rows, 2), *shape, dtype=like.dtype, device=like.device)
        if network.channels_last and x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        samples: dict[int, list[float]] = defaultdict(list)
        for _ in range(1 + _ROUNDS):
            for branch, side in sides.items():
                samples[branch].append(run(side, x, precision))
        found[name] = {
            branch: min(seconds[1:]) for branch, seconds in samples.items()
        }  # the first sets kernels up
    return found


def slowest(seconds: Mapping[int, float]) -> int | None:
    """The branch that takes clearly longer than the rank's others, by their median; None: they are alike."""
    if not seconds:
        return None
    branch = max(seconds, key=seconds.__getitem__)
    others = sorted(s for b, s in seconds.items() if b != branch)
    return branch if others and seconds[branch] > _CLEARLY * others[len(others) // 2] else None


def _single_branches(block: nn.Module) -> dict[int, nn.Module]:
    """The block with one branch in each of its sums, by branch; nothing where they are one, or stacked."""
    sums = [one for _, one in branch_sums(block)]
    if not any(len(one.held) > 1 and not _is_stacked(one) for one in sums):
        return {}
    return {branch: _only(block, branch) for branch in sorted({b for one in sums for b in one.held})}


def _is_stacked(one: BranchSum) -> bool:
    return any(tensor.dim is not None for tensor in one.branch_tensors().values())


def _only(block: nn.Module, branch: int) -> nn.Module:
    side = copy.deepcopy(block)
    for name, one in branch_sums(side):
        if branch in one.held:
            if not name:
                return one.shard((branch,))
            side.set_submodule(name, one.shard((branch,)))
    return side
