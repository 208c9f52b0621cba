"""A run of several trainings, one after another, each done once: what is finished stays, what was begun goes on.

RUN/stages/settings.json                 what everything here was made with
RUN/stages/full/checkpoints, done.json   a training, or another run's checkpoint; with done.json it is finished
RUN/stages/evaluation.json               other results, written whole
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from anabranch.cluster import WorkerContext
from anabranch.runtime.agreement import on_all_ranks
from anabranch.runtime.checkpoint import Checkpoint
from anabranch.runtime.checkpoints import Checkpoints
from anabranch.runtime.config import Config
from anabranch.runtime.data.sources import DataBundle
from anabranch.runtime.durable import write_bytes
from anabranch.runtime.gross_space import check_settings
from anabranch.runtime.loss import LossFunction
from anabranch.runtime.mesh import make_mesh
from anabranch.runtime.run_folder import RunFolder
from anabranch.runtime.trainer import Trainer
from anabranch.schedulers import Plan

_OF_A_STEP = ("step_time_s", "images_per_s", "times_s", "loss", "accuracy")


class StopAsked(Exception):
    """The run was asked to stop, and its position is saved."""


class _StageContext(WorkerContext):
    """A rank's context whose status says where the whole run stands, not the stage."""

    def __init__(self, whole: WorkerContext, stage: str, steps_before: int, all_steps: int) -> None:
        super().__init__(*(getattr(whole, field.name) for field in fields(WorkerContext) if field.init))
        self._whole, self._stage, self._steps_before, self._all_steps = whole, stage, steps_before, all_steps

    def publish(self, **status: Any) -> None:
        if "phase" in status:
            status["phase"] = f"{self._stage}, {status['phase']}"
        if "step" in status:
            status["step"] += self._steps_before
        self._whole.publish(**{**status, "num_steps": self._all_steps})

    def status(self) -> dict[str, Any]:
        return self._whole.status()

    def request_stop(self, reason: str) -> None:
        self._whole.request_stop(reason)

    @property
    def stop_requested(self) -> str | None:
        return self._whole.stop_requested


class Stages:
    """The stages of a run on this rank; every rank calls the same methods in the same order.

    folder: RUN/stages, which all ranks see. steps: training steps in the stages so far; all_steps: in all, as far as
    the owner knows: for the progress.
    """

    def __init__(self, folder: Path, context: WorkerContext) -> None:
        self.folder, self.context = folder, context
        self.device = torch.device(context.device)
        self.mesh = make_mesh(context.world_size, 1, self.device.type)
        self.steps, self.all_steps = 0, 0

    def tell(self, phase: str) -> None:
        """Of what trains nothing: the last step's figures, which foretell the time left, are taken away."""
        self.context.publish(phase=phase, **dict.fromkeys(_OF_A_STEP))

    def train(
        self,
        name: str,
        network: nn.Module,
        data: DataBundle,
        config: Config,
        plan: Plan,
        loss_of: Callable[[nn.Module], LossFunction] | None = None,
    ) -> dict[str, Any]:
        """Trains a one-device network in place, unless that was done before; the trainer's result.

        loss_of: gives the loss for the very module that is trained. Raises StopAsked.
        """
        folder = self.folder / name
        checkpoints = Checkpoints(folder)
        done, newest = self.on_first(lambda: [read_json(folder / "done.json"), _newest(checkpoints)])
        if done is None:
            trained = copy.deepcopy(network)
            self.on_first(lambda: folder.mkdir(parents=True, exist_ok=True))
            trainer = Trainer(
                trained,
                data,
                config,
                plan=plan,
                context=_StageContext(self.context, name, self.steps, self.all_steps),
                loss=None if loss_of is None else loss_of(trained),
                run_dir=folder,
                resume=None if newest is None else Checkpoint.open(Path(newest)),
            )
            done = trainer.fit()
            if done["stopped"]:
                raise StopAsked
            self.on_first(partial(write_json, folder / "done.json", done))
            newest = self.on_first(lambda: _newest(checkpoints))
        self.steps += done["steps"]
        Checkpoint.open(Path(newest)).load_into(network, None)
        return dict(done)

    def adopt(
        self, name: str, run: Path, network: nn.Module, data: DataBundle, config: Config, plan: Plan
    ) -> dict[str, Any]:
        """Fills a one-device network from the newest checkpoint of another run, which is kept here, so that the other
        may go on or be deleted. Its test_accuracy and test_loss."""
        folder = self.folder / name

        def copy_checkpoint() -> Any:
            done = read_json(folder / "done.json")
            if done is None:
                found, aside = RunFolder.open(run).checkpoint(), folder / "copied"
                for former in (aside, folder / "checkpoints"):
                    shutil.rmtree(former, ignore_errors=True)
                found.copy_to(aside / found.folder.name)
                aside.rename(folder / "checkpoints")
            return [done, _newest(Checkpoints(folder))]

        done, newest = self.on_first(copy_checkpoint)
        checkpoint = Checkpoint.open(Path(newest))
        if done is None:
            context = _StageContext(self.context, name, self.steps, self.all_steps)
            trainer = Trainer(copy.deepcopy(network), data, config, plan=plan, context=context)
            done = {**trainer.evaluate(checkpoint), "steps": 0}
            self.on_first(partial(write_json, folder / "done.json", done))
        checkpoint.load_into(network, None)
        return dict(done)

    def claim(self, settings: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """Makes the folder these settings', or raises ConfigError if it is others': see `check_settings`. Returns those
        that it was made with."""

        def agree() -> Any:
            stored = check_settings(self.folder.parent, settings)
            if stored is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_json(self.folder / "settings.json", settings)
            return stored or settings

        stored: dict[str, dict[str, Any]] = self.on_first(agree)
        return stored

    def check_stop(self) -> None:
        """Raises StopAsked on all ranks if one was asked to stop."""
        if any(self.on_all(lambda: self.context.stop_requested is not None, "agree to stop")):
            raise StopAsked

    def on_all(self, work: Callable[[], Any], what: str) -> list[Any]:
        """What `work` returned (plain JSON) on each rank, on all of them."""
        return on_all_ranks(self.mesh, self.device, work, what)

    def on_first(self, work: Callable[[], Any]) -> Any:
        """What `work` returned on rank 0, the only one that does it, on all ranks."""
        return self.on_all(lambda: work() if self.mesh.rank == 0 else None, "go on")[0]


def read_json(path: Path) -> Any:
    """The plain data in a file, None where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def write_json(path: Path, value: Any) -> None:
    """Writes plain data; the file is whole or absent."""
    write_bytes(path, json.dumps(value).encode())


def _newest(checkpoints: Checkpoints) -> str | None:
    newest = checkpoints.newest(on_bad=lambda message: None)
    return None if newest is None else str(newest.path)
