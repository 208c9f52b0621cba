"""Dropout whose mask is a function of (seed, step, layer, sample): the same on every mesh and resume."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from anabranch.blocks.batch import layout_for
from anabranch.blocks.random import fold, sample_keys, uniform


class Dropout(nn.modules.dropout._DropoutNd):
    """Zeroes features with probability p in training and scales the others by 1/(1-p).

    per_channel: zero whole channels, as `nn.Dropout2d`. `layer` is the module's name in the network, set by
    `anabranch.blocks.convert.prepare`; called twice in a pass, it draws the same mask twice. Without a batch layout
    this is torch's own dropout.
    """

    def __init__(self, p: float = 0.5, *, per_channel: bool = False, layer: str = "") -> None:
        super().__init__(p)
        self.per_channel, self.layer = per_channel, layer

    def forward(self, x: Tensor) -> Tensor:
        layout = layout_for(self)
        if not self.training or self.p == 0.0:
            return x
        if layout is None or layout.sample_ids is None:
            return F.dropout2d(x, self.p) if self.per_channel else F.dropout(x, self.p)
        layout.check_rows(x, f"the dropout {self.layer}")
        shape = x.shape[1:2] if self.per_channel else x.shape[1:]
        keys = sample_keys(fold(layout.random_key, "dropout", self.layer), layout.sample_ids)
        drawn = uniform(keys, shape.numel()).view(x.shape[0], *shape)
        kept = (drawn >= self.p).to(x.dtype) / (1.0 - self.p or 1.0)  # nothing is kept of p = 1
        return x * (kept.view(*kept.shape, *([1] * (x.dim() - kept.dim()))))

    def extra_repr(self) -> str:
        return f"p={self.p}, per_channel={self.per_channel}"
