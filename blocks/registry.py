"""Networks by name: families with options, and the ready names of the papers' tables."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from anabranch.blocks.cru_net import READY as CRU_NETS
from anabranch.blocks.cru_net import cru_net, preact_resnext
from anabranch.blocks.densenet import READY as DENSENETS
from anabranch.blocks.densenet import densenet
from anabranch.blocks.errors import ModelError
from anabranch.blocks.features import Features
from anabranch.blocks.gross import READY as GROSS_NETS
from anabranch.blocks.gross import gross_net
from anabranch.blocks.mobilenet import READY as MOBILENETS
from anabranch.blocks.mobilenet import mobilenet_v2
from anabranch.blocks.multi_resnet import READY as MULTI_RESNETS
from anabranch.blocks.multi_resnet import multi_resnet, pre_resnet
from anabranch.blocks.resnext import READY as RESNEXTS
from anabranch.blocks.resnext import resnext
from anabranch.blocks.shared_resnet import READY as RESNETS
from anabranch.blocks.shared_resnet import cifar_resnet, resnet
from anabranch.blocks.shared_transform import READY as SHARED_BASES
from anabranch.blocks.shared_transform import shared_basis

_FAMILIES: dict[str, Callable[..., nn.Module]] = {
    family.__name__: family
    for family in (
        multi_resnet, pre_resnet, resnext, preact_resnext, cru_net, resnet, cifar_resnet, densenet, mobilenet_v2,
        shared_basis, gross_net,
    )
}  # fmt: skip

_READY: dict[str, tuple[str, dict[str, Any]]] = {
    **MULTI_RESNETS, **RESNEXTS, **CRU_NETS, **RESNETS, **DENSENETS, **MOBILENETS, **SHARED_BASES, **GROSS_NETS,
}  # fmt: skip


def families() -> list[str]:
    """Names that take options."""
    return list(_FAMILIES)


def models() -> list[str]:
    """The ready names, each a network of a paper's table."""
    return list(_READY)


def family_of(name: str) -> str:
    """The family of a ready name; a family's own name is its own. Raises ModelError for an unknown one."""
    family, _ = _READY.get(name, (name, {}))
    if family not in _FAMILIES:
        known = [*_FAMILIES, *_READY]
        close = difflib.get_close_matches(name, known, 3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"
        raise ModelError(f"no model {name!r}; {hint}")
    return family


def build(name: str, *, features: bool = False, **options: Any) -> nn.Module:
    """A network on one device, with fresh parameters from torch's default generator.

    features: its `Features` for a detector instead: no head, every stage's output, channels and strides stated.

    Options of a ready name override its own. Raises ModelError for an unknown name or option, naming close
    ones.
    """
    if features:
        return Features(build(name, **options))
    make = _FAMILIES[family_of(name)]
    merged = {**_READY.get(name, (name, {}))[1], **options}
    known_options = list(inspect.signature(make).parameters)
    for key in merged:
        if key not in known_options:
            close = difflib.get_close_matches(key, known_options, 1)
            hint = f"did you mean {close[0]}?" if close else f"its options: {', '.join(known_options)}"
            raise ModelError(f"{name} has no option {key!r}; {hint}")
    try:
        return make(**merged)
    except TypeError as error:
        raise ModelError(f"{name}: {error}; its options: {', '.join(known_options)}") from error
