"""What a worker does, whoever started it: the targets that the launchers run on every rank."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anabranch.blocks.convert import prepare
from anabranch.cluster import WorkerContext
from anabranch.runtime.assemble import (
    auto_partial,
    make_data,
    make_loss,
    make_network,
    make_penalty,
    make_plan,
    provisional_plan,
    settle,
    with_memory,
)
from anabranch.runtime.checkpoint import Checkpoint
from anabranch.runtime.config import Config
from anabranch.runtime.config_rules import mesh_axes
from anabranch.runtime.data.augment import normalise
from anabranch.runtime.data.batches import epoch_order
from anabranch.runtime.data.sources import DataBundle
from anabranch.runtime.errors import CheckpointError
from anabranch.runtime.job import Job
from anabranch.runtime.mesh import leave_meshes, make_mesh
from anabranch.runtime.model_spec import spec_of
from anabranch.runtime.plan_step import StepSetting
from anabranch.runtime.process_group import broadcast_json, gather_json, process_group
from anabranch.runtime.run_folder import RunFolder
from anabranch.runtime.trackers import tracker
from anabranch.runtime.trainer import Rewound, Trainer
from anabranch.runtime.verify import Trial, verify_plan
from anabranch.schedulers import Cluster, Device, Plan, PlanError, parse_plan


def train_worker(job: Job, context: WorkerContext) -> dict[str, Any]:
    """Trains; what `Trainer.fit` returns, with the plan's mesh."""
    context.publish(phase="loading")
    with _started(job, context, joined=job.plan is None) as (data, plan):
        config = settle(job.config, plan)
        run_dir = _run_dir(job, config, plan, context)
        start, network = job.checkpoint, make_network(config, data)
        if context.generation < 0:  # a newcomer: everything is loaded that needs no place
            order = context.await_order(committed=None)
            start = _start_of(order)
        while True:
            checkpoint = _checkpoint(start, context)
            trainer = Trainer(
                network, data, config, plan=plan, context=context, loss=make_loss(config), run_dir=run_dir,
                resume=checkpoint, leading=lambda: [tracker(name, run_dir) for name in config.profile.trackers],
            )  # fmt: skip
            try:
                return trainer.fit()
            except Rewound as rewound:
                start, network = rewound.checkpoint, make_network(config, data)


def _checkpoint(start: str, context: WorkerContext) -> Checkpoint | None:
    """The one to begin from, None for "". Where an order named it, and it is not there or cannot be read now, this rank
    waits for another order: all are to have the same one, the newest that there is by then."""
    while start:
        try:
            return Checkpoint.open(start)
        except CheckpointError as error:
            if context.order is None:
                raise
            text = f"rank {context.rank} cannot go back: {error}"
            context.publish(warning=text, not_joined=text)
            start = _start_of(context.await_order(committed=None))
    return None


def _start_of(order: dict[str, Any]) -> str:
    """Filled from a peer a rank needs no checkpoint, and the one that the run began from may be long gone."""
    return str(order["checkpoint"]) if order["action"] == "rewind" else ""


def gross_worker(job: Job, context: WorkerContext) -> dict[str, Any]:
    """Trains and searches all group sizes; what `run_gross` returns."""
    from anabranch.runtime.gross import run_gross

    context.publish(phase="loading")
    with _started(job, context) as (data, plan):
        config = settle(job.config, plan)
        return run_gross(
            make_network(config, data), data, config, plan=plan, context=context,
            run_dir=_run_dir(job, config, plan, context),
        )  # fmt: skip


def _run_dir(job: Job, config: Config, plan: Plan, context: WorkerContext) -> Path:
    """The run's folder, which rank 0 makes where no driver did."""
    run_dir = job.run_dir
    if job.plan is None:
        if context.rank == 0:
            file = auto_partial(config)[1]
            pins = file.pins if file else ()
            run_dir = str(RunFolder.create(config, plan, filled_in=True, pins=pins).path)
        run_dir = broadcast_json(run_dir, context.device)
        context.publish(run_dir=run_dir)
    return Path(run_dir)


def plan_worker(job: Job, context: WorkerContext) -> dict[str, Any]:
    """Measures, plans and times plans; what `automatic_plan` returns."""
    context.publish(phase="loading")
    with _started(job, context) as (data, plan):
        return _automatic(job, settle(job.config, plan), data, plan, context)


def _automatic(
    job: Job, config: Config, data: DataBundle, plan: Plan, context: WorkerContext
) -> dict[str, Any]:
    """`automatic_plan` on the job's own first samples; `plan`: any on these ranks, whose devices count."""
    from anabranch.runtime.audit import automatic_plan

    train = config.train
    ids = epoch_order(len(data.train), train.seed, 0)[: train.batch_size]
    x, target = data.train.fetch(ids, 0)
    network = prepare(make_network(config, data)).to(context.device)
    dtype = next(network.parameters()).dtype
    setting = StepSetting(_images(x, data, dtype), target, config, make_loss(config), make_penalty(config))
    devices, cluster = _names(plan), with_memory(_cluster(job, plan, context), config.mesh.memory_gb)
    _, partial = auto_partial(config)
    shape = mesh_axes(job.config.mesh.shape)

    def on_stage(stage: str, done: int, total: int) -> None:
        context.publish(phase=stage, step=done, num_steps=total)

    return automatic_plan(
        network, setting, cluster, devices, mesh=shape, partial=partial, budget_s=config.mesh.plan_budget_s,
        costs_file=config.mesh.costs, remeasure=config.mesh.remeasure, audit=config.mesh.audit, on_stage=on_stage,
    )  # fmt: skip


