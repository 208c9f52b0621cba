"""Optimizers, and the gradient norm that counts every parameter once wherever it lies."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.runtime import exchange
from anabranch.runtime.config import OptimizerConfig
from anabranch.runtime.parallel_network import ParallelNetwork


def make_optimizer(config: OptimizerConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """torch's own SGD or AdamW as configured."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    common: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay, "foreach": True}
    if config.name == "adamw":
        return _without_compiler(torch.optim.AdamW)(trained, betas=config.betas, eps=config.eps, **common)
    nesterov = config.nesterov and config.momentum > 0
    return _without_compiler(torch.optim.SGD)(trained, momentum=config.momentum, nesterov=nesterov, **common)


@cache
def _without_compiler(kind: type[torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    """The same optimizer, without the two seconds for which a process's first one imports torch's compiler.

    torch keeps its compiler off some methods of `Optimizer`, and imports it at their first call to say so; `step` too
    imports it, only to say where a compiled graph must break. We compile no optimizer, so the methods beneath will
    do. A torch without these wrappers is used as it is.
    """
    for method in vars(torch.optim.Optimizer).values():
        plain, code = getattr(method, "__wrapped__", None), getattr(method, "__code__", None)
        if plain is not None and getattr(code, "co_qualname", "").startswith("_disable_dynamo."):
            plain.__dynamo_disable = plain
    plain_step = getattr(kind.step, "__wrapped__", None)
    return type(kind.__name__, (kind,), {"step": torch.no_grad()(plain_step)}) if plain_step else kind


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
        exchange.all_reduce(squares[0], network.mesh.branch_group).wait()
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
