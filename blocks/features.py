"""A network's stage outputs, as detectors take them (the backbones of a feature pyramid)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from anabranch.blocks.errors import ModelError
from anabranch.blocks.network import named_blocks

_SIZE = 256  # of the image that shapes are taken of; every network of the registry has strides that divide it


@dataclass(frozen=True)
class StageOutput:
    """channels: C of a stage's output (N, C, H/stride, W/stride). stride: pixels of the image a step in it."""

    channels: int
    stride: int


class Features(nn.Module):
    """The network without its head: (N, C, H, W) → {"stage1": (N, C1, H1, W1), …}, one tensor a stage, in order.

    A stage's output is that of its last block; a DenseNet's is taken before the transition, which belongs to the next.
    Pre-activated networks give what their next BN-ReLU would read.

    network: any with stem and named blocks; its modules are used, not copied. Names of parameters are the network's,
    so `load_state_dict` takes the state of a trained or exported one: the head's tensors in it are left aside.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        last = {name.rpartition(".")[0] or name: name for name, block in _within_stages(network)}
        self._stage_of = {name: stage for stage, name in last.items()}
        self.stem, self.blocks, self.head = network.stem, network.blocks, nn.Identity()
        self.input_shape: tuple[int, int, int] | None = getattr(network, "input_shape", None)
        self.train(network.training)
        self.register_load_state_dict_pre_hook(_without_head)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = {}
        x = self.get_submodule("stem")(x)
        for name, block in named_blocks(self):
            x = block(x)
            if name in self._stage_of:
                outputs[self._stage_of[name]] = x
            if len(outputs) == len(self._stage_of):
                break
        return outputs

    def stage_outputs(self) -> dict[str, StageOutput]:
        """Channels and stride of every stage's output, found without computing; raises ModelError for a network
        without input_shape (C, H, W)."""
        if self.input_shape is None:
            raise ModelError("the network has no input_shape: set it to (C, H, W) of an image")
        state = {name: tensor.to("meta") for name, tensor in self.state_dict(keep_vars=True).items()}
        dtype = next(self.parameters()).dtype
        training = [module for module in self.modules() if module.training]
        self.eval()
        try:
            with torch.no_grad():
                image = torch.empty(1, self.input_shape[0], _SIZE, _SIZE, dtype=dtype, device="meta")
                outputs: dict[str, Tensor] = functional_call(self, state, image, tie_weights=False)
        finally:
            for module in training:
                module.training = True
        return {stage: StageOutput(y.shape[1], round(_SIZE / y.shape[2])) for stage, y in outputs.items()}


def _within_stages(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((n, b) for n, b in named_blocks(network) if not getattr(b, "between_stages", False))


def _without_head(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}head.")]:
        del state[name]
