"""Networks whose blocks are sums of branches, as plain torch modules on one device: the reference."""

from anabranch.blocks.branch_sum import BranchSum, BranchTensor
from anabranch.blocks.count import Count, count
from anabranch.blocks.errors import ModelError
from anabranch.blocks.features import Features
from anabranch.blocks.multi_residual import MultiResidual
from anabranch.blocks.multi_resnet import multi_resnet, pre_resnet
from anabranch.blocks.network import Network, named_blocks
from anabranch.blocks.registry import build, families, models

__all__ = [
    "BranchSum",
    "BranchTensor",
    "Count",
    "Features",
    "ModelError",
    "MultiResidual",
    "Network",
    "build",
    "count",
    "families",
    "models",
    "multi_resnet",
    "named_blocks",
    "pre_resnet",
]
