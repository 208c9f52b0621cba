"""What recording costs: steps with nothing recorded, with what is always on, and detailed, in turn, two CPU workers.

The steps are those of `anabranch profile`: a run's own, with what it tells of them. Beside the times, the share that
records and telling should take: how many × what one costs.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch.distributed as dist

from anabranch.benchmarks.record import RESULTS, write_record
from anabranch.benchmarks.workers import device_of, run_workers
from anabranch.blocks.convert import prepare
from anabranch.cluster import WorkerContext
from anabranch.runtime.assemble import make_data, make_network
from anabranch.runtime.config import Config
from anabranch.runtime.intervals import median_interval
from anabranch.runtime.model_spec import spec_of
from anabranch.runtime.process_group import gather_json
from anabranch.runtime.profile_loop import StepLoop, overhead_seconds, record_seconds
from anabranch.runtime.trainer import Trainer
from anabranch.schedulers import BranchPlacement, Plan

_WORKERS, _WARM_UP = 2, 5
_MOST = {"light": 0.01, "detailed": 0.10}  # of a step, asked


def run(
    *, rounds: int = 100, depth: int = 14, branches: int = 4, batch_size: int = 128, folder: Path = RESULTS
) -> dict[str, Any]:
    """Measures and writes the record: paired ratios to steps with nothing recorded, with their 95 % intervals."""
    settings: dict[str, Any] = {
        "model": {"name": "multi_resnet", "options": {"depth": depth, "num_branches": branches}},
        "data": {"name": "digits"},
        "train": {"batch_size": batch_size},
    }
    found = run_workers(_WORKERS, _measure, settings, rounds, threads=1)
    off = found["seconds"]["off"]
    rows = {}
    for kind, most in _MOST.items():
        ratio, low, high = median_interval([a / b for a, b in zip(found["seconds"][kind], off, strict=True)])
        share = (found["records"][kind] * found["record_s"] + found["told_s"]) / statistics.median(off)
        rows[kind] = {
            "ratio_median": ratio, "ratio_interval_95": [low, high], "records": found["records"][kind],
            "share": share, "asked": most, "share_met": share <= most, "interval_met": high <= 1 + most,
        }  # fmt: skip
    record = {
        **settings,
        "workers": _WORKERS,
        "threads_per_worker": 1,
        "rounds": rounds,
        **found,
        "kinds": rows,
    }
    return {**record, "path": str(write_record("profile_overhead", record, folder))}


def _measure(rank: int, settings: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Of the slowest rank. All branches split: most exchanges, hence most records."""
    config, device = Config.from_dict(settings), device_of(rank)
    data = make_data(config)
    network = prepare(make_network(config, data))
    blocks = {b.name: BranchPlacement.even(b.num_branches, _WORKERS) for b in spec_of(network).blocks}
    plan = Plan(1, _WORKERS, blocks, "replicated", "sample")
    context = WorkerContext(rank, _WORKERS, rank, "here", str(device), 1, "", dist.get_backend())
    trainer = Trainer(network, data, config, plan=plan, context=context)
    trainer._set_up()
    recorder, run = trainer.network.recorder, StepLoop(trainer, 3 * rounds)
    records = {}
    for kind in ("light", "detailed"):
        recorder.detailed = kind == "detailed"
        for _ in range(_WARM_UP):
            run()
        records[kind] = recorder.num_records
    seconds = overhead_seconds(run, recorder, rounds)
    mine = {
        "seconds": seconds, "records": records, "record_s": record_seconds(device), "told_s": run.tell_seconds(),
    }  # fmt: skip
    everyone = gather_json(mine, device)
    return {
        "seconds": {k: [max(s) for s in zip(*(one["seconds"][k] for one in everyone), strict=True)] for k in seconds},
        "records": {kind: max(one["records"][kind] for one in everyone) for kind in records},
        **{key: max(one[key] for one in everyone) for key in ("record_s", "told_s")},
    }  # fmt: skip
