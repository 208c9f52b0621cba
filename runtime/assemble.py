"""From the configuration to the things it names: dataset, network, loss, plan."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from anabranch.blocks import build, families, models
from anabranch.blocks.random import fold
from anabranch.runtime.config import Config
from anabranch.runtime.config_rules import IMAGE_FOLDERS, is_plan_file, mesh_axes
from anabranch.runtime.data.load import load_data
from anabranch.runtime.data.sources import DataBundle
from anabranch.runtime.data.user import import_object, user_code
from anabranch.runtime.errors import ConfigError
from anabranch.runtime.loss import LossFunction, cross_entropy
from anabranch.runtime.regularizer import OrthogonalityPenalty
from anabranch.schedulers import Cluster, Device, ModelSpec, Plan, PlanFile, read_plan, schedule
from anabranch.schedulers.cost_file import read_costs
from anabranch.schedulers.costs import Batch, Costs

# of the schedulers; costs kept with a run are not theirs to refuse
_PREDICT_NOTHING = ("", "even", "data", "manual")
AUTO = "auto"  # `mesh.plan`, or a plan file's scheduler: measured and timed on the workers


def make_data(config: Config) -> DataBundle:
    """The dataset of `[data]`. Raises DataError."""
    data = config.data
    if data.name in IMAGE_FOLDERS:
        from anabranch.runtime.data.image_folder import load_image_folder

        return load_image_folder(
            data.name, data.path, data.options, seed=config.train.seed, loader_workers=data.loader_workers,
            augment=data.augment, on_bad=data.on_bad_image, margin=data.eval_crops > 1,
        )  # fmt: skip
    return load_data(data.name, data.path, data.options, config.train.seed, data.loader_workers)


def make_network(config: Config, bundle: DataBundle) -> nn.Module:
    """The network of `[model]` on one device, its parameters a function of the seed.

    in_channels and num_classes of our families come from the data unless given, as does the input_shape of a user's
    network. Raises ModelError or ConfigError.
    """
    name, options = config.model.name, dict(config.model.options)
    shape = (bundle.in_channels, *bundle.image_size)
    if ":" in name:
        make = import_object(name, "model.name")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(fold(config.train.seed, "model"))
            with user_code(f"model.name = {name}"):
                network = make(**options)
        if not isinstance(network, nn.Module):
            raise ConfigError(
                f"model.name = {name} returned a {type(network).__name__}: it must return a torch module"
            )
        if getattr(network, "input_shape", None) is None:
            network.input_shape = shape  # type: ignore[assignment]
        return in_precision(config, network)
    if name in (*families(), *models()):
        given: dict[str, Any] = {"in_channels": bundle.in_channels}
        if bundle.num_classes is not None:
            given["num_classes"] = bundle.num_classes
        options = {**given, **options}
        wanted, there = options.get("num_classes"), bundle.num_classes or 0
        if config.train.loss == "cross_entropy" and isinstance(wanted, int) and 0 < wanted < there:
            raise ConfigError(
                f"model.options.num_classes is {wanted}, data.name = {config.data.name} has {there} classes: leave it "
                f"out, or make it {there} or more"
            )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold(config.train.seed, "model"))
        network = build(name, **options)
    network.input_shape = shape  # type: ignore[assignment]
    return in_precision(config, network)


def in_precision(config: Config, network: nn.Module) -> nn.Module:
    """The network with parameters as `train.precision` keeps them: float64, else float32 (bf16 too)."""
    return network.double() if config.train.precision == "fp64" else network.float()


def make_loss(config: Config) -> LossFunction:
    """The loss of `[train]`: cross entropy, or a user's function as it is."""
    if config.train.loss == "cross_entropy":
        return cross_entropy(config.train.label_smoothing)
    if config.train.label_smoothing:
        raise ConfigError(
            f"train.label_smoothing is {config.train.label_smoothing}, but train.loss is your own {config.train.loss}: "
            "smooth there, and set label_smoothing to 0"
        )
    return import_object(config.train.loss, "train.loss")


def make_penalty(config: Config) -> OrthogonalityPenalty | None:
    """The orthogonality penalty of `[train]`, None where it is off."""
    train = config.train
    if train.orthogonality == 0.0:
        return None
    return OrthogonalityPenalty(
        train.orthogonality, train.orthogonality_normalisation, train.orthogonality_joint
    )


def make_plan(config: Config, spec: ModelSpec, cluster: Cluster) -> Plan:
    """The plan of `[mesh]` for a network on a cluster: a plan file's, or a scheduler's, which is given `mesh.costs`.

    Raises PlanError, or ConfigError where num_workers contradicts it.
    """
    mesh = mesh_axes(config.mesh.shape)
    named = config.mesh.plan
    partial = read_plan(Path(named)) if is_plan_file(named) else None
    if partial is not None:
        costs, batch = _costs(config, spec, cluster, partial.scheduler or "", partial.mesh)
        plan = partial.resolve(spec, cluster, mesh=mesh, costs=costs, batch=batch)
    else:
        if mesh is None and config.mesh.num_workers:
            num = config.mesh.num_workers
            cluster = _first(cluster, (num, 1) if named == "data" else (1, num))
        costs, batch = _costs(config, spec, cluster, named, mesh)
        plan = schedule(named, spec, cluster, mesh=mesh, costs=costs, batch=batch)
    wanted = config.mesh.num_workers
    if wanted and plan.world_size != wanted:
        raise ConfigError(
            f"mesh.num_workers is {wanted}, the plan's mesh is {plan.data}x{plan.branch} = {plan.world_size} workers: "
            "leave one of them out, or make them equal"
        )
    return plan


