"""One step under torch.profiler: kernels on a GPU, operators on a CPU, on the recorder's clock."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from anabranch.runtime.recorder import Recorder, Span

MOST_OPS = 20_000  # kept of a rank's step: the longest; the trace stays small enough to open
_CLOCK = "anabranch.clock"
_KINDS = {"kernel": "kernel", "gpu_memcpy": "copy", "gpu_memset": "copy", "cpu_op": "op"}


def traced(
    step: Callable[[], object], recorder: Recorder, device: torch.device
) -> tuple[list[list[Any]], list[tuple[list[Span], float, float]]]:
    """([name, kind, thread, start, seconds] of all of a step's events, the recorder's steps).

    kind: kernel, copy (both on a GPU) or op (what the CPU ran). The recorder must keep.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    moments = []
    step()  # under a profiler the first step's start-up would show: this one has nothing to show
    with profile(activities=activities) as profiler:
        for _ in range(3):  # the profiler's clock is its own: these tie it to ours
            begun = time.perf_counter()
            with record_function(_CLOCK):
                pass
            moments.append((begun + time.perf_counter()) / 2)
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    kept = recorder.kept()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        found = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    marks = sorted(e["ts"] + e["dur"] / 2 for e in found if e.get("name") == _CLOCK and e.get("ph") == "X")
    offset = sorted(ours - mark / 1e6 for ours, mark in zip(moments, marks, strict=False))[len(marks) // 2]
    events = [
        [e["name"], _KINDS[e["cat"]], str(e["tid"]), e["ts"] / 1e6 + offset, e["dur"] / 1e6]
        for e in found
        if e.get("ph") == "X" and e.get("cat") in _KINDS
    ]
    return sorted(events, key=lambda event: (event[3], -event[4])), kept


def shortened(events: Sequence[list[Any]]) -> list[list[Any]]:
    """Events for the trace: all that a GPU ran, which are short and many, and the longest of the CPU's operators."""
    longest = sorted((event for event in events if event[1] == "op"), key=lambda event: -event[4])[:MOST_OPS]
    return sorted(
        [*(event for event in events if event[1] != "op"), *longest], key=lambda event: (event[3], -event[4])
    )


def kernels_of(
    events: Sequence[list[Any]], spans: Sequence[Span], start: float, end: float
) -> dict[str, tuple[int, float]]:
    """{element: (kernels, seconds between them)} of the step from start to end; "": of all of it, losses, the
    reduction and the optimizer too. Exchanges count for the whole step, and what they take is nowhere a gap.

    events: all of the step, of `traced`. spans: the step's, of the same clock.
    """
    running = Running(events)
    number, seconds = running.during(start, end)
    found = {"": (number, end - start - seconds)}
    for span in spans:
        if span.part == "sent" or not (span.element or span.op):
            continue
        number, seconds = running.during(span.start, span.end)
        gap = span.end - span.start - seconds
        if span.op:
            found[""] = found[""][0], found[""][1] - gap
            number, gap = -number, -gap  # its own operators are no work of the element
        if span.element:
            before = found.get(span.element, (0, 0.0))
            found[span.element] = before[0] + number, before[1] + gap
    return {element: (max(number, 0), max(gap, 0.0)) for element, (number, gap) in found.items()}


class Running:
    """When kernels (else operators) of a step's events ran."""

    def __init__(self, events: Sequence[list[Any]]) -> None:
        on_device = [event for event in events if event[1] != "op"] or events
        times = np.array([(start, start + seconds) for *_, start, seconds in on_device]).reshape(-1, 2)
        self._start, self._end = times[np.argsort(times[:, 0], kind="stable")].T

    def during(self, start: float, end: float) -> tuple[int, float]:
        """(how many, seconds that at least one ran) in an interval."""
        inside = (self._start < end) & (self._end > start)
        seconds, until, number = 0.0, start, 0
        for begin, stop in zip(self._start[inside].tolist(), self._end[inside].tolist(), strict=True):
            begin, stop = max(begin, start), min(stop, end)
            number += begin >= until  # a nested operator is part of the one that called it
            seconds += max(stop - max(begin, until), 0.0)
            until = max(until, stop)
        return number, seconds
