"""The folder of a run: config.toml, plan.toml, metrics.jsonl, checkpoints/."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, replace
from pathlib import Path

from anabranch.runtime.checkpoint import Checkpoint
from anabranch.runtime.checkpoints import Checkpoints
from anabranch.runtime.config import Config
from anabranch.runtime.config_file import read_toml
from anabranch.runtime.durable import write_bytes
from anabranch.runtime.errors import CheckpointError, ConfigError
from anabranch.schedulers import Plan, format_plan
from anabranch.schedulers.plan_file import PinRule


@dataclass(frozen=True)
class RunFolder:
    """A run on disk."""

    path: Path

    @classmethod
    def create(
        cls, config: Config, plan: Plan, *, filled_in: bool, pins: tuple[PinRule, ...] = ()
    ) -> RunFolder:
        """Makes (or goes on in) the configured folder and writes the resolved configuration and plan.

        The configuration is one to begin with: where this run went on from is not in it. filled_in: nobody asked for
        the plan's devices, so that the run may go on on others, which keep the pins.
        """
        given = config.launch.run_dir
        config = replace(config, checkpoint=replace(config.checkpoint, resume=""))
        path = Path(given).absolute() if given else _new_path(config)
        try:
            path.mkdir(parents=True, exist_ok=True)
            write_bytes(path / "config.toml", config.to_toml().encode())
            write_bytes(path / "plan.toml", format_plan(plan, pins, filled_in=filled_in).encode())
        except OSError as error:
            raise ConfigError(
                f"launch.run_dir {path} cannot be written: {error.strerror}; choose another with --run-dir"
            ) from error
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing run. Raises ConfigError where there is none."""
        if not (path / "config.toml").is_file():
            raise ConfigError(
                f"{path} is no run: it has no config.toml; `anabranch train` prints a run's folder at its end"
            )
        return cls(path.absolute())

    def config(self) -> Config:
        """The configuration that the run was started with."""
        return Config.from_dict(read_toml(self.path / "config.toml")[1])

    def checkpoint(self, name: str = "", on_bad: object = None) -> Checkpoint:
        """The checkpoint of that name, else the newest whole one. Raises CheckpointError where there is none."""
        saved = Checkpoints(self.path, url=self.config().checkpoint.url)
        if name:
            return Checkpoint.open(saved.folder.child(name))
        warnings: list[str] = []
        newest = saved.newest(on_bad=warnings.append)
        if newest is None:
            detail = "; ".join(warnings) or "the run was stopped before its first"
            raise CheckpointError(f"{self.path} has no whole checkpoint: {detail}")
        if callable(on_bad):
            for warning in warnings:
                on_bad(warning)
        return newest


def _new_path(config: Config) -> Path:
    words = f"{config.data.name}-{config.model.name}"
    stem = time.strftime("%Y%m%d-%H%M%S-") + re.sub(r"[^A-Za-z0-9]+", "-", words).strip("-")
    path = Path("runs").absolute() / stem
    number = 1
    while path.exists():
        number += 1
        path = path.with_name(f"{stem}-{number}")
    return path
