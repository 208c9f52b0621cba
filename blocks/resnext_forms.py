"""The map between the parameters of ResNeXt's three forms (Figure 3 of the paper; the blocks: resnext_block.py).

    layer of a block              (a)                   (b)                    (c)
    conv1, norm1, conv2, norm2    branch.<i>.<layer>    branch.<i>.<layer>     rows [i·d, (i+1)·d)
    conv3                         branch.<i>.conv3      columns [i·d, (i+1)·d) columns [i·d, (i+1)·d)
    norm3, shortcut               the same in all, like stem and head

i: the path, d: its width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from anabranch.blocks.errors import ModelError
from anabranch.blocks.resnext_block import Form

_OF_PATH: dict[Form, tuple[str, ...]] = {
    "a": ("conv1", "norm1", "conv2", "norm2", "conv3"),
    "b": ("conv1", "norm1", "conv2", "norm2"),
    "c": (),
}
"""The layers that each path has as its own module, "branch.<path>.<layer>"; the others hold all paths."""

_PATH_KEY = re.compile(
    r"(?P<block>(?:.*\.)?)branch\.(?P<path>\d+)\.(?P<name>(?P<layer>(?:conv|norm)\d)\.\w+)"
)
_LAYER_KEY = re.compile(r"(?P<block>(?:.*\.)?)(?P<name>(?P<layer>(?:conv|norm)\d)\.\w+)")


def form_of(state: Mapping[str, Tensor]) -> Form:
    """The form whose names a whole state has."""
    layers = {found["layer"] for key in state if (found := _PATH_KEY.fullmatch(key))}
    return "a" if "conv3" in layers else "b" if layers else "c"


def convert(state: Mapping[str, Tensor], from_form: Form, to_form: Form) -> dict[str, Tensor]:
    """A state (parameters and buffers; gradients or momenta by name too) of one form as that of another.

    state: of a block or a whole network. The values are copied, never computed with: there and back is bit-equal.
    Raises ModelError if the state is not of `from_form`, a path is missing, or channels do not divide into paths.
    """
    for form in (from_form, to_form):
        if form not in _OF_PATH:
            raise ModelError(f"a form is one of {list(_OF_PATH)}, got {form!r}")
    for key in state:
        of_path = _PATH_KEY.fullmatch(key)
        found = of_path or _LAYER_KEY.fullmatch(key)
        if found and (found["layer"] in _OF_PATH[from_form]) != bool(of_path):
            raise ModelError(
                f"{key} is no name of form ({from_form}): the state seems to be of form ({form_of(state)})"
            )
    return _split(_joined(state), _OF_PATH[to_form])


def _joined(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state in form (c)."""
    joined: dict[str, Tensor] = {}
    paths: dict[tuple[str, str], dict[int, Tensor]] = {}  # by block and name in it
    for key, tensor in state.items():
        if found := _PATH_KEY.fullmatch(key):
            paths.setdefault((found["block"], found["name"]), {})[int(found["path"])] = tensor
        else:
            joined[key] = tensor.clone()
    counts: dict[str, int] = {}
    for (block, _), parts in paths.items():
        counts[block] = max(counts.get(block, 0), max(parts) + 1)
    for (block, name), parts in paths.items():
        key, count = block + name, counts[block]
        if missing := sorted(set(range(count)) - set(parts)):
            raise ModelError(f"{key} lacks paths {missing} of {count}: give a state that has all of them")
        ordered = [parts[path] for path in range(count)]
        if ordered[0].dim():
            joined[key] = torch.cat(ordered, 1 if key.endswith("conv3.weight") else 0)
        else:  # num_batches_tracked: all paths have seen the same batches
            joined[key] = ordered[0].clone()
    return joined


def _split(state: Mapping[str, Tensor], layers: tuple[str, ...]) -> dict[str, Tensor]:
    """A state in form (c) with `layers` as those of single paths."""
    if not layers:
        return dict(state)
    split: dict[str, Tensor] = {}
    for key, tensor in state.items():
        found = _LAYER_KEY.fullmatch(key)
        if found is None or found["layer"] not in layers:
            split[key] = tensor
            continue
        core = f"{found['block']}conv2.weight"
        if core not in state:
            raise ModelError(f"{key} needs {core} beside it, whose shape tells the number of paths")
        count = cardinality_of(core, state[core])
        dim = 1 if found["name"] == "conv3.weight" else 0
        if tensor.dim() and tensor.shape[dim] % count:
            raise ModelError(f"{key} has {tensor.shape[dim]} channels, which are no {count} equal paths")
        parts = tensor.chunk(count, dim) if tensor.dim() else [tensor] * count
        for path, part in enumerate(parts):
            split[f"{found['block']}branch.{path}.{found['name']}"] = part.clone()
    return split


def cardinality_of(name: str, weight: Tensor) -> int:
    """The groups of a grouped 3×3 convolution with as many channels in as out, from its weight (C·d, d, 3, 3).

    Raises ModelError if the width is no multiple of the path's.
    """
    width, path_width = weight.shape[:2]
    if width % path_width:
        raise ModelError(
            f"{name} has {width} channels in groups of {path_width}, which does not divide {width}: "
            "the width must be cardinality × path width"
        )
    return width // path_width