def _cluster(job: Job, plan: Plan, context: WorkerContext) -> Cluster:
    """The devices that the job's ranks run on, with the memory that they say they have. Collective."""
    here = _devices(context)
    if job.cluster is None:
        return Cluster(here)
    memory = dict(zip(_names(plan), (device.memory_bytes for device in here), strict=True))
    known = (replace(d, memory_bytes=memory.get(str(d), d.memory_bytes)) for d in job.cluster.devices)
    return replace(job.cluster, devices=tuple(known))


def _names(plan: Plan) -> list[str]:
    return [name for row in plan.devices or () for name in row]


def _devices(context: WorkerContext) -> tuple[Device, ...]:
    """Where each rank runs, by rank. Collective."""
    mine: list[Any] = [socket.gethostname(), context.local_rank, "cpu", None]
    if context.device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(context.device)
        mine[2:] = [properties.name, properties.total_memory]
    return tuple(Device(*told) for told in gather_json(mine, context.device))


def profile_worker(job: Job, context: WorkerContext) -> dict[str, Any]:
    """Profiles the job's first steps; on rank 0 the profile and the folder that it lies in."""
    from anabranch.runtime.profile_command import profile_rank

    context.publish(phase="loading")
    with _started(job, context) as (data, plan):
        config = settle(job.config, plan)
        network = prepare(make_network(config, data))
        model = spec_of(network)
        trainer = Trainer(network, data, config, plan=plan, context=context, loss=make_loss(config))
        run_dir = _run_dir(job, config, plan, context)
        cluster = _cluster(job, plan, context)
        return profile_rank(trainer, model, config, job.steps, config.mesh.costs, run_dir, context, cluster)


def eval_worker(job: Job, context: WorkerContext) -> dict[str, Any]:
    """Accuracy and loss of the job's checkpoint on the test samples."""
    with _started(job, context) as (data, plan):
        config = settle(job.config, plan)
        trainer = Trainer(
            make_network(config, data), data, config, plan=plan, context=context, loss=make_loss(config)
        )
        return trainer.evaluate(Checkpoint.open(job.checkpoint))


def verify_worker(job: Job, context: WorkerContext) -> dict[str, Any]:
    """Compares some steps under the plan with one device, on the job's own first samples."""
    context.publish(phase="loading")
    with _started(job, context) as (data, plan):
        config, steps = settle(job.config, plan), job.steps
        train = config.train
        ids = epoch_order(len(data.train), train.seed, 0)[: steps * train.batch_size]
        x, target = data.train.fetch(ids, 0)
        dtype = torch.float64 if train.precision == "fp64" else torch.float32
        # lr ≥ 0.1: at smaller ones a parameter's change would drown in the parameter's own rounding.
        optimizer = replace(config.optimizer, lr=max(config.optimizer.lr, 0.1))
        trial = Trial(
            _images(x, data, dtype), target, train.batch_size, train.bn_batch_size, train.accumulation, steps,
            train.seed, train.precision, config.mesh.execution, make_loss(config), optimizer, make_penalty(config),
            config.mesh.memory_format, config.mesh.wire, config.mesh.overlap, config.mesh.recompute,
            config.mesh.chunks, config.mesh.compile,
        )  # fmt: skip
        mesh = make_mesh(plan.data, plan.branch, torch.device(context.device).type)

        def on_step(step: int, num_steps: int) -> None:
            context.publish(phase="comparing", step=step, num_steps=num_steps)

        report = verify_plan(
            make_network(config, data), plan, mesh, trial, device=context.device, on_step=on_step
        )
        context.publish(phase="done", step=steps)
        return {
            "max_relative_difference": report.max_relative_difference,
            "worst": report.worst,
            "by_kind": report.by_kind,
            "num_compared": report.num_compared,
            "steps": steps,
        }


def _images(x: Tensor, data: DataBundle, dtype: torch.dtype) -> Tensor:
    return normalise(x, data.normalisation, dtype)


@contextmanager
def _started(job: Job, context: WorkerContext, joined: bool = True) -> Iterator[tuple[DataBundle, Plan]]:
    """A worker's common beginning and end: the user's folder, the dataset, the process group, the plan.

    joined: False where the job's target forms its process group itself.
    """
    if Path(job.folder).is_dir():  # another host may not have it
        os.chdir(job.folder)
        if job.folder not in sys.path:
            sys.path.insert(0, job.folder)
    data = make_data(job.config)
    try:
        launch, precision = job.config.launch, job.config.train.precision
        with process_group(context, launch.timeout_s, precision) if joined else nullcontext():
            yield data, job.plan or _agreed_plan(job, data, context)
    finally:
        data.close()


def _agreed_plan(job: Job, data: DataBundle, context: WorkerContext) -> Plan:
    """The plan over ranks that somebody else has placed: rank r is where it is. An automatic one is found here."""
    config, cluster = job.config, Cluster(_devices(context))
    spec = spec_of(prepare(make_network(config, data)))
    is_auto = auto_partial(config)[0]
    plan = (provisional_plan if is_auto else make_plan)(config, spec, cluster)
    if plan.world_size != context.world_size:
        raise PlanError(
            f"the plan is for {plan.world_size} ranks ({plan.data}x{plan.branch}), {context.world_size} were started: "
            "start as many, or change --mesh"
        )
    names = cluster.names
    placed = tuple(tuple(names[d * plan.branch : (d + 1) * plan.branch]) for d in range(plan.data))
    plan = replace(plan, devices=placed)
    if not is_auto:
        return plan
    outcome = _automatic(job, settle(config, plan), data, plan, context)
    plan = parse_plan(outcome["plan"]).resolve(spec)
    leave_meshes(but=make_mesh(plan.data, plan.branch, torch.device(context.device).type))
    return plan
