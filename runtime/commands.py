"""What the command line's verbs do. Each prints through `console` and returns the plain data of `--json`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from anabranch.blocks import build, count
from anabranch.blocks import models as model_names
from anabranch.blocks.convert import prepare
from anabranch.cluster import RayRequest, WorkerContext, connect, discover, ray_calls, run_on_ray
from anabranch.runtime.assemble import local_cluster, make_data, make_loss, make_network, make_plan, settle
from anabranch.runtime.checkpoint import Checkpoints
from anabranch.runtime.config import Config
from anabranch.runtime.errors import ConfigError
from anabranch.runtime.export import export_state
from anabranch.runtime.interrupts import Interrupted, Stopped, Terminated
from anabranch.runtime.launch import choose_launcher, run_here
from anabranch.runtime.model_spec import spec_of
from anabranch.runtime.progress import RunProgress, print_placement
from anabranch.runtime.run_folder import RunFolder
from anabranch.runtime.worker import Job, eval_worker, train_worker, verify_worker
from anabranch.schedulers import ModelSpec, Plan

Target = Callable[[WorkerContext], dict[str, Any]]


def train(config: Config, console: Console) -> dict[str, Any] | None:
    """Trains; test_accuracy, test_loss, train_seconds, median_step_s, start_to_first_step_s, steps, run_dir, plan.

    Raises Interrupted or Terminated when told to stop, after the checkpoint.
    """
    with _Launch(config, console) as launch:
        config, checkpoint = _resumed(launch.config, console)
        launch.config = config
        if launch.plan is not None:
            folder = RunFolder.create(launch.config, launch.plan)
            launch.config = replace(config, launch=replace(config.launch, run_dir=str(folder.path)))
            print_placement(console, launch.plan, launch.model)
            console.print(f"run folder: {folder.path}", highlight=False, soft_wrap=True)
        job = launch.job(checkpoint)
        result = launch.run(partial(train_worker, job), "training")
    if result is None:
        return None
    begun = result.pop("first_step_at")
    result["start_to_first_step_s"] = begun - _process_start() if begun else None
    if reason := result.pop("stopped"):
        _raise_stopped(reason, result)
    _print_result(console, result)
    return result


def evaluate(run: Path, checkpoint: str, console: Console) -> dict[str, Any] | None:
    """Accuracy of a run's checkpoint on the test samples: test_accuracy, test_loss, checkpoint."""
    folder = RunFolder.open(run)
    found = folder.checkpoint(checkpoint, partial(_warn, console))
    config = folder.config()
    if choose_launcher() != "env":  # one process is enough, whatever the run had
        config = replace(
            config,
            launch=replace(config.launch, launcher="none"),
            mesh=replace(config.mesh, num_workers=1, shape="1x1", plan="data"),
        )
    with _Launch(config, console) as launch:
        result = launch.run(partial(eval_worker, launch.job(str(found.path))), "evaluating")
    if result is None:
        return None
    console.print(f"test accuracy {100 * result['test_accuracy']:.2f} %, test loss {result['test_loss']:.4f}")
    return {**result, "checkpoint": str(found.path)}


def verify(
    config: Config, steps: int, float64: bool, tolerance: float, console: Console
) -> dict[str, Any] | None:
    """Compares the plan with one device: max_relative_difference, worst, by_kind, num_compared."""
    if steps < 1:
        raise ConfigError(f"--steps is {steps}: compare at least 1")
    if float64:
        config = replace(config, train=replace(config.train, precision="fp64"))
    with _Launch(config, console) as launch:
        if launch.plan is not None:
            print_placement(console, launch.plan, launch.model)
        result = launch.run(partial(verify_worker, launch.job(), steps), "verifying")
    if result is None:
        return None
    passed = result["max_relative_difference"] <= tolerance
    console.print(
        f"{'same function' if passed else 'NOT the same function'}: largest relative difference "
        f"{result['max_relative_difference']:.2e} (tolerance {tolerance:g}), {result['worst']}",
        highlight=False,
        soft_wrap=True,
    )
    return {**result, "tolerance": tolerance, "passed": passed}


def models(console: Console) -> dict[str, Any]:
    """The ready networks: models, a list of name, params, macs, num_branches, log2_paths."""
    table = Table("name", "params", "multiply-adds", "branches", "paths", box=None, pad_edge=False)
    rows = []
    for name in model_names():
        with torch.device("meta"):
            counted = count(build(name))
        rows.append(
            {
                "name": name,
                "params": counted.params,
                "macs": counted.macs,
                "num_branches": counted.num_branches,
                "log2_paths": counted.log2_paths,
            }
        )
        table.add_row(
            name, f"{counted.params:,}", f"{counted.macs:,}", str(counted.num_branches), f"2^{counted.log2_paths}"
        )
    console.print(table)
    return {"models": rows}


def export(run: Path, output: Path, checkpoint: str, console: Console) -> dict[str, Any]:
    """Writes a checkpoint as the plain state dict of the one-device network: output, num_tensors, bytes."""
    folder = RunFolder.open(run)
    found = folder.checkpoint(checkpoint, partial(_warn, console))
    config = folder.config()
    network = prepare(make_network(config, make_data(config)))
    result = export_state(found, network, output)
    console.print(f"{found.path.name} written to {output}", highlight=False, soft_wrap=True)
    return {**result, "checkpoint": str(found.path)}


