"""The way from a configuration to running workers: everything that can be wrong is told before they start."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from anabranch.cluster import (
    RayRequest,
    Stop,
    WorkerError,
    connect,
    discover,
    load_ray,
    ray_calls,
    run_on_ray,
)
from anabranch.cluster.doctor import is_remote, preflight
from anabranch.runtime.config import Config
from anabranch.runtime.config_rules import is_plan_file, mesh_axes
from anabranch.runtime.doctor_command import run_folder
from anabranch.runtime.errors import ConfigError
from anabranch.runtime.interrupts import stopped_by
from anabranch.runtime.job import Job, Kind
from anabranch.runtime.job_line import check_address, outlive_note
from anabranch.runtime.launch import choose_launcher, leads, run_here
from anabranch.runtime.numerics import numerics
from anabranch.runtime.progress import RunProgress
from anabranch.runtime.recovery_policy import check_replicas_wanted, recovery_of
from anabranch.runtime.redact import redacted
from anabranch.runtime.run_record import RunRecord
from anabranch.schedulers import Cluster, ModelSpec, Plan, parse_plan
from anabranch.schedulers.cost_file import parse_costs, read_costs
from anabranch.schedulers.costs import Costs
from anabranch.schedulers.registry import make_request
from anabranch.schedulers.wording import first_few

if TYPE_CHECKING:
    from torch import nn

    from anabranch.runtime.run_folder import RunFolder
    from anabranch.schedulers.plan_file import PinRule


class Driver:
    """Within its context the configuration is checked and settled, the plan made and the cluster connected.

    config: settled where there is a plan. plan: None under torchrun and srun, whose ranks make it together; where
    `is_auto`, only a provisional one before `find_plan`. cluster: the plan's devices, by rank. model: what the plan
    places. network: the one-device network, for checks. num_train: training samples. last_step: how many steps the run
    has. shares_folder: every worker writes into the run's folder.
    """

    plan: Plan | None = None
    cluster: Cluster | None = None
    costs: Costs | None = None  # by which an automatic plan was found
    is_auto = False
    _asks_devices = False  # a person said which; else only their hosts count
    _pins: tuple[PinRule, ...] = ()
    model: ModelSpec
    network: nn.Module
    num_train: int
    last_step: int

    def __init__(self, config: Config, console: Console, *, shares_folder: bool = False) -> None:
        self.config, self.console, self._shares_folder = config, console, shares_folder
        # An address is Ray's, also where srun started this.
        self.launcher = choose_launcher(config.launch.launcher or ("ray" if config.launch.address else ""))
        self.failures: list[dict[str, Any]] = []  # that training was recovered from
        self.mesh_changes: list[dict[str, Any]] = []  # replicas left out and taken in again
        self._replans = False  # a run that has begun, and whose record goes on
        self._stack = ExitStack()

    def __enter__(self) -> Driver:
        address = self.config.launch.address
        if self.launcher == "ray":
            check_address(address, sys.argv[1:])
            if note := outlive_note(address, sys.argv[1:]):
                self.console.print(note, highlight=False, soft_wrap=True, markup=False)
        console = self.console if leads(self.launcher) else Console(quiet=True)
        try:
            with RunProgress(console, "starting") as progress, ThreadPoolExecutor(1) as beside:
                progress.watch([{"phase": "Ray, torch" if self.launcher == "ray" else "torch"}])
                if self.launcher == "ray":
                    load_ray()
                # Ray's processes take seconds to start, torch to import: both at once. Not the two imports, which
                # would wait for each other.
                prepared = beside.submit(self._prepare)
                if self.launcher == "ray":
                    self._stack.enter_context(connect(address))
                prepared.result()
                progress.watch([{"phase": "checking the plan and its hosts"}])
                self._make_plan()
                self._check_hosts()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _prepare(self) -> None:
        """What the configuration names is there and can be built."""
        from anabranch.blocks.convert import prepare
        from anabranch.runtime.assemble import make_data, make_loss, make_network, make_penalty
        from anabranch.runtime.lr_schedule import last_step
        from anabranch.runtime.model_spec import spec_of
        from anabranch.runtime.regularizer import penalty_warnings

        data = make_data(self.config)
        self.num_train = len(data.train)
        self.last_step = last_step(self.config.train, self.num_train)
        try:
            make_loss(self.config)
            self.network = prepare(make_network(self.config, data))
            self.model = spec_of(self.network)
            self.console.print(str(data), highlight=False)
            for warning in penalty_warnings(self.network, make_penalty(self.config)):
                self.console.print(f"warning: {warning}", style="yellow", highlight=False, soft_wrap=True)
        finally:
            data.close()

    def _make_plan(self) -> None:
        from anabranch.runtime.assemble import (
            AUTO,
            auto_partial,
            local_cluster,
            make_plan,
            provisional_plan,
            settle,
        )

        config = self.config
        if self.launcher == "env":
            return
        if self.launcher == "none" and config.mesh.num_workers > 1:
            raise ConfigError(
                f"mesh.num_workers is {config.mesh.num_workers}, launcher none runs one: use --launcher ray"
            )
        cluster = self._cluster() if self.launcher == "ray" else local_cluster(1, "localhost")
        self.is_auto, file = auto_partial(config)
        if file is not None:
            self._asks_devices, self._pins = file.asks_devices, file.pins
        # what planning anew asks for, where a plan that was found before is gone on with
        self._asked = config.mesh if self.is_auto else replace(config.mesh, plan=AUTO, shape="")
        self.plan = (provisional_plan if self.is_auto else make_plan)(config, self.model, cluster)
        check_replicas_wanted(config, self.plan)
        names = [name for row in self.plan.devices or () for name in row]
        self.cluster = replace(cluster, devices=tuple(cluster.by_name[name] for name in names))
        if file is not None and file.on(cluster).devices != file.devices:
            self.console.print(
                f"the devices of {file.source} are not free here: the run is on {first_few(names)}",
                highlight=False,
                soft_wrap=True,
            )
        settled = settle(config, self.plan)
        self.config = replace(settled, mesh=config.mesh) if self.is_auto else settled
        if self.is_auto:
            self._check_request(settled)

    def _check_request(self, settled: Config) -> None:
        """What a plan file settles and a cost file holds is this network's, as far as can be told without workers."""
        from anabranch.runtime.assemble import auto_partial

        assert self.cluster is not None, "with a plan"
        assert self.plan is not None, "with a plan"
        mesh = settled.mesh
        make_request(
            self.model, self.cluster, mesh=mesh_axes(self.config.mesh.shape), partial=auto_partial(settled)[1]
        )
        if mesh.costs:
            from anabranch.runtime.measure import cost_key

            costs = read_costs(mesh.costs)
            costs.check(self.model, frozenset(d.kind for d in self.cluster.devices), mesh.costs)
            costs.check_key(cost_key(self.network, settled), mesh.costs)

    def _check_hosts(self) -> None:
        """What `anabranch doctor` finds quickly, on the plan's hosts of a cluster that was there before."""
        launch = self.config.launch
        if self.launcher == "ray" and self.cluster is not None and is_remote(launch.address):
            names = {device.host for device in self.cluster.devices}
            preflight(sorted(names), run_folder(launch.run_dir) if self._shares_folder else None)

    def find_plan(self) -> dict[str, Any] | None:
        """Measures, plans and times plans on the workers; from then on `plan` is the one chosen.

        What `automatic_plan` returns, but for the costs, which are in `costs`; None where there is nothing to choose
        (one worker), or no driver's choice. Raises Interrupted or Terminated when told to stop.
        """
        from anabranch.runtime.assemble import settle

        if self.plan is None or self.plan.world_size == 1:
            return None
        asked = self.config.mesh
        result = self.run("plan", "planning")
        assert result is not None, "with a driver"
        if reason := result.pop("stopped"):
            run_dir = self.config.launch.run_dir
            saved = f", the checkpoint is saved; go on with: anabranch train --resume {run_dir}"
            raise stopped_by(reason)(f"stopped while planning{saved if self._replans else ''}", run_dir)
        self.costs = parse_costs(result.pop("costs_json"), result["costs"])
        self.plan = parse_plan(result["plan"]).resolve(self.model, self.cluster)
        check_replicas_wanted(self.config, self.plan)
        self.config = settle(self.config, self.plan)
        self._asked = asked
        return result

    def plan_again(self) -> dict[str, Any] | None:
        """`find_plan` with costs measured anew, as it was asked for at first."""
        from anabranch.runtime.assemble import provisional_plan

        assert self.cluster is not None, "with a plan"
        self._replans = True
        self.config = replace(self.config, mesh=replace(self._asked, remeasure=True))
        self.plan = provisional_plan(self.config, self.model, self.cluster)
        return self.find_plan()

    def make_folder(self) -> RunFolder:
        """The run's folder, with its configuration and plan: a person's wishes are told from what was filled in."""
        from anabranch.runtime.run_folder import RunFolder

        assert self.plan is not None, "a driver's"
        return RunFolder.create(self.config, self.plan, filled_in=not self._asks_devices, pins=self._pins)

    def _cluster(self) -> Cluster:
        """The cluster's devices; without GPUs and without a word from the user, two workers' places."""
        cluster, mesh = discover(self.config.launch.cpus_per_worker), self.config.mesh
        self._uses_gpus = cluster.devices[0].kind != "cpu"
        if not (self._uses_gpus or mesh.num_workers or mesh.shape or is_plan_file(mesh.plan)):
            return replace(cluster, devices=cluster.devices[:2])
        return cluster

    def run(self, kind: Kind, what: str, *, checkpoint: str = "", steps: int = 0) -> dict[str, Any] | None:
        """Runs the job on all ranks, showing progress; rank 0's result, None on the other ranks of torchrun."""
        if kind in ("train", "gross") and self.config.mesh.replan:
            self._check_replan(kind)
        launch = self.config.launch
        job = Job(
            kind, self.config, self.plan, launch.run_dir, checkpoint, str(Path.cwd()), steps, self.cluster
        )
        other = not leads(self.launcher)
        record = None
        if (kind in ("train", "profile", "gross") or self._replans) and not other:
            record = RunRecord(launch.run_dir, what, launch.address)
            record.note(numerics=numerics(self.config.train.precision))
            if "://" in checkpoint:
                record.note(checkpoint=Path(checkpoint).name)
        with RunProgress(Console(quiet=True) if other else self.console, what, record) as progress:
            if self.launcher != "ray":
                result = run_here(
                    job, progress.watch, self.launcher, backend=launch.backend, port=launch.port
                )
                progress.stopped = result.get("stopped")
                return None if other else result
            assert self.plan is not None, "made with the cluster"
            request = RayRequest(
                mesh=(self.plan.data, self.plan.branch),
                use_gpu=self._uses_gpus,
                devices=self.plan.devices,
                any_gpu=not self._asks_devices,
                address=launch.address,
                backend=launch.backend,
                port=launch.port,
                cpus_per_worker=launch.cpus_per_worker,
                timeout_s=launch.timeout_s,
            )
            stop = Stop()
            if kind != "train":
                result = run_on_ray(job, request, progress.watch, stop=stop)[0]
                if kind == "plan":
                    result = {**result, "stopped": stop.reason}
                progress.stopped = result.get("stopped") or ("replan" if kind == "plan" else None)
                return {**result, "ray_calls": dict(ray_calls)}

            def told(event: dict[str, Any]) -> None:
                text = event.pop("text")
                if text:
                    self.console.print(
                        f"warning: {text}", style="yellow", highlight=False, soft_wrap=True, markup=False
                    )
                if "rank" in event:
                    self.failures.append(event)
                if "mesh" in event:
                    self.mesh_changes.append(event)
                    if record:
                        record.note(mesh=event["mesh"], mesh_changes=self.mesh_changes)
                # a full disk: it was printed, and the run goes on
                with (
                    suppress(OSError),
                    (Path(launch.run_dir) / "failures.jsonl").open("a", encoding="utf-8") as file,
                ):
                    file.write(json.dumps(redacted({**event, "text": text})) + "\n")

            recovery = recovery_of(self.config, self.plan, checkpoint, told)
            try:
                result = run_on_ray(job, request, progress.watch, recovery, stop)[0]
            except WorkerError as error:
                raise _with_remedy(error, self.failures, self.config) from error.__cause__
            if result["stopped"] == "replan":  # who is told to stop meanwhile does not plan
                result = {**result, "stopped": stop.reason or "replan"}
            progress.stopped = result["stopped"]
            found = {"failures": self.failures, "mesh_changes": self.mesh_changes}
            return {**result, **found, "ray_calls": dict(ray_calls)}

    def _check_replan(self, kind: Kind) -> None:
        """Raises ConfigError where nobody could plan anew; where there is nothing to plan, says so."""
        if self.launcher == "env":
            raise ConfigError(
                "mesh.replan is true, and torchrun or srun started the ranks: only a run under Ray is planned anew; "
                "make it false, or take --launcher ray"
            )
        assert self.plan is not None, "with a driver"
        if kind == "gross" or self.plan.world_size == 1:
            why = "gross keeps its plan" if kind == "gross" else "one worker has nothing to plan"
            self.console.print(f"warning: mesh.replan is ignored: {why}", style="yellow", highlight=False)
            self.config = replace(self.config, mesh=replace(self.config.mesh, replan=False))


def _with_remedy(error: WorkerError, failures: list[dict[str, Any]], config: Config) -> WorkerError:
    """The same with what was tried before, and how to go on."""
    from anabranch.runtime.manifest import finished
    from anabranch.runtime.storage import open_folder

    text, run_dir = str(error), config.launch.run_dir
    if num := sum(failure["action"] != "ended" for failure in failures):
        text += f"\nBefore this {num} lost workers were replaced (launch.max_failures)."
    with suppress(OSError):  # a service that does not answer: the error itself says more
        if finished(open_folder(config.checkpoint.url or Path(run_dir) / "checkpoints")):
            text += f"\nGo on from the last checkpoint with: anabranch train --resume {run_dir}"
    return WorkerError(text, error.worker_failures)
