"""Convolutions that leave time for exchanges: nothing here knows of processes, a runtime hands the hooks in.

forward    chunk 0 ──► sent    chunk 1 ──► sent …       `sending(sums)`: the last convolution, by parts of the batch
backward   input's gradient ──► sent, weights' gradients meanwhile        `deferring(queue)`
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class WeightGradients:
    """Computations of weight gradients, in the order in which backward met them.

    Whoever sends a block's input gradient starts sending in backward, and then calls `run`. report: told of each
    parameter after its last use here. shared: parameters with uses elsewhere too, which are left to autograd: it alone
    knows the last one.
    """

    def __init__(
        self, report: Callable[[nn.Parameter], None], shared: Set[nn.Parameter] = frozenset()
    ) -> None:
        self._report, self.shared = report, shared
        self._waiting = list[tuple[nn.Parameter, Callable[[], Tensor]]]()

    def add(self, parameter: nn.Parameter, compute: Callable[[], Tensor]) -> None:
        """Keeps a computation for `run`."""
        self._waiting.append((parameter, compute))

    @torch.no_grad()
    def run(self) -> None:
        """Computes them all: each is added to its parameter's grad, as autograd does."""
        waiting, self._waiting = self._waiting, []
        uses = Counter(parameter for parameter, _ in waiting)
        for parameter, compute in waiting:
            grad = compute().to(parameter.dtype)
            if parameter.grad is None:
                parameter.grad = grad
            else:
                parameter.grad += grad
            uses[parameter] -= 1
            if not uses[parameter]:
                self._report(parameter)


class ChunkedSum(Protocol):
    """Takes a partial sum in parts of the batch."""

    def begin(self, shape: tuple[int, ...], like: Tensor) -> list[Tensor]:
        """Where to write the partial sum of this shape, (N, O, H, W), and like's precision: its parts along N."""

    def send(self, part: Tensor) -> None:
        """A part is written: it may travel."""

    def whole(self) -> Tensor:
        """All parts in one tensor."""


class _Current(threading.local):
    queue: WeightGradients | None = None
    sums: ChunkedSum | None = None


_current = _Current()


@contextmanager
def exchanging(queue: WeightGradients | None, sums: ChunkedSum | None) -> Iterator[None]:
    """Convolutions of stacked branches inside use these; None: autograd's way, and the batch in one piece."""
    before = _current.queue, _current.sums
    _current.queue, _current.sums = queue, sums
    try:
        yield
    finally:
        _current.queue, _current.sums = before


def conv2d(
    x: Tensor, weight: nn.Parameter, stride: int, padding: int, groups: int, *, is_last: bool = False
) -> Tensor:
    """`F.conv2d` without bias. is_last: its result is the partial sum of a block's branches."""
    queue, sums = _current.queue, _current.sums if is_last else None
    needs_both = x.requires_grad and weight.requires_grad and torch.is_grad_enabled()
    if queue is not None and (not needs_both or weight in queue.shared):
        queue = None
    if queue is None and sums is None:
        return F.conv2d(x, weight, None, stride, padding, 1, groups)
    kernel: Tensor = weight if queue is None else weight.detach()
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, kernel = x.to(dtype), kernel.to(dtype)
    return _conv(x, kernel, None if queue is None else (weight, queue), sums, stride, padding, groups)


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, kernel: Tensor, owner: tuple[nn.Parameter, WeightGradients] | None,
        sums: ChunkedSum | None, stride: int, padding: int, groups: int,
    ) -> Tensor:  # fmt: skip
        ctx.owner, ctx.how = owner, (stride, padding, groups)
        ctx.save_for_backward(x, kernel)
        if sums is None:
            return F.conv2d(x, kernel, None, stride, padding, 1, groups)
        size = [
            (n + 2 * padding - k) // stride + 1 for n, k in zip(x.shape[2:], kernel.shape[2:], strict=True)
        ]
        parts = sums.begin((x.shape[0], kernel.shape[0], *size), x)
        for part, rows in zip(parts, x.split([len(part) for part in parts]), strict=True):
            part.copy_(F.conv2d(rows, kernel, None, stride, padding, 1, groups))
            sums.send(part)
        return sums.whole()

    @staticmethod
    @once_differentiable  # the weight's gradient is not autograd's
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, kernel = ctx.saved_tensors
        stride, padding, groups = ctx.how
        grad = grads[0].to(x.dtype)

        def of(*wanted: bool) -> tuple[Tensor | None, Tensor | None, None]:
            found: tuple[Tensor | None, Tensor | None, None] = torch.ops.aten.convolution_backward(
                grad, x, kernel, None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], groups, wanted
            )
            return found

        nothing = [None] * 5
        if ctx.owner is None:
            grad_x, grad_kernel, _ = of(ctx.needs_input_grad[0], ctx.needs_input_grad[1], False)
            return grad_x, grad_kernel, *nothing
        parameter, queue = ctx.owner

        def weight_gradient() -> Tensor:
            _, grad_kernel, _ = of(False, True, False)
            assert grad_kernel is not None, "asked for"
            return grad_kernel

        queue.add(parameter, weight_gradient)
        grad_x, _, _ = of(True, False, False)
        return grad_x, None, *nothing


_conv: Callable[..., Tensor] = _Conv.apply
