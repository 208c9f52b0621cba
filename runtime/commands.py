"""What the command line's verbs do. Each prints through `console` and returns the plain data of `--json`.

torch is imported inside: the driver starts Ray meanwhile.
"""

from __future__ import annotations

import importlib.util
import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from anabranch.runtime.config import Config, LaunchConfig, ProfileConfig
from anabranch.runtime.driver import Driver
from anabranch.runtime.errors import ConfigError
from anabranch.runtime.interrupts import stopped_by
from anabranch.runtime.launch import choose_launcher, leads
from anabranch.runtime.numerics import is_exact
from anabranch.runtime.plan_report import print_candidates
from anabranch.runtime.position import check_steps
from anabranch.runtime.progress import print_placement, print_status
from anabranch.runtime.run_lock import RunLock
from anabranch.runtime.unended_run import begins_here, go_on

if TYPE_CHECKING:
    from anabranch.runtime.checkpoint import Checkpoint


def train(config: Config, console: Console) -> dict[str, Any] | None:
    """Trains; test_accuracy, test_loss, train_seconds, median_step_s, start_to_first_step_s, steps, run_dir,
    unreadable (file: why), failures (lost workers: rank, host, cause, step, action, seconds, …), mesh_changes
    (replicas left out and taken in again: mesh, before, hosts, step, …).

    Raises Interrupted or Terminated when told to stop, after the checkpoint.
    """
    own_folder = not config.checkpoint.url  # else nothing but rank 0's files are in it
    with _locked(config) as lock, Driver(go_on(config), console, shares_folder=own_folder) as driver:
        driver.config, checkpoint = _resumed(driver.config, console)
        if checkpoint is not None:
            checkpoint.check(driver.network)
            check_steps(checkpoint.position, driver.config.train.batch_size, driver.num_train)
        if driver.config.profile.basis_every_steps:
            from anabranch.runtime.basis_record import check_recordable

            check_recordable(driver.network)
        audit = driver.find_plan() if driver.is_auto else None
        if driver.plan is not None:
            folder = driver.make_folder()
            lock.take(folder.path)
            driver.config = replace(
                driver.config, launch=replace(driver.config.launch, run_dir=str(folder.path))
            )
            if audit is not None:
                print_candidates(console, audit)
                (folder.path / "audit.json").write_text(json.dumps(audit, indent=1) + "\n")
            print_placement(console, driver.plan, driver.model)
            console.print(f"run folder: {folder.path}", highlight=False, soft_wrap=True)
        path = str(checkpoint.folder) if checkpoint else ""
        while (result := driver.run("train", "training", checkpoint=path)) and result["stopped"] == "replan":
            audit = driver.plan_again()
            assert audit is not None, "the plan is automatic"
            assert driver.plan is not None, "with a driver"
            print_candidates(console, audit)
            folder = driver.make_folder()
            found = folder.checkpoint()
            (folder.path / f"audit-{found.folder.name}.json").write_text(json.dumps(audit, indent=1) + "\n")
            path = str(found.folder)
    if result is None:
        return None
    result = {"failures": [], "mesh_changes": [], **result}  # only Ray's workers are replaced
    begun = result.pop("first_step_at")
    result["start_to_first_step_s"] = begun - _process_start() if begun else None
    if reason := result.pop("stopped"):
        _raise_stopped(reason, result)
    _print_result(console, result)
    return result


def evaluate(
    run: Path, checkpoint: str, console: Console, *, crops: int = 0, data_path: str = ""
) -> dict[str, Any] | None:
    """Accuracy of a run's checkpoint on the test samples: test_accuracy, test_loss, checkpoint, crops, unreadable.

    crops: of each sample, 1 or 10; 0: as the run was configured. data_path: where the dataset is; "": where it was.
    """
    from anabranch.runtime.run_folder import RunFolder

    folder = RunFolder.open(run)
    found = folder.checkpoint(checkpoint, partial(_warn, console))
    config = _with_data(folder.config(), data_path)
    # Where and how the run ran says nothing here: one process is enough, or those that torchrun started.
    config = replace(
        config,
        data=replace(config.data, eval_crops=crops or config.data.eval_crops),
        mesh=replace(config.mesh, num_workers=0, shape="", plan="data", replan=False),
        launch=LaunchConfig(launcher="env" if choose_launcher() == "env" else "none"),
        profile=ProfileConfig(),
    )
    config.check()
    with Driver(config, console) as driver:
        result = driver.run("eval", "evaluating", checkpoint=str(found.folder))
    if result is None:
        return None
    console.print(f"test accuracy {100 * result['test_accuracy']:.2f} %, test loss {result['test_loss']:.4f}")
    _warn_unreadable(console, result["unreadable"])
    return {**result, "checkpoint": str(found.folder), "crops": config.data.eval_crops}


