"""Single elements of a rank's part of a network, run forward and backward to be timed."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from anabranch.blocks.batch import BatchLayout, batch_layout
from anabranch.blocks.branch_sum import branch_sums
from anabranch.runtime.rank_batch import Rows
from anabranch.runtime.step import autocast


@contextmanager
def alone(module: nn.Module) -> Iterator[nn.Module]:
    """The module without exchanges with other ranks."""
    exchanges = [(one, one.exchange) for _, one in branch_sums(module) if one.exchange is not None]
    for one, _ in exchanges:
        one.exchange = None
    try:
        yield module
    finally:
        for one, exchange in exchanges:
            one.exchange = exchange


def input_shapes(
    elements: Iterable[tuple[str, nn.Module, Rows]], image_shape: tuple[int, ...], like: Tensor
) -> Iterator[tuple[str, nn.Module, Rows, tuple[int, ...]]]:
    """A network's elements, each with the shape of one sample that it reads; image_shape: (C, H, W), the first's."""
    shape = image_shape
    for name, module, rows in elements:
        yield name, module, rows, shape
        with alone(module) as element:
            shape = _output_shape(element, shape, like)


def _output_shape(element: nn.Module, shape: tuple[int, ...], like: Tensor) -> tuple[int, ...]:
    """Of one sample."""
    element.eval()
    try:
        with torch.no_grad(), batch_layout(_layout(1)):
            y = element(torch.zeros(1, *shape, device=like.device, dtype=like.dtype))
    finally:
        element.train()
    return tuple(y.shape[1:]) if isinstance(y, Tensor) else ()


def _layout(rows: int) -> BatchLayout:
    """Any: some modules draw by its key."""
    return BatchLayout((rows,), rows)


def key_of(element: nn.Module, x_shape: tuple[int, ...]) -> str:
    """Equal for elements that do the same work: which branches they hold does not matter, how many does."""
    text = re.sub(r"held=\[(.*?)\]", lambda found: f"held={len(found[1].split())}", repr(element))
    sizes = [tuple(p.shape) for p in element.parameters()]
    return hashlib.sha256(f"{text} {sizes} {x_shape}".encode()).hexdigest()[:24]


def run(
    element: Callable[[Tensor], Tensor],
    x: Tensor,
    precision: str,
    *,
    layout: BatchLayout | None = None,
    block: nn.Module | None = None,
) -> float:
    """Seconds forward and backward, in which the element's exchanges (if any) are made; gradients are dropped.

    layout: of x's samples; None: any. block: whose parameters it computes with, where it is no module itself.
    """
    if block is None:
        assert isinstance(element, nn.Module), "or its block is given"
        block = element
    leaf = x.detach().requires_grad_()
    _wait(x)
    begun = time.perf_counter()
    with batch_layout(layout or _layout(len(x))), autocast(precision, x.device):
        y = element(leaf.clone())  # a leaf may not be changed in place
    y.backward(torch.ones_like(y))
    _wait(x)
    seconds = time.perf_counter() - begun
    for parameter in block.parameters():
        parameter.grad = None
    return seconds


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
