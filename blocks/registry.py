"""Networks by name: families with options, and the ready names of the papers' tables."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from anabranch.blocks.errors import ModelError
from anabranch.blocks.multi_resnet import multi_resnet, pre_resnet

_FAMILIES: dict[str, Callable[..., nn.Module]] = {"multi_resnet": multi_resnet, "pre_resnet": pre_resnet}

_WIDE = {"depth": 26, "num_branches": 4, "width": 10}

_READY: dict[str, tuple[str, dict[str, Any]]] = {
    "pre_resnet_110": ("pre_resnet", {"depth": 110}),
    "multi_resnet_110_k4": ("multi_resnet", {"depth": 110, "num_branches": 4}),
    "multi_resnet_200_k5": ("multi_resnet", {"depth": 200, "num_branches": 5, "block": "bottleneck"}),
    "multi_resnet_26_k4_w10": ("multi_resnet", {**_WIDE, "shortcut": "B"}),
    "multi_resnet_26_k4_w10_a": ("multi_resnet", {**_WIDE, "shortcut": "A"}),
    "resnet200_preact": ("pre_resnet", {"depth": 200, "block": "bottleneck", "stem": "imagenet"}),
}


def families() -> list[str]:
    """Names that take options."""
    return list(_FAMILIES)


def models() -> list[str]:
    """The ready names, each a network of a paper's table."""
    return list(_READY)


def build(name: str, **options: Any) -> nn.Module:
    """A network on one device, with fresh parameters from torch's default generator.

    Options of a ready name override its own. Raises ModelError for an unknown name or option, naming close
    ones.
    """
    family, ready = _READY.get(name, (name, {}))
    if family not in _FAMILIES:
        known = [*_FAMILIES, *_READY]
        close = difflib.get_close_matches(name, known, 3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"
        raise ModelError(f"no model {name!r}; {hint}")
    make = _FAMILIES[family]
    merged = {**ready, **options}
    known_options = list(inspect.signature(multi_resnet if make is pre_resnet else make).parameters)
    if make is pre_resnet:
        known_options.remove("num_branches")
    for key in merged:
        if key not in known_options:
            close = difflib.get_close_matches(key, known_options, 1)
            hint = f"did you mean {close[0]}?" if close else f"its options: {', '.join(known_options)}"
            raise ModelError(f"{name} has no option {key!r}; {hint}")
    try:
        return make(**merged)
    except TypeError as error:
        raise ModelError(f"{name}: {error}; its options: {', '.join(known_options)}") from error
