"""Measures what a network's steps cost on the workers that stand: `Costs` for the scheduler.

Costs are read off real steps, of a *reduced* network that has every distinct block once, under a few plans that
together show every element as each split and each number of branches runs it: with the allocator, threads and caches
of training, all ranks busy. Gradients are then reduced after the backward, so that neither hides the other.

    trial            shows
    all "sample"     every element on a rank's own samples
    1×M, counts …    every block on its group's samples, with 0 … k branches; exchanges as large as they are
    links            collectives by size and group; what an overlapped one takes from compute

What does not fit the budget is measured on a part of the batch and drawn out, labelled "extrapolated".
"""

from __future__ import annotations

import copy
import hashlib
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn

from anabranch.runtime.config import Config
from anabranch.runtime.machine import processor
from anabranch.runtime.measure_elements import Seen, element_costs, without_waiting
from anabranch.runtime.measure_links import link_costs, occupancy
from anabranch.runtime.measure_network import alike_blocks, reduced_network
from anabranch.runtime.measure_trial import WARM_UP, Trial, trial_plans
from anabranch.runtime.mesh import Mesh, make_mesh
from anabranch.runtime.model_shape import shared_bytes, unequal_blocks
from anabranch.runtime.model_spec import spec_of
from anabranch.runtime.plan_step import PlanStep, StepSetting
from anabranch.runtime.process_group import gather_json
from anabranch.schedulers import Cluster, Plan
from anabranch.schedulers.costs import Costs, ModelCosts

_LEAST, _MOST = 3, 10  # steps of a trial, fewest and most measured

SPEEDS = "speeds"  # the key's entry for the workers' relative speeds
OnTrial = Callable[[int, int], None]


