"""Optimizers, and the gradient norm that counts every parameter once wherever it lies."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from anabranch.runtime.config import OptimizerConfig
from anabranch.runtime.parallelize import ParallelNetwork


def make_optimizer(config: OptimizerConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """torch's own SGD or AdamW as configured."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if config.name == "adamw":
        return torch.optim.AdamW(
            trained, config.lr, config.betas, config.eps, config.weight_decay, foreach=True
        )
    nesterov = config.nesterov and config.momentum > 0
    return torch.optim.SGD(
        trained, config.lr, config.momentum, 0.0, config.weight_decay, nesterov, foreach=True
    )


def clip_gradients(network: ParallelNetwork, max_norm: float) -> Tensor:
    """Scales all (reduced) gradients so that their global L2 norm is at most max_norm; returns the norm
    before.

    Replicated parameters count once, and each branch's on the rank of the branch group that holds it.
    """
    owned: list[Tensor] = []
    replicated: list[Tensor] = []
    for name, parameter in network.named_parameters():
        if parameter.grad is not None:
            (owned if network.roles[name].over == "data" else replicated).append(parameter.grad)
    squares = [_square_sum(owned, network), _square_sum(replicated, network)]
    if network.mesh.branch > 1:
        dist.all_reduce(squares[0], group=network.mesh.branch_group)
    norm = (squares[0] + squares[1]).sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    if owned or replicated:
        torch._foreach_mul_(owned + replicated, scale)
    return norm


def _square_sum(grads: list[Tensor], network: ParallelNetwork) -> Tensor:
    like = next(network.parameters())
    if not grads:
        return torch.zeros((), dtype=like.dtype, device=like.device)
    return torch.stack(torch._foreach_norm(grads)).square().sum()
