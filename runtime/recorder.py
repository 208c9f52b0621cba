"""What a rank's step spends its time on: intervals on one clock, cheap enough to be always on.

    with recorder.span("forward"):          the parts of a step, one after another
        …
            start = recorder.started("all_reduce")
            all_reduce(…)
            recorder.exchanged("all_reduce", num_bytes, start)      inside a part: exposed branch communication

Every part is measured by itself, so that what nobody measured shows: `times` ends with the step's whole length.
On CUDA a moment is an event in the device's stream, read one step later, when the device is long past it: recording
adds no wait to a step (what waits there by itself: `runtime/README.md`, "How a step runs").
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PARTS = ("data", "forward", "backward", "exchange", "reduction", "optimizer", "idle", "step")
"""Of `Recorder.times`: forward and backward without their exchanges; exchange: with the branch group, exposed;
reduction: waiting for gradients after the backward, and for the vote; idle: what is no training (evaluation,
checkpoints, callbacks, telling of the step);
step: from one step's end to the next one's, everything included."""
WHOLE = ("sent", "reduction", "idle")
"""Spans whose exchanges are not taken out of them: "reduction" is communication itself, those of an evaluation in
"idle" are no training's."""

Moment = Any  # seconds of time.perf_counter, or a CUDA event
_Interval = tuple[str, str, str, int, Moment, Moment]  # as Span


@dataclass(frozen=True)
class Span:
    """One interval on a rank, in seconds of its clock.

    part: of PARTS. element: stem, a block or head; "": the whole part. op, num_bytes: of an exchange; else "" and 0.
    Ops: all_reduce, reduce_scatter (whatever the backend makes of it, see `exchange`), all_gather (branch group);
    data_sum, world_sum (BatchNorm's statistics across ranks). Where `detailed`, part "reduction" has the wait for each
    bucket of gradients (data_bucket, world_bucket, in order of waiting), and "sent" the moment at which this rank had
    given its share of the same bucket.
    """

    part: str
    element: str
    op: str
    num_bytes: int
    start: float
    end: float


