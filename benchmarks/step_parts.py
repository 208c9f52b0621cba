"""What single parts of the step gain: fused branches, exchanges between branches, activations made again.

Two CPU workers (one for `fused`), one thread each, interleaved rounds, paired ratios with 95 % intervals.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from anabranch.benchmarks.record import RESULTS, write_record
from anabranch.benchmarks.steps import OurStep, images
from anabranch.benchmarks.workers import interleaved, run_workers
from anabranch.blocks import build
from anabranch.blocks.branch_sum import Execution, branch_sums
from anabranch.blocks.network import named_blocks
from anabranch.runtime.config import MeshConfig
from anabranch.runtime.deal import deal_step
from anabranch.runtime.exchange import all_reduce
from anabranch.runtime.execution import how_to_run
from anabranch.runtime.intervals import median_interval
from anabranch.runtime.mesh import make_mesh
from anabranch.runtime.model_spec import spec_of
from anabranch.runtime.parallel_network import parallelize
from anabranch.runtime.wire import Wire
from anabranch.schedulers import BranchPlacement, Plan
from anabranch.schedulers.plan import SAMPLE


def fused(
    *, rounds: int = 24, branches: int = 4, batches: tuple[int, ...] = (32, 128), folder: Path = RESULTS
) -> dict[str, Any]:
    """Each stage's repeated block in all its forms, in the memory format that was chosen: what the choice costs."""
    rows = [
        row
        for batch in batches
        for row in run_workers(1, _fused, branches, batch, rounds, threads=1, on_cpu=True)
    ]
    worst = max(row["chosen_over_best"] for row in rows)
    record = {"num_branches": branches, "rows": rows, "worst_chosen_over_best": worst}
    return {**record, "path": str(write_record("fused", record, folder))}


def _fused(rank: int, branches: int, batch: int, rounds: int) -> list[dict[str, Any]]:
    network = build("multi_resnet", depth=14, num_branches=branches)
    names = [block.name for block in spec_of(network).blocks]
    plan = Plan(1, 1, dict.fromkeys(names, SAMPLE), "sample", "sample")
    parallel = parallelize(network, plan, make_mesh(1, 1))
    (deal,) = deal_step(batch, bn_batch_size=batch, data=1, branch=1)
    how = how_to_run(
        parallel, (3, 32, 32), parallel.rank_batch(deal, batch), MeshConfig(), precision="fp32", ours=True
    )
    channels_last = how.memory_format == "channels_last"
    rows = []
    for stage, (channels, size) in enumerate(((16, 32), (32, 16), (64, 8)), 1):
        name = f"stage{stage}.block2"
        x = torch.randn(batch, channels, size, size)
        block = dict(named_blocks(parallel))[name]
        parallel.use_memory_format(channels_last=channels_last)
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        (block_sum,) = (one for _, one in branch_sums(block))
        forms: dict[str, Callable[[], None]] = {
            form: _block_step(copy.deepcopy(block), x, form) for form in block_sum.executions
        }
        samples, chosen = interleaved(forms, rounds, 2), how.execution[name]
        over = {
            way: median_interval([a / b for a, b in zip(samples[chosen], seconds, strict=True)])
            for way, seconds in samples.items()
            if way != chosen
        }
        rows.append(
            {
                "stage": stage, "batch": batch, "memory_format": how.memory_format, "chosen": chosen,
                "samples_s": samples,
                "chosen_over": {way: ratio for way, (ratio, _, _) in over.items()},
                "interval_95": {way: [low, high] for way, (_, low, high) in over.items()},
                "chosen_over_best": max(1.0, *(ratio for ratio, _, _ in over.values())),
            }
        )  # fmt: skip
    return rows


def _block_step(block: nn.Module, x: Tensor, way: Execution) -> Callable[[], None]:
    for _, one in branch_sums(block):
        one.execution = way

    def step() -> None:
        leaf = x.detach().requires_grad_()
        y = block(leaf)
        y.backward(torch.ones_like(y))
        for parameter in block.parameters():
            parameter.grad = None

    return step


class _Silent(Wire):
    """Exchanges nothing: what the compute alone takes."""

    def sum(
        self, x: Tensor, meanwhile: Callable[[], None] | None = None, sizes: Sequence[int] | None = None
    ) -> Tensor:
        if meanwhile is not None:
            meanwhile()
        return self.own(torch.empty_like(x, memory_format=self.format_of(x)).copy_(x), sizes)


