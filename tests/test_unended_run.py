"""A run whose driver died: the same command goes on, and no other one does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
from rich.console import Console

from anabranch.runtime.checkpoints import Checkpoints
from anabranch.runtime.cli import main
from anabranch.runtime.commands import _resumed
from anabranch.runtime.config import Config
from anabranch.runtime.config_file import load_resumed
from anabranch.runtime.errors import ConfigError
from anabranch.runtime.manifest import Manifest
from anabranch.runtime.run_record import RunRecord
from anabranch.runtime.storage import open_folder
from anabranch.runtime.unended_run import go_on

# The user's loss: at its sixth call it kills the process, where a file says so.
LOSS = """
import os, signal
from pathlib import Path
import torch.nn.functional as F
calls = 0
def loss(output, target):
    global calls
    calls += 1
    if calls == 6 and Path("KILL").exists():
        Path("KILL").unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    return F.cross_entropy(output, target)
"""
COMMAND = [
    "train", "--launcher", "none", "--loss", "dying:loss", "--train.label-smoothing", "0", "--train.max-steps", "8",
    "--checkpoint.every-epochs", "0.1", "--train.eval-every-epochs", "0", "--model.options.depth", "8",
    "--mesh.execution", "fused", "--mesh.memory-format", "contiguous", "--run-dir",
]  # fmt: skip


def saved(run: Path) -> list[bytes]:
    checkpoint = Checkpoints(run).newest()
    assert checkpoint is not None
    assert checkpoint.position["step"] == 8
    return [(checkpoint.path / name).read_bytes() for name in checkpoint.manifest.files]


def test_the_same_command_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After SIGKILL of the driver: bit-equal to the run that nothing disturbed; a third time it is refused."""
    (tmp_path / "dying.py").write_text(LOSS)
    (tmp_path / "KILL").touch()
    killed = subprocess.run(
        [sys.executable, "-m", "anabranch.runtime", *COMMAND, "run"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    capsys.readouterr()
    assert main([*COMMAND, "run", "--train.seed", "1"]) == 2
    assert "its train.seed is 0, here it is 1: make it the same" in capsys.readouterr().err
    assert main([*COMMAND, "run"]) == 0
    out = capsys.readouterr().out
    assert "going on from" in out
    assert "(step 0)" not in out
    assert main([*COMMAND, "whole"]) == 0
    assert saved(tmp_path / "run") == saved(tmp_path / "whole")
    assert main([*COMMAND, "run"]) == 2
    assert "holds a run already: go on with it (--resume run)" in capsys.readouterr().err


def plant(folder: Path, state: str, checkpoint: bool = True) -> Config:
    """A folder as a driver leaves it; the configuration of the command that made it."""
    config = replace(Config(), launch=replace(Config().launch, run_dir=str(folder)))
    kept = replace(
        config, train=replace(config.train, bn_batch_size=32), mesh=replace(config.mesh, num_workers=2)
    )
    (folder / "config.toml").write_text(kept.to_toml())
    RunRecord(str(folder), "training")
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, "state": state, "start": "1"}))
    if checkpoint:
        (folder / "checkpoints/step-000002").mkdir(parents=True)
        (folder / "checkpoints/step-000002/manifest.json").touch()
    return config


@pytest.mark.parametrize(
    ("state", "checkpoint", "goes_on"),
    [
        ("running", True, True),  # its process is gone
        ("failed", True, True),
        ("stopped", True, True),
        ("finished", True, False),
        ("running", False, False),
    ],
)
def test_what_goes_on(tmp_path: Path, state: str, checkpoint: bool, goes_on: bool) -> None:
    config = plant(tmp_path, state, checkpoint)
    found = go_on(config)
    if not goes_on:
        assert found == config
        return
    assert (found.checkpoint.resume, found.train.bn_batch_size) == ("auto", 32)
    assert replace(found, checkpoint=config.checkpoint, train=config.train) == config, (
        "where it runs is this command's"
    )


@pytest.mark.parametrize("torn", ["", "{", "[]"])
def test_a_torn_record_is_a_run_that_died(tmp_path: Path, torn: str) -> None:
    """A power cut may leave an empty file."""
    config = plant(tmp_path, "running")
    (tmp_path / "run.json").write_text(torn)
    assert go_on(config).checkpoint.resume == "auto"
    RunRecord(str(tmp_path), "training")
    assert json.loads((tmp_path / "run.json").read_text())["state"] == "running"


