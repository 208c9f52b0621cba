"""Runs in this process alone: what a folder is read for later, and what goes on from it."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

from anabranch.blocks import build
from anabranch.runtime import Trainer, commands
from anabranch.runtime.assemble import make_network
from anabranch.runtime.callbacks import Callback
from anabranch.runtime.checkpoint import Checkpoint
from anabranch.runtime.checkpoints import Checkpoints
from anabranch.runtime.cli import main
from anabranch.runtime.config import Config
from anabranch.runtime.config_file import load_config, load_resumed
from anabranch.runtime.data.load import load_data
from anabranch.runtime.driver import Driver
from anabranch.runtime.errors import ConfigError
from anabranch.runtime.held_out import keep_out
from anabranch.runtime.launch import alone
from anabranch.runtime.mesh import Mesh
from anabranch.runtime.parallel_network import ParallelNetwork, parallelize
from anabranch.runtime.position import falls_due
from anabranch.runtime.run_folder import RunFolder
from anabranch.schedulers import Plan

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


def test_what_was_learned_is_tested_and_exported_by_commands(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert main(["eval", str(run), "--json"]) == 0
    tested = json.loads(capsys.readouterr().out)
    *_, last = [line["test_accuracy"] for line in lines if line["kind"] == "evaluation"]
    assert (tested["test_accuracy"], Path(tested["checkpoint"]).name) == (last, "step-000004")
    file = tmp_path / "model.safetensors"
    assert main(["export", str(run), "--output", str(file), "--json"]) == 0
    exported = json.loads(capsys.readouterr().out)
    tensors = load_file(file)
    assert (exported["num_tensors"], exported["bytes"]) == (len(tensors), file.stat().st_size)
    network = build("multi_resnet", depth=8, num_branches=2, in_channels=1)
    network.load_state_dict(tensors, strict=True)
    assert main(["eval", str(tmp_path / "none"), "--json"]) == 2


@pytest.mark.parametrize("planted", [False, True])
def test_verify_as_a_command_names_the_worst_block(
    planted: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def doubled(network: nn.Module, plan: Plan, mesh: Mesh) -> ParallelNetwork:
        parallel = parallelize(network, plan, mesh)
        if planted:
            (weight, *_) = parallel.blocks.get_submodule("stage2.block1").parameters()
            weight.register_hook(lambda gradient: 2 * gradient)
        return parallel

    monkeypatch.setattr("anabranch.runtime.verify.parallelize", doubled)
    flags = ["--launcher", "none", "--plan", "data", "--model.options.depth", "8", "--steps", "1"]
    flags += ["--mesh.execution", "fused", "--mesh.memory-format", "contiguous", "--float64"]
    assert main(["verify", *flags, "--json"]) == (1 if planted else 0)
    told = json.loads(capsys.readouterr().out)
    assert (told["max_relative_difference"] > 1e-9) == planted
    assert told["by_kind"]["loss"] <= 1e-9
    assert not planted or "blocks.stage2.block1." in told["worst"]


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


def resumed(folder: Path, **train: int) -> Config:
    return load_resumed(
        folder, {"checkpoint": {"resume": str(folder)}, "launch": {"launcher": "none"}, "train": train}
    )


def test_goes_on_with_the_same_steps_only(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Epochs and rates are counted in steps: of another size they would be others. Said before anything starts."""
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    before = (folder / "metrics.jsonl").read_text()

    with monkeypatch.context() as patch:
        patch.setattr(Driver, "run", None)
        with pytest.raises(ConfigError) as caught:
            train(resumed(folder, batch_size=1024, max_steps=8))
    assert str(caught.value) == (
        "the checkpoint at step 4 was trained by 512 of 1437 samples a step, here train.batch_size is 1024, and the "
        "training data have 1437: make them the same, or start anew"
    )
    fewer, _ = keep_out(load_data("digits"), 0.5, seed=0)
    network = build("multi_resnet", depth=8, num_branches=2, in_channels=1)
    with pytest.raises(
        ConfigError, match=r"512 of 1437 samples a step, .* is 512, and the training data have 719"
    ):
        Trainer(network, fewer, config(folder), resume=RunFolder(folder).checkpoint())
    assert (folder / "metrics.jsonl").read_text() == before
    assert train(resumed(folder, max_steps=5))["steps"] == 5


def test_a_trainer_begins_in_no_folder_that_holds_a_run(run: Path) -> None:
    """It would keep that run's later checkpoints as its own, and retire the others."""
    before = (run / "metrics.jsonl").read_text()
    chosen, data = config(run), load_data("digits")
    with pytest.raises(
        ConfigError, match=r"step-000004 is a checkpoint of a run .* go on with it \(resume=\)"
    ):
        Trainer(make_network(chosen, data), data, chosen, context=alone(), run_dir=run).fit()
    assert (run / "metrics.jsonl").read_text() == before