def exchange(
    *, rounds: int = 12, depth: int = 20, branches: int = 4, batch: int = 32, folder: Path = RESULTS
) -> dict[str, Any]:
    """All branches split over two workers: the step against compute alone plus the same collectives alone."""
    found: dict[str, Any] = run_workers(2, _exchange, rounds, depth, branches, batch, threads=1, on_cpu=True)
    samples = found["samples"]
    added = [a + b for a, b in zip(samples["compute"], samples["collectives"], strict=True)]
    ratio, low, high = median_interval([a / b for a, b in zip(samples["step"], added, strict=True)])
    record = {
        "network": {"name": "multi_resnet", "depth": depth, "num_branches": branches}, "batch": batch,
        "wire": "fp32", "samples_s": samples, "exposed_s_by_block": found["exposed"], "bytes": found["bytes"],
        "step_over_parts": ratio, "interval_95": [low, high],
        **{f"{name}_median_s": statistics.median(values) for name, values in samples.items()},
    }  # fmt: skip
    return {**record, "path": str(write_record("exchange", record, folder))}


def _exchange(rank: int, rounds: int, depth: int, branches: int, batch: int) -> dict[str, Any]:
    x, target = images(batch)
    split = BranchPlacement.from_counts((branches - branches // 2, branches // 2))

    def made() -> OurStep:
        torch.manual_seed(0)
        network = build("multi_resnet", depth=depth, num_branches=branches)
        names = [block.name for block in spec_of(network).blocks]
        plan = Plan(1, 2, dict.fromkeys(names, split), "replicated", "replicated")
        return OurStep(network, plan, x, target, channels_last=True)

    whole, compute = made(), made()
    silent = _Silent(compute.network.wire.group, channels_last=True)
    for _, one in branch_sums(compute.network):
        one.exchange.wire = silent  # type: ignore[union-attr]
    recorder = whole.network.recorder
    recorder.detailed = True
    whole()
    shapes = [span.num_bytes for span in recorder.spans() if span.op == "all_reduce"]
    assert shapes, "branches are split: they exchange"
    buffers = [torch.zeros(num // 4) for num in shapes]

    def collectives() -> None:
        for buffer in buffers:
            all_reduce(buffer, whole.network.wire.group).wait()

    exposed: dict[str, list[float]] = {}

    def step() -> None:
        whole()
        by_block: dict[str, float] = {}
        for span in recorder.spans():
            if span.op == "all_reduce":
                by_block[span.element] = by_block.get(span.element, 0.0) + span.end - span.start
        for name, seconds in by_block.items():
            exposed.setdefault(name, []).append(seconds)

    samples = interleaved({"step": step, "compute": compute, "collectives": collectives}, rounds, 1)
    return {
        "samples": samples,
        "exposed": {name: statistics.median(values) for name, values in exposed.items()},
        "bytes": sum(shapes),
    }


def recompute(
    *, rounds: int = 8, depth: int = 44, branches: int = 4, batch: int = 64, folder: Path = RESULTS
) -> dict[str, Any]:
    """Peak of a rank's live tensors and step time, with activations kept and made again."""
    found: dict[str, Any] = run_workers(2, _recompute, rounds, depth, branches, batch, threads=1, on_cpu=True)
    samples, peaks = found["samples"], found["peaks"]
    ratio, low, high = median_interval(
        [a / b for a, b in zip(samples["again"], samples["kept"], strict=True)]
    )
    record = {
        "network": {"name": "multi_resnet", "depth": depth, "num_branches": branches}, "batch": batch,
        "peak_bytes_by_rank": peaks, "peak_ratio": peaks["again"][0] / peaks["kept"][0],
        "samples_s": samples, "time_ratio": ratio, "interval_95": [low, high],
    }  # fmt: skip
    return {**record, "path": str(write_record("recompute", record, folder))}


def _recompute(rank: int, rounds: int, depth: int, branches: int, batch: int) -> dict[str, Any]:
    from torch.distributed._tools.mem_tracker import MemTracker

    x, target = images(batch)
    peaks: dict[str, list[int]] = {}
    sides: dict[str, OurStep] = {}
    for name in ("kept", "again"):
        network = build("multi_resnet", depth=depth, num_branches=branches)
        names = [block.name for block in spec_of(network).blocks]
        plan = Plan(2, 1, dict.fromkeys(names, SAMPLE), "sample", "sample")
        sides[name] = OurStep(network, plan, x, target, channels_last=True, recompute=name == "again")
        sides[name]()  # the optimizer's state is there
        tracker = MemTracker()
        tracker.track_external(sides[name].network, sides[name].optimizer)
        with tracker:
            sides[name]()
        peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
        told = torch.zeros(dist.get_world_size(), dtype=torch.float64)
        told[rank] = peak
        dist.all_reduce(told)
        peaks[name] = [round(p) for p in told.tolist()]
    return {"samples": interleaved(dict(sides), rounds, 1), "peaks": peaks}