@pytest.mark.parametrize(
    "launch",
    [{"launcher": "env"}, {"run_dir": ""}, {"run_dir": "/not/there"}],
    ids=["ranks", "no folder", "new"],
)
def test_what_stays_as_it_is(tmp_path: Path, launch: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = plant(tmp_path, "running")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    config = replace(config, launch=replace(config.launch, **{"launcher": "ray", **launch}))
    assert go_on(config) == config


@pytest.mark.parametrize(
    ("section", "change", "said"),
    [
        ("train", {"epochs": 30}, "train.epochs is 20, here it is 30"),
        ("train", {"bn_batch_size": 8}, "train.bn_batch_size is 32, here it is 8"),
        ("model", {"options": {"depth": 8}}, r"model.options is .*'depth': 14.*, here it is {'depth': 8}"),
        ("optimizer", {"betas": (0.8, 0.9)}, r"optimizer.betas is \[0.9, 0.999\], here it is \[0.8, 0.9\]"),
    ],
)
def test_another_training_is_refused(tmp_path: Path, section: str, change: dict[str, Any], said: str) -> None:
    config = plant(tmp_path, "running")
    config = replace(config, **{section: replace(getattr(config, section), **change)})
    with pytest.raises(
        ConfigError, match=f"holds a run already that did not end, its {said}: make it the same"
    ):
        go_on(config)


def kept(run: Path, bn_batch_size: int) -> None:
    """A checkpoint without tensors, and its run's configuration."""
    config = replace(Config(), train=replace(Config().train, bn_batch_size=bn_batch_size))
    run.mkdir(exist_ok=True)
    (run / "config.toml").write_text(config.to_toml())
    folder = open_folder(run / "checkpoints/step-000002")
    folder.make()
    Manifest({"step": 2}, config.to_toml(), "", "SGD", {}, {}, {}).write(folder)


@pytest.mark.parametrize("launcher", ["ray", "env", "none"])
@pytest.mark.parametrize("resume", ["auto", "before", "before, at a URL", "elsewhere"])
def test_groups_belong_to_the_run(
    tmp_path: Path, resume: str, launcher: Literal["ray", "env", "none"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the number of workers: 0 is the default of a new run alone."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    before, url = tmp_path / "before", ""
    kept(before, 32)
    run_dir = before if resume == "auto" else tmp_path / "new"
    if resume.endswith("URL"):
        url = f"file://{tmp_path}/bucket"
        (before / "checkpoints").rename(tmp_path / "bucket")
        (before / "config.toml").write_text(Config.from_dict({"checkpoint": {"url": url}}).to_toml())
    (before / "checkpoints/step-000003").mkdir(parents=True)
    (before / "checkpoints/step-000003/manifest.json").touch()  # torn: the older one is gone on from
    config = Config.from_dict(
        {
            "launch": {"run_dir": str(run_dir), "launcher": launcher},
            "checkpoint": {"resume": "auto" if resume == "auto" else str(before)},
        }
    )
    if resume == "elsewhere":  # on a machine that has nothing but the URL
        (before / "checkpoints").rename(tmp_path / "bucket")
        config = replace(
            config, checkpoint=replace(config.checkpoint, resume="auto", url=f"file://{tmp_path}/bucket")
        )
    assert go_on(config) == replace(config, train=replace(config.train, bn_batch_size=32))
    own = replace(config, train=replace(config.train, bn_batch_size=8))
    assert go_on(own) == own, "said by name"
    new = replace(config, checkpoint=Config().checkpoint)
    assert go_on(new) == new, "nothing to go on with"


def test_a_run_that_began_from_another_goes_on_with_its_own(tmp_path: Path) -> None:
    """The same command again (a job that is retried) neither begins once more nor mixes the two."""
    first, second = tmp_path / "first", tmp_path / "second"
    kept(first, 32)
    second.mkdir()
    config = plant(second, "running")
    config = replace(config, checkpoint=replace(config.checkpoint, resume=str(first)))
    assert (go_on(config).checkpoint.resume, go_on(config).train.bn_batch_size) == ("auto", 32)
    other = replace(config, train=replace(config.train, epochs=30))
    with pytest.raises(ConfigError, match=r"did not end, its train.epochs is 20, here it is 30"):
        go_on(other)
    record = json.loads((second / "run.json").read_text())
    (second / "run.json").write_text(json.dumps({**record, "state": "finished"}))
    assert go_on(config).checkpoint.resume == str(first)
    with pytest.raises(ConfigError, match=f"second holds a run already: go on with it .--resume {second}"):
        _resumed(go_on(config), Console(quiet=True))
    (second / "checkpoints/step-000002/manifest.json").unlink()
    found, checkpoint = _resumed(go_on(config), Console(quiet=True))
    assert (found.launch.run_dir, str(checkpoint and checkpoint.path)) == (
        str(second),
        str(first / "checkpoints/step-000002"),
    )


def test_a_run_that_begins_from_another_has_a_url_of_its_own(tmp_path: Path) -> None:
    """Each would retire the other's checkpoints there."""
    first, url = tmp_path / "first", f"file://{tmp_path}/bucket"
    kept(first, 32)
    (first / "checkpoints").rename(tmp_path / "bucket")
    (first / "config.toml").write_text(Config.from_dict({"checkpoint": {"url": url}}).to_toml())
    given: dict[str, dict[str, Any]] = {
        "checkpoint": {"resume": str(first)},
        "launch": {"run_dir": str(tmp_path / "second")},
    }
    config = load_resumed(first, given)
    assert config.checkpoint.url == url
    with pytest.raises(
        ConfigError, match=f"checkpoint.url {url} holds a run's checkpoints already: .* another URL"
    ):
        _resumed(config, Console(quiet=True))
    given["checkpoint"]["url"] = f"{url}-of-its-own"
    assert _resumed(load_resumed(first, given), Console(quiet=True))[1] is not None
    in_place = replace(config, launch=replace(config.launch, run_dir=""))
    assert _resumed(in_place, Console(quiet=True))[0].launch.run_dir == str(first)
