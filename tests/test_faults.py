"""Ranks that are killed, stop, hang or raise in training: replaced, and the weights are the undisturbed run's."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from anabranch.cluster import WorkerError, connect
from anabranch.runtime import commands
from anabranch.runtime.config import Config

SMALL: dict[str, dict[str, Any]] = {
    "model": {"name": "faulty:make", "options": {"depth": 8, "num_branches": 4}},
    "data": {"name": "digits", "augment": "crop", "crop_padding": 1},
    "train": {"epochs": 1, "max_steps": 12, "batch_size": 32, "bn_batch_size": 8},
    "optimizer": {"clip_norm": 5.0},
    "checkpoint": {"every_epochs": 4 / 45},  # every fourth step
    "launch": {"cpus_per_worker": 0.1},
}

Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory of all runs, with the model in it; one local cluster for this file."""
    folder = tmp_path_factory.mktemp("faults")
    shutil.copy(Path(__file__).with_name("faulty.py"), folder)
    (folder / "FAULTS").write_text("[]")
    before = Path.cwd()
    sys.path.insert(0, str(folder))
    with connect(num_cpus=2):  # its processes begin where the tests did
        os.chdir(folder)
        yield folder
        os.chdir(before)
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    """Trains with faults; the result, with the last checkpoint's tensors and the lines that were printed."""

    def run(name: str, shape: str, faults: list[dict[str, Any]], **launch: Any) -> dict[str, Any]:
        for old in folder.glob("fired-*"):
            old.unlink()
        (folder / "FAULTS").write_text(json.dumps(faults))
        layers = {"mesh": {"shape": shape}, "launch": {"run_dir": str(folder / name), **launch}}
        with (folder / f"{name}.txt").open("w") as file:
            result = commands.train(Config.from_dict(SMALL, layers), Console(file=file))
        assert result is not None
        assert len(list(folder.glob("fired-*"))) == len(faults), "every fault happened"
        steps = [line["step"] for line in metrics(folder / name) if line["kind"] == "step"]
        assert steps == list(range(1, 13)), "every step is told of once"
        newest = max((folder / name / "checkpoints").iterdir())
        tensors = {k: t for path in newest.glob("*.safetensors") for k, t in load_file(path).items()}
        text = (folder / f"{name}.txt").read_text()
        return {**result, "tensors": tensors, "text": " ".join(text.split())}

    return run


@pytest.fixture(scope="module")
def undisturbed(run: Run) -> Callable[[str], dict[str, Any]]:
    known: dict[str, dict[str, Any]] = {}

    def undisturbed(shape: str) -> dict[str, Any]:
        if shape not in known:
            known[shape] = run(f"undisturbed-{shape}", shape, [])
        return known[shape]

    return undisturbed


