"""What a group-size search chooses from, and what of its settings can be wrong before anything is trained."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn

from anabranch.blocks import ModelError
from anabranch.blocks.gross import convolutions, series_network
from anabranch.blocks.group_search import Configuration, configurations
from anabranch.blocks.group_series import check_group_sizes, powers_of_two
from anabranch.runtime.assemble import auto_partial
from anabranch.runtime.config import Config
from anabranch.runtime.errors import ConfigError
from anabranch.runtime.gross_config import GrossConfig
from anabranch.runtime.run_folder import RunFolder

Sizes = tuple[int, ...]
Limit = tuple[Sizes | None, int]
"""A fixed configuration to beat, or none, and the multiply-adds to stay within."""


@dataclass(frozen=True)
class SearchSpace:
    """layers: the decomposed layers' group sizes, by name, in order. configurations: all, cheapest first."""

    layers: dict[str, list[int]]
    configurations: list[Configuration]
    limits: list[Limit]


def search_space(network: nn.Module, gross: GrossConfig) -> SearchSpace:
    """The space of a network. Raises ModelError for one without convolutions to decompose; ConfigError for group sizes
    that don't chain, a baseline that is none of them, a limit that no configuration meets, or no limit at all."""
    layers = _layer_sizes(network, gross.sizes)
    found = configurations(series_network(network, layers))
    macs = {c.sizes: c.macs for c in found}
    limits: list[Limit] = []
    for size in gross.baselines:
        sizes = tuple(min(size, layer[-1]) for layer in layers.values())
        if sizes not in macs:
            raise ConfigError(
                f"gross.baselines has {size}, the network's layers have group sizes {list(layers.values())}: "
                "use one of these"
            )
        limits.append((sizes, macs[sizes]))
    if given := gross.max_macs:
        if given < found[0].macs:
            raise ConfigError(
                f"gross.max_macs is {given}, the smallest configuration has {found[0].macs}: allow that"
            )
        limits.append((None, given))
    if not limits:
        raise ConfigError("gross.baselines is empty and gross.max_macs is 0: give one, to search under")
    return SearchSpace(layers, found, limits)


def check_search(network: nn.Module, config: Config) -> None:
    """Raises, before workers start, what `search_space` does, and ConfigError (CheckpointError) for an automatic plan,
    epochs that don't ascend, a `gross.full` that is no run of this network, or a folder with something else in it."""
    gross = config.gross
    if auto_partial(config)[0]:
        raise ConfigError(
            f"mesh.plan is {config.mesh.plan}, an automatic one, and gross measures none of its networks: "
            'give --plan data, --plan even, or a plan file without scheduler = "auto"'
        )
    for field in fields(gross):
        epochs = getattr(gross, field.name)
        if field.name.endswith("milestones") and list(epochs) != sorted(set(epochs)):
            raise ConfigError(f"gross.{field.name} is {list(epochs)}: the epochs must ascend")
    search_space(network, gross)
    if gross.full:
        RunFolder.open(Path(gross.full)).checkpoint().check(network)
    if config.launch.run_dir:
        check_settings(Path(config.launch.run_dir), settings_of(config))


def settings_of(config: Config) -> dict[str, dict[str, Any]]:
    """What a search's numbers depend on, as plain JSON: not where it runs."""
    settings = config.to_dict()
    for section in ("mesh", "launch", "checkpoint", "profile"):
        del settings[section]
    plain: dict[str, dict[str, Any]] = json.loads(json.dumps(settings))
    return plain


def check_settings(run_dir: Path, mine: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]] | None:
    """The settings that a folder's search was begun with, None for a new one. Raises ConfigError if they are not these,
    or the folder holds a run of another kind.

    train.bn_batch_size may differ: it follows from the mesh where nobody set it, and the run keeps its own.
    """
    path = run_dir / "stages" / "settings.json"
    if not path.exists():
        if (run_dir / "checkpoints").exists():
            raise ConfigError(
                f"{run_dir} holds a training, not a group-size search: start one from its network with "
                f"--gross.full {run_dir} and another --run-dir"
            )
        return None
    stored: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    for section, values in mine.items():
        for key, value in values.items():
            former = stored.get(section, {}).get(key)
            if former != value and (section, key) != ("train", "bn_batch_size"):
                raise ConfigError(
                    f"{run_dir} has results of {section}.{key} = {former!r}, now it is {value!r}: "
                    "go on with the former value, or choose another folder with --run-dir"
                )
    return stored


def chosen(limit: Limit, found: Sequence[Mapping[str, Any]], num: int) -> dict[str, Any]:
    """The most accurate configurations within a limit, besides the fixed one that sets it; of equals the cheaper."""
    baseline, macs = limit
    allowed = [c for c in found if c["macs"] <= macs and c["sizes"] != baseline]
    allowed.sort(key=lambda c: (-c["validation_accuracy"], c["macs"], c["sizes"]))
    return {"baseline": baseline, "macs": macs, "winners": [c["sizes"] for c in allowed[:num]]}


def _layer_sizes(network: nn.Module, sizes: Sequence[int]) -> dict[str, list[int]]:
    """Each layer's group sizes: the given ones that are not larger than its input channels, else powers of two."""
    layers: dict[str, list[int]] = {}
    for name, layer in convolutions(network).items():
        channels = layer.weight.shape[1]
        layers[name] = [size for size in sizes if size <= channels] if sizes else powers_of_two(channels)
        try:
            check_group_sizes(layers[name], channels)
        except ModelError as error:
            raise ConfigError(f"gross.sizes is {list(sizes)}, but of {name} {error}") from None
    return layers
