"""BatchNorm whose statistics belong to BN groups of samples, wherever those samples lie.

Elsewhere a BN group is called a ghost or virtual batch. Under a `BatchLayout` each group is normalised by its
own statistics, and the running statistics are *staged*: they move once a step, by `StagedStatistics.commit`,
towards the mean over all groups of the step (weighted by samples), whatever the number of groups, processes
or micro-batches. Without a layout the module is `nn.BatchNorm2d`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from anabranch.blocks.batch import BatchLayout, GroupSync, current_layout, is_running_again, layout_for
from anabranch.blocks.errors import ModelError

_WHOLE = slice(None)


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm over (N, C, *) with one statistic per BN group; parameters and buffers as `nn.BatchNorm2d`.

    `forward(x, channels)` normalises with the parameters of a slice of the channels: branches stacked in one
    module can be run one by one. `affine`: weight and bias (C,) that are kept elsewhere.
    """

    # (3, C), rows of a StagedStatistics: sums over the step's groups of weight·mean, weight·variance, weight.
    staged: Tensor | None = None
    # Set while the module runs as part of something that may not change its state (a compiled graph): what each call
    # would stage, (statistics, channels), for `stage_found`.
    found: tuple[tuple[Tensor, slice], ...] | None = None
    _nothing_staged = False  # since the last commit: the kernel may write into the zeros of `staged` itself

    def forward(
        self, x: Tensor, channels: slice = _WHOLE, affine: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        weight, bias = affine or (self.weight, self.bias)
        if channels is not _WHOLE:  # a slice of everything would cost a node of the graph
            weight, bias = (
                None if weight is None else weight[channels],
                None if bias is None else bias[channels],
            )
        layout = layout_for(self)
        if not self.training or layout is None:
            if self.training and self.num_batches_tracked is not None and (channels.start or 0) == 0:
                self.num_batches_tracked.add_(1)
            mean = None if self.running_mean is None else self.running_mean[channels]
            var = None if self.running_var is None else self.running_var[channels]
            return F.batch_norm(
                x, mean, var, weight, bias, self.training or mean is None, self._plain_momentum(), self.eps
            )
        layout.check_rows(x, f"a BatchNorm of {self.num_features} channels")
        sizes = layout.group_sizes
        _check_variance(sizes if layout.sync is None else layout.sync.group_sizes, x)
        # asked first: a compiled graph is made anew where anything that it read has changed
        if (
            self.found is None
            and self._nothing_staged
            and not is_running_again()
            and len(sizes) == 1
            and sizes[0]
            and layout.sync is None
        ):
            assert self.staged is not None, "StagedStatistics sets both"
            self._nothing_staged = False
            share = sizes[0] / layout.num_samples  # as momentum it makes of zeros share · statistics
            # `data` has versions of its own: autograd keeps these rows, though a training backward never reads them
            mean, var = self.staged.data[:2, channels].unbind()
            y = F.batch_norm(x, mean, var, weight, bias, True, share, self.eps)
            self.staged[2, channels].add_(share)
            return y
        stats = torch.zeros((2, len(sizes), x.shape[1]), dtype=self._stat_dtype(x), device=x.device)
        if layout.sync is not None:
            y = _synced_group_norm(x, weight, bias, sizes, layout.sync, self.eps, stats)
        elif len(sizes) == 1:  # the library's own kernel; momentum 1 makes it return the statistics
            y = F.batch_norm(x, stats[0, 0], stats[1, 0], weight, bias, True, 1.0, self.eps)
        elif self.found is not None:  # a graph does not take results written into parts of others
            parts = [
                F.batch_norm(part, stats[0, group], stats[1, group], weight, bias, True, 1.0, self.eps)
                for group, part in enumerate(x.split(sizes))
                if len(part)
            ]
            y = torch.cat(parts)
        else:
            y = _group_norm(x, weight, bias, sizes, self.eps, stats)
        if self.found is not None:
            self.found = (*self.found, (stats, channels))
        elif not is_running_again():
            self._nothing_staged = False
            self._stage(stats, layout, channels)
        return y

    def stage_found(self) -> None:
        """Stages what calls since `found` was set have found, under the layout that they ran under."""
        found, self.found, layout = self.found, None, current_layout()
        if layout is None or is_running_again():
            return
        for stats, channels in found or ():
            self._nothing_staged = False
            self._stage(stats, layout, channels)

    def _plain_momentum(self) -> float:
        """Of running statistics, where they move."""
        if self.momentum is not None or not self.training:  # a GPU's counter would be waited for
            return self.momentum or 0.0
        return 1.0 / float(self.num_batches_tracked or 1)  # nn.BatchNorm's cumulative average

    def _stat_dtype(self, x: Tensor) -> torch.dtype:
        if self.running_mean is not None:
            return self.running_mean.dtype
        return torch.promote_types(
            x.dtype, torch.float32
        )  # what kernels keep statistics of half precisions in

    @torch.no_grad()
    def _stage(self, stats: Tensor, layout: BatchLayout, channels: slice) -> None:
        if self.staged is None:
            return
        shares = [size / layout.num_samples for size in layout.group_sizes]
        for group, share in enumerate(shares):
            self.staged[:2, channels].add_(stats[:, group], alpha=share)
        self.staged[2, channels].add_(sum(shares))


class StagedStatistics:
    """The staged statistics of several BatchNorms in one buffer: reduced by one call, committed by one.

    buffer: (3·channels + num_extra,): for all modules weight·mean, weight·variance, weight, then `extra`
        numbers that travel along. Whoever runs the modules in several processes sums it over them before
        `commit`.
    """

    def __init__(
        self, modules: Iterable[BatchNorm], device: torch.device, dtype: torch.dtype, num_extra: int = 0
    ) -> None:
        self.modules = [module for module in modules if module.running_mean is not None]
        self.sizes = [module.num_features for module in self.modules]
        total = sum(self.sizes)
        self.buffer = torch.zeros(3 * total + num_extra, dtype=dtype, device=device)
        self.rows, self.extra = self.buffer[: 3 * total].view(3, total), self.buffer[3 * total :]
        for module, staged in zip(self.modules, self.rows.split(self.sizes, 1), strict=True):
            module.staged, module._nothing_staged = staged, True
        rates = [0.0 if m.momentum is None else m.momentum for m in self.modules]
        sizes = torch.tensor(self.sizes, dtype=torch.long)
        self._momentum = torch.tensor(rates, dtype=dtype).repeat_interleave(sizes).to(device)
        # Where to read whether a module ran: its first channel. One whose branches are all elsewhere has none, and
        # counts its batches like its copies there, which run in every step: it reads a True behind all channels.
        starts = torch.where(sizes > 0, sizes.cumsum(0) - sizes, total)
        self._starts = starts.to(device)

    def clear(self) -> None:
        """Forgets what was staged."""
        self.buffer.zero_()
        for module in self.modules:
            module._nothing_staged = True

    @torch.no_grad()
    def commit(self) -> None:
        """Moves the running statistics by the staged ones and clears; modules that nobody ran stay."""
        if self.modules:
            used = self.rows[2] > 0
            targets = self.rows[:2] / self.rows[2].clamp(min=torch.finfo(self.rows.dtype).tiny)
            module_used = F.pad(used, (0, 1), value=True)[self._starts].to(torch.long)
            counters = _present(m.num_batches_tracked for m in self.modules)
            torch._foreach_add_(counters, module_used.unbind())
            rates = list((self._momentum * used).split(self.sizes))
            for index, module in enumerate(self.modules):
                if module.momentum is None:  # nn.BatchNorm's cumulative average
                    rate = module_used[index].to(self.rows.dtype) / counters[index].clamp(min=1)
                    rates[index] = rate.expand(self.sizes[index])
            means = _present(m.running_mean for m in self.modules)
            variances = _present(m.running_var for m in self.modules)
            for values, target in ((means, targets[0]), (variances, targets[1])):
                torch._foreach_lerp_(values, list(target.split(self.sizes)), rates)
        self.clear()


class _GroupNorm(torch.autograd.Function):
    """Each group through the library's batch-norm kernel, results written side by side (no copies)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, sizes: tuple[int, ...],
        eps: float, stats: Tensor,
    ) -> Tensor:  # fmt: skip
        if not (x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))):
            # torch 2.13's CPU kernel with `out` gives wrong numbers for other strides, and no error
            x = x.contiguous()
        y = torch.empty_like(x)
        saved = stats.new_empty((2, len(sizes), x.shape[1]))
        start = 0
        for group, size in enumerate(sizes):
            if size:
                rows = slice(start, start + size)
                torch.ops.aten.native_batch_norm.out(
                    x[rows], weight, bias, stats[0, group], stats[1, group], True, 1.0, eps,
                    out=y[rows], save_mean=saved[0, group], save_invstd=saved[1, group],
                )  # fmt: skip
            start += size
        ctx.sizes, ctx.eps, ctx.affine = sizes, eps, (weight is not None, bias is not None)
        ctx.save_for_backward(x, weight, saved)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, saved = ctx.saved_tensors
        has_weight, has_bias = ctx.affine
        mask = [ctx.needs_input_grad[0], has_weight, has_bias]
        grad_y, grad_x, start = grads[0], torch.empty_like(x) if mask[0] else None, 0
        grad_weight = saved.new_zeros(x.shape[1]) if has_weight else None
        grad_bias = saved.new_zeros(x.shape[1]) if has_bias else None
        for group, size in enumerate(ctx.sizes):
            if size:
                rows = slice(start, start + size)
                dx, dw, db = torch.ops.aten.native_batch_norm_backward(
                    grad_y[rows], x[rows], weight, None, None, *saved[:, group], True, ctx.eps, mask
                )
                if grad_x is not None:
                    grad_x[rows] = dx
                if grad_weight is not None:
                    grad_weight += dw
                if grad_bias is not None:
                    grad_bias += db
            start += size
        return grad_x, grad_weight, grad_bias, None, None, None


class _SyncedGroupNorm(torch.autograd.Function):
    """Groups whose samples lie in several processes: one exchange forward (mean, M2, count), one backward.

    Statistics are combined as count, mean and sum of squared deviations (Chan et al.), which loses no digits.
    The gradients of weight and bias stay this process's own share: the gradient reduction sums them like all
    others.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, sizes: tuple[int, ...],
        sync: GroupSync, eps: float, stats: Tensor,
    ) -> Tensor:  # fmt: skip
        dims, channels = [0, *range(2, x.dim())], x.shape[1]
        per_sample = x[0, 0].numel() if x.shape[0] else 0
        wide = x.to(stats.dtype)
        slots = stats.new_zeros((sync.num_parts, len(sync.group_sizes), 2 * channels + 1))
        for group, rows in _local_groups(sizes, sync):
            mean = wide[rows].mean(dims)
            m2 = (wide[rows] - _per_channel(mean, x)).square().sum(dims)
            count = mean.new_full(
                (1,), wide[rows].shape[0] * per_sample
            )  # of a list, a GPU would be waited for
            slots[sync.part, group] = torch.cat([mean, m2, count])
        slots = sync.all_reduce(slots)
        means, m2s, counts = slots[..., :channels], slots[..., channels:-1], slots[..., -1:]
        count = counts.sum(0)  # (groups, 1)
        mean = (counts * means).sum(0) / count.clamp(min=1)
        m2 = (m2s + counts * (means - mean).square()).sum(0)
        invstd = (m2 / count.clamp(min=1) + eps).rsqrt()
        y = torch.empty_like(x)
        for group, rows in _local_groups(sizes, sync):
            normal = (wide[rows] - _per_channel(mean[group], x)) * _per_channel(invstd[group], x)
            if weight is not None:
                normal = normal * _per_channel(weight, x)
            y[rows] = normal if bias is None else normal + _per_channel(bias, x)
            local = group - sync.first_group
            stats[0, local] = mean[group]
            stats[1, local] = m2[group] / (count[group] - 1).clamp(min=1)
        ctx.sizes, ctx.sync, ctx.affine = sizes, sync, (weight is not None, bias is not None)
        ctx.save_for_backward(x, weight, mean, invstd, count)
        return y

    @staticmethod
    @once_differentiable  # mean and invstd are constants to autograd here
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, invstd, count = ctx.saved_tensors
        sync, grad_y = ctx.sync, grads[0].to(mean.dtype)
        dims = [0, *range(2, x.dim())]
        sums = mean.new_zeros((len(sync.group_sizes), 2, x.shape[1]))  # Σ grad_y, Σ grad_y·x̂
        normal = torch.empty_like(grad_y)
        for group, rows in _local_groups(ctx.sizes, sync):
            normal[rows] = (x[rows] - _per_channel(mean[group], x)) * _per_channel(invstd[group], x)
            sums[group, 0] = grad_y[rows].sum(dims)
            sums[group, 1] = (grad_y[rows] * normal[rows]).sum(dims)
        has_weight, has_bias = ctx.affine
        grad_bias = sums[:, 0].sum(0) if has_bias else None
        grad_weight = sums[:, 1].sum(0) if has_weight else None
        means = sync.all_reduce(sums.clone()) / count.clamp(min=1)[:, None]
        grad_x = torch.empty_like(x)
        for group, rows in _local_groups(ctx.sizes, sync):
            scale = invstd[group] if weight is None else invstd[group] * weight
            along = normal[rows] * _per_channel(means[group, 1], x)
            grad_x[rows] = (grad_y[rows] - _per_channel(means[group, 0], x) - along) * _per_channel(scale, x)
        return grad_x, grad_weight, grad_bias, None, None, None, None


_group_norm: Callable[..., Tensor] = _GroupNorm.apply
_synced_group_norm: Callable[..., Tensor] = _SyncedGroupNorm.apply


def _check_variance(sizes: tuple[int, ...], x: Tensor) -> None:
    """The rule of nn.BatchNorm, for every group: of one value a channel there is no variance."""
    if 1 in sizes and math.prod(x.shape[2:]) == 1:
        raise ModelError(
            f"BN group {sizes.index(1) + 1} of {len(sizes)} has 1 sample of 1 pixel, of which there is no variance: "
            "give groups 2 samples or more (train.bn_batch_size; train.batch_size, where it is an epoch's last), or "
            "use larger images"
        )


def _local_groups(sizes: tuple[int, ...], sync: GroupSync) -> list[tuple[int, slice]]:
    """(index among the batch's groups, rows here) of each group that has rows here."""
    groups, start = [], 0
    for local, size in enumerate(sizes):
        if size:
            groups.append((sync.first_group + local, slice(start, start + size)))
        start += size
    return groups


def _present(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def _per_channel(values_C: Tensor, like: Tensor) -> Tensor:
    return values_C.view(1, -1, *([1] * (like.dim() - 2)))
