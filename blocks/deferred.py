"""Weight gradients that wait: a convolution's input gradient first, its weight's while the other travels.

Whoever sends a block's input gradient to other processes runs the block's forward inside `deferring(queue)`, starts
sending in backward, and then calls `queue.run()`: the weight gradients are computed while the bytes are on their way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Report = Callable[[nn.Parameter], None]


class WeightGradients:
    """Computations of weight gradients, in the order in which backward met them. report: told of each that is there."""

    def __init__(self, report: Report) -> None:
        self._report, self._waiting = report, list[tuple[nn.Parameter, Callable[[], Tensor]]]()

    def add(self, parameter: nn.Parameter, compute: Callable[[], Tensor]) -> None:
        """Keeps a computation for `run`."""
        self._waiting.append((parameter, compute))

    @torch.no_grad()
    def run(self) -> None:
        """Computes them all: each is added to its parameter's grad, as autograd does."""
        waiting, self._waiting = self._waiting, []
        for parameter, compute in waiting:
            grad = compute().to(parameter.dtype)
            if parameter.grad is None:
                parameter.grad = grad
            else:
                parameter.grad += grad
            self._report(parameter)


class _Current(threading.local):
    queue: WeightGradients | None = None


_current = _Current()


@contextmanager
def deferring(queue: WeightGradients | None) -> Iterator[None]:
    """Convolutions of stacked branches inside give their weights' gradients to the queue; None: to autograd."""
    before, _current.queue = _current.queue, queue
    try:
        yield
    finally:
        _current.queue = before


def conv2d(x: Tensor, weight: nn.Parameter, stride: int, padding: int, groups: int) -> Tensor:
    """`F.conv2d` without bias, its weight's gradient deferred inside `deferring`."""
    queue = _current.queue
    if queue is None or not (x.requires_grad and weight.requires_grad and torch.is_grad_enabled()):
        return torch.nn.functional.conv2d(x, weight, None, stride, padding, 1, groups)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return _deferred(x, weight.detach().to(x.dtype), (weight, queue), stride, padding, groups)


class _DeferredConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, kernel: Tensor, owner: tuple[nn.Parameter, WeightGradients], *how: int
    ) -> Tensor:
        ctx.owner, ctx.how = owner, how
        ctx.save_for_backward(x, kernel)
        stride, padding, groups = how
        return torch.nn.functional.conv2d(x, kernel, None, stride, padding, 1, groups)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, kernel = ctx.saved_tensors
        parameter, queue = ctx.owner
        stride, padding, groups = ctx.how

        def part(*wanted: bool) -> tuple[Tensor, ...]:
            found: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
                grads[0], x, kernel, None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], groups, wanted
            )
            return found

        queue.add(parameter, lambda: part(False, True, False)[1])
        return part(True, False, False)[0], None, None, None, None, None


_deferred: Callable[..., Tensor] = _DeferredConv.apply
