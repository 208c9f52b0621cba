"""Makes any network ready to be spread: torch's BatchNorm and Dropout become ours, every random layer is named."""

from __future__ import annotations

import copy

from torch import nn

from anabranch.blocks.dropout import Dropout
from anabranch.blocks.errors import ModelError
from anabranch.blocks.norm import BatchNorm

_BatchNorm, _LazyNorm = nn.modules.batchnorm._BatchNorm, nn.modules.batchnorm._LazyNormBase
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)

# What draws numbers or keeps statistics of its own. Classes, the option that makes them do so ("": they always do), and
# what to do instead.
_DEPENDENT: tuple[tuple[tuple[type[nn.Module], ...], str, str], ...] = (
    ((nn.SyncBatchNorm,), "", "use nn.BatchNorm2d, which is converted"),
    ((nn.AlphaDropout, nn.FeatureAlphaDropout), "", "use nn.Dropout, which is converted"),
    ((nn.RReLU,), "", "use nn.LeakyReLU"),
    ((nn.FractionalMaxPool2d, nn.FractionalMaxPool3d), "", "use a pool without random numbers"),
    ((nn.modules.instancenorm._InstanceNorm,), "track_running_stats", "set it to False"),
    ((nn.MultiheadAttention, nn.RNNBase), "dropout", "set it to 0; nn.Dropout beside it is converted"),
)


def prepare(network: nn.Module) -> nn.Module:
    """Converts every `nn.BatchNorm*` and `nn.Dropout*` of `network`, in place, and names the random layers.

    Modules stay the same objects, with their names, parameters, buffers and hooks. A dropout that has several names
    becomes one for each, as torch draws anew at each. Raises ModelError on layers whose random numbers or statistics
    would depend on the plan, and on BatchNorms and dropouts that compute something else than torch's.
    """
    placed: set[int] = set()  # dropouts
    for name, module in list(network.named_modules()):
        for key, child in list(module._modules.items()):  # every name, also of a module that has another here
            if child is None:
                continue
            place = f"{name}.{key}".lstrip(".")
            _convert(child, place)
            if isinstance(child, Dropout):
                if id(child) in placed:
                    child = copy.copy(child)
                    setattr(module, key, child)
                placed.add(id(child))
                child.layer = place
    return network


def _convert(module: nn.Module, name: str) -> None:
    """Makes a module ours where it is one of torch's that we have a form of."""
    if isinstance(module, (BatchNorm, Dropout)):
        return
    kind = type(module).__name__
    for kinds, option, remedy in _DEPENDENT:
        if isinstance(module, kinds) and (not option or getattr(module, option)):
            with_option = f" with {option}={getattr(module, option)}" if option else ""
            raise ModelError(
                f"{name} is a {kind}{with_option}: its result depends on how a batch is spread over devices; {remedy}"
            )
    if isinstance(module, _BatchNorm):
        if isinstance(module, _LazyNorm):
            raise ModelError(f"{name} is lazy: run the network once, or give its num_features")
        _check_forward(module, name, "nn.BatchNorm2d", (_BatchNorm,))
        module.__class__ = BatchNorm
    elif isinstance(module, nn.modules.dropout._DropoutNd):
        _check_forward(module, name, "nn.Dropout", _DROPOUTS)
        per_channel = not isinstance(module, nn.Dropout)
        module.__class__ = Dropout
        assert isinstance(module, Dropout), "from now on"
        module.per_channel = per_channel


def _check_forward(module: nn.Module, name: str, torchs: str, originals: tuple[type[nn.Module], ...]) -> None:
    """Ours computes what torch's does: whatever else a class of the user's does would be lost."""
    same = type(module).forward in [original.forward for original in originals]
    if not same or "forward" in vars(module) or module._modules:  # a parametrization is a module inside too
        raise ModelError(
            f"{name} is a {type(module).__name__}, which does something else than {torchs}: its conversion would lose "
            f"that; make it a module that holds a plain {torchs}"
        )