def metrics(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Bit for bit, and the last test too."""
    assert found["tensors"].keys() == expected["tensors"].keys()
    different = [
        key for key, tensor in found["tensors"].items() if not torch.equal(tensor, expected["tensors"][key])
    ]
    assert not different
    assert (found["test_loss"], found["test_accuracy"]) == (expected["test_loss"], expected["test_accuracy"])


def fault(rank: int, step: int, moment: str, how: str = "SIGKILL") -> dict[str, Any]:
    return {"rank": rank, "step": step, "moment": moment, "how": how}


@pytest.mark.optin  # test_fault_matrix.py kills by default
def test_killed_ranks_are_replaced_without_a_trace(
    run: Run, undisturbed: Callable[[str], dict[str, Any]]
) -> None:
    """D=2, M=2: a rank in its reduction (nobody is prepared), rank 0 after the vote (all are)."""
    found = run("killed", "2x2", [fault(3, 2, "reduction"), fault(0, 6, "apply")])
    first, second = found["failures"]
    assert (first["rank"], first["action"], first["step"]) == (3, "discard", 3)
    assert second["rank"] == 0
    assert second["step"] in (7, 8)
    assert first["lost_steps"] == second["lost_steps"] == 0
    assert first["seconds"] > 0
    assert "rank 3 on" in found["text"]
    assert "0 steps lost" in found["text"]
    assert_same(found, undisturbed("2x2"))


@pytest.mark.optin
def test_without_a_peer_all_go_back_to_the_checkpoint(
    run: Run, undisturbed: Callable[[str], dict[str, Any]]
) -> None:
    found = run("alone", "1x2", [{**fault(1, 6, "forward"), "after_save": 4}])
    assert [(f["action"], f["resumed_from"], f["lost_steps"]) for f in found["failures"]] == [
        ("rewind", 4, 2)
    ]
    assert_same(found, undisturbed("1x2"))


@pytest.mark.optin  # test_train.py::test_a_failing_worker_is_told_once_with_rank_and_host by default
def test_the_same_error_again_ends_the_run(run: Run, folder: Path) -> None:
    faults = [fault(1, 2, "forward", "raise"), fault(1, 2, "forward", "raise")]
    with pytest.raises(WorkerError, match=r"^rank 1 on(.|\n)*ValueError: a user's bug"):
        run("raises", "2x1", faults)


MOMENTS = ("forward", "reduction", "vote", "voted", "apply", "evaluate", "evaluated", "save", "saved")


@pytest.mark.optin
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("moment", MOMENTS)
def test_every_moment(run: Run, undisturbed: Callable[[str], dict[str, Any]], moment: str, rank: int) -> None:
    step = 12 if "eval" in moment else 8 if "save" in moment else 5
    found = run(f"{moment}-{rank}", "2x2", [fault(rank, step, moment)], spares=1)
    happened = float(Path("fired-0").read_text())
    print(
        moment,
        rank,
        *(round(f["at"] + f["seconds"] - happened, 2) for f in found["failures"]),
        "s from the kill",
    )
    assert [failure["spare"] for failure in found["failures"]] == [True]
    assert found["failures"][0]["lost_steps"] == 0
    assert_same(found, undisturbed("2x2"))


@pytest.mark.optin
def test_stopped_and_hanging_ranks(run: Run, undisturbed: Callable[[str], dict[str, Any]]) -> None:
    found = run(
        "stopped", "2x2", [fault(1, 3, "reduction", "SIGSTOP"), fault(2, 7, "forward", "hang")], hang_s=5.0
    )
    stopped, hanging = found["failures"]
    assert (stopped["rank"], hanging["rank"]) == (1, 2)
    assert "no answer for" in stopped["cause"]
    assert "hangs: no step for" in hanging["cause"]
    assert "in idle" in hanging["cause"]
    assert "time.sleep(1000)" in hanging["stack"]
    assert_same(found, undisturbed("2x2"))


@pytest.mark.optin
def test_broken_connections(run: Run, undisturbed: Callable[[str], dict[str, Any]]) -> None:
    """Nobody dies: all form their groups again; at the very end there is nothing left to wait for."""
    found = run("cut", "2x2", [fault(2, 5, "reduction", "cut"), fault(1, 12, "evaluated", "cut")])
    assert found["failures"][0]["spare"] is None
    assert found["failures"][0]["cause"] == "lost its connections to the others"
    assert_same(found, undisturbed("2x2"))


@pytest.mark.optin
def test_failures_while_recovering(run: Run, undisturbed: Callable[[str], dict[str, Any]]) -> None:
    """A survivor and then the newcomer are killed where they form the next generation's groups; then both holders."""
    faults = [fault(3, 2, "reduction"), fault(0, 2, "join"), fault(3, -1, "join")]
    found = run("again", "2x2", faults, max_failures=5)
    assert {f["rank"] for f in found["failures"]} == {0, 3}
    assert_same(found, undisturbed("2x2"))
    found = run("both", "2x2", [fault(1, 6, "forward"), fault(3, 6, "forward")])
    assert found["failures"][-1]["action"] == "rewind"
    assert_same(found, undisturbed("2x2"))
