"""How long the search for a plan takes as networks and clusters grow, with and without memory that binds."""

from __future__ import annotations

import statistics
from pathlib import Path
from time import perf_counter
from typing import Any

from anabranch.benchmarks.record import RESULTS, write_record
from anabranch.schedulers.search import search
from anabranch.schedulers.synthetic import synthetic_request

SIZES = {  # of the axis named: the other is fixed
    "blocks": [(blocks, 64) for blocks in (50, 100, 200, 500, 1000)],
    "devices": [(200, devices) for devices in (8, 32, 128, 512, 1024, 4096)],
}
ASKED_S = {(1000, 64): 1.0, (200, 4096): 10.0}


def run(
    *, rounds: int = 3, sizes: dict[str, list[tuple[int, int]]] | None = None, folder: Path = RESULTS
) -> dict[str, Any]:
    """Times every size; writes the record and, where matplotlib is there, its picture beside it."""
    rows = [
        {"axis": axis, "blocks": blocks, "devices": devices, **_timed(blocks, devices, is_bound, rounds)}
        for axis, found in (sizes or SIZES).items()
        for blocks, devices in found
        for is_bound in (False, True)
    ]
    asked = [
        {
            "blocks": blocks,
            "devices": devices,
            "at_most_s": most,
            "measured_s": max(of),
            "met": max(of) <= most,
        }
        for (blocks, devices), most in ASKED_S.items()
        if (of := [r["median_s"] for r in rows if (r["blocks"], r["devices"]) == (blocks, devices)])
    ]
    record = {"rounds": rounds, "rows": rows, "asked": asked, "met": all(one["met"] for one in asked)}
    path = write_record("search_growth", record, folder)
    return {**record, "path": str(path), "picture": _picture(rows, path.with_suffix(".svg"))}


def _timed(blocks: int, devices: int, is_bound: bool, rounds: int) -> dict[str, Any]:
    """Seconds of a search, the request made before; is_bound: with a fifth less memory than the best plan needs."""
    limit = None
    if is_bound:
        limit = int(0.8 * max(search(synthetic_request(blocks, devices)).prediction.memory_bytes))
    samples = []
    for _ in range(rounds):
        request = synthetic_request(blocks, devices, memory_bytes=limit)
        begun = perf_counter()
        found = search(request)
        samples.append(perf_counter() - begun)
    median = statistics.median(samples)
    return {"memory_binds": is_bound, "samples_s": samples, "median_s": median, "gap": found.gap}


def _picture(rows: list[dict[str, Any]], path: Path) -> str | None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, (axis, other) in zip(
        figure.subplots(1, 2), (("blocks", "64 devices"), ("devices", "200 blocks")), strict=True
    ):
        for is_bound, style, label in ((False, "o-", "memory is enough"), (True, "s--", "memory binds")):
            points = [
                (r[axis], r["median_s"]) for r in rows if r["axis"] == axis and r["memory_binds"] == is_bound
            ]
            axes.loglog(*zip(*points, strict=True), style, label=label)
        for (blocks, devices), most in ASKED_S.items():
            if (axis == "blocks") == (devices == 64):
                axes.plot(
                    blocks if axis == "blocks" else devices,
                    most,
                    "v",
                    color="gray",
                    label="asked for, at most",
                )
        axes.set(xlabel=f"{axis} ({other})", ylabel="seconds of the search")
        axes.legend()
    figure.savefig(path)
    return str(path)
