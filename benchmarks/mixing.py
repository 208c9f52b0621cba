"""Two hosts behind a slow wire: the automatic plan splits samples early and branches late, and gains by it.

Two namespaces of this machine, each with one worker (root only). `python -m anabranch.benchmarks mixing`.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from anabranch.benchmarks.plans import Case
from anabranch.benchmarks.record import RESULTS, write_record
from anabranch.benchmarks.two_hosts import two_hosts
from anabranch.runtime.audit import automatic_plan, time_plans
from anabranch.runtime.intervals import median_interval
from anabranch.runtime.model_spec import spec_of
from anabranch.schedulers import Cluster, Device, format_plan, parse_plan, schedule
from anabranch.schedulers.cost_file import read_costs
from anabranch.schedulers.costs import Batch
from anabranch.schedulers.predict import predict

_CASE = Case("multi_resnet", {"depth": 14, "num_branches": 4, "width": 4, "shortcut": "B"}, 24)
_PORT = 29_517


def run(*, mbit_per_s: float = 100.0, rounds: int = 8, folder: Path = RESULTS) -> dict[str, Any]:
    """Measures, plans and times on the two hosts; writes the record. Raises RuntimeError without root or `ip`, `tc`."""
    with tempfile.TemporaryDirectory() as place, two_hosts(mbit_per_s) as hosts:
        out = Path(place, "result.json")
        workers = [
            host.popen(
                [sys.executable, "-W", "ignore", "-m", "anabranch.benchmarks.mixing", str(out), str(rounds)],
                {
                    "RANK": str(rank),
                    "WORLD_SIZE": "2",
                    "MASTER_ADDR": hosts[0].address,
                    "MASTER_PORT": str(_PORT),
                    "GLOO_SOCKET_IFNAME": host.device,
                    "OMP_NUM_THREADS": "1",
                    "XDG_CACHE_HOME": place,
                },
            )
            for rank, host in enumerate(hosts)
        ]
        errors = [worker.communicate()[1] for worker in workers]
        if any(worker.returncode for worker in workers):
            raise RuntimeError("a worker failed:\n" + "\n".join(errors))
        found = json.loads(out.read_text())
    record = {
        "mbit_per_s": mbit_per_s, "case": str(_CASE), "rounds": rounds, **found,
        "asked": {"speed_up_median": 1.5}, "met": found["speed_up_median"] >= 1.5,
    }  # fmt: skip
    return {**record, "path": str(write_record("mixing", record, folder))}


def _worker(out: Path, rounds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    network, setting = _CASE.network(), _CASE.setting()
    cluster = Cluster(tuple(Device(host, 0, "cpu") for host in ("a", "b")))
    devices, spec = [str(device) for device in cluster.devices], spec_of(network)
    outcome = automatic_plan(network, setting, cluster, devices, budget_s=120)
    plans = {
        "auto": parse_plan(outcome["plan"]).resolve(spec, cluster),
        "all-data": schedule("data", spec, cluster, mesh=(2, 1)),
        "all-branch": schedule("even", spec, cluster, mesh=(1, 2)),
    }
    samples = time_plans(network, plans, setting, rounds=rounds, budget_s=600)
    rival = min(("all-data", "all-branch"), key=lambda name: statistics.median(samples[name]))
    ratios = [a / b for a, b in zip(samples[rival], samples["auto"], strict=True)]
    costs = read_costs(outcome["costs"]) if Path(outcome["costs"]).exists() else None
    batch = Batch(len(setting.x), setting.config.train.bn_batch_size)
    if dist.get_rank() == 0:
        assert costs is not None, "rank 0 keeps them"
        predicted = {name: predict(plan, spec, cluster, costs, batch) for name, plan in plans.items()}
        median, low, high = median_interval(ratios)
        result = {
            "auto": format_plan(plans["auto"]),
            "better_of_the_others": rival,
            "speed_up_median": median,
            "speed_up_interval_95": [low, high],
            "samples_s": samples,
            "predicted_s": {name: p.total_s for name, p in predicted.items()},
            "bytes_by_link": {name: [t._asdict() for t in p.traffic] for name, p in predicted.items()},
            "audit": outcome["plans"],
        }
        out.write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    _worker(Path(sys.argv[1]), int(sys.argv[2]))
