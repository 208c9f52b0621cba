"""TensorBoard, Weights & Biases and MLflow: TensorBoard's own files; the others faked with the calls that they have."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from anabranch.runtime.callbacks import MetricsFile
from anabranch.runtime.trackers import Tracker, tracker


def tell(told: Tracker, whole: bool) -> None:
    """A step, a change of the mesh and an evaluation of a run that ends well, or breaks off."""
    told.on_step({"step": 3, "loss": 0.5, "times_s": {"forward": [0.1, 0.2]}, "memory_bytes": [5, 7]})
    told.on_mesh({"step": 3, "data": 1, "branch": 2})
    told.on_evaluation({"step": 3, "test_accuracy": 0.9})
    if whole:
        told.on_end({})
    told.close()


NUMBERS = {
    "train/loss": 0.5, "time/forward_s": 0.2, "memory/max_bytes": 7, "mesh/data": 1, "mesh/branch": 2,
    "test/test_accuracy": 0.9,
}  # fmt: skip


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tell(tracker("tensorboard", tmp_path), True)
    found = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert set(found.Tags()["scalars"]) == set(NUMBERS)
    for name, value in NUMBERS.items():
        (event,) = found.Scalars(name)
        assert (event.step, event.value) == (3, pytest.approx(value))


class FakeRun:
    """wandb.Run, as of 0.31: what `log` and `finish` take."""

    def __init__(self) -> None:
        self.logged: dict[str, float] = {}
        self.exit_code: int | None = None

    def log(self, data: dict[str, Any], step: int | None = None, commit: bool | None = None) -> None:
        assert type(data) is dict
        assert step == 3
        self.logged |= data

    def finish(self, exit_code: int | None = None) -> None:
        self.exit_code = exit_code


@pytest.mark.parametrize("whole", [True, False])
def test_wandb_is_told_as_it_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool) -> None:
    run = FakeRun()
    began: dict[str, str | None] = {}

    def init(
        entity: str | None = None, project: str | None = None, dir: str | None = None, id: str | None = None,
        name: str | None = None,
    ) -> FakeRun:  # fmt: skip
        began.update(project=project, dir=dir, name=name)
        return run

    module = ModuleType("wandb")
    module.__dict__["init"] = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    tell(tracker("wandb", tmp_path), whole)
    assert began == {"project": "anabranch", "dir": str(tmp_path), "name": tmp_path.name}
    assert run.logged == NUMBERS
    assert run.exit_code == (0 if whole else 1)


@pytest.mark.parametrize("whole", [True, False])
def test_mlflow_is_told_as_it_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool) -> None:
    """Of mlflow 3: positions and names of what its functions take."""
    told: dict[str, Any] = {"metrics": {}}

    def set_tracking_uri(uri: str) -> None:
        told["uri"] = uri

    def set_experiment(experiment_name: str | None = None, experiment_id: str | None = None) -> None:
        told["experiment"] = experiment_name

    def start_run(
        run_id: str | None = None, experiment_id: str | None = None, run_name: str | None = None
    ) -> None:
        told["run"] = run_name

    def log_metrics(metrics: Mapping[str, float], step: int | None = None) -> None:
        assert step == 3
        told["metrics"] |= metrics

    def end_run(status: str = "FINISHED") -> None:
        told["status"] = status

    module = ModuleType("mlflow")
    for function in (set_tracking_uri, set_experiment, start_run, log_metrics, end_run):
        module.__dict__[function.__name__] = function
    monkeypatch.setitem(sys.modules, "mlflow", module)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tell(tracker("mlflow", tmp_path), whole)
    assert told == {
        "uri": f"sqlite:///{tmp_path / 'mlflow.db'}",
        "experiment": "anabranch",
        "run": tmp_path.name,
        "metrics": NUMBERS,
        "status": "FINISHED" if whole else "FAILED",
    }


def test_a_full_disk_is_told_once_and_the_training_goes_on(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    told: list[str] = []
    file = MetricsFile(tmp_path / "metrics.jsonl", on_failure=told.append)
    for step in (1, 2):
        file.on_step({"step": step})
    file.on_evaluation({"step": 2, "test_loss": 1.0})
    file.close()
    assert told == [f"{tmp_path}/metrics.jsonl lacks lines from step 1 on: No space left on device"]
