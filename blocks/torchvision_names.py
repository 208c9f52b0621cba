"""torchvision's parameter names of ResNets and ResNeXts (resnet50, resnext101_64x4d, …), there and back.

    ours                                 torchvision's
    stem.conv, stem.norm                 conv1, bn1
    blocks.stage2.block1.conv3           layer2.0.conv3
    blocks.stage2.block1.norm3           layer2.0.bn3
    blocks.stage2.block1.shortcut.conv   layer2.0.downsample.0     (.norm: .1)
    head.fc                              fc

torchvision itself is not needed. Its networks have the stride on the 3×3, as ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from anabranch.blocks.errors import ModelError
from anabranch.blocks.network import Network
from anabranch.blocks.resnext import resnext
from anabranch.blocks.resnext_forms import cardinality_of, convert, form_of

_EDGES = {"stem.conv": "conv1", "stem.norm": "bn1", "head.fc": "fc"}
_LAYERS = {f"conv{i}": f"conv{i}" for i in (1, 2, 3)} | {f"norm{i}": f"bn{i}" for i in (1, 2, 3)}
_LAYERS |= {"shortcut.conv": "downsample.0", "shortcut.norm": "downsample.1"}
_COUNTER = ".num_batches_tracked"
_MOST_LISTED = 8


def load_torchvision(state_dict: Mapping[str, Tensor], network: Network | None = None) -> Network:
    """A network with torchvision's weights, to be trained on.

    network: one of `resnext`, any form, to be filled; None: the one that the shapes describe is made. For other
    classes, give the network a new head afterwards: `network.head = PoolHead(2048, num_classes)`.

    Every key is used. Raises ModelError that lists missing keys, unexpected ones, and those of another shape; nothing
    is loaded then. A state without any num_batches_tracked (as old files are) sets those counters to 0.
    """
    if network is None:
        network = _described(state_dict)
    own = {name: tensor.to("meta") for name, tensor in network.state_dict().items()}  # names and shapes
    form = form_of(own)
    ours = convert(own, form, "c")
    theirs = to_torchvision(ours)  # in the order of `ours`
    if not any(key.endswith(_COUNTER) for key in state_dict):
        counters = {key for key in theirs if key.endswith(_COUNTER)}
        state_dict = {**state_dict, **dict.fromkeys(counters, torch.tensor(0))}
    missing, unexpected = theirs.keys() - state_dict.keys(), state_dict.keys() - theirs.keys()
    reshaped = {
        f"{key} {tuple(state_dict[key].shape)}, not {tuple(tensor.shape)}"
        for key, tensor in theirs.items()
        if key in state_dict and state_dict[key].shape != tensor.shape
    }
    found = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    if problems := [f"{len(keys)} {kind}: {_listed(keys)}" for kind, keys in found.items() if keys]:
        raise ModelError(
            f"the state does not fit the network; {'; '.join(problems)}. Load it into the network it is of, or leave "
            "the network out"
        )
    filled = {name: state_dict[key] for name, key in zip(ours, theirs, strict=True)}
    network.load_state_dict(convert(filled, "c", form))
    return network


def to_torchvision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state_dict of a `resnext`, in any form, under torchvision's names: what `load_state_dict` there takes.

    Raises ModelError that lists keys without a name there.
    """
    state = convert(state, form_of(state), "c")
    renamed = {name: _torchvision_name(name) for name in state}
    if strange := [name for name, theirs in renamed.items() if theirs is None]:
        raise ModelError(
            f"torchvision's ResNets have no {_listed(strange)}: give the state_dict of a resnext"
        )
    return {theirs: state[name] for name, theirs in renamed.items() if theirs is not None}


def _torchvision_name(name: str) -> str | None:
    layer, _, tensor = name.rpartition(".")
    if layer in _EDGES:
        return f"{_EDGES[layer]}.{tensor}"
    found = re.fullmatch(r"blocks\.stage(\d+)\.block(\d+)\.(.+)", layer)
    if found is None or found[3] not in _LAYERS:
        return None
    return f"layer{found[1]}.{int(found[2]) - 1}.{_LAYERS[found[3]]}.{tensor}"


def _described(state: Mapping[str, Tensor]) -> Network:
    """The network, not yet filled, that a torchvision state's keys and shapes describe."""
    needed = ("conv1.weight", "layer1.0.conv2.weight", "layer1.0.conv3.weight", "fc.weight")
    if missing := [key for key in needed if key not in state]:
        raise ModelError(
            f"{_listed(missing)} missing: a state of torchvision's resnet50, 101, 152, a wide one or a resnext has "
            "bottlenecks and these keys"
        )
    places = [(int(m[1]), int(m[2])) for key in state if (m := re.match(r"layer(\d+)\.(\d+)\.", key))]
    stages = range(1, max(stage for stage, _ in places) + 1)
    counts = [1 + max((block for s, block in places if s == stage), default=-1) for stage in stages]
    stem, core, last, fc = (state[key] for key in needed)
    network = resnext(
        cardinality=cardinality_of(needed[1], core),
        base_width=core.shape[1],
        num_classes=fc.shape[0],
        stem="imagenet" if stem.shape[-1] == 7 else "cifar",
        in_channels=stem.shape[1],
        channels=last.shape[0],
        blocks_per_stage=counts,
    )
    return network.to(stem.dtype if stem.dtype.is_floating_point else torch.float32)


def _listed(keys: Iterable[str]) -> str:
    ordered = sorted(keys)
    rest = len(ordered) - _MOST_LISTED
    return ", ".join(ordered[:_MOST_LISTED]) + (f" and {rest} more" if rest > 0 else "")
