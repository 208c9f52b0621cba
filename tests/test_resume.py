"""Runs in this process alone: what a folder is read for later, and what goes on from it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from anabranch.runtime import commands
from anabranch.runtime.config import Config
from anabranch.runtime.run_folder import RunFolder

SMALL: dict[str, dict[str, Any]] = {  # three steps an epoch
    "model": {"name": "multi_resnet", "options": {"depth": 8, "num_branches": 2}},
    "data": {"name": "digits"},
    "train": {"epochs": 2, "batch_size": 512, "max_steps": 4},
    "launch": {"launcher": "none"},
    "mesh": {"execution": "fused", "memory_format": "contiguous"},  # measuring takes longer than the steps
}


def config(folder: Path, *layers: dict[str, Any]) -> Config:
    return Config.from_dict(SMALL, {"launch": {"launcher": "none", "run_dir": str(folder)}}, *layers)


def train(chosen: Config) -> dict[str, Any]:
    chosen.check()
    result = commands.train(chosen, Console(quiet=True))
    assert result is not None
    return result


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps, of an epoch and a third; not to be changed."""
    folder = tmp_path_factory.mktemp("run")
    train(config(folder))
    return folder


def test_eval_of_a_run_whose_settings_need_more_workers(run: Path, tmp_path: Path) -> None:
    """One process is enough to test it: what asks for an automatic plan or for replicas does not count there."""
    folder = RunFolder(Path(shutil.copytree(run, tmp_path / "run")))
    before = folder.config()
    mesh = replace(before.mesh, plan="auto", replan=True, num_workers=2, shape="2x1")
    launch = replace(before.launch, launcher="ray", min_replicas=2)
    as_run = replace(before, mesh=mesh, launch=launch)
    (folder.path / "config.toml").write_text(as_run.to_toml())
    result = commands.evaluate(folder.path, "", Console(quiet=True))
    assert result is not None
    assert 0 <= result["test_accuracy"] <= 1
