"""Our step with all blocks split by samples against torch DDP of the same network, two CPU workers.

Both run in the same processes, in turn, round by round: the machine's drift hits both. DDP is tuned
(`broadcast_buffers=False, gradient_as_bucket_view=True, static_graph=True`), BN groups, batches, optimizer, threads and
allocator are equal. `ddp_shared` reduces its gradients through shared memory, as ours are, and not over gloo.
Ours also reduces loss, hits and the running statistics, DDP's copies of those drift apart.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from anabranch.benchmarks.record import write_record
from anabranch.benchmarks.steps import OurStep, ddp_step, images
from anabranch.benchmarks.workers import interleaved, run_workers
from anabranch.blocks import build
from anabranch.runtime.intervals import median_interval
from anabranch.runtime.model_spec import spec_of
from anabranch.schedulers import Plan
from anabranch.schedulers.plan import SAMPLE

_NETWORK: dict[str, Any] = {"depth": 20, "num_branches": 4}
_WORKERS = 2


def run(
    *, rounds: int = 40, steps: int = 3, batch_size: int = 32, folder: Path | None = None
) -> dict[str, Any]:
    """Measures and writes the record: paired ratios ours ÷ DDP by round, their median with its 95 % interval."""
    samples = run_workers(_WORKERS, _measure, rounds, steps, batch_size, threads=1, on_cpu=True)
    ours, ddp, shared = samples["ours"], samples["ddp"], samples["ddp_shared"]
    median, low, high = median_interval([a / b for a, b in zip(ours, ddp, strict=True)])
    of_shared = median_interval([a / b for a, b in zip(ours, shared, strict=True)])
    record = {
        "network": {"name": "multi_resnet", **_NETWORK},
        "batch_size": batch_size,
        "workers": _WORKERS,
        "threads_per_worker": 1,
        "steps_per_round": steps,
        "ours_s": ours,
        "ddp_s": ddp,
        "ours_median_s": statistics.median(ours),
        "ddp_median_s": statistics.median(ddp),
        "ratio_median": median,
        "ratio_interval_95": [low, high],
        "ddp_shared_s": shared,
        "ddp_shared_median_s": statistics.median(shared),
        "ddp_shared_ratio_median": of_shared[0],
        "ddp_shared_ratio_interval_95": [*of_shared[1:]],
    }
    path = write_record("data_parallel", record, folder) if folder else write_record("data_parallel", record)
    return {**record, "path": str(path)}


def _measure(rank: int, rounds: int, steps: int, batch_size: int) -> dict[str, list[float]]:
    torch.manual_seed(0)
    network = build("multi_resnet", **_NETWORK)
    x, target = images(batch_size)
    plan = Plan(_WORKERS, 1, {block.name: SAMPLE for block in spec_of(network).blocks}, "sample", "sample")
    sides: dict[str, Callable[[], object]] = {
        "ddp": ddp_step(copy.deepcopy(network), x, target),
        "ddp_shared": ddp_step(copy.deepcopy(network), x, target, shared=True),
        "ours": OurStep(network, plan, x, target),
    }
    return interleaved(sides, rounds, steps, warm_up=3)