def measure_costs(
    network: nn.Module,
    setting: StepSetting,
    cluster: Cluster,
    devices: Sequence[str],
    *,
    budget_s: float = 60.0,
    on_trial: OnTrial = lambda done, total: None,
) -> Costs:
    """The costs of a one-device network (prepared, kept as it is) on the ranks of the default process group.

    Every rank calls it. devices: by rank, as "host:index" of the cluster. Collective; the same on all ranks.
    """
    started, world = time.perf_counter(), len(devices)
    kinds = [cluster.by_name[name].kind for name in devices]
    key = {**cost_key(network, setting.config), **workers_key(cluster, devices, _device(network))}
    spec, alike = spec_of(network), alike_blocks(network, setting.x[:2])
    reduced = reduced_network(network, alike)
    meshes = {
        m: make_mesh(world // m, m, _device(network).type) for m in range(1, world + 1) if world % m == 0
    }
    trials = list(trial_plans(spec_of(reduced), unequal_blocks(reduced), world))
    setting, label = _within(reduced, trials[0], meshes, setting, budget_s / 2, len(trials))
    running = [Trial(copy.deepcopy(reduced), plan, meshes[plan.branch], setting) for plan in trials]
    rounds, once = _MOST, _agreed_max(sum(trial.once_s for trial in running), meshes[1])
    left = budget_s / 2 - (time.perf_counter() - started)
    rounds = min(max(int(_agreed_min(left, meshes[1]) / max(once, 1e-9)), _LEAST), _MOST)
    for number in range(rounds):  # all trials in every round: whatever drifts on the machine hits all of them
        on_trial(number, rounds + 1)
        for trial in running:
            trial.run()
    on_trial(rounds, rounds + 1)
    seen = [[[*vars(one).values()] for one in trial.seen()] for trial in running]
    everything = gather_json(seen, _device(network))
    of_rank = without_waiting([[Seen(*row) for rows in of_trial for row in rows] for of_trial in everything])
    speeds = _speeds([[Seen(*row) for row in of_trial[0]] for of_trial in everything], kinds)
    alike_ranks = len({*zip(kinds, speeds, strict=True)}) == 1
    exchanges: dict[int, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    even = {trial.plan.branch for trial in running if trial.is_even}
    for trial in running:
        if trial.is_even or trial.plan.branch not in even:
            for num_bytes, seconds in trial.exchanges(alike=alike_ranks):
                exchanges[trial.plan.branch][num_bytes].append(seconds)
    rest = [statistics.median(trial.rest) for trial in running]
    per_byte = [statistics.median(trial.optimizer) / trial.num_bytes for trial in running]
    in_steps = {
        size: {num_bytes: statistics.median(s) for num_bytes, s in found.items()}
        for size, found in exchanges.items()
    }
    hosts = [cluster.by_name[name].host for name in devices]
    taken = occupancy(PlanStep(copy.deepcopy(reduced), trials[0], meshes[1], setting))
    groups = link_costs(meshes, hosts, in_steps, taken, _device(network))
    key[SPEEDS] = " ".join(map(str, speeds))
    models = []
    for kind in dict.fromkeys(kinds):
        ranks = [rank for rank in range(world) if kinds[rank] == kind]
        of_kind = [one.at_speed_1(speeds[r]) for r in ranks for one in of_rank[r]]
        elements = element_costs(network, spec, alike, of_kind, setting.config)
        models.append(
            ModelCosts(
                kind,
                elements,
                shared_bytes(network, spec),
                _agreed(rest, network),
                _agreed(per_byte, network),
                _copies(setting.config),
                _agreed([trial.update_copies for trial in running], network),
                (len(setting.x),),
                label,
                key,
            )
        )
    return Costs(tuple(models), groups)


def with_speeds(cluster: Cluster, devices: Sequence[str], costs: Costs) -> Cluster:
    """The cluster with the workers' relative speeds as they were measured. devices: by rank."""
    speeds = dict(zip(devices, map(float, costs.models[0].key.get(SPEEDS, "").split()), strict=False))
    changed = (replace(d, speed=speeds.get(str(d), d.speed)) for d in cluster.devices)
    return replace(cluster, devices=tuple(changed))


def _speeds(own: Sequence[Sequence[Seen]], kinds: Sequence[str]) -> list[float]:
    """Each rank's speed relative to the fastest of its kind, by what a sample took where all do the same.

    own: by rank, the trial in which every rank runs everything on its own samples, which may be more than another's;
    1 where it has none. In steps of a twentieth, and 1 within a fifth of the fastest: on shared cores that is noise.
    """
    seconds = [
        sum((one.forward_s + one.backward_s) / one.samples for one in seen if one.samples) for seen in own
    ]
    fastest = {
        kind: min((s for s, k in zip(seconds, kinds, strict=True) if k == kind and s), default=0.0)
        for kind in kinds
    }
    ratios = [fastest[kind] / s if s else 1.0 for s, kind in zip(seconds, kinds, strict=True)]
    return [1.0 if ratio > 0.8 else max(round(ratio * 20), 1) / 20 for ratio in ratios]


def cost_key(network: nn.Module, config: Config) -> dict[str, str]:
    """What figures hold for, of the run: versions, network, batch, all that a step does. Needs no workers."""
    shapes = ",".join("x".join(map(str, p.shape)) for p in network.parameters())
    train, optimizer = config.train, config.optimizer
    penalty = (
        (train.orthogonality_normalisation, str(train.orthogonality_joint)) if train.orthogonality else ()
    )
    return {
        "torch": torch.__version__,
        "network": f"{_digest(repr(network) + shapes)}",
        "image": "x".join(map(str, getattr(network, "input_shape", ()))),
        "batch": f"{train.batch_size}/{train.bn_batch_size}/{train.accumulation}",
        "precision": train.precision,
        "execution": "/".join(
            str(getattr(config.mesh, name))
            for name in ("execution", "memory_format", "wire", "overlap", "recompute", "chunks", "compile")
        ),
        "optimizer": optimizer.name + ("/momentum" if optimizer.momentum else ""),
        "clipping": "on" if optimizer.clip_norm else "off",
        "orthogonality": "/".join(penalty) or "off",
    }


def workers_key(cluster: Cluster, devices: Sequence[str], device: torch.device) -> dict[str, str]:
    """What figures hold for, of the workers: their hardware by rank, once where it is the same. Collective.

    devices: by rank; device: this rank's own.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    mine = {
        "device": name,
        "kind": cluster.by_name[devices[dist.get_rank()]].kind,
        "cores": str(len(os.sched_getaffinity(0))),
        "threads": str(torch.get_num_threads()),
        "backend": dist.get_backend(),
    }
    everyone: list[dict[str, str]] = gather_json(mine, device)
    by_rank = {entry: [one[entry] for one in everyone] for entry in mine}
    found = {
        entry: values[0] if len({*values}) == 1 else ", ".join(values) for entry, values in by_rank.items()
    }
    hosts = [cluster.by_name[name].host for name in devices]
    numbers = {host: str(number) for number, host in enumerate(dict.fromkeys(hosts))}
    return {**found, "workers": str(len(devices)), "hosts": " ".join(numbers[host] for host in hosts)}


def _within(
    network: nn.Module,
    plan: Plan,
    meshes: dict[int, Mesh],
    setting: StepSetting,
    budget_s: float,
    trials: int,
) -> tuple[StepSetting, str]:
    """The setting with as much of the batch as the budget lets, and the label of what is measured so."""
    step = PlanStep(copy.deepcopy(network), plan, meshes[1], setting)
    step()
    once = _agreed_max(step.timed(), meshes[1])
    parts, train = 1, setting.config.train
    least = train.bn_batch_size * meshes[1].world_size  # a BN group a rank
    while once / parts * trials * (WARM_UP + _LEAST) > budget_s and len(setting.x) // (2 * parts) >= least:
        parts *= 2
    if parts == 1:
        return setting, "measured"
    num = len(setting.x) // parts
    smaller = replace(setting.config, train=replace(train, batch_size=num, accumulation=1))
    return replace(setting, x=setting.x[:num], target=setting.target[:num], config=smaller), "extrapolated"


def _copies(config: Config) -> float:
    """Live bytes for a parameter's, all the time: itself and the optimizer's state."""
    optimizer = config.optimizer
    return 1.0 + (2.0 if optimizer.name == "adamw" else 1.0 if optimizer.momentum else 0.0)


def _agreed(values: Sequence[float], network: nn.Module) -> float:
    """The median over ranks of their medians, the same everywhere."""
    medians: list[float] = gather_json(statistics.median(values), _device(network))
    return statistics.median(medians)


def _agreed_max(value: float, mesh: Mesh) -> float:
    values: list[float] = gather_json(value, mesh.device_mesh.device_type, mesh.world_group)
    return max(values)


def _agreed_min(value: float, mesh: Mesh) -> float:
    values: list[float] = gather_json(value, mesh.device_mesh.device_type, mesh.world_group)
    return min(values)


def _device(network: nn.Module) -> torch.device:
    return next(network.parameters()).device


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