class _Launch:
    """The way from a configuration to running workers: everything that can be wrong is told before they start."""

    def __init__(self, config: Config, console: Console) -> None:
        self.config, self.console = config, console
        self.launcher = choose_launcher(config.launch.launcher)
        self.plan: Plan | None = None
        self._stack = ExitStack()

    def __enter__(self) -> _Launch:
        config = self.config
        if self.launcher == "ray":
            self._stack.enter_context(connect(config.launch.address))
        try:
            data = make_data(config)
            try:
                make_loss(config)
                self.model: ModelSpec = spec_of(prepare(make_network(config, data, meta=True)))
                self.console.print(str(data), highlight=False)
            finally:
                data.close()
            if self.launcher == "ray":
                self.plan = make_plan(config, self.model, self._cluster())
            elif self.launcher == "none":
                if config.mesh.num_workers > 1:
                    raise ConfigError(
                        f"mesh.num_workers is {config.mesh.num_workers}, launcher none runs one: use --launcher ray"
                    )
                self.plan = make_plan(config, self.model, local_cluster(1, "localhost"))
            if self.plan is not None:
                self.config = settle(config, self.plan)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _cluster(self) -> Any:
        """The cluster's devices; without GPUs and without a word from the user, two workers' places."""
        cluster = discover(self.config.launch.cpus_per_worker)
        mesh = self.config.mesh
        if cluster.devices[0].kind == "cpu" and not mesh.num_workers and not mesh.shape and mesh.plan.find(".") < 0:
            return replace(cluster, devices=cluster.devices[:2])
        return cluster

    def job(self, checkpoint: str = "") -> Job:
        """What the workers are told."""
        return Job(self.config, self.plan, self.config.launch.run_dir, checkpoint, str(Path.cwd()))

    def run(self, target: Target, what: str) -> dict[str, Any] | None:
        """Runs the target on all ranks, showing progress; rank 0's result, None on the other ranks of torchrun."""
        launch = self.config.launch
        quiet = int(os.environ.get("RANK", "0")) > 0 and self.launcher == "env"
        with RunProgress(Console(quiet=True) if quiet else self.console, what) as progress:
            if self.launcher == "ray":
                assert self.plan is not None, "made with the cluster"
                request = RayRequest(
                    mesh=(self.plan.data, self.plan.branch),
                    use_gpu=self._uses_gpus(),
                    devices=self.plan.devices,
                    address=launch.address,
                    backend=launch.backend,
                    port=launch.port,
                    cpus_per_worker=launch.cpus_per_worker,
                    timeout_s=launch.timeout_s,
                )
                results = run_on_ray(target, request, progress.watch)
                return {**results[0], "ray_calls": ray_calls()}
            result = run_here(target, progress.watch, self.launcher, backend=launch.backend, port=launch.port)
            return None if quiet else result

    def _uses_gpus(self) -> bool:
        return discover(self.config.launch.cpus_per_worker).devices[0].kind != "cpu"


def _resumed(config: Config, console: Console) -> tuple[Config, str]:
    """The checkpoint that the run goes on from ("" for none), and the configuration with the folder it goes on in."""
    wanted, given = config.checkpoint.resume, config.launch.run_dir
    if not wanted:
        if given and Checkpoints(Path(given)).newest() is not None:
            raise ConfigError(
                f"launch.run_dir {given} holds a run already: go on with it (--resume {given}), or choose another folder"
            )
        return config, ""
    if wanted == "auto":
        if not given:
            raise ConfigError('checkpoint.resume is "auto", which looks in launch.run_dir: give --run-dir')
        newest = Checkpoints(Path(given)).newest(on_bad=partial(_warn, console))
        checkpoint = newest
    else:
        folder = RunFolder.open(Path(wanted))
        checkpoint = folder.checkpoint("", partial(_warn, console))
        config = replace(config, launch=replace(config.launch, run_dir=given or str(folder.path)))
    if checkpoint is None:
        return config, ""
    console.print(f"going on from {checkpoint.path} (step {checkpoint.position['step']})", highlight=False, soft_wrap=True)
    return config, str(checkpoint.path)


def _raise_stopped(reason: str, result: dict[str, Any]) -> None:
    kind: type[Stopped] = Terminated if reason == "terminate" else Interrupted
    raise kind(
        f"stopped after step {result['steps']}, checkpoint saved; go on with: anabranch train --resume {result['run_dir']}",
        result["run_dir"],
    )


def _print_result(console: Console, result: dict[str, Any]) -> None:
    if "test_accuracy" in result:
        console.print(f"test accuracy {100 * result['test_accuracy']:.2f} %", highlight=False)
    if result["median_step_s"] is not None:
        console.print(
            f"{result['steps']} steps in {result['train_seconds']:.1f} s, median {1e3 * result['median_step_s']:.1f} ms; "
            f"first step done {result['start_to_first_step_s']:.1f} s after the start",
            highlight=False,
        )
    console.print(f"run folder: {result['run_dir']}", highlight=False, soft_wrap=True)


def _warn(console: Console, message: str) -> None:
    console.print(f"warning: {message}", style="yellow", highlight=False, soft_wrap=True)


def _process_start() -> float:
    """When this process began, in seconds of the system clock."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return time.time() - (uptime - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):  # no Linux: from here on
        return _IMPORTED


_IMPORTED = time.time()
