"""The learning rate under every schedule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from anabranch.runtime import commands
from anabranch.runtime.config import Config, LrScheduleConfig
from anabranch.runtime.config_file import load_resumed
from anabranch.runtime.lr_schedule import Plateau, learning_rate
from anabranch.runtime.run_folder import RunFolder


def test_plateau_falls_after_so_many_tests_without_a_better_one() -> None:
    plateau = Plateau(LrScheduleConfig("plateau", factor=0.1, patience=2, min_factor=0.005))
    scales = []
    for accuracy in (0.5, 0.6, 0.6, 0.55, 0.7, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6):
        plateau.observe(accuracy, 1.0)
        scales.append(plateau.scale)
    assert scales == pytest.approx([1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.005, 0.005, 0.005])


def test_plateau_goes_on_from_its_state() -> None:
    schedule = LrScheduleConfig("plateau", patience=2)
    whole, first, second = Plateau(schedule), Plateau(schedule), Plateau(schedule)
    accuracies = [0.5, 0.4, 0.3, 0.6, 0.5, 0.4]
    for accuracy in accuracies:
        whole.observe(accuracy, 1.0)
    for accuracy in accuracies[:2]:
        first.observe(accuracy, 1.0)
    second.load(first.state())
    for accuracy in accuracies[2:]:
        second.observe(accuracy, 1.0)
    assert second.state() == whole.state()
    others = Plateau(LrScheduleConfig("cosine", patience=1))
    others.observe(0.5, 1.0)
    others.observe(0.4, 1.0)
    assert others.scale == 1


def test_plateau_of_the_loss() -> None:
    """A loss falls where it is better; one that is not a number never is, and leaves a state that JSON can hold."""
    plateau = Plateau(LrScheduleConfig("plateau", patience=2, plateau_of="loss"))
    scales = []
    for loss in (float("nan"), 3.0, 2.0, 2.5, float("inf"), 1.0):
        plateau.observe(0.5, loss)
        scales.append(plateau.scale)
        json.dumps(plateau.state(), allow_nan=False)
    assert scales == pytest.approx([1, 1, 1, 1, 0.1, 0.1])


def test_step_and_cosine() -> None:
    step = LrScheduleConfig("step", milestones=(2, 3), warmup_epochs=1.0)
    rates = [learning_rate(step, 1.0, i, 2, 8) for i in range(8)]
    assert rates == pytest.approx([0.5, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])
    cosine = LrScheduleConfig("cosine", warmup_epochs=0.0, final_factor=0.5)
    assert learning_rate(cosine, 1.0, 0, 2, 8) == 1
    assert learning_rate(cosine, 1.0, 4, 2, 8) == pytest.approx(0.75)


def test_a_resumed_run_follows_the_same_plateau(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lr of every step, stopped after the second of three epochs and gone on with, as undisturbed."""
    observe = Plateau.observe
    monkeypatch.setattr(
        Plateau, "observe", lambda plateau, **_: observe(plateau, 0.5, 1.0)
    )  # nothing is learned
    layers: dict[str, Any] = {
        "model": {"name": "multi_resnet", "options": {"depth": 8, "num_branches": 2}},
        "data": {"name": "digits"},
        "lr_schedule": {"name": "plateau", "patience": 1, "warmup_epochs": 0.0},
        "optimizer": {"lr": 1e-9},
        "train": {"epochs": 4, "batch_size": 512, "max_steps": 11},
        "checkpoint": {"every_epochs": 0.34},  # the first one before any test
        "launch": {"launcher": "none"},
        "mesh": {
            "execution": "fused",
            "memory_format": "contiguous",
        },  # measuring takes longer than the steps
    }

    def rates(name: str, *more: dict[str, Any]) -> list[float]:
        folder = tmp_path / name
        given = {"launch": {"launcher": "none", "run_dir": str(folder)}}
        config = Config.from_dict(layers, given, *more)
        commands.train(config, Console(quiet=True))
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [line["lr"] for line in lines if line["kind"] == "step"]

    whole = rates("whole")
    assert whole[0] == 1e-9
    assert whole[-1] == pytest.approx(1e-11)
    rates("stopped", {"train": {"max_steps": 7}})
    folder = tmp_path / "stopped"
    resumed = load_resumed(
        folder,
        {"train": {"max_steps": 11}, "checkpoint": {"resume": str(folder)}, "launch": {"launcher": "none"}},
    )
    commands.train(resumed, Console(quiet=True))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines if line["kind"] == "step"] == whole
    assert RunFolder.open(folder).checkpoint().position["plateau"]["scale"] < 1
