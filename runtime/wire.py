"""The branch group as the collectives use it, and a sum that travels over it part by part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor, nn

from anabranch.runtime import exchange
from anabranch.runtime.recorder import Recorder


def sent_dtype(dtype: torch.dtype, *, half: bool) -> torch.dtype:
    """What sums of this type travel as; half: as of `Wire`."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return dtype
    return torch.bfloat16 if half else torch.float32


@dataclass(eq=False)
class Wire:
    """A branch group as the collectives use it. recorder: told of every exchange.

    channels_last: the format in which images travel and arrive; the same on all ranks, whatever format a rank has.
    half: float32 sums travel and are added as bfloat16: half the bytes, and rounding that `verify` reports. overlap:
    the weight gradients of a block are computed while its input's gradient travels; report: is told of each then;
    shared: parameters of several modules, whose gradients autograd computes.
    chunks: parts of the batch in which partial sums travel, each while the next is computed where blocks can.
    """

    group: dist.ProcessGroup
    recorder: Recorder | None = None
    channels_last: bool = False
    half: bool = False
    overlap: bool = False
    report: Callable[[nn.Parameter], None] = lambda parameter: None
    shared: Set[nn.Parameter] = frozenset()
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
        op, recorder = self.name_of(sizes), self.recorder
        begun = recorder.started(op) if recorder and meanwhile is None else None
        work = exchange.begin_sum(self.flat(total), self.group, sizes)
        if meanwhile is not None:
            meanwhile()
            begun = recorder.started(op) if recorder else None  # what is exposed begins here
        work.wait()
        if recorder:
            recorder.exchanged(op, total.nbytes, begun)
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

    @property
    def is_repeating(self) -> bool:
        """Whether inside `repeating`."""
        return self._repeated is not None

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
        return sent_dtype(x.dtype, half=self.half)

    def gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """All ranks' rows in order: rank i gives sizes[i]."""
        start = self.recorder.started("all_gather") if self.recorder else None
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


class SumInParts:
    """A partial sum that becomes the whole sum part by part, in a buffer of its own (see `blocks.convolution`).

    The buffer has the partial sum's precision; where the wire has another one, copies of its parts travel.
    sizes: rows that each rank wants of it; else all of them.
    """

    def __init__(self, wire: Wire, sizes: Sequence[int] | None = None) -> None:
        self.wire, self.sizes = wire, sizes
        self.buffer: Tensor | None = None
        self._sent = 0
        # part of the buffer, what travels, its sum
        self._sends: list[tuple[Tensor, Tensor, exchange.Work]] = []

    def begin(self, shape: tuple[int, ...], like: Tensor) -> list[Tensor]:
        """Parts of the new buffer."""
        wire = self.wire
        layout = torch.channels_last if wire.channels_last and len(shape) == 4 else torch.contiguous_format
        self.buffer = torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)
        return list(self.buffer.tensor_split(wire.chunks))

    def send(self, part: Tensor) -> None:
        if not len(part):
            return
        sizes = self.sizes and _cut(self.sizes, self._sent, self._sent + len(part))
        self._sent += len(part)
        travelling = part.to(self.wire.dtype_of(part))  # itself where that is its own
        work = exchange.begin_sum(self.wire.flat(travelling), self.wire.group, sizes)
        self._sends.append((part, travelling, work))

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
        start = recorder.started(self.wire.name_of(self.sizes)) if recorder else None
        for part, travelling, work in self._sends:
            work.wait()
            if travelling is not part:
                part.copy_(travelling)
        if recorder:
            num_bytes = sum(travelling.nbytes for _, travelling, _ in self._sends)
            recorder.exchanged(self.wire.name_of(self.sizes), num_bytes, start)
        return self.wire.own(whole, self.sizes)


def _cut(sizes: Sequence[int], start: int, stop: int) -> tuple[int, ...]:
    """How many of each rank's rows lie in rows start to stop."""
    ends = list(accumulate(sizes))
    begins = [0, *ends[:-1]]
    return tuple(max(min(e, stop) - max(b, start), 0) for b, e in zip(begins, ends, strict=True))
