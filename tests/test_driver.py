"""What the driver settles before workers start."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from anabranch.cluster import RayRequest, Stop
from anabranch.runtime import assemble, commands
from anabranch.runtime import driver as driver_module
from anabranch.runtime.cli import main
from anabranch.runtime.config import Config
from anabranch.runtime.driver import Driver
from anabranch.runtime.errors import ConfigError
from anabranch.runtime.interrupts import Interrupted, Terminated
from anabranch.runtime.job import Job, Kind
from anabranch.runtime.run_folder import RunFolder
from anabranch.runtime.run_record import run_status
from anabranch.schedulers import Cluster, Device, PlanError, read_plan
from anabranch.schedulers.cost_file import format_costs
from anabranch.schedulers.costs import Costs


def configured(**sections: dict[str, Any]) -> Config:
    """A small run in this process, with other fields."""
    return Config.from_dict({"model": {"options": {"depth": 8}}, "launch": {"launcher": "none"}}, sections)


PLAN = '[mesh]\ndata = 1\nbranch = 1\nscheduler = "data"\n'


@pytest.mark.parametrize(
    ("devices", "asks", "said"),
    [
        ("", False, ""),
        ('devices = [["localhost:0"]]\n', True, ""),
        ('devices = [["localhost:0"]]\nfilled_in = true\n', False, ""),
        ('devices = [["gone:0"]]\nfilled_in = true\n', False, "are not free here: the run is on localhost:0"),
    ],
)
def test_only_devices_that_a_person_wrote_are_exact(
    tmp_path: Path, devices: str, asks: bool, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of others the hosts are kept, where they are there, and the run's own plan says so."""
    (tmp_path / "plan.toml").write_text(PLAN + devices)
    requests: list[RayRequest] = []

    def run_on_ray(
        job: object, request: RayRequest, *others: object, **named: object
    ) -> list[dict[str, Any]]:
        requests.append(request)
        return [{}]

    monkeypatch.setattr(driver_module, "run_on_ray", run_on_ray)
    out = io.StringIO()
    with Driver(configured(mesh={"plan": str(tmp_path / "plan.toml")}), Console(file=out)) as driver:
        assert driver.plan is not None
        driver.launcher, driver._uses_gpus = "ray", True
        driver.run("eval", "evaluating")
        assert [(r.devices, r.any_gpu) for r in requests] == [((("localhost:0",),), not asks)]
        launch = replace(driver.config.launch, run_dir=str(tmp_path / "run"))
        driver.config = replace(driver.config, launch=launch)
        driver.make_folder()
    assert read_plan(tmp_path / "run/plan.toml").asks_devices is asks
    assert said in " ".join(out.getvalue().split())
    assert ("not free here" in out.getvalue()) is bool(said)


def test_asked_devices_that_are_gone_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text(PLAN + 'devices = [["gone:0"]]\n')
    with (
        pytest.raises(PlanError, match="devices gone:0 are not in the cluster"),
        Driver(configured(mesh={"plan": str(tmp_path / "plan.toml")}), Console(quiet=True)),
    ):
        pass


def test_pins_hold_where_a_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On other devices too, or it does not."""
    clusters = [Cluster((Device(a, 0, "cpu"), Device(b, 0, "cpu"))) for a, b in ("ab", "cb", "cd")]
    monkeypatch.setattr(assemble, "local_cluster", lambda *_: clusters.pop(0))
    pins = '[[pins]]\nmatch = "stage1.block1"\nbranch = 3\nhost = "b"\n'
    rule = '[[blocks]]\nmatch = "*"\nsplit = "branch"\ncounts = [2, 2]\n'
    (tmp_path / "plan.toml").write_text(f"[mesh]\ndata = 1\nbranch = 2\n{rule}{pins}")
    config = configured(mesh={"plan": str(tmp_path / "plan.toml")}, launch={"run_dir": str(tmp_path)})
    for devices in (("a:0", "b:0"), ("c:0", "b:0")):
        with Driver(config, Console(quiet=True)) as driver:
            assert driver.plan is not None
            assert driver.plan.devices == (devices,)
            driver.make_folder()
    with pytest.raises(PlanError, match='pinned to "b", the cluster has c, d'), Driver(config, Console()):
        pass


def test_its_devices_are_in_the_order_of_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the cluster names a host first that has less room: costs are read by rank."""
    uneven = Cluster(tuple(Device(*place, "cpu") for place in (("a", 0), ("b", 0), ("b", 1))))
    monkeypatch.setattr(assemble, "local_cluster", lambda *_: uneven)
    with Driver(configured(mesh={"plan": "auto"}), Console(quiet=True)) as driver:
        assert driver.plan is not None
        assert driver.cluster is not None
        assert driver.cluster.names == [name for row in driver.plan.devices or () for name in row]
        assert driver.cluster.names == ["b:0", "b:1", "a:0"]


def test_an_automatic_plan_is_found_before_it_is_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(Driver, "find_plan", lambda driver: done.append("plan"))
    monkeypatch.setattr(Driver, "run", lambda driver, kind, *_, **__: done.append(kind))
    for plan in ("auto", "data"):
        commands.verify(configured(mesh={"plan": plan}), 1, False, 1e-3, Console(quiet=True))
    assert done == ["plan", "verify", "verify"]