def verify(
    config: Config, steps: int, float64: bool, tolerance: float, console: Console
) -> dict[str, Any] | None:
    """Compares the plan with one device: max_relative_difference, worst, by_kind, num_compared."""
    if steps < 1:
        raise ConfigError(f"--steps is {steps}: compare at least 1")
    if float64:
        config = replace(config, train=replace(config.train, precision="fp64"))
    with Driver(config, console) as driver:
        if driver.is_auto:
            driver.find_plan()
        if driver.plan is not None:
            print_placement(console, driver.plan, driver.model)
        result = driver.run("verify", "verifying", steps=steps)
    if result is None:
        return None
    passed = result["max_relative_difference"] <= tolerance
    exact = is_exact(config.train.precision, config.mesh.wire)
    verdict = "NOT the same function" if not passed else "same function" if exact else "same up to rounding"
    console.print(
        f"{verdict}: largest relative difference {result['max_relative_difference']:.2e} "
        f"(tolerance {tolerance:g}), {result['worst']}",
        highlight=False,
        soft_wrap=True,
    )
    if not passed and config.train.precision != "fp64":
        text = "few samples to a BatchNorm group round as much by themselves: --float64 tells an error from rounding"
        console.print(text, highlight=False, soft_wrap=True)
    return {**result, "tolerance": tolerance, "passed": passed}


def profile(config: Config, steps: int, console: Console) -> dict[str, Any] | None:
    """Profiles a run's first steps: step_s, stragglers, suggestion, unattributed, overhead, files, run_dir (see
    `profile_folder`); the report is that of launch.run_dir, with the curves of a run that trained there.

    Raises Interrupted or Terminated when told to stop, with nothing written.
    """
    if steps < 1:
        raise ConfigError(f"--steps is {steps}: profile at least 1")
    from anabranch.runtime.profile_file import profile_folder

    # a run's configuration is profiled, nothing is gone on with
    config = replace(config, checkpoint=replace(config.checkpoint, resume=""))
    run = Path(config.launch.run_dir) if config.launch.run_dir else None
    if run is not None and profile_folder(run) != run:
        config = replace(config, launch=replace(config.launch, run_dir=str(profile_folder(run))))
    with _locked(config) as lock, Driver(config, console, shares_folder=True) as driver:
        from anabranch.runtime.profile_command import print_result
        from anabranch.runtime.profile_steps import check_steps

        check_steps(steps, driver.last_step)
        audit = driver.find_plan() if driver.is_auto else None
        if driver.plan is not None:
            folder = driver.make_folder()
            lock.take(folder.path)
            mesh = replace(driver.config.mesh, costs=audit["costs"] if audit else driver.config.mesh.costs)
            launch = replace(driver.config.launch, run_dir=str(folder.path))
            driver.config = replace(driver.config, launch=launch, mesh=mesh)
            if audit is not None:
                (folder.path / "audit.json").write_text(json.dumps(audit, indent=1) + "\n")
            print_placement(console, driver.plan, driver.model)
        result = driver.run("profile", "profiling", steps=steps)
    if result is None:
        return None
    if reason := result.get("stopped"):
        raise stopped_by(reason)(
            f"stopped before all {steps} steps were measured, no profile was written: run it again, "
            "or with fewer --steps",
            driver.config.launch.run_dir,
        )
    return print_result(console, result, run)


def report(runs: list[Path], output: Path | None, png: bool, console: Console) -> dict[str, Any]:
    """Makes report.html of runs' files: output, runs, notes, pictures."""
    from anabranch.runtime.report import write_report

    result = write_report(runs, output, png=png)
    for note in result["notes"]:
        _warn(console, note)
    for path in (result["output"], *result["pictures"]):
        console.print(f"written: {path}", highlight=False, soft_wrap=True)
    return result


