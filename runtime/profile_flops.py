"""Floating-point operations from the shapes of what runs, by element and part.

A multiply-add counts two. Counted: convolutions and matrix products, forward and backward, as PyTorch's
FlopCounterMode does (a test compares them); what is elementwise is left out there and here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from anabranch.runtime.recorder import Recorder

_aten = torch.ops.aten


class ElementFlops(TorchDispatchMode):
    """Within its context the recorder's steps are counted: flops[part, element]. The recorder must be detailed.

    num_ops: operators that ran, by the same keys.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorder = recorder
        self.flops: dict[tuple[str, str], int] = defaultdict(int)
        self.num_ops: dict[tuple[str, str], int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        key = self.recorder.part, self.recorder.element
        self.num_ops[key] += 1
        if (count := _COUNTS.get(func.overloadpacket)) is not None:
            self.flops[key] += count(args, out)
        return out


def _product(a: Tensor, b: Tensor) -> int:
    """(…, n, k) @ (…, k, m)."""
    return 2 * prod(a.shape) * b.shape[-1]


def _convolution(x: Sequence[int], w: Sequence[int], y: Sequence[int], transposed: bool) -> int:
    """x (N, C, …), w (K, C/groups, …), y (N, K, …): every output is a sum over one filter; transposed: every input."""
    return 2 * prod(w[1:]) * prod(x if transposed else y)


def _forward(args: Any, out: Any) -> int:
    x, w = args[0], args[1]
    return _convolution(x.shape, w.shape, out.shape, bool(args[6]))


def _backward(args: Any, out: Any) -> int:
    grad, x, w = args[0], args[1], args[2]
    # with respect to the input, the filters: each as much as the forward
    wanted = sum(map(bool, args[10][:2]))
    return wanted * _convolution(x.shape, w.shape, grad.shape, bool(args[7]))


_COUNTS: dict[Any, Callable[[Any, Any], int]] = {
    _aten.mm: lambda args, out: _product(args[0], args[1]),
    _aten.addmm: lambda args, out: _product(args[1], args[2]),
    _aten.bmm: lambda args, out: _product(args[0], args[1]),
    _aten.baddbmm: lambda args, out: _product(args[1], args[2]),
    _aten.convolution: _forward,
    _aten.convolution_backward: _backward,
}
