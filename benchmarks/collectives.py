"""Collectives by size and group: the library's own (gloo, NCCL), and our autograd pairs over them.

    plain   all_reduce, all_gather, reduce_scatter            of `num_bytes` in all
    ours    copy_to_branches, reduce_from_branches, gather_samples, scatter_samples: forward and backward together,
            one of which travels; reduce_to_samples: both do

`transport`: what carried them; ours go through shared memory where all CPU ranks are on one host, plain ones never do.
Bandwidth is what each rank sends in a ring, a second: 2(n-1)/n of the bytes of an all-reduce, (n-1)/n of the others.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

from anabranch.benchmarks.record import RESULTS, write_record
from anabranch.benchmarks.table5_sides import ring_bytes
from anabranch.benchmarks.workers import device_of, interleaved, run_workers
from anabranch.runtime import exchange
from anabranch.runtime.collectives import (
    copy_to_branches,
    gather_samples,
    reduce_from_branches,
    reduce_to_samples,
    scatter_samples,
)
from anabranch.runtime.process_group import share_memory
from anabranch.runtime.wire import Wire

SIZES = tuple(4**i * 1024 for i in range(8))  # bytes: 1 KiB … 16 MiB
_OURS_MOVE = {
    "copy_to_branches": "all_reduce",
    "reduce_from_branches": "all_reduce",
    "gather_samples": "all_gather",
    "scatter_samples": "all_gather",
    "reduce_to_samples": "all_reduce",  # as many bytes: a reduce-scatter and an all-gather
}


def run(
    *, workers: int = 2, rounds: int = 20, sizes: Sequence[int] = SIZES, folder: Path = RESULTS
) -> dict[str, Any]:
    """Measures groups of 2, 4, … and all workers; writes folder/collectives.json.

    rows: {collective, group, transport, num_bytes, samples_s, median_s, bandwidth_bytes_per_s}; summary: by collective
    and group transport, latency_s (of the smallest message) and bandwidth_bytes_per_s (the most of any size).
    """
    found = run_workers(workers, _measure, rounds, tuple(sizes), threads=1)
    rows = []
    for (name, group, num_bytes), samples in found["samples"].items():
        median = statistics.median(samples)
        transport = "shared memory" if name in _OURS_MOVE and group in found["sharing"] else found["backend"]
        rate = ring_bytes(_OURS_MOVE.get(name, name), num_bytes, group) / median
        rows.append(
            {"collective": name, "group": group, "transport": transport, "num_bytes": num_bytes,
             "samples_s": samples, "median_s": median, "bandwidth_bytes_per_s": rate, "label": "measured"}
        )  # fmt: skip
    summary = []
    for name, group in dict.fromkeys((row["collective"], row["group"]) for row in rows):
        mine = [row for row in rows if (row["collective"], row["group"]) == (name, group)]
        summary.append(
            {"collective": name, "group": group, "transport": mine[0]["transport"], "latency_s": mine[0]["median_s"],
             "bandwidth_bytes_per_s": max(row["bandwidth_bytes_per_s"] for row in mine)}
        )  # fmt: skip
    record = {"workers": workers, "backend": found["backend"], "rounds": rounds, "rows": rows, "summary": summary,
              "left_out": found["left_out"]}  # fmt: skip
    return {**record, "path": str(write_record("collectives", record, folder))}


def _measure(rank: int, rounds: int, sizes: tuple[int, ...]) -> dict[str, Any]:
    device, world = device_of(rank), dist.get_world_size()
    groups = sorted({*(2**i for i in range(1, world.bit_length())), world} & set(range(2, world + 1)))
    samples: dict[tuple[str, int, int], list[float]] = {}
    left_out: list[str] = []
    sharing: list[int] = []  # sizes of groups
    for size in groups:
        group = dist.new_group(list(range(size)))
        if rank < size:
            share_memory(group)
            sharing += [size] if exchange.shares_memory(group) else []
        for num_bytes in sizes:
            sides = _sides(group, size, num_bytes, device) if rank < size else {}
            names = _NAMES if size == world else tuple(_NAMES)
            for name in names:
                side = sides.get(name, _nothing)
                try:
                    side()
                except RuntimeError as error:  # a backend that lacks it
                    sides.pop(name)
                    left_out.append(f"{name} of {size}: {str(error).splitlines()[0]}")
            both = {name: sides.get(name, _nothing) for name in names}
            timed = interleaved(both, rounds, warm_up=1)
            samples |= {(name, size, num_bytes): timed[name] for name in names if name in sides}
    backend = dist.get_backend()
    return {"samples": samples, "left_out": sorted(set(left_out)), "backend": backend, "sharing": sharing}


_NAMES = ("all_reduce", "all_gather", "reduce_scatter", *_OURS_MOVE)


def _nothing() -> None:
    """What a rank outside the group does."""


def _sides(
    group: dist.ProcessGroup, size: int, num_bytes: int, device: torch.device
) -> dict[str, Callable[[], object]]:
    """Each collective as a call; num_bytes: of the whole that is reduced or gathered, as float32 rows of 16."""
    rows = max(num_bytes // 64, size) // size * size
    whole = torch.ones(rows, 16, device=device, requires_grad=True)
    part = torch.ones(rows // size, 16, device=device, requires_grad=True)
    sums, gathered, wire = (
        torch.ones(rows, 16, device=device),
        torch.empty(rows, 16, device=device),
        Wire(group),
    )
    sizes = [rows // size] * size
    all_gather = (
        getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    )  # renamed in torch 2.13
    reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

    def both(y: Tensor) -> None:
        y.backward(torch.ones_like(y))

    return {
        "all_reduce": lambda: dist.all_reduce(sums, group=group),
        "all_gather": lambda: all_gather(gathered, part.detach(), group=group),
        "reduce_scatter": lambda: reduce_scatter(torch.empty_like(part), sums, group=group),
        "copy_to_branches": lambda: both(copy_to_branches(whole, wire)),  # type: ignore[arg-type]
        "reduce_from_branches": lambda: both(reduce_from_branches(whole, whole, wire)),
        "gather_samples": lambda: both(gather_samples(part, sizes, wire)),
        "scatter_samples": lambda: both(scatter_samples(whole, sizes, wire)),
        "reduce_to_samples": lambda: both(reduce_to_samples(whole, whole, whole, sizes, wire)),
    }


def print_table(record: dict[str, Any], console: Console) -> None:
    """Milliseconds by size, and what follows of them."""
    sizes = sorted({row["num_bytes"] for row in record["rows"]})
    table = Table(
        title="milliseconds by message size", title_justify="left", box=None, pad_edge=False
    )  # fmt: skip
    table.add_column("collective")
    table.add_column("ranks", justify="right")
    table.add_column("over")
    for size in sizes:
        table.add_column(f"{size // 1024} KiB" if size < 2**20 else f"{size // 2**20} MiB", justify="right")
    table.add_column("GB/s", justify="right")
    for one in record["summary"]:
        cells = {
            row["num_bytes"]: f"{1e3 * row['median_s']:.2f}"
            for row in record["rows"]
            if (row["collective"], row["group"]) == (one["collective"], one["group"])
        }
        rate = f"{one['bandwidth_bytes_per_s'] / 1e9:.2f}"
        table.add_row(
            one["collective"],
            str(one["group"]),
            one["transport"],
            *(cells.get(size, "") for size in sizes),
            rate,
        )
    console.print(table, highlight=False)
    for line in record["left_out"]:
        console.print(f"left out: {line}", style="yellow", highlight=False)
