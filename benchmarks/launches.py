"""What starting kernels costs a step: how many there are, and how long the device has none, from torch's profiler.

One device, a row of Table V: the deeper pre-resnet, and the Multi-ResNet with its branches one after another (before)
and as the runtime runs them (after). On a GPU a kernel is what the device runs, and a gap is where it runs nothing; on
a CPU a kernel is an operator that no other called and that makes more than a view, and a gap is where Python and
autograd are between two.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from anabranch.benchmarks.record import RESULTS, write_record
from anabranch.benchmarks.table5_sides import DdpSide, OurSide, Row, network_of, setting_of
from anabranch.benchmarks.workers import device_of, interleaved, run_workers
from anabranch.blocks.network import named_blocks
from anabranch.runtime.intervals import median_interval
from anabranch.runtime.mesh import make_mesh
from anabranch.schedulers import Plan
from anabranch.schedulers.plan import SAMPLE

BEFORE: Final = "looped"  # what gaps and kernels of the others are compared with
_OPERATOR = "aten::"


def run(
    *, batch: int = 32, branches: int = 4, precision: str = "fp32", fold: int = 1, steps: int = 3,
    rounds: int = 9, compiled: bool = False, folder: Path = RESULTS,
) -> dict[str, Any]:  # fmt: skip
    """Kernels and gaps of a step of each side, profiled over `steps`; seconds without the profiler, in `rounds`."""
    row = Row(batch, branches, mesh=(1, 1), precision=precision, fold=fold, compiled=compiled)
    found = run_workers(1, _measure, row, steps, rounds, threads=1)
    record = {"row": str(row), "depth": row.depth, "deeper": row.deeper, "steps": steps, **found}
    return {**record, "path": str(write_record("launches", record, folder))}


def _measure(rank: int, row: Row, steps: int, rounds: int) -> dict[str, Any]:
    device = device_of(rank)
    sides = _sides(row, device)
    samples = interleaved(sides, rounds)
    rows = []
    for name, side in sides.items():
        before, seconds = samples[BEFORE], samples[name]
        ratio, low, high = median_interval([a / b for a, b in zip(before, seconds, strict=True)])
        rows.append(
            {
                "side": name, **_profiled(side, device, steps), "samples_s": seconds,
                "median_s": statistics.median(seconds), "speed_up": ratio, "speed_up_interval_95": [low, high],
            }
        )  # fmt: skip
    return {"device": device.type, "rows": rows}


def _sides(row: Row, device: torch.device) -> dict[str, Callable[[], None]]:
    setting, mesh = setting_of(row, "channels_last"), make_mesh(1, 1, device.type)

    def ours(execution: Literal["auto", "looped"], *, compiled: bool = False) -> OurSide:
        config, network = setting.config, network_of(row, "d", "channels_last")
        how = replace(config.mesh, execution=execution, compile="on" if compiled else "off")
        names = [name for name, _ in named_blocks(network)]
        plan = Plan(1, 1, dict.fromkeys(names, SAMPLE), "sample", "sample")
        return OurSide(network, replace(setting, config=replace(config, mesh=how)), plan, mesh)

    plain = DdpSide(
        network_of(row, "b", "channels_last"), setting, slice(None), device, tuned=True, wrapped=False
    )
    sides: dict[str, Callable[[], None]] = {"deeper": plain, BEFORE: ours(BEFORE), "chosen": ours("auto")}
    if row.compiled:
        sides["compiled"] = ours("auto", compiled=True)
    return sides


def _profiled(side: Callable[[], None], device: torch.device, steps: int) -> dict[str, Any]:
    """Of one step: kernels, seconds in them, seconds between them, the median gap."""
    is_cuda = device.type == "cuda"
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch 2.13's profiler tells of each start and stop
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    found: list[dict[str, Any]] = []
    for _ in range(steps):
        with profile(activities=activities) as trace:
            side()
            if is_cuda:
                torch.cuda.synchronize(device)
        events = trace.events() or ()
        ranges = (event.time_range for event in events if _is_kernel(event, is_cuda=is_cuda))
        found.append(gaps([(1e-6 * one.start, 1e-6 * one.end) for one in ranges]))
    return {key: statistics.median(one[key] for one in found) for key in found[0]}


def _is_kernel(event: Any, *, is_cuda: bool) -> bool:
    if is_cuda:
        # ranges that the host has named (an optimizer's step) are told as the GPU's too; copies are its work
        return str(event.device_type.name) == "CUDA" and not event.is_user_annotation
    name = str(event.name)
    return name.startswith(_OPERATOR) and not _is_view(name.removeprefix(_OPERATOR)) and not _is_inside(event)


@cache
def _is_view(operator: str) -> bool:
    """Whether an operator of torch returns its input's memory, unchanged: by what it declares."""
    packet = getattr(torch.ops.aten, operator, None)
    schemas = [getattr(packet, overload)._schema for overload in packet.overloads()] if packet else []
    returned = [result.alias_info for schema in schemas for result in schema.returns]
    return any(alias is not None and not alias.is_write for alias in returned)


def _is_inside(event: Any) -> bool:
    """Whether another operator called this one."""
    while (event := event.cpu_parent) is not None:
        if event.name.startswith(_OPERATOR):
            return True
    return False


def gaps(kernels: Iterable[tuple[float, float]]) -> dict[str, Any]:
    """Of kernels' begins and ends in seconds: how many, seconds from the first's begin to the last's end, with at least
    one of them (busy), without any (gap), and the median of these gaps."""
    ranges = sorted(kernels)
    if not ranges:
        raise ValueError(
            "the profiler saw no kernel: is this build of torch one with a profiler for the device?"
        )
    end, between = ranges[0][1], list[float]()
    for begin, stop in ranges[1:]:
        if begin > end:
            between.append(begin - end)
        end = max(end, stop)
    whole = end - ranges[0][0]
    return {
        "kernels": len(ranges),
        "whole_s": whole,
        "busy_s": whole - sum(between),
        "gap_s": sum(between),
        "median_gap_s": statistics.median(between) if between else 0.0,
    }


def print_table(record: dict[str, Any], console: Console) -> None:
    """A line a side."""
    table = Table(
        title=f"{record['row']}, {record['device']}", title_justify="left", box=None, pad_edge=False
    )
    table.add_column("side")
    for heading in ("kernels", "ms in them", "ms between", "median gap, us", "ms a step", f"{BEFORE} ÷ it"):
        table.add_column(heading, justify="right")
    for row in record["rows"]:
        low, high = row["speed_up_interval_95"]
        table.add_row(
            row["side"], f"{row['kernels']:.0f}", f"{1e3 * row['busy_s']:.1f}", f"{1e3 * row['gap_s']:.1f}",
            f"{1e6 * row['median_gap_s']:.1f}", f"{1e3 * row['median_s']:.1f}",
            f"{row['speed_up']:.3f} ({low:.3f} to {high:.3f})",
        )  # fmt: skip
    console.print(table, highlight=False)
