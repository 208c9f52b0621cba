"""What the driver settles before workers start."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from anabranch.cluster import RayRequest
from anabranch.runtime import assemble
from anabranch.runtime import driver as driver_module
from anabranch.runtime.config import Config
from anabranch.runtime.driver import Driver
from anabranch.runtime.run_folder import RunFolder
from anabranch.schedulers import Cluster, Device, PlanError, read_plan


def configured(**sections: dict[str, Any]) -> Config:
    """A small run in this process, with other fields."""
    return Config.from_dict(
        {"model": {"options": {"depth": 8}}, "launch": {"launcher": "none"}}, {**sections}
    )


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

    def run_on_ray(job: object, request: RayRequest, *others: object) -> list[dict[str, Any]]:
        requests.append(request)
        return [{}]

    monkeypatch.setattr(driver_module, "run_on_ray", run_on_ray)
    out = io.StringIO()
    with Driver(configured(mesh={"plan": str(tmp_path / "plan.toml")}), Console(file=out)) as driver:
        assert driver.plan is not None
        driver.launcher, driver._uses_gpus = "ray", True
        driver.run("eval", "evaluating")
        assert [(r.devices, r.any_gpu) for r in requests] == [((("localhost:0",),), not asks)]
        config = replace(driver.config, launch=replace(driver.config.launch, run_dir=str(tmp_path / "run")))
        RunFolder.create(config, driver.plan, filled_in=not driver.asks_devices)
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


def test_its_devices_are_in_the_order_of_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the cluster names a host first that has less room: costs are read by rank."""
    uneven = Cluster(tuple(Device(*place, "cpu") for place in (("a", 0), ("b", 0), ("b", 1))))
    monkeypatch.setattr(assemble, "local_cluster", lambda *_: uneven)
    with Driver(configured(mesh={"plan": "auto"}), Console(quiet=True)) as driver:
        assert driver.plan is not None
        assert driver.cluster is not None
        assert driver.cluster.names == [name for row in driver.plan.devices or () for name in row]
        assert driver.cluster.names == ["b:0", "b:1", "a:0"]