def gross(config: Config, console: Console) -> dict[str, Any] | None:
    """Trains and searches all group sizes; what `run_gross` returns.

    A folder that holds such a run is gone on with. Raises Interrupted or Terminated when told to stop.
    """
    resume = config.checkpoint.resume
    if config.checkpoint.url:
        raise ConfigError("checkpoint.url is set: gross keeps its stages in the run's folder, leave it empty")
    config = replace(
        config,
        launch=replace(
            config.launch, run_dir=resume if resume not in ("", "auto") else config.launch.run_dir
        ),
        checkpoint=replace(config.checkpoint, resume=""),
    )
    if not importlib.util.find_spec("matplotlib"):
        console.print("without matplotlib there will be no plot: pip install matplotlib", style="yellow")
    with _locked(config) as lock, Driver(config, console, shares_folder=True) as driver:
        from anabranch.runtime.gross_report import print_table
        from anabranch.runtime.gross_space import check_search

        check_search(driver.network, driver.config)
        if driver.plan is not None:
            folder = driver.make_folder()
            lock.take(folder.path)
            driver.config = replace(
                driver.config, launch=replace(driver.config.launch, run_dir=str(folder.path))
            )
            console.print(f"run folder: {folder.path}", highlight=False, soft_wrap=True)
        result = driver.run("gross", "searching")
    if result is None:
        return None
    if reason := result.pop("stopped"):
        again = f"go on with: anabranch gross --resume {result['run_dir']}"
        raise stopped_by(reason)(f"stopped, what was done is saved; {again}", result["run_dir"])
    print_table(console, result)
    plot = result["plot"] or "none, matplotlib is not installed: install it and run the command again"
    console.print(f"plot of accuracy against multiply-adds: {plot}", highlight=False, soft_wrap=True)
    console.print(f"run folder: {result['run_dir']}", highlight=False, soft_wrap=True)
    return result


def plan(
    config: Config,
    devices: str,
    interconnect: str,
    cluster: str,
    explain: bool,
    output: Path | None,
    console: Console,
) -> dict[str, Any] | None:
    """Plans, for the cluster that stands or for machines that are not here; see `plan_command`.

    output: None: plan.toml, which may be the user's own: it is not replaced.
    """
    from anabranch.runtime.plan_command import plan_elsewhere, plan_here

    if output is None:
        output = Path("plan.toml")
        if output.exists():
            raise ConfigError(
                "plan.toml is here already: name another file with --output, or give --output plan.toml to replace it"
            )
    if not output.parent.is_dir():
        raise ConfigError(
            f"{output} cannot be written: there is no folder {output.parent}; give another --output"
        )
    if devices and cluster:
        raise ConfigError("--devices and --cluster both name machines: give one of them")
    if interconnect and not devices:
        raise ConfigError("--interconnect is for --devices: give both, or [links] in the cluster file")
    if devices or cluster:
        return plan_elsewhere(config, devices, interconnect, cluster, explain, output, console)
    return plan_here(config, explain, output, console)


def doctor(config: Config, console: Console) -> dict[str, Any]:
    """Says what would stop a run on the cluster; see `doctor_command`."""
    from anabranch.runtime.doctor_command import doctor as examine

    return examine(config, console)


def status(run: Path, console: Console) -> dict[str, Any]:
    """Says where a run stands; see `run_record.run_status`."""
    from anabranch.runtime.run_record import run_status

    found = run_status(run)
    print_status(console, found)
    return found


def stop(run: Path, wait: bool, console: Console) -> dict[str, Any]:
    """Asks a run to save and end; see `run_record.request_stop`."""
    from anabranch.runtime.run_record import request_stop

    found = request_stop(run, wait)
    if wait:
        print_status(console, found)
    else:
        console.print(f"asked: {found['what']}, process {found['pid']} on {found['host']}", highlight=False)
    return found


def models(console: Console) -> dict[str, Any]:
    """The ready networks: models, a list of name, params, macs, num_branches, log2_paths."""
    import torch

    from anabranch.blocks import build, count
    from anabranch.blocks import models as model_names

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
            name,
            f"{counted.params:,}",
            f"{counted.macs:,}",
            str(counted.num_branches),
            f"2^{counted.log2_paths}",
        )
    console.print(table)
    return {"models": rows}


