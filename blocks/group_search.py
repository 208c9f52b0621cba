"""The space of a series network's configurations: a group size for each layer, set at run time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product

from torch import nn

from anabranch.blocks.count import count
from anabranch.blocks.errors import ModelError
from anabranch.blocks.group_series import GroupSeriesConv, GroupSize

_MOST = 100_000  # each is an evaluation


@dataclass(frozen=True)
class Configuration:
    """A group size for each decomposed layer, in the network's order, and one sample's multiply-adds."""

    sizes: tuple[int, ...]
    macs: int


def series_layers(network: nn.Module) -> dict[str, GroupSeriesConv]:
    """The decomposed layers of a network (or a rank's part of it), by full name, in order."""
    return {name: m for name, m in network.named_modules() if isinstance(m, GroupSeriesConv)}


def configurations(network: nn.Module, limit: int | None = None) -> list[Configuration]:
    """Every choice of group sizes of a series network, cheapest first; with at most `limit` multiply-adds.

    Raises ModelError if the limit leaves none, and where there are more than can be searched one by one.
    """
    layers = list(series_layers(network).values())
    if (num := math.prod(len(layer.sizes) for layer in layers)) > _MOST:
        raise ModelError(
            f"{len(layers)} layers of {min(len(layer.sizes) for layer in layers)} or more group sizes have {num:,} "
            f"configurations, and at most {_MOST:,} are searched: give fewer sizes (gross.sizes)"
        )
    smallest = tuple(layer.sizes[0] for layer in layers)
    base = configuration_macs(network, smallest)
    more: list[dict[int, int]] = []  # what a layer's size costs beyond its smallest: layers add up
    for index, layer in enumerate(layers):
        changed = [(*smallest[:index], size, *smallest[index + 1 :]) for size in layer.sizes]
        more.append(
            {s: configuration_macs(network, c) - base for s, c in zip(layer.sizes, changed, strict=True)}
        )
    found = [
        Configuration(sizes, base + sum(costs[size] for costs, size in zip(more, sizes, strict=True)))
        for sizes in product(*(layer.sizes for layer in layers))
    ]
    if limit is not None and limit < base:
        raise ModelError(f"no configuration has at most {limit} multiply-adds: the smallest has {base}")
    return sorted((c for c in found if limit is None or c.macs <= limit), key=lambda c: (c.macs, c.sizes))


def configuration_macs(network: nn.Module, sizes: Sequence[int]) -> int:
    """One sample's multiply-adds with these group sizes."""
    with group_sizes(network, sizes):
        return count(network).macs


def set_group_sizes(network: nn.Module, sizes: Sequence[int] | GroupSize) -> None:
    """Sets the layers' group sizes, one for each in order or one for all ("sampled"). Raises ModelError."""
    layers = series_layers(network)
    given = [sizes] * len(layers) if isinstance(sizes, int | str) else list(sizes)
    if len(given) != len(layers):
        raise ModelError(
            f"{len(given)} group sizes for {len(layers)} layers ({', '.join(layers)}): give one each"
        )
    for (name, layer), size in zip(layers.items(), given, strict=True):
        if size != "sampled" and size not in layer.sizes:
            raise ModelError(f'{name} has no group size {size}: use one of {list(layer.sizes)}, or "sampled"')
    for layer, size in zip(layers.values(), given, strict=True):
        layer.group_size = size


@contextmanager
def group_sizes(network: nn.Module, sizes: Sequence[int] | GroupSize) -> Iterator[None]:
    """The group sizes for what is inside; the former ones afterwards."""
    before = [layer.group_size for layer in series_layers(network).values()]
    set_group_sizes(network, sizes)
    try:
        yield
    finally:
        for layer, size in zip(series_layers(network).values(), before, strict=True):
            layer.group_size = size