def _costs(
    config: Config, spec: ModelSpec, cluster: Cluster, scheduler: str, mesh: tuple[int, int] | None
) -> tuple[Costs | None, Batch]:
    """For a scheduler that may predict: the cost file's figures, if one is named, and a step's samples as `settle`."""
    train, source = config.train, config.mesh.costs
    num = math.prod(mesh) if mesh else len(cluster.devices)
    batch = Batch(train.batch_size, bn_batch_size(config, num), train.accumulation)
    if not source or scheduler in _PREDICT_NOTHING:
        return None, batch
    costs = read_costs(source)
    costs.check(spec, frozenset(device.kind for device in cluster.devices), source)
    return costs, batch


def auto_partial(config: Config) -> tuple[bool, PlanFile | None]:
    """(whether the plan is to be measured and timed, what a plan file settles of it)."""
    named = config.mesh.plan
    if named == AUTO:
        return True, None
    if is_plan_file(named):
        partial = read_plan(Path(named))
        return partial.scheduler == AUTO, partial
    return False, None


def provisional_plan(config: Config, spec: ModelSpec, cluster: Cluster) -> Plan:
    """Data parallelism over the workers that an automatic plan is for, in the order of its mesh.

    They are on the devices that a plan file names, or else on the hosts of its pins too.
    """
    _, partial = auto_partial(config)
    axes = (partial.mesh if partial else None) or mesh_axes(config.mesh.shape)
    axes = axes or (1, config.mesh.num_workers or len(cluster.devices))
    pinned = frozenset(rule.host for rule in partial.pins) if partial else frozenset()
    placed = (partial and partial.devices) or _first(cluster, axes, pinned).place(*axes)
    cluster.check(placed)
    devices = tuple((name,) for row in placed for name in row)
    return replace(schedule("data", spec, cluster, mesh=(len(devices), 1)), devices=devices)


def bn_batch_size(config: Config, num_workers: int) -> int:
    """Samples of a BN group: as configured, else what data parallelism over the workers has.

    So that all workers have one group in every micro-batch, where any number of samples makes that many groups.
    """
    train = config.train
    if train.bn_batch_size:
        return train.bn_batch_size
    num_groups = train.accumulation * num_workers
    rounded_up = -(-train.batch_size // num_groups)
    if -(-train.batch_size // rounded_up) == num_groups:
        return rounded_up
    return max(1, train.batch_size // num_groups)


def settle(config: Config, plan: Plan) -> Config:
    """The configuration with what was chosen for it: numbers of workers and of samples in a BN group.

    Raises ConfigError where a step cannot be cut so.
    """
    train = config.train
    micro_batch = -(-train.batch_size // train.accumulation)  # the largest
    group = bn_batch_size(config, plan.world_size)
    if group > micro_batch:
        raise ConfigError(
            f"train.bn_batch_size is {group}, a micro-batch has {micro_batch} samples (batch_size "
            f"{train.batch_size} / accumulation {train.accumulation}): make it {micro_batch} or smaller"
        )
    mesh = replace(config.mesh, num_workers=plan.world_size, shape=f"{plan.data}x{plan.branch}")
    return replace(config, train=replace(train, bn_batch_size=group), mesh=mesh)


def with_memory(cluster: Cluster, memory_gb: float) -> Cluster:
    """The cluster with `mesh.memory_gb` as each device's memory; 0: what is known of it."""
    if not memory_gb:
        return cluster
    limited = (replace(device, memory_bytes=int(memory_gb * 1e9)) for device in cluster.devices)
    return replace(cluster, devices=tuple(limited))


def local_cluster(num_devices: int, host: str) -> Cluster:
    """Places for workers that were started by somebody else (torchrun, srun), or this process alone."""
    kind = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return Cluster(tuple(Device(host, index, kind) for index in range(num_devices)))


def _first(cluster: Cluster, mesh: tuple[int, int], hosts: frozenset[str] = frozenset()) -> Cluster:
    """The devices a scheduler may use when the user said how many; too few are told by the cluster's own check.

    mesh: (data, branch) where it is known, so that replicas are on several hosts; else one branch group, on few.
    hosts: each gives a device at least, where there are so many.
    """
    pinned_first = sorted(cluster.devices, key=lambda device: device.host not in hosts)
    cluster = replace(cluster, devices=tuple(pinned_first))
    devices = [cluster.by_name[name] for row in cluster.place(*mesh) for name in row]
    if not hosts <= {device.host for device in devices}:  # one is too small for a branch group of its own
        by_turn = sorted(pinned_first, key=lambda device: (device.host not in hosts, device.index))
        devices = by_turn[: math.prod(mesh)]
    return replace(cluster, devices=tuple(devices))
