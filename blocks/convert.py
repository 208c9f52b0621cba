"""Makes any network ready to be spread: our BatchNorm and Dropout for torch's, every random layer named."""

from __future__ import annotations

from torch import nn

from anabranch.blocks.dropout import Dropout
from anabranch.blocks.errors import ModelError
from anabranch.blocks.norm import BatchNorm

_RANDOM = (nn.AlphaDropout, nn.FeatureAlphaDropout, nn.RReLU)


def prepare(network: nn.Module) -> nn.Module:
    """Converts every `nn.BatchNorm*` and `nn.Dropout*` of `network`, in place, and names the random layers.

    Parameters, buffers and their names stay the same tensors and names. Raises ModelError on layers whose
    random numbers or statistics would depend on the plan.
    """
    converted: dict[int, nn.Module] = {}  # by identity: a module used twice stays one module
    for name, module in list(network.named_modules(remove_duplicate=False)):
        for child_name, child in list(module.named_children()):
            if id(child) in converted:
                setattr(module, child_name, converted[id(child)])
            elif (ours := _ours(child, f"{name}.{child_name}".lstrip("."))) is not None:
                converted[id(child)] = ours
                setattr(module, child_name, ours)
    for name, module in network.named_modules():
        if isinstance(module, Dropout):
            module.layer = name
    return network


def _ours(module: nn.Module, name: str) -> nn.Module | None:
    if isinstance(module, BatchNorm):
        return None
    if isinstance(module, (nn.SyncBatchNorm, *_RANDOM)):
        raise ModelError(
            f"{name} is a {type(module).__name__}: its result depends on how a batch is spread over devices; "
            "use nn.BatchNorm2d or nn.Dropout, which are converted"
        )
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        if isinstance(module, nn.modules.batchnorm._LazyNormBase):
            raise ModelError(f"{name} is lazy: run the network once, or give its num_features")
        ours = BatchNorm(
            module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats
        )
        ours.weight, ours.bias = module.weight, module.bias
        ours.running_mean, ours.running_var = module.running_mean, module.running_var
        ours.num_batches_tracked = module.num_batches_tracked
        return ours.train(module.training)
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return Dropout(module.p, per_channel=not isinstance(module, nn.Dropout)).train(module.training)
    return None
