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

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from anabranch.blocks.branch_sum import Hidden
from anabranch.blocks.convolution import WeightGradients
from anabranch.runtime import exchange
from anabranch.runtime.recorder import Recorder


@dataclass(eq=False)
class Wire:
    """A branch group as the collectives use it. recorder: told of every exchange.

    channels_last: the format in which images travel and arrive; the same on all ranks, whatever format a rank has.
    half: float32 sums travel and are added as bfloat16: half the bytes, and rounding that `verify` reports. overlap:
    the weight gradients of a block are computed while its input's gradient travels; report: is told of each then.
    chunks: parts of the batch in which partial sums travel, each while the next is computed where blocks can.
    """

    group: dist.ProcessGroup
    recorder: Recorder | None = None
    channels_last: bool = False
    half: bool = False
    overlap: bool = False
    report: Callable[[nn.Parameter], None] = lambda parameter: None
    chunks: int = 1
    _kept: list[Tensor] | None = None
    _repeated: Iterator[Tensor] | None = None

    def sum(
        self, x: Tensor, meanwhile: Callable[[], None] | None = None, sizes: Sequence[int] | None = None
    ) -> Tensor:
        """The sum over the group, in a new tensor; half precisions travel and are added as float32 unless `half`.

        meanwhile: is called while the sum travels. sizes: rows that each rank wants of it; else all of them.
        """
        total = torch.empty_like(x, dtype=self.dtype_of(x), memory_format=self.format_of(x)).copy_(x)
        begun = self.recorder.now() if self.recorder else None
        work = exchange.begin_sum(self.flat(total), self.group, sizes)
        if meanwhile is not None:
            meanwhile()
            begun = self.recorder.now() if self.recorder else None  # what is exposed begins here
        work.wait()
        if self.recorder:
            self.recorder.exchanged(self.name_of(sizes), total.nbytes, begun)
        return self.own(total, sizes).to(x.dtype)

    @contextmanager
    def keeping(self, sums: list[Tensor]) -> Iterator[None]:
        """Inside, all that branches add up to is kept in `sums`, for `repeating`."""
        self._kept = sums
        try:
            yield
        finally:
            self._kept = None

    @contextmanager
    def repeating(self, sums: Sequence[Tensor]) -> Iterator[None]:
        """Inside, what ran in `keeping` runs again, and what its branches add up to is taken from there."""
        self._repeated = iter(sums)
        try:
            yield
        finally:
            self._repeated = None

    def once(self, sum_up: Callable[[], Tensor]) -> Tensor:
        """What branches add up to, however often their block runs for one backward."""
        if self._repeated is not None:
            return next(self._repeated).detach()
        total = sum_up()
        if self._kept is not None:
            self._kept.append(total.clone())  # a block may change its own
        return total

    @staticmethod
    def name_of(sizes: Sequence[int] | None) -> str:
        """What a sum is to the recorder."""
        return "all_reduce" if sizes is None else "reduce_scatter"

    def own(self, x: Tensor, sizes: Sequence[int] | None) -> Tensor:
        """This rank's rows; without sizes all of them."""
        return x if sizes is None else exchange.own_rows(x, sizes, self.group.rank())

    def dtype_of(self, x: Tensor) -> torch.dtype:
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return x.dtype
        return torch.bfloat16 if self.half else torch.float32

    def gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """All ranks' rows in order: rank i gives sizes[i]."""
        start = self.recorder.now() if self.recorder else None
        rows = exchange.all_gather(
            self.flat(x.contiguous(memory_format=self.format_of(x))), sizes, self.group
        )
        if self.recorder:
            self.recorder.exchanged("all_gather", rows.nbytes, start)
        return rows.permute(0, 3, 1, 2) if self.is_image(x) else rows

    def is_image(self, x: Tensor) -> bool:
        return self.channels_last and x.dim() == 4

    def format_of(self, x: Tensor) -> torch.memory_format:
        return torch.channels_last if self.is_image(x) else torch.contiguous_format

    def flat(self, x: Tensor) -> Tensor:
        """The same memory, rows first and without gaps, as the backends want it."""
        return x.permute(0, 2, 3, 1) if self.is_image(x) else x


def copy_to_branches(h: Hidden, wire: Wire, queue: WeightGradients | None = None) -> Hidden:
    """h for this rank's branches; backward sums the gradients that all ranks' branches sent.

    `join` must get h from *before* this, else the shortcut's gradient counts once for every rank. queue: run in
    backward while the gradient travels.
    """
    if isinstance(h, Tensor):
        return _copy(h, wire, queue)
    return tuple(_copy(part, wire, queue) if part.is_floating_point() else part for part in h)


class SumInParts:
    """A partial sum that becomes the whole sum part by part, in a buffer of its own (see `blocks.convolution`).

    sizes: rows that each rank wants of it; else all of them.
    """

    def __init__(self, wire: Wire, sizes: Sequence[int] | None = None) -> None:
        self.wire, self.sizes = wire, sizes
        self.buffer: Tensor | None = None
        self._sent = 0
        self._works: list[exchange.Work] = []

    def begin(self, shape: tuple[int, ...], like: Tensor) -> list[Tensor]:
        """Parts of the new buffer."""
        wire = self.wire
        layout = torch.channels_last if wire.channels_last and len(shape) == 4 else torch.contiguous_format
        self.buffer = torch.empty(shape, dtype=wire.dtype_of(like), device=like.device, memory_format=layout)
        return list(self.buffer.tensor_split(wire.chunks))

    def send(self, part: Tensor) -> None:
        if not len(part):
            return
        sizes = self.sizes and _cut(self.sizes, self._sent, self._sent + len(part))
        self._sent += len(part)
        self._works.append(exchange.begin_sum(self.wire.flat(part), self.wire.group, sizes))

    def whole(self) -> Tensor:
        assert self.buffer is not None, "begun"
        return self.buffer

    def finish(self, s: Tensor) -> Tensor:
        """The whole sum, where s is what the branches gave: the buffer, or what was not sent yet."""
        if self.buffer is None:
            parts = self.begin(tuple(s.shape), s)
            for part, rows in zip(parts, s.split([len(part) for part in parts]), strict=True):
                part.copy_(rows)
                self.send(part)
        elif s.data_ptr() != self.buffer.data_ptr():
            raise RuntimeError("a block changed its partial sum after it was sent: set mesh.chunks to 1")
        recorder, whole = self.wire.recorder, self.whole()
        start = recorder.now() if recorder else None
        for work in self._works:
            work.wait()
        if recorder:
            recorder.exchanged(self.wire.name_of(self.sizes), whole.nbytes, start)
        return self.wire.own(whole, self.sizes)


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
    """This rank's slice of skip + the sum of all ranks' partial sums; the same skip is on all ranks.

    What `reduce_from_branches`, `+ skip` and `scatter_samples` are one after another, h and sums as there.
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


def _cut(sizes: Sequence[int], start: int, stop: int) -> tuple[int, ...]:
    """How many of each rank's rows lie in rows start to stop."""
    ends = list(accumulate(sizes))
    begins = [0, *ends[:-1]]
    return tuple(max(min(e, stop) - max(b, start), 0) for b, e in zip(begins, ends, strict=True))
