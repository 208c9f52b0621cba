"""The baseline that torch DDP trains: a pre-activation ResNet of plain torch modules, as a user of DDP would write it.

It computes what ours (`pre_resnet`) does, from the same weights, without what ours needs to be spread: one
`nn.BatchNorm2d` where ours normalises and then applies each branch's affine map. Measured, it is never slower.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from anabranch.blocks.errors import ModelError
from anabranch.blocks.multi_resnet import PreactResidual
from anabranch.blocks.network import named_blocks
from anabranch.blocks.stacked import StackedConv2d


class PlainBlock(nn.Module):
    """y = shortcut + conv(relu(norm(conv(relu(norm(x)))))): basic, shortcut identity or type A."""

    def __init__(self, block: PreactResidual) -> None:
        super().__init__()
        affine = block.affine if block.preact == "branch" else block.norm
        first = plain_norm(block.in_channels, affine)
        self.norms = nn.ModuleList([first, *(plain_norm(block.out_channels, norm) for norm in block.norms)])
        self.convs = nn.ModuleList(plain_conv(conv) for conv in block.convs)  # type: ignore[arg-type]
        self.reads_h, self.stride, self.width = block.shortcut_reads_h, block.stride, block.out_channels

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C', H', W')."""
        a = h = F.relu_(self.norms[0](x))
        for conv, norm in zip(self.convs, [*self.norms[1:], None], strict=True):
            a = conv(a) if norm is None else F.relu_(norm(conv(a)))
        source = h if self.reads_h else x
        if source.shape[1:] != a.shape[1:]:
            source = source[:, :, :: self.stride, :: self.stride]
            source = F.pad(source, (0, 0, 0, 0, 0, self.width - source.shape[1]))
        return source + a


def plain_pre_resnet(network: nn.Module) -> nn.Sequential:
    """The same function as one of our pre-resnets, with its weights. Raises ModelError for another network."""
    blocks = [block for _, block in named_blocks(network)]
    for block in blocks:
        known = isinstance(block, PreactResidual) and block.num_branches == 1 and block.preact != "none"
        if not known or block.shortcut_kind == "B":
            raise ModelError(f"no plain form of {type(block).__name__}: give a pre_resnet of shortcut type A")
    stem, head = network.stem, network.head
    layers = [stem, *(PlainBlock(block) for block in blocks), plain_norm(head.norm.num_features, head.norm)]  # type: ignore[arg-type,union-attr]
    return nn.Sequential(*layers, nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head.fc)  # type: ignore[arg-type,union-attr]


def plain_norm(channels: int, affine: nn.Module) -> nn.BatchNorm2d:
    """torch's BatchNorm with the affine map of ours."""
    norm = nn.BatchNorm2d(channels)
    norm.load_state_dict({"weight": affine.weight, "bias": affine.bias}, strict=False)
    return norm


def plain_conv(conv: StackedConv2d) -> nn.Conv2d:
    """torch's convolution with the weight of ours (of one branch)."""
    out_channels, channels, kernel, _ = conv.weight.shape
    plain = nn.Conv2d(channels, out_channels, kernel, conv.stride, conv.padding, bias=False)
    plain.load_state_dict({"weight": conv.weight})
    return plain
