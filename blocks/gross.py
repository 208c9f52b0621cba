"""The GroSS paper's network, its decomposition into group-size series, and the space of their configurations.

        full network ── series_network ──► every convolution but the stem's: a GroupSeriesConv
                                            │ load(fits) · response_loss · training with sampled group sizes
                                            ▼
        configurations(series, limit) ──► the best ── series_network with one size a layer ──► tuned alone

Discrepancies with the paper:

- Tables 2 and 3 count B + 73,728·g₂ + 18,432·g₃ + 9,216·g₄ multiply-adds with B = 1.037M. The slopes are those of
  the text's structure, whose convolutions and linear layers have B = 1,804,800; the full network has 5,081,600,
  not 4.42M. A limit for this network is therefore the count of a configuration, not a number of the tables'.
- Eq. 9's norms are taken sample by sample and averaged, so that the loss, as every other here, is a mean over
  samples and does not depend on how a batch is spread. The response is the convolution's output, before its ReLU.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anabranch.blocks.branch_sum import BranchSum, BranchTensor, Hidden
from anabranch.blocks.channels import take_groups
from anabranch.blocks.dropout import Dropout
from anabranch.blocks.errors import ModelError, at_least_one
from anabranch.blocks.group_search import series_layers
from anabranch.blocks.group_series import GroupSeriesConv, powers_of_two
from anabranch.blocks.network import Network, named_blocks


class ChannelSumConv(BranchSum):
    """A convolution as the sum over its input channels, a branch each: (N, d1, H, W) → (N, d2, H', W').

    Parameters, their names and init (He, fan-out; biases 0) as an `nn.Conv2d`'s.
    """

    def __init__(self, channels: int, out_channels: int, kernel: int = 3) -> None:
        super().__init__(channels)
        self.stride, self.padding, self.dilation = 1, kernel // 2, 1
        self.weight = nn.Parameter(torch.empty(out_channels, channels, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")

    def branches(self, h: Hidden) -> Tensor:
        assert isinstance(h, Tensor), "`enter` gives one tensor"
        if self.execution != "looped":
            mine = h if len(self.held) == self.num_branches else take_groups(h, self.held, 1)
            return F.conv2d(mine, self.weight, None, self.stride, self.padding)
        total: Tensor | None = None
        for weight, branch in zip(self.weight.split(1, 1), self.held, strict=True):
            term = F.conv2d(h[:, branch : branch + 1], weight, None, self.stride, self.padding)
            total = term if total is None else total + term
        assert total is not None, "at least one branch is held"
        return total

    def join(self, x: Tensor, h: Hidden, s: Tensor) -> Tensor:
        return s + self.bias.view(-1, 1, 1)

    def branch_tensors(self) -> dict[str, BranchTensor]:
        return {"weight": BranchTensor(self.held, 1)}


class _Head(nn.Module):
    """Linear, ReLU, dropout 0.5, linear over all features: (N, C, H, W) → (N, classes)."""

    def __init__(self, features: int, width: int, num_classes: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(features, width), nn.Linear(width, num_classes)
        self.dropout = Dropout(0.5)
        for layer in (self.fc1, self.fc2):
            nn.init.normal_(layer.weight, std=0.1)  # variance 0.01
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(self.dropout(F.relu(self.fc1(x.flatten(1)))))
        return y


def gross_net(
    channels: Sequence[int] = (32, 32, 64, 64),
    width: int = 256,
    num_classes: int = 10,
    in_channels: int = 3,
    image_size: int = 32,
) -> Network:
    """The paper's network (Section 4.2): 3×3 convolutions with bias, each with ReLU and 2×2 max pool, two linear
    layers with ReLU and dropout 0.5 between them.

    channels: of the convolutions; the first is the stem. width: of the first linear layer. image_size: height and
    width, divided by two (rounding down) by each pool. Raises ModelError if nothing is left of it.
    """
    if len(channels) < 2 or min(channels) < 1:
        raise ModelError(
            f"channels {list(channels)}: give two or more layers' channels, and at least 1 of each"
        )
    at_least_one(width=width, in_channels=in_channels, num_classes=num_classes)
    left = image_size >> len(channels)
    if left < 1:
        raise ModelError(
            f"{len(channels)} max pools leave nothing of {image_size} × {image_size} pixels: give images of at least "
            f"{2 ** len(channels)}, or at most {image_size.bit_length() - 1} channels"
        )
    first = nn.Conv2d(in_channels, channels[0], 3, padding=1)
    nn.init.kaiming_normal_(first.weight, mode="fan_out", nonlinearity="relu")
    nn.init.zeros_(first.bias)  # type: ignore[arg-type]
    blocks = {
        f"stage{index}": {"block1": _pooled(ChannelSumConv(c, out))}
        for index, (c, out) in enumerate(pairwise(channels), 1)
    }
    head = _Head(channels[-1] * left**2, width, num_classes)
    return Network(_pooled(first), blocks, head, input_shape=(in_channels, image_size, image_size))


READY: dict[str, tuple[str, dict[str, Any]]] = {"gross_net": ("gross_net", {})}


def _pooled(conv: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(conv=conv, relu=nn.ReLU(), pool=nn.MaxPool2d(2)))


def convolutions(network: nn.Module) -> dict[str, nn.Conv2d | ChannelSumConv]:
    """The layers of a network's blocks that can be decomposed, by full name, in order: k×k convolutions, ungrouped,
    padded with zeros, by themselves or as a ChannelSumConv (not those inside another BranchSum)."""
    named_blocks(network)  # refuses what is no network
    return dict(_dense(network.get_submodule("blocks"), "blocks"))


def series_network(network: nn.Module, sizes: Mapping[str, Sequence[int]] | None = None) -> nn.Module:
    """A copy of a network whose convolutions (see `convolutions`) are series, not loaded yet; all else is copied.

    sizes: by layer the group sizes; None: the paper's, `powers_of_two` of the layer's input channels. Layers that
    are not named stay as they are. A series network is what it was made of but for its P, R, Q: biases, linear
    layers and the stem have their values. Raises ModelError for a name that is no such layer, a network without
    any, or sizes that don't chain.
    """
    found = convolutions(network)
    if not found:
        raise ModelError(
            f"{type(network).__name__} has no convolution to decompose: its blocks need ungrouped k×k convolutions "
            "outside of branch sums"
        )
    if sizes is None:
        sizes = {name: powers_of_two(layer.weight.shape[1]) for name, layer in found.items()}
    if unknown := [name for name in sizes if name not in found]:
        raise ModelError(
            f"no convolution {', '.join(unknown)} to decompose: the network has {', '.join(found)}"
        )
    made = copy.deepcopy(network)
    for name, layer_sizes in sizes.items():
        parent, _, key = name.rpartition(".")
        setattr(made.get_submodule(parent), key, _as_series(found[name], layer_sizes, name))
    return made


def train_series_only(network: nn.Module) -> list[nn.Parameter]:
    """Freezes everything but the series' pointwise and grouped layers (biases too are frozen) and returns these: what
    response reconstruction (Eq. 9) and finetuning train. Do it before the network is spread."""
    trained = [p for layer in series_layers(network).values() for p in layer.series_parameters()]
    network.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    return trained


class ResponseLoss:
    """Eq. 9 as a loss function: Σ over the decomposed layers of ‖A' − A‖ ÷ ‖A‖, each sample's; (n,).

    Call it after a forward pass of `series`, with anything: A' are the responses that this pass gave, layer after
    layer. A, the targets, are those of the layers of the same names in a copy of `full` in evaluation mode, run on
    the samples that the pass began with. Raises ModelError for a network without decomposed layers.
    """

    def __init__(self, series: nn.Module, full: nn.Module) -> None:
        layers = series_layers(series)
        if not layers:
            raise ModelError(f"{type(series).__name__} has no decomposed layers: make it with series_network")
        self._full = copy.deepcopy(full).eval().requires_grad_(False)
        self._given: dict[str, Tensor] = {}
        self._wanted: dict[str, Tensor] = {}
        self._hooks = [series.get_submodule("stem").register_forward_pre_hook(self._start)]
        for name, layer in layers.items():
            self._hooks.append(layer.register_forward_hook(partial(_catch, self._given, name)))
            self._full.get_submodule(name).register_forward_hook(partial(_catch, self._wanted, name))

    def __call__(self, output: Tensor, target: object = None) -> Tensor:
        with torch.no_grad():
            self._full.to(self._x)(self._x)
        ratios = [_relative(given, self._wanted[name]) for name, given in self._given.items()]
        return torch.stack(ratios).sum(0)

    def _start(self, stem: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._x = args[0]

    def remove(self) -> None:
        """Leaves the network as it was."""
        for hook in self._hooks:
            hook.remove()


def response_loss(series: nn.Module, full: nn.Module, x: Tensor) -> Tensor:
    """Eq. 9 for images x (n, C, H, W) now: see `ResponseLoss`."""
    loss = ResponseLoss(series, full)
    try:
        return loss(series(x))
    finally:
        loss.remove()


def _catch(caught: dict[str, Tensor], name: str, module: nn.Module, args: object, output: Tensor) -> None:
    caught[name] = output.clone()  # what follows (a ReLU) may work in place


def _dense(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Conv2d | ChannelSumConv]]:
    for key, child in module.named_children():
        if isinstance(child, nn.Conv2d):
            if child.groups == 1 and child.padding_mode == "zeros" and max(child.kernel_size) > 1:
                yield f"{name}.{key}", child
        elif isinstance(child, ChannelSumConv):
            yield f"{name}.{key}", child
        elif not isinstance(child, BranchSum):
            yield from _dense(child, f"{name}.{key}")


def _as_series(layer: nn.Conv2d | ChannelSumConv, sizes: Sequence[int], name: str) -> GroupSeriesConv:
    out_channels, channels, height, width = layer.weight.shape
    made = GroupSeriesConv(
        channels,
        out_channels,
        (height, width),
        sizes,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        bias=layer.bias is not None,
        layer=name,
    ).to(layer.weight)
    if made.bias is not None and layer.bias is not None:
        made.bias.data.copy_(layer.bias)
    return made.train(layer.training)


def _relative(given: Tensor, wanted: Tensor) -> Tensor:
    """‖given − wanted‖ ÷ ‖wanted‖ of each sample; (n,)."""
    tiny = torch.finfo(wanted.dtype).tiny
    norms = torch.linalg.vector_norm(wanted.flatten(1), dim=1).clamp_min(tiny)
    ratio: Tensor = torch.linalg.vector_norm((given - wanted).flatten(1), dim=1) / norms
    return ratio
