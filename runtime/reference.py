"""The reference: a network trained on one device, with nothing of the parallel form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from anabranch.blocks.batch import BatchLayout, batch_layout
from anabranch.blocks.norm import BatchNorm, StagedStatistics
from anabranch.runtime.deal import Deal
from anabranch.runtime.loss import LossFunction, step_share
from anabranch.runtime.regularizer import OrthogonalityPenalty, one_device_penalty
from anabranch.runtime.step import autocast


class ReferenceStep:
    """Steps of a one-device network over whole batches: the function that every plan must compute.

    `network` is any module that maps samples to outputs; its BatchNorm and Dropout are converted (by
    blocks.convert.prepare).
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: LossFunction,
        *,
        precision: str = "fp32",
        clip_norm: float = 0.0,
        penalty: OrthogonalityPenalty | None = None,
    ) -> None:
        self.penalty = penalty
        self.network, self.optimizer, self.loss = network, optimizer, loss
        self.precision, self.clip_norm = precision, clip_norm
        like = next(network.parameters())
        norms = [module for module in network.modules() if isinstance(module, BatchNorm)]
        self.statistics = StagedStatistics(norms, like.device, like.dtype)

    def gradients(
        self, x: Tensor, target: Tensor, ids: Tensor, deals: Sequence[Deal], random_key: int
    ) -> float:
        """The step's mean loss; every trained p.grad is set.

        x, target, ids: the step's samples in order; deals: the groups they form.
        """
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for deal in deals:
            rows = slice(deal.start, deal.start + deal.num_samples)
            layout = BatchLayout(deal.group_sizes, len(ids), ids[rows], random_key)
            with autocast(self.precision, x.device):
                with batch_layout(layout):
                    output = self.network(x[rows])
                share = step_share(self.loss, output, target[rows], len(ids))
            share.backward()
            total += float(share.detach())
        if self.penalty is not None:
            penalty = one_device_penalty(self.network, self.penalty)
            if penalty.requires_grad:  # else every basis is frozen
                penalty.backward()
        return total

    def apply(self, lr: float) -> None:
        """Updates parameters and running statistics."""
        if self.clip_norm > 0:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.statistics.commit()