class Recorder:
    """Records one rank's steps. detailed: also what each element takes (for `anabranch profile`; costs more).

    enabled: False records nothing, to measure what recording costs. num_records: of the last step that ended.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.detailed, self.enabled = False, True
        self._device = device or torch.device("cpu")
        self._cuda = self._device.type == "cuda"
        self._part, self._element = "idle", ""
        self.entered = ""  # the element whose forward began last
        self._running: list[_Interval] = []  # of the step that runs
        self._last: list[_Interval] = []  # of the one before
        self._ended: tuple[Moment, Moment] | None = None  # of the step before: its start and end
        self._start: Moment = self.now()
        self._since: Moment = self._start  # when the element that runs began
        self._base = time.perf_counter(), self._start  # the device's clock on the host's: where, and how fast
        self._host_per_device = 1.0
        # Of kept moments: half of what looking at both clocks took, the longer of two.
        self.clock_error_s = 0.0
        self._nvtx: int | None = None  # range of the element that runs
        self._nvtx_exchange: int | None = None
        self._kept: list[tuple[list[_Interval], Moment, Moment]] | None = None

    @property
    def num_records(self) -> int:
        return len(self._last)

    def align(self) -> None:
        """Ties the device's clock to time.perf_counter anew: between steps, it waits for the device."""
        if self._cuda:
            host, event, self.clock_error_s = self._tied()
            self._base, self._host_per_device, self._start = (host, event), 1.0, event

    def _tied(self) -> tuple[float, Moment, float]:
        """A moment on the host's clock and on the device's, and the error: of five looks the quickest."""
        found = []
        for _ in range(5):
            torch.cuda.synchronize(self._device)
            begun, event = time.perf_counter(), self._stamp()
            event.synchronize()
            ended = time.perf_counter()
            found.append(((begun + ended) / 2, event, (ended - begun) / 2))
        return min(found, key=lambda look: look[2])

    def now(self) -> Moment:
        """This moment on the device's clock."""
        return self._stamp() if self.enabled else time.perf_counter()

    def _stamp(self) -> Moment:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    @property
    def element(self) -> str:
        """What runs at the moment; only where `detailed`, else ""."""
        return self._element

    @property
    def part(self) -> str:
        """The part of the step that runs."""
        return self._part

    def span(self, part: str) -> _Part:
        """A context that is one interval of a part."""
        return _Part(self, part)

    def started(self, op: str) -> Moment:
        """This moment, in which an exchange begins or, of gradients, the wait for it."""
        if self._cuda and self.detailed:
            self._nvtx_exchange = torch.cuda.nvtx.range_start(f"{self._part} {op}")
        return self.now()

    def _close_exchange(self) -> None:
        if self._nvtx_exchange is not None:
            torch.cuda.nvtx.range_end(self._nvtx_exchange)
            self._nvtx_exchange = None

    def exchanged(self, op: str, num_bytes: int, start: Moment) -> None:
        """An exchange with the branch group, `started` at start, until now, inside the part that runs."""
        self._close_exchange()
        if self.enabled:
            self._running.append((self._part, self._element, op, num_bytes, start, self.now()))

    def reduced(self, op: str, num_bytes: int, sent: Moment, start: Moment) -> None:
        """A bucket of gradients, given at `sent` and waited for from `start` to now; only where `detailed`."""
        self._close_exchange()
        self._running.append(("sent", "", op, num_bytes, sent, sent))
        self._running.append(("reduction", "", op, num_bytes, start, self.now()))

    def at(self, element: str) -> None:
        """The element that ran ends here, another one begins ("": none); only where `detailed`."""
        now = self.now()
        if self._cuda:
            self._name_range(element)
        if self._element:
            self._running.append((self._part, self._element, "", 0, self._since, now))
        self._element, self._since = element, now

    def _name_range(self, element: str) -> None:
        """The element's NVTX range; of the process: the backward runs in a thread of its own."""
        if self._nvtx is not None:
            torch.cuda.nvtx.range_end(self._nvtx)
        self._nvtx = torch.cuda.nvtx.range_start(f"{self._part} {element}") if element else None

    def begin(self) -> None:
        """A step begins here, and what came before belongs to none: building, recovering."""
        self._last, self._running = [], []
        self._ended, self._start = None, self._stamp()

    def end_step(self) -> None:
        """The step ends here (its optimizer is done); the next one begins."""
        end = self._stamp()
        self._last, self._running = self._running, []
        self._ended, self._start = (self._start, end), end
        if self._kept is not None:
            self._kept.append((self._last, *self._ended))

    def times(self) -> list[float]:
        """Seconds by PARTS of the last step that ended; zeros before there is one since `begin`."""
        if self._ended is None:
            return [0.0] * len(PARTS)
        if self._cuda:
            self._ended[1].synchronize()  # the step before: long done
        seconds = dict.fromkeys(PARTS, 0.0)
        for part, element, op, _, start, end in self._last:
            if op and part in WHOLE:
                continue
            if op:  # it lies inside its part
                length = self._between(start, end)
                seconds["exchange"] += length
                seconds[part] -= length
            elif not element:
                seconds[part] += self._between(start, end)
        seconds["step"] = self._between(*self._ended)
        return [seconds[part] for part in PARTS]

    def spans(self) -> list[Span]:
        """Every interval of the last step that ended, in seconds of time.perf_counter. Waits for the device."""
        if self._ended is None:
            return []
        start, end = self._ended
        if self._cuda:
            end.synchronize()
        since = self._between(self._base[1], start)
        return [self._span(interval, start, since) for interval in self._last]

    def keep(self) -> None:
        """Every step that ends from now on is kept until `kept` takes them."""
        self._kept = []

    def kept(self) -> list[tuple[list[Span], float, float]]:
        """The steps since `keep`: spans, start and end, in seconds of time.perf_counter. Waits for the device."""
        steps, self._kept = self._kept or [], None
        if self._cuda and steps:
            steps[-1][2].synchronize()
        sinces, before, since = [], self._base[1], 0.0
        for _, start, _ in steps:
            since += self._between(before, start)
            sinces.append(since)
            before = start
        if self._cuda:
            self._end_tie(before, since)
        return [
            (
                [self._span(interval, start, since) for interval in spans],
                self._at(start, start, since),
                self._at(end, start, since),
            )
            for (spans, start, end), since in zip(steps, sinces, strict=True)
        ]

    def _end_tie(self, last: Moment, since: float) -> None:
        """The clocks drift apart: with where they are at the end, moments between lie on a line.

        last: a moment `since` seconds of the device behind the base.
        """
        host, event, error = self._tied()
        since += self._between(last, event)
        if since > 0:
            self._host_per_device = (host - self._base[0]) / since
        self.clock_error_s = max(self.clock_error_s, error)

    def _span(self, interval: _Interval, step: Moment, since: float) -> Span:
        """An interval of the step that began at `step`, `since` seconds of the device behind the base."""
        part, element, op, num_bytes, start, end = interval
        return Span(part, element, op, num_bytes, self._at(start, step, since), self._at(end, step, since))

    def _at(self, moment: Moment, step: Moment, since: float) -> float:
        """On time.perf_counter's clock. By way of the step: an event tells milliseconds as a float32, which of a minute
        are no better than 4 µs."""
        if not self._cuda:
            return float(moment)
        return self._base[0] + self._host_per_device * (since + self._between(step, moment))

    def _between(self, start: Moment, end: Moment) -> float:
        return float(start.elapsed_time(end) / 1e3 if self._cuda else end - start)


def by_part(times: Sequence[Sequence[float]]) -> dict[str, list[float]]:
    """[rank][part] seconds as {part: [rank]}, to the microsecond, with what no part accounts for."""
    # round(x, 6) takes ten times as long, and this is every step's
    micros = [[round(1e6 * seconds) for seconds in row] for row in times]
    columns = zip(*micros, strict=True)
    found = {part: [n / 1e6 for n in column] for part, column in zip(PARTS, columns, strict=True)}
    found["unattributed"] = [(2 * row[-1] - sum(row)) / 1e6 for row in micros]  # the last one is the step
    return found


class _Part:
    """One interval of a part of the step."""

    __slots__ = ("_before", "_part", "_recorder", "_start")

    def __init__(self, recorder: Recorder, part: str) -> None:
        self._recorder, self._part = recorder, part

    def __enter__(self) -> None:
        recorder = self._recorder
        self._before, recorder._part = recorder._part, self._part
        self._start = recorder.now()

    def __exit__(self, *error: object) -> None:
        recorder = self._recorder
        if recorder.enabled:
            if recorder.detailed:
                recorder.at("")
            recorder._running.append((self._part, "", "", 0, self._start, recorder.now()))
        recorder._part = self._before


class _Mark(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, recorder: Recorder, element: str) -> Tensor:
        ctx.recorder, ctx.element = recorder, element
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.recorder.at(ctx.element)
        return grads[0], None, None


marked: Callable[..., Tensor] = _Mark.apply
"""marked(x, recorder, element): x, an element's output; where its gradient arrives the element's backward begins."""
