"""Makes any network ready to be spread: our BatchNorm and Dropout for torch's, every random layer named."""

from __future__ import annotations

import copy

from torch import nn

from anabranch.blocks.dropout import Dropout
from anabranch.blocks.errors import ModelError
from anabranch.blocks.norm import BatchNorm

_RANDOM = (nn.AlphaDropout, nn.FeatureAlphaDropout, nn.RReLU)


def prepare(network: nn.Module) -> nn.Module:
    """Converts every `nn.BatchNorm*` and `nn.Dropout*` of `network`, in place, and names the random layers.

    Parameters, buffers and their names stay the same tensors and names. A BatchNorm that has several names stays one
    module; a dropout becomes one for each, as torch draws anew at each. Raises ModelError on layers whose random
    numbers or statistics would depend on the plan.
    """
    used: dict[int, nn.Module] = {}  # by identity of what was there
    for name, module in list(network.named_modules()):
        for key, child in list(module._modules.items()):  # every name, also of a module that has another here
            if child is None:
                continue
            place = f"{name}.{key}".lstrip(".")
            if is_first := id(child) not in used:
                used[id(child)] = _ours(child, place)
            ours = used[id(child)]
            if isinstance(ours, Dropout):
                ours = ours if is_first else copy.deepcopy(ours)
                ours.layer = place
            if ours is not child:
                setattr(module, key, ours)
    return network


def _ours(module: nn.Module, name: str) -> nn.Module:
    """Our form of a module; itself where it is or needs none."""
    if isinstance(module, BatchNorm):
        return module
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
    return module
