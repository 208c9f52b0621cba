"""Accuracy of many configurations of a series network at once, over the ranks.

Configurations that begin alike share what they begin with: a batch runs through the tree of their group sizes.

        block 1 at 1 ──┬─ block 2 at 1 ──┬─ block 3 at 1 ── head
                       │                 └─ block 3 at 2 ── head
                       └─ block 2 at 2 ──── …
        block 1 at 2 ──── …

The ranks are dealt neighbouring configurations, each evaluates its own on all samples, and the hits are gathered.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor, nn

from anabranch.blocks.group_search import series_layers
from anabranch.blocks.network import named_blocks
from anabranch.runtime.data.augment import normalise
from anabranch.runtime.data.batches import Wanted, batches
from anabranch.runtime.data.sources import DataBundle
from anabranch.runtime.gross_space import Sizes
from anabranch.runtime.step import num_correct


@torch.no_grad()
def count_hits(network: nn.Module, wanted: Sequence[Sizes], data: DataBundle, batch_size: int) -> list[int]:
    """Right answers of each configuration on the test samples of `data`. Every rank calls it with the same ones.

    network: a whole series network on this rank's device; its group sizes are changed. wanted: a group size for each
    layer; neighbours should begin alike.
    """
    network.eval()
    like = next(network.parameters())
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mine = range(rank * len(wanted) // world_size, (rank + 1) * len(wanted) // world_size)
    hits = torch.zeros(len(wanted), dtype=torch.int64, device=like.device)
    num = len(data.test) if mine else 0
    steps = [Wanted(torch.arange(i, min(i + batch_size, num))) for i in range(0, num, batch_size)]
    for batch in batches(data.test, steps, like.device):
        x = normalise(batch.x_NCHW, data.normalisation, like.dtype)
        for index, logits in outputs(network, {i: wanted[i] for i in mine}, x):
            hits[index] += num_correct(logits, batch.labels)
    dist.all_reduce(hits)
    counted: list[int] = hits.tolist()
    return counted


def outputs(network: nn.Module, wanted: Mapping[int, Sizes], x: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(key, output) of each configuration for one batch. Sets the layers' group sizes."""
    layers = series_layers(network)
    places = {id(layer): place for place, layer in enumerate(layers.values())}
    blocks = [
        (block, [(layer, places[id(layer)]) for layer in series_layers(block).values()])
        for _, block in named_blocks(network)
    ]
    stem, head = network.get_submodule("stem"), network.get_submodule("head")

    def walk(x: Tensor, depth: int, members: Mapping[int, Sizes]) -> Iterator[tuple[int, Tensor]]:
        if depth == len(blocks):
            y = head(x)
            yield from ((key, y) for key in members)
            return
        block, inside = blocks[depth]

        def here(item: tuple[int, Sizes]) -> Sizes:
            return tuple(item[1][place] for _, place in inside)

        for sizes, alike in groupby(sorted(members.items(), key=here), key=here):
            for (layer, _), size in zip(inside, sizes, strict=True):
                layer.group_size = size
            yield from walk(block(x), depth + 1, dict(alike))

    yield from walk(stem(x), 0, wanted)