def test_two_workers_on_a_cpu_unless_more_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a plan file too, whatever its ending."""
    eight = Cluster(tuple(Device("a", index, "cpu") for index in range(8)))
    monkeypatch.setattr(driver_module, "discover", lambda cpus_per_worker: eight)
    for mesh, num in (({}, 2), ({"plan": "data"}, 2), ({"plan": "plans/mine"}, 8), ({"num_workers": 3}, 8)):
        assert len(Driver(configured(mesh=mesh), Console())._cluster().devices) == num


def test_a_checkpoint_is_evaluated_on_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the run's trackers, workers and backend; with the dataset where it is here."""
    launch = {"launcher": "ray", "backend": "nccl", "min_replicas": 1}
    mesh = {"plan": "auto", "shape": "2x2", "num_workers": 4, "replan": True, "wire": "bf16"}
    own = configured(mesh=mesh, launch=launch, profile={"trackers": ["mlflow"]})
    (tmp_path / "config.toml").write_text(own.to_toml())
    monkeypatch.setattr("anabranch.runtime.config_rules.find_spec", lambda name: None)
    monkeypatch.setattr(RunFolder, "checkpoint", lambda *_: SimpleNamespace(folder=tmp_path / "step-000001"))
    seen: list[Config] = []
    monkeypatch.setattr(Driver, "run", lambda driver, *_, **__: seen.append(driver.config))
    assert commands.evaluate(tmp_path, "", Console(quiet=True)) is None
    (config,) = seen
    assert (config.launch.launcher, config.launch.backend, config.profile.trackers) == ("none", "", ())
    assert (config.mesh.shape, config.mesh.plan, config.mesh.wire) == ("1x1", "data", "bf16")
    for verb in ("eval", "export"):
        assert main([verb, str(tmp_path), "--data.path", "elsewhere"]) == 2
        assert 'data.path = "elsewhere"' in capsys.readouterr().err


def planning(monkeypatch: pytest.MonkeyPatch, run_dir: Path, asked: str) -> Driver:
    """A driver of two workers that plan, under a Ray which is not there and is told to stop too late for them."""
    two = Cluster((Device("a", 0, "cpu"), Device("a", 1, "cpu")))
    monkeypatch.setattr(assemble, "local_cluster", lambda *_: two)

    def run_on_ray(
        job: Job, request: RayRequest, watch: object, recovery: object = None, stop: Stop | None = None
    ) -> list[dict[str, Any]]:
        assert stop is not None
        if asked:
            stop(asked)
        plan, costs = "[mesh]\ndata = 2\nbranch = 1\n", format_costs(Costs(()))
        # measured on another host: the file is not here
        found = {"plan": plan, "costs": "/elsewhere/costs.json", "costs_json": costs}
        return [{"stopped": "replan"} if job.kind == "train" else found]

    monkeypatch.setattr(driver_module, "run_on_ray", run_on_ray)
    mesh = {"plan": "auto", "replan": True}
    return Driver(configured(mesh=mesh, launch={"run_dir": str(run_dir)}), Console(quiet=True))


@pytest.mark.parametrize(("asked", "raised"), [("interrupt", Interrupted), ("terminate", Terminated)])
def test_who_is_told_to_stop_neither_plans_on_nor_anew(
    asked: str, raised: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the word came when the workers were done."""
    with planning(monkeypatch, tmp_path, asked) as driver:
        driver.launcher, driver._uses_gpus = "ray", False
        with pytest.raises(raised, match=r"stopped while planning$"):
            driver.find_plan()
        result = driver.run("train", "training")
        assert result is not None
        assert (result["stopped"], run_status(tmp_path)["state"]) == (asked, "stopped")
        with pytest.raises(
            raised, match=f"checkpoint is saved; go on with: anabranch train --resume {tmp_path}"
        ):
            driver.plan_again()


def test_a_run_that_is_planned_anew_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For whoever looks at it, or wants to stop it, meanwhile."""
    with planning(monkeypatch, tmp_path, "") as driver:
        driver.launcher, driver._uses_gpus = "ray", False
        driver.run("train", "training")
        assert run_status(tmp_path)["alive"]
        monkeypatch.setattr(driver_module, "parse_plan", lambda text: read_plan(tmp_path / "plan.toml"))
        (tmp_path / "plan.toml").write_text('[mesh]\ndata = 2\nbranch = 1\nscheduler = "data"\n')
        driver.plan_again()
        assert driver.costs == Costs(()), "of a file that this host need not see"
        status = run_status(tmp_path)
    assert (status["what"], status["alive"]) == ("planning", True)


@pytest.mark.parametrize(
    ("kind", "stopped", "state"),
    [("gross", "interrupt", "stopped"), ("gross", None, "finished"), ("train", "by another rank", "stopped")],
)
def test_the_record_says_how_it_ended(
    kind: Kind, stopped: str | None, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver_module, "run_here", lambda *_, **__: {"stopped": stopped})
    with Driver(configured(launch={"run_dir": str(tmp_path)}), Console(quiet=True)) as driver:
        driver.run(kind, "working")
    assert run_status(tmp_path)["state"] == state


def test_a_run_that_nobody_can_plan_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under torchrun it is refused before it starts; with one worker, which has nothing to plan, it is told."""
    jobs: list[Job] = []

    def run_here(job: Job, *_: object, **__: object) -> dict[str, Any]:
        jobs.append(job)
        return {"stopped": None}

    monkeypatch.setattr(driver_module, "run_here", run_here)
    config, out = configured(mesh={"plan": "auto", "replan": True}), io.StringIO()
    with Driver(config, Console(file=out, width=200)) as driver:
        driver.run("train", "training")
    assert [job.config.mesh.replan for job in jobs] == [False]
    assert "warning: mesh.replan is ignored: one worker has nothing to plan" in out.getvalue()
    driver.launcher, driver.config = "env", config
    with pytest.raises(ConfigError, match="replan is true, and torchrun or srun started the ranks"):
        driver.run("train", "training")
