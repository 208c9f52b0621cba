"""The four collectives of branch parallelism: autograd pairs over the branch group.

    name                  forward                backward                    used
    copy_to_branches      identity               all-reduce                  between `enter` and `branches`
    reduce_from_branches  all-reduce             identity                    before `join`
    gather_samples        all-gather of samples  own slice                   split `sample` → `branch`
    scatter_samples       own slice              all-gather of the gradient  split `branch` → `sample`

Not `torch.distributed.nn.functional`: its all-reduce sums the gradient again, branch-group-size times too
much here, because inside split `branch` every rank's gradient is already whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from anabranch.blocks.branch_sum import Hidden

# renamed in torch 2.13
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def copy_to_branches(h: Hidden, group: dist.ProcessGroup) -> Hidden:
    """h for this rank's branches; backward sums the gradients that all ranks' branches sent.

    `join` must get h from *before* this, else the shortcut's gradient counts once for every rank.
    """
    if isinstance(h, Tensor):
        return _copy(h, group)
    return tuple(_copy(part, group) if part.is_floating_point() else part for part in h)


def reduce_from_branches(s: Tensor, h: Hidden, group: dist.ProcessGroup) -> Tensor:
    """The sum of all ranks' partial sums, on every rank.

    h is what `copy_to_branches` returned. A rank whose branches do not use it (it holds none) must still take
    part in that one's all-reduce: the extra input keeps the edge in the graph at no cost.
    """
    parts = (h,) if isinstance(h, Tensor) else h
    # Whether the sum needs a gradient must not depend on which branches are here (none, frozen ones), else some ranks
    # would call the backward of what comes before and others not.
    anchor = torch.empty(0, requires_grad=True)
    return _reduce(s, group, anchor, *parts)


def gather_samples(x: Tensor, sizes: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """All ranks' samples in order: rank i gives sizes[i] rows (unequal and zero allowed)."""
    return _gather(x, tuple(sizes), group)


def scatter_samples(x: Tensor, sizes: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """This rank's slice of samples that every rank has."""
    return _scatter(x, tuple(sizes), group)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _summed(grads[0], ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, s: Tensor, group: dist.ProcessGroup, *h: Tensor) -> Tensor:
        ctx.num_h = len(h)
        total = _summed(s, group)
        # A rank without branches cannot know which precision the others' branches end in: one rule for all.
        device = s.device.type
        return total.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None, *([None] * ctx.num_h)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: tuple[int, ...], group: dist.ProcessGroup) -> Tensor:
        ctx.sizes, ctx.rank = sizes, group.rank()
        return gathered_rows(x, sizes, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _own_rows(grads[0], ctx.sizes, ctx.rank), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: tuple[int, ...], group: dist.ProcessGroup) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        return _own_rows(x, sizes, group.rank()).clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return gathered_rows(grads[0], ctx.sizes, ctx.group), None, None


_copy: Callable[..., Tensor] = _Copy.apply
_reduce: Callable[..., Tensor] = _Reduce.apply
_gather: Callable[..., Tensor] = _Gather.apply
_scatter: Callable[..., Tensor] = _Scatter.apply


def gathered_rows(x: Tensor, sizes: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """All ranks' rows in order, outside autograd; padded on the way, as gloo refuses unequal shapes."""
    longest = max(sizes)
    x = x.contiguous()
    if x.shape[0] < longest:
        x = torch.cat([x, x.new_zeros((longest - x.shape[0], *x.shape[1:]))])
    everything = x.new_empty((len(sizes) * longest, *x.shape[1:]))
    _all_gather_single(everything, x, group=group)
    if all(size == longest for size in sizes):
        return everything
    rows = everything.view(len(sizes), longest, *x.shape[1:])
    return torch.cat([rows[index, :size] for index, size in enumerate(sizes)])


def _own_rows(x: Tensor, sizes: Sequence[int], rank: int) -> Tensor:
    return x.narrow(0, sum(sizes[:rank]), sizes[rank])


def _summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over the group, in a new tensor; half precisions travel and are added as float32."""
    half = x.dtype in (torch.bfloat16, torch.float16)
    total = x.to(torch.float32, copy=True) if half else x.clone(memory_format=torch.contiguous_format)
    total = total.contiguous()
    dist.all_reduce(total, group=group)
    return total.to(x.dtype) if half else total
