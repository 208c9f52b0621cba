"""The collectives of branch parallelism: autograd pairs over the branch group.

    name                  forward                backward                    used
    copy_to_branches      identity               all-reduce                  between `enter` and `branches`
    reduce_from_branches  all-reduce             identity                    before `join`
    gather_samples        all-gather of samples  own slice                   split `sample` → `branch`
    scatter_samples       own slice              all-gather of the gradient  split `branch` → `sample`
    reduce_to_samples     reduce-scatter         all-gather of the gradient  both at once, where a block ends in its sum

Not `torch.distributed.nn.functional`: its all-reduce sums the gradient again, branch-group-size times too
much here, because inside split `branch` every rank's gradient is already whole. All of them go over a `Wire`: the
branch group, and the recorder that is told how long each took.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from anabranch.blocks.branch_sum import Hidden
from anabranch.blocks.convolution import WeightGradients
from anabranch.runtime import exchange
from anabranch.runtime.wire import SumInParts, Wire


def copy_to_branches(h: Hidden, wire: Wire, queue: WeightGradients | None = None) -> Hidden:
    """h for this rank's branches; backward sums the gradients that all ranks' branches sent.

    `join` must get h from *before* this, else the shortcut's gradient counts once for every rank. queue: run in
    backward while the gradient travels.
    """
    if isinstance(h, Tensor):
        return _copy(h, wire, queue)
    return tuple(_copy(part, wire, queue) if part.is_floating_point() else part for part in h)


def reduce_from_branches(s: Tensor, h: Hidden, wire: Wire, sums: SumInParts | None = None) -> Tensor:
    """The sum of all ranks' partial sums, on every rank.

    h is what `copy_to_branches` returned. A rank whose branches do not use it (it holds none) must still take
    part in that one's all-reduce: the extra input keeps the edge in the graph at no cost. sums: of wire.chunks > 1.
    """
    parts = (h,) if isinstance(h, Tensor) else h
    # Whether the sum needs a gradient must not depend on which branches are here (none, frozen ones), else some ranks
    # would call the backward of what comes before and others not.
    anchor = torch.empty(0, requires_grad=True)
    return _reduce(s, wire, sums, anchor, *parts)


def gather_samples(x: Tensor, sizes: Sequence[int], wire: Wire) -> Tensor:
    """All ranks' samples in order: rank i gives sizes[i] rows (unequal and zero allowed)."""
    return _gather(x, tuple(sizes), wire)


def scatter_samples(x: Tensor, sizes: Sequence[int], wire: Wire) -> Tensor:
    """This rank's slice of samples that every rank has."""
    return _scatter(x, tuple(sizes), wire)


def reduce_to_samples(
    s: Tensor, skip: Tensor, h: Hidden, sizes: Sequence[int], wire: Wire, sums: SumInParts | None = None
) -> Tensor:
    """This rank's slice (sizes[rank], …) of skip + the sum of all ranks' partial sums s, both (sum of sizes, …).

    The same skip is on all ranks. What `reduce_from_branches`, `+ skip` and `scatter_samples` are one after another,
    h and sums as there.
    """
    parts = (h,) if isinstance(h, Tensor) else h
    return _reduce_to(s, skip, tuple(sizes), wire, sums, torch.empty(0, requires_grad=True), *parts)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, wire: Wire, queue: WeightGradients | None) -> Tensor:
        ctx.wire, ctx.queue = wire, queue
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.wire.sum(grads[0], ctx.queue.run if ctx.queue else None), None, None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, s: Tensor, wire: Wire, sums: SumInParts | None, *h: Tensor) -> Tensor:
        ctx.num_h, ctx.dtype = len(h), s.dtype
        # a view: an output may not be the input itself
        total = wire.once(lambda: wire.sum(s) if sums is None else sums.finish(s).view(s.shape))
        return _in_one_precision(total)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0].to(ctx.dtype), None, None, *([None] * ctx.num_h)


class _ReduceTo(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        s: Tensor,
        skip: Tensor,
        sizes: tuple[int, ...],
        wire: Wire,
        sums: SumInParts | None,
        *h: Tensor,
    ) -> Tensor:
        ctx.num_h, ctx.dtypes, ctx.sizes, ctx.wire = len(h), (s.dtype, skip.dtype), sizes, wire
        total = wire.once(lambda: wire.sum(s, sizes=sizes) if sums is None else sums.finish(s))
        return wire.own(skip, sizes) + _in_one_precision(total)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = ctx.wire.gather(grads[0], ctx.sizes)
        return *(grad.to(dtype) for dtype in ctx.dtypes), None, None, None, *([None] * ctx.num_h)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: tuple[int, ...], wire: Wire) -> Tensor:
        ctx.sizes, ctx.rank = sizes, wire.group.rank()
        return wire.gather(x, sizes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return exchange.own_rows(grads[0], ctx.sizes, ctx.rank), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: tuple[int, ...], wire: Wire) -> Tensor:
        ctx.sizes, ctx.wire = sizes, wire
        return wire.own(x, sizes).clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.wire.gather(grads[0], ctx.sizes), None, None


_copy: Callable[..., Tensor] = _Copy.apply
_reduce: Callable[..., Tensor] = _Reduce.apply
_reduce_to: Callable[..., Tensor] = _ReduceTo.apply
_gather: Callable[..., Tensor] = _Gather.apply
_scatter: Callable[..., Tensor] = _Scatter.apply


def _in_one_precision(total: Tensor) -> Tensor:
    """A rank without branches cannot know which precision the others' branches end in: one rule for all."""
    device = total.device.type
    return total.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else total
