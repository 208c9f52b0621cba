"""Multi-Residual Networks (Abdi & Nahavandi): blocks y = x + f_1(x) + … + f_k(x), and their deep k = 1
relatives.

Pre-activation branches: BN-ReLU-conv3×3-BN-ReLU-conv3×3 ("basic") or
BN-ReLU-conv1×1-BN-ReLU-conv3×3-BN-ReLU-conv1×1 ("bottleneck", middle width a quarter of the output). In the
first block of every stage one BN-ReLU is shared: the branches *and the shortcut* read h = ReLU(BN(x)). In all
others each branch owns its first BN-ReLU; their statistics are statistics of x, so x is normalised once and
each branch keeps only its affine map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from anabranch.blocks.branch_sum import BranchSum, BranchTensor, Execution, Hidden
from anabranch.blocks.errors import ModelError, at_least_one
from anabranch.blocks.network import Head, Network, conv2d, make_stem
from anabranch.blocks.norm import BatchNorm
from anabranch.blocks.stacked import Role, StackedAffine, StackedConv2d

Preact = Literal["branch", "shared", "none"]

_IMAGENET_BLOCKS = {
    ("basic", 18): (2, 2, 2, 2),
    ("basic", 34): (3, 4, 6, 3),
    ("bottleneck", 50): (3, 4, 6, 3),
    ("bottleneck", 101): (3, 4, 23, 3),
    ("bottleneck", 152): (3, 8, 36, 3),
    ("bottleneck", 200): (3, 24, 36, 3),
}


class PreactResidual(BranchSum):
    """One multi-residual block (Eq. 3, Figure 2); branches stacked in each tensor.

    chain: (out_channels, kernel, stride) of a branch's convolutions.
    preact: "branch" each branch owns its first BN-ReLU; "shared" one BN-ReLU for all; "none" branches start
        with the convolution. Where the shape changes, or `shortcut_reads_h`, the shortcut reads h.
    shortcut: "identity", "A" (subsample, zero-pad channels) or "B" (1×1 convolution without BN).
    """

    def __init__(
        self,
        num_branches: int,
        channels: int,
        chain: Sequence[tuple[int, int, int]],
        *,
        preact: Preact,
        shortcut: Literal["identity", "A", "B"],
        shortcut_reads_h: bool,
    ) -> None:
        super().__init__(num_branches)
        self.preact, self.shortcut_kind, self.shortcut_reads_h = preact, shortcut, shortcut_reads_h
        self.in_channels, self.out_channels, self.stride = channels, chain[-1][0], 1
        if preact != "none":
            self.norm = BatchNorm(channels, affine=preact == "shared")
        if preact == "branch":
            self.affine = StackedAffine(num_branches, channels)
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        for index, (out_channels, kernel, stride) in enumerate(chain):
            last = index == len(chain) - 1
            role: Role = "sum" if last else "spread" if index == 0 and preact != "branch" else "each"
            self.convs.append(StackedConv2d(role, num_branches, channels, out_channels, kernel, stride))
            if not last:
                self.norms.append(BatchNorm(num_branches * out_channels))
            channels, self.stride = out_channels, self.stride * stride
        if shortcut == "B":
            self.shortcut = conv2d(self.in_channels, self.out_channels, 1, self.stride)

    def enter(self, x: Tensor) -> Tensor:
        if self.preact == "none":
            return x
        if self._plain:
            return F.relu_(self.norm(x, affine=(self.affine.weight, self.affine.bias)))
        h: Tensor = self.norm(x)
        return h if self.preact == "branch" else F.relu_(h)

    @property
    def _plain(self) -> bool:
        """One branch in all and here: its affine map is the BatchNorm's own, in one kernel."""
        return self.preact == "branch" and self.num_branches == 1 and self.exchange is None

    @property
    def executions(self) -> tuple[Execution, ...]:
        forms = super().executions
        is_grouped = any(conv.role == "each" for conv in self._stacked())
        return ("fused", "mixed", "looped") if len(forms) > 1 and is_grouped else forms

    def branches(self, h: Hidden) -> Tensor:
        assert isinstance(h, Tensor), "`enter` gives one tensor"
        if self.execution == "looped":
            total = self._branch(h, 0)
            for index in range(1, len(self.held)):
                total = total + self._branch(h, index)
            return total
        mixed, (first, *rest) = self.execution == "mixed" and len(self.held) > 1, self._stacked()
        if mixed and first.role == "each":
            # a branch's map just before its convolution, which finds the result in the cache
            a = first.one_by_one(self.affine.one(h, index) for index in range(len(self.held)))
        else:
            has_maps = self.preact == "branch" and not self._plain
            a = first(self.affine(h) if has_maps else h, is_last=not rest)
        for norm, conv in zip(self.norms, rest, strict=True):
            a = F.relu_(norm(a))
            if mixed and conv.role == "each":
                a = conv.one_by_one(a.split(conv.channels, 1))
            else:
                a = conv(a, is_last=conv is rest[-1])
        return a

    def _branch(self, h: Tensor, index: int) -> Tensor:
        a = self.affine.one(h, index) if self.preact == "branch" and not self._plain else h
        for conv, norm in zip(self._stacked(), [*self.norms, None], strict=True):
            a = conv.one(a, index)
            if norm is not None:
                rows = slice(index * conv.out_channels, (index + 1) * conv.out_channels)
                a = F.relu_(norm(a, rows))
        return a

    def _stacked(self) -> list[StackedConv2d]:
        return [conv for conv in self.convs if isinstance(conv, StackedConv2d)]

    def skip_term(self, x: Tensor, h: Hidden) -> Tensor:
        assert isinstance(h, Tensor), "`enter` gives one tensor"
        source = h if self.shortcut_reads_h else x
        if self.shortcut_kind == "B":
            source = self.shortcut(source)
        elif self.shortcut_kind == "A":
            source = source[:, :, :: self.stride, :: self.stride]
            source = F.pad(source, (0, 0, 0, 0, 0, self.out_channels - source.shape[1]))
        return source

    def branch_tensors(self) -> dict[str, BranchTensor]:
        dims = {f"convs.{i}.weight": conv.dim for i, conv in enumerate(self._stacked())}
        stacked = ["weight", "bias", "running_mean", "running_var"]
        dims |= {f"norms.{i}.{name}": 0 for i in range(len(self.norms)) for name in stacked}
        if self.preact == "branch":
            dims |= {"affine.weight": 0, "affine.bias": 0}
        return {name: BranchTensor(self.held, dim) for name, dim in dims.items()}