def test_a_resumed_runs_configuration_begins_anew(run: Path, tmp_path: Path) -> None:
    """`train RUN/config.toml --run-dir ANOTHER` is a run of its own, whatever the first one went on from."""
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    train(resumed(folder, max_steps=5))
    given: dict[str, dict[str, Any]] = {
        "launch": {"launcher": "none", "run_dir": str(tmp_path / "another")},
        "mesh": {"plan": "data"},
    }
    again = load_config(str(folder / "config.toml"), given)
    assert again.checkpoint.resume == ""
    train(again)
    lines = [json.loads(line) for line in (tmp_path / "another" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "step"] == [1, 2, 3, 4, 5]


def test_files_are_replaced_as_a_whole(run: Path, tmp_path: Path) -> None:
    """Going on writes them anew: a kill or a full disk leaves the ones before, which nobody writes into."""
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    names = ("config.toml", "plan.toml", "metrics.jsonl")
    before = {name: (folder / name).read_text() for name in names}
    with ExitStack() as stack:
        files = {name: stack.enter_context((folder / name).open()) for name in names}
        train(resumed(folder, max_steps=5))
        assert {name: file.read() for name, file in files.items()} == before
    assert (folder / "metrics.jsonl").read_text().startswith(before["metrics.jsonl"])
    assert "max_steps = 5" in (folder / "config.toml").read_text()


def test_an_empty_configuration_is_told(run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    (folder / "config.toml").write_text("")
    with pytest.raises(
        ConfigError, match=r"config\.toml is not whole, it has no \[mesh\]: give the run's own CONFIG"
    ):
        resumed(folder)
    again = config(folder, {"checkpoint": {"resume": "auto"}, "train": {"max_steps": 5}})
    assert train(again)["steps"] == 5


class StopsAfter(Callback):
    """Asks to stop when the run stands at that step: the next one is the last."""

    def __init__(self, step: int) -> None:
        self.step, self.context = step, alone()

    def on_gradients(self, step: int, network: object) -> None:
        if step + 1 == self.step:
            self.context.request_stop("test")


def fit(folder: Path, chosen: Config, stop_after: int = 0) -> dict[str, Any]:
    """In a folder, from its newest checkpoint; stopped one step after that one."""
    folder.mkdir(exist_ok=True)
    data, resume, stops = load_data("digits"), Checkpoints(folder).newest(), StopsAfter(stop_after)
    if resume and resume.position["step"] == stop_after:
        stops.context.request_stop("test")
    return Trainer(
        make_network(chosen, data), data, chosen, context=stops.context, run_dir=folder, resume=resume,
        callbacks=[stops],
    ).fit()  # fmt: skip


def accuracies(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["test_accuracy"]) for line in lines if line["kind"] == "evaluation"]


def test_stopped_in_an_epochs_last_step(tmp_path: Path) -> None:
    """The test that was due then is made when the run goes on: the same tests, and rates, as undisturbed."""
    chosen = Config.from_dict(
        SMALL,
        {"lr_schedule": {"name": "plateau", "patience": 1, "warmup_epochs": 0.0}, "optimizer": {"lr": 1e-9}},
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fit(whole, chosen)
    stopped = fit(parts, chosen, stop_after=2)
    assert (stopped["steps"], stopped["stopped"]) == (3, "test")
    assert accuracies(parts) == []
    stopped = fit(parts, chosen, stop_after=3)  # in the last step of all
    assert (stopped["steps"], stopped["stopped"]) == (4, "test")
    assert fit(parts, chosen)["stopped"] is None
    assert accuracies(parts) == accuracies(whole)
    assert [step for step, _ in accuracies(whole)] == [3, 4]
    ends = [Checkpoint.open(folder / "checkpoints/step-000004") for folder in (whole, parts)]
    assert ends[0].position["plateau"] == ends[1].position["plateau"]


@pytest.mark.parametrize(
    ("every", "due"),
    [
        (0.0, []),
        (0.4, [1, 2, 3, 4, 5, 6, 7, 8, 9]),
        (1.0, [1, 2, 3, 4, 5, 6, 7, 8, 9]),
        (1.5, [2, 3, 4, 6, 8, 9]),
        (3.0, [3, 6, 9]),
        (3.5, [4, 7]),
        (4.5, [4, 9]),
    ],
)
def test_falls_due_at_every_multiples_nearest_step(every: float, due: list[int]) -> None:
    assert [done for done in range(10) if falls_due(done, every)] == due


def test_the_best_is_kept_where_an_epoch_has_several_checkpoints(tmp_path: Path) -> None:
    """Half an epoch is a step and a half: each epoch's last one, which is tested, is saved too."""
    checkpoint = {"every_epochs": 0.5, "num_to_keep": 9}
    fit(tmp_path / "run", Config.from_dict(SMALL, {"train": {"max_steps": 6}, "checkpoint": checkpoint}))
    tested = {step for step, _ in accuracies(tmp_path / "run")}
    assert tested == {3, 6}
    saved = [Checkpoint.open(path).position for path in sorted((tmp_path / "run/checkpoints").iterdir())]
    assert {each["step"]: "test_accuracy" in each for each in saved} == {2: False, 3: True, 4: False, 6: True}
