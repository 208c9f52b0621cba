"""Experiment trackers as callbacks; each needs its package, and none is needed for metrics.jsonl.

Trainer(network, data, config, callbacks=[tracker("tensorboard", run_dir)])
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from anabranch.runtime.callbacks import Callback
from anabranch.runtime.errors import ConfigError

Log = Callable[[Mapping[str, float], int], None]


class Tracker(Callback):
    """Sends a run's numbers to a tracker: log gets {name: number} and the step. Of what every rank has, the most.

    Warnings are no numbers: metrics.jsonl has them.

    end: closes it, once; told whether the run came to its end without an error.
    """

    def __init__(self, log: Log, end: Callable[[bool], None]) -> None:
        self._log, self._end, self._ended = log, end, False

    def on_step(self, metrics: Mapping[str, Any]) -> None:
        values = {f"train/{key}": value for key, value in _numbers(metrics).items()}
        values |= {f"time/{part}_s": max(of_ranks) for part, of_ranks in metrics.get("times_s", {}).items()}
        if memory := metrics.get("memory_bytes"):
            values["memory/max_bytes"] = max(memory)
        self._log(values, metrics["step"])

    def on_evaluation(self, metrics: Mapping[str, Any]) -> None:
        self._log({f"test/{key}": value for key, value in _numbers(metrics).items()}, metrics["step"])

    def on_mesh(self, mesh: Mapping[str, Any]) -> None:
        self._log({f"mesh/{key}": value for key, value in _numbers(mesh).items()}, mesh["step"])

    def on_end(self, result: Mapping[str, Any]) -> None:
        self._ended = True

    def close(self) -> None:
        self._end(self._ended)


def tracker(name: str, run_dir: Path) -> Tracker:
    """The tracker "tensorboard", "wandb" or "mlflow"; all of them write below run_dir unless told otherwise by their
    own environment variables (WANDB_MODE, MLFLOW_TRACKING_URI, …).

    Raises ConfigError for another name, or where the package is not installed.
    """
    if name not in _TRACKERS:
        raise ConfigError(f"tracker {name!r} is unknown: use {', '.join(_TRACKERS)}")
    try:
        return _TRACKERS[name](run_dir)
    except ImportError as error:
        raise ConfigError(
            f"tracker {name} needs a package that is not installed ({error}): pip install 'anabranch[{name}]'"
        ) from error


def _tensorboard(run_dir: Path) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run_dir / "tensorboard"))

    def log(values: Mapping[str, float], step: int) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, step)

    return Tracker(log, lambda whole: writer.close())


def _wandb(run_dir: Path) -> Tracker:
    import wandb  # type: ignore[import-not-found,unused-ignore]

    run = wandb.init(project="anabranch", name=run_dir.name, dir=str(run_dir))
    return Tracker(
        lambda values, step: run.log(dict(values), step=step),
        lambda whole: run.finish(exit_code=0 if whole else 1),
    )


def _mlflow(run_dir: Path) -> Tracker:
    import os

    import mlflow  # type: ignore[import-not-found,unused-ignore]

    if "MLFLOW_TRACKING_URI" not in os.environ:
        mlflow.set_tracking_uri(f"sqlite:///{run_dir / 'mlflow.db'}")
    mlflow.set_experiment("anabranch")
    mlflow.start_run(run_name=run_dir.name)
    return Tracker(
        lambda values, step: mlflow.log_metrics(dict(values), step=step),
        lambda whole: mlflow.end_run("FINISHED" if whole else "FAILED"),
    )


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if key != "step" and isinstance(value, int | float)}


_TRACKERS: dict[str, Callable[[Path], Tracker]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
}