def multi_resnet(
    depth: int,
    num_branches: int,
    width: int = 1,
    block: Literal["basic", "bottleneck"] = "basic",
    shortcut: Literal["A", "B"] | None = None,
    num_classes: int | None = None,
    in_channels: int = 3,
    stem: Literal["cifar", "imagenet"] = "cifar",
    preact: Literal["branch", "shared"] = "branch",
    blocks_per_stage: Sequence[int] | None = None,
) -> Network:
    """A Multi-ResNet (Tables I-V of the paper).

    depth: CIFAR: 6n+2 (basic) or 9n+2 (bottleneck); ImageNet: 18, 34 (basic), 50, 101, 152, 200 (bottleneck);
        any depth with `blocks_per_stage`, which then decides.
    num_branches: k, residual functions in each block.
    width: widening factor of the stages (the stem keeps its own width).
    shortcut: on a change of size; "A" subsamples and zero-pads (default on CIFAR basic), "B" is a 1×1
        convolution (ImageNet, bottlenecks).
    num_classes: 10, or 1000 with the ImageNet stem, unless given.
    preact: "shared" shares the first BN-ReLU in *every* block: not the paper's network: fewer parameters,
        faster.

    Raises ModelError for a depth or option that does not fit.
    """
    for name, value, allowed in (
        ("block", block, ("basic", "bottleneck")),
        ("shortcut", shortcut, ("A", "B", None)),
        ("stem", stem, ("cifar", "imagenet")),
        ("preact", preact, ("branch", "shared")),
    ):
        if value not in allowed:
            raise ModelError(f"{name} is one of {allowed}, got {value!r}")
    imagenet, bottleneck = stem == "imagenet", block == "bottleneck"
    classes = num_classes if num_classes is not None else 1000 if imagenet else 10
    at_least_one(width=width, num_branches=num_branches, in_channels=in_channels, num_classes=classes)
    stages = _stages(depth, block, stem, blocks_per_stage)
    if shortcut is None:
        shortcut = "B" if imagenet or bottleneck else "A"
    channels = 64 if imagenet else 16
    base = [64, 128, 256, 512] if imagenet else [16, 32, 64]
    blocks: dict[str, dict[str, nn.Module]] = {}
    for stage, count in enumerate(stages):
        out = base[stage] * width * (4 if bottleneck else 1)
        blocks[f"stage{stage + 1}"] = rows = {}
        for index in range(count):
            first = index == 0
            stride = 2 if first and stage > 0 else 1
            # Basic: one shared BN-ReLU at the head of every stage. Bottleneck (CIFAR): where channels change.
            shared = first and (not bottleneck or imagenet or channels != out)
            changes = stride != 1 or channels != out
            if bottleneck:
                strides = (1, stride, 1) if imagenet else (stride, 1, 1)
                chain = [(out // 4, 1, strides[0]), (out // 4, 3, strides[1]), (out, 1, strides[2])]
            else:
                chain = [(out, 3, stride), (out, 3, 1)]
            bare = imagenet and stage == 0 and first  # the stem has just normalised and rectified
            rows[f"block{index + 1}"] = PreactResidual(
                num_branches,
                channels,
                chain,
                preact="none" if bare else "shared" if shared else preact,
                shortcut=shortcut if changes else "identity",
                shortcut_reads_h=shared or bare,
            )
            channels = out
    size = 224 if imagenet else 32
    return Network(
        make_stem(stem, in_channels, 64 if imagenet else 16),
        blocks,
        Head(channels, classes),
        input_shape=(in_channels, size, size),
    )


def pre_resnet(
    depth: int,
    width: int = 1,
    block: Literal["basic", "bottleneck"] = "basic",
    shortcut: Literal["A", "B"] | None = None,
    num_classes: int | None = None,
    in_channels: int = 3,
    stem: Literal["cifar", "imagenet"] = "cifar",
    blocks_per_stage: Sequence[int] | None = None,
) -> Network:
    """A pre-activation ResNet, the baseline: `multi_resnet` with one residual function a block; options as there."""
    return multi_resnet(
        depth, 1, width, block, shortcut, num_classes, in_channels, stem, blocks_per_stage=blocks_per_stage
    )


_WIDE = {"depth": 26, "num_branches": 4, "width": 10}

READY: dict[str, tuple[str, dict[str, Any]]] = {
    "pre_resnet_110": ("pre_resnet", {"depth": 110}),
    "multi_resnet_110_k4": ("multi_resnet", {"depth": 110, "num_branches": 4}),
    "multi_resnet_200_k5": ("multi_resnet", {"depth": 200, "num_branches": 5, "block": "bottleneck"}),
    "multi_resnet_26_k4_w10": ("multi_resnet", {**_WIDE, "shortcut": "B"}),
    "multi_resnet_26_k4_w10_a": ("multi_resnet", {**_WIDE, "shortcut": "A"}),
    "resnet200_preact": ("pre_resnet", {"depth": 200, "block": "bottleneck", "stem": "imagenet"}),
}


def _stages(depth: int, block: str, stem: str, given: Sequence[int] | None) -> tuple[int, ...]:
    num_stages = 4 if stem == "imagenet" else 3
    if given is not None:
        if len(given) != num_stages or min(given) < 1:
            raise ModelError(f"blocks_per_stage {list(given)} must be {num_stages} numbers of at least 1")
        return tuple(given)
    if stem == "imagenet":
        if (block, depth) not in _IMAGENET_BLOCKS:
            known = [d for b, d in _IMAGENET_BLOCKS if b == block]
            raise ModelError(
                f"no ImageNet {block} network of depth {depth}: use one of {known}, or give blocks_per_stage"
            )
        return _IMAGENET_BLOCKS[block, depth]
    layers = 9 if block == "bottleneck" else 6
    num_blocks, rest = divmod(depth - 2, layers)
    if rest or num_blocks < 1:
        low = layers * max(num_blocks, 1) + 2
        raise ModelError(
            f"a {block} CIFAR network has depth {layers}n+2, got {depth}: use {low} or {low + layers}, "
            "or give blocks_per_stage"
        )
    return (num_blocks,) * 3
