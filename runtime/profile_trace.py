"""One trace of all ranks for Perfetto (ui.perfetto.dev) and chrome://tracing: JSON trace events, gzipped.

A process for each rank: thread 0 has the parts of the step, in them stem, blocks and head, in them the exchanges; the
others what torch.profiler saw of the same step. Seconds are rank 0's, from the first span on.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from anabranch.runtime.profile_steps import RankSteps
from anabranch.runtime.recorder import Span


def write_trace(ranks: Sequence[RankSteps], path: Path) -> None:
    """The traced step of all ranks."""
    content = {"displayTimeUnit": "ms", "traceEvents": list(trace_events(ranks))}
    path.write_bytes(gzip.compress(json.dumps(content, separators=(",", ":")).encode(), 6, mtime=0))


def trace_events(ranks: Sequence[RankSteps]) -> Iterator[dict[str, Any]]:
    """Complete ("X") events in microseconds, and the names of processes and threads ("M")."""
    starts = [span.start for rank in ranks for span in rank.traced]
    origin = min([*starts, *(event[3] for rank in ranks for event in rank.events)], default=0.0)
    for number, rank in enumerate(ranks):
        name = f"rank {number} ({rank.facts['host']} {rank.facts['device']})"
        yield {"ph": "M", "name": "process_name", "pid": number, "tid": 0, "args": {"name": name}}
        yield {
            "ph": "M",
            "name": "process_sort_index",
            "pid": number,
            "tid": 0,
            "args": {"sort_index": number},
        }
        yield {"ph": "M", "name": "thread_name", "pid": number, "tid": 0, "args": {"name": "step"}}
        # outer before inner, where both begin at once
        for span in sorted(rank.traced, key=lambda s: (s.start, -s.end)):
            if span.part != "sent":
                yield _event(number, span, origin)
        threads = {thread: index + 1 for index, thread in enumerate(dict.fromkeys(e[2] for e in rank.events))}
        kinds = {thread: kind for _, kind, thread, _, _ in rank.events}
        for thread, tid in threads.items():
            label = f"{'CPU' if kinds[thread] == 'op' else 'GPU stream'} {thread}"
            yield {"ph": "M", "name": "thread_name", "pid": number, "tid": tid, "args": {"name": label}}
        for name, kind, thread, start, seconds in rank.events:
            yield {
                "ph": "X", "name": name, "cat": kind, "pid": number, "tid": threads[thread],
                "ts": round((start - origin) * 1e6, 3), "dur": round(seconds * 1e6, 3),
            }  # fmt: skip


def _event(rank: int, span: Span, origin: float) -> dict[str, Any]:
    name, kind = (
        (span.op, "exchange")
        if span.op
        else (span.element, "element")
        if span.element
        else (span.part, "part")
    )
    event: dict[str, Any] = {
        "ph": "X", "name": name, "cat": kind, "pid": rank, "tid": 0,
        "ts": round((span.start - origin) * 1e6, 3),
        "dur": round((span.end - span.start) * 1e6, 3),
        "args": {"part": span.part},
    }  # fmt: skip
    if span.op:
        event["args"] |= {"element": span.element, "bytes": span.num_bytes}
    return event
