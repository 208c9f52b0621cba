"""In how many parts partial sums travel: `mesh.chunks = 0`, timed on the ranks with the exchanges of the run."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from anabranch.blocks.branch_sum import Execution, branch_sums
from anabranch.runtime.branch_exchange import BranchExchange
from anabranch.runtime.element_run import alone, input_shapes, key_of, run
from anabranch.runtime.parallel_network import ParallelNetwork, set_memory_format
from anabranch.runtime.process_group import gather_json
from anabranch.runtime.wire import Wire

_CHOICES = (1, 2, 4)
_ROUNDS = 5


def fastest_chunks(
    network: ParallelNetwork,
    image_shape: tuple[int, ...],
    num_rows: int,
    execution: Mapping[str, Execution],
    wire: Wire,
    precision: str,
    clearly: float,
) -> int:
    """The parts in which this network's split blocks are fastest, the same on all ranks. Collective.

    1 unless others take less than `clearly` of its time. Each distinct split block runs forward and backward, its
    exchanges too, on num_rows samples: the best of some rounds, all choices in each, in which the slowest rank counts.
    execution, wire, precision: as the blocks are going to run.
    """
    parameter = next(network.parameters())
    blocks: dict[str, tuple[nn.Module, tuple[int, ...]]] = {}
    keys: dict[str, str] = {}
    for name, module, _, shape in input_shapes(network.elements(), image_shape, parameter):
        if any(one.exchange is not None for _, one in branch_sums(module)) and shape:
            blocks[name] = module, shape
            with alone(module) as element:
                keys[name] = key_of(element, (num_rows, *shape))
    told = gather_json(keys, parameter.device)
    if any(set(one) != set(keys) for one in told) or not keys:
        return 1
    # what is one block to a rank may be two to another, which holds other numbers of their branches
    of_all = {name: tuple(one[name] for one in told) for name in keys}
    counts = Counter(of_all.values())
    totals = dict.fromkeys(_CHOICES, 0.0)
    for key, name in {key: name for name, key in reversed(of_all.items())}.items():
        block, size = blocks[name]
        x = torch.randn(max(num_rows, 2), *size, dtype=parameter.dtype, device=parameter.device)
        with alone(block) as element:
            side = copy.deepcopy(element)
        mine = _timed(side, execution[name], x, wire, precision)
        rounds = gather_json(mine, parameter.device)
        for index, choice in enumerate(_CHOICES):
            slowest = (max(rank[turn][index] for rank in rounds) for turn in range(_ROUNDS))
            totals[choice] += counts[key] * min(slowest)
    best = min(totals, key=totals.__getitem__)
    return best if totals[best] < clearly * totals[1] else 1


def _timed(
    block: nn.Module, execution: Execution, x: Tensor, wire: Wire, precision: str
) -> list[list[float]]:
    """Seconds by round and choice, on this rank."""
    if wire.is_image(x):
        x = x.contiguous(memory_format=torch.channels_last)
    set_memory_format(block, channels_last=wire.channels_last)
    wires = [replace(wire, chunks=choice) for choice in _CHOICES]
    seconds: list[list[float]] = []
    for _ in range(1 + _ROUNDS):
        seconds.append([])
        for one in wires:
            for _, block_sum in branch_sums(block):
                block_sum.execution, block_sum.exchange = execution, BranchExchange(one)
            seconds[-1].append(run(block, x, precision))
    return seconds[1:]  # the first round sets kernels up