def export(
    run: Path, output: Path, checkpoint: str, console: Console, *, data_path: str = ""
) -> dict[str, Any]:
    """Writes a checkpoint as the plain state dict of the one-device network: output, num_tensors, bytes.

    data_path: where the dataset is; "": where it was.
    """
    from anabranch.blocks.convert import prepare
    from anabranch.runtime.assemble import make_data, make_network
    from anabranch.runtime.export import export_state
    from anabranch.runtime.run_folder import RunFolder

    folder = RunFolder.open(run)
    found = folder.checkpoint(checkpoint, partial(_warn, console))
    config = _with_data(folder.config(), data_path)
    data = make_data(config)
    network = prepare(make_network(config, data))
    data.close()
    result = export_state(found, network, output)
    console.print(f"{found.folder.name} written to {output}", highlight=False, soft_wrap=True)
    return {**result, "checkpoint": str(found.folder)}


def _with_data(config: Config, path: str) -> Config:
    return replace(config, data=replace(config.data, path=path or config.data.path))


@contextmanager
def _locked(config: Config) -> Iterator[RunLock]:
    """Locks the folder that is named, if one is, before anything starts; another is for the caller to lock.

    Under torchrun and srun rank 0 does it for all. A folder that stays empty (the input was wrong) goes again.
    """
    resume = config.checkpoint.resume
    given = config.launch.run_dir or (resume if resume != "auto" else "")
    path = Path(given).absolute()
    with ExitStack() as after, RunLock() as lock:
        if given and leads(config.launch.launcher):
            with suppress(OSError):  # RunFolder.create tells it
                if not path.exists():
                    path.mkdir(parents=True)
                    after.callback(_remove_if_empty, path)
            if path.is_dir():
                lock.take(path)
        yield lock


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _resumed(config: Config, console: Console) -> tuple[Config, Checkpoint | None]:
    """The checkpoint that the run goes on from, and the configuration with the folder it goes on in."""
    from anabranch.runtime.checkpoints import Checkpoints
    from anabranch.runtime.manifest import finished
    from anabranch.runtime.run_folder import RunFolder
    from anabranch.runtime.storage import open_folder

    wanted, given, url = config.checkpoint.resume, config.launch.run_dir, config.checkpoint.url
    if given and begins_here(config) and finished(open_folder(Path(given) / "checkpoints")):
        raise ConfigError(
            f"launch.run_dir {given} holds a run already: go on with it (--resume {given}), or choose another folder"
        )
    # also where this one begins from that run's: each would retire the other's
    if (
        url
        and begins_here(config)
        and Checkpoints(Path(given), url=url).newest(on_bad=partial(_warn, console))
    ):
        raise ConfigError(
            f"checkpoint.url {url} holds a run's checkpoints already: go on with it (--resume auto --run-dir DIR), "
            "or choose another URL"
        )
    if not wanted:
        return config, None
    checkpoint: Checkpoint | None
    if wanted == "auto":
        if not given:
            raise ConfigError('checkpoint.resume is "auto", which looks in launch.run_dir: give --run-dir')
        checkpoint = Checkpoints(Path(given), url=url).newest(on_bad=partial(_warn, console))
    else:
        folder = RunFolder.open(Path(wanted))
        checkpoint = folder.checkpoint("", partial(_warn, console))
        config = replace(config, launch=replace(config.launch, run_dir=given or str(folder.path)))
    if checkpoint is None:
        return config, None
    step = checkpoint.position["step"]
    console.print(f"going on from {checkpoint.folder} (step {step})", highlight=False, soft_wrap=True)
    return config, checkpoint


def _raise_stopped(reason: str, result: dict[str, Any]) -> None:
    raise stopped_by(reason)(
        f"stopped after step {result['steps']}, checkpoint saved; "
        f"go on with: anabranch train --resume {result['run_dir']}",
        result["run_dir"],
    )


def _print_result(console: Console, result: dict[str, Any]) -> None:
    if "test_accuracy" in result:
        console.print(f"test accuracy {100 * result['test_accuracy']:.2f} %", highlight=False)
    if result["median_step_s"] is not None:
        console.print(
            f"{result['steps']} steps in {result['train_seconds']:.1f} s, "
            f"median {1e3 * result['median_step_s']:.1f} ms; "
            f"first step done {result['start_to_first_step_s']:.1f} s after the start",
            highlight=False,
        )
    console.print(f"run folder: {result['run_dir']}", highlight=False, soft_wrap=True)
    _warn_unreadable(console, result["unreadable"])


def _warn_unreadable(console: Console, files: dict[str, str]) -> None:
    if files:
        first = "".join(f"\n  {file}: {why}" for file, why in sorted(files.items())[:10])
        more = "\n  …" if len(files) > 10 else ""
        _warn(console, f"{len(files)} images could not be read and were skipped:{first}{more}")


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
