"""Every family is trained, saved, gone on with on another mesh and exported, as a user does it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from family_cases import CASES, RECORDED, SAVED_AFTER, STEPS, case_config, train
from ranks import run_ranks
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from anabranch.blocks import build, families
from anabranch.blocks.registry import family_of
from anabranch.runtime import commands
from anabranch.runtime.assemble import make_data
from anabranch.runtime.basis_record import read_gradient_flow
from anabranch.runtime.config_file import load_resumed
from anabranch.runtime.data.augment import normalise

pytestmark = pytest.mark.timeout(300)  # the fixtures run all cases


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each case's four steps on 2×2, in a folder by case."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run_ranks(4, train, {case: (case_config(case, folder / case), "") for case in CASES}, (2, 2))
    return folder


@pytest.fixture(scope="module")
def resumed(undisturbed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same runs, but the second half on 2×1, no block split by branch, as `train --resume` does it."""
    folder = tmp_path_factory.mktemp("resumed")
    runs = {}
    for case in CASES:
        run = folder / case
        shutil.copytree(undisturbed / case, run)
        shutil.rmtree(run / f"checkpoints/step-{STEPS:06}")  # as if it had been killed before its end
        given: dict[str, dict[str, Any]] = {
            "mesh": {"shape": "2x1", "num_workers": 2},
            "launch": {"run_dir": str(run)},
        }
        runs[case] = (load_resumed(run, given), str(run / f"checkpoints/step-{SAVED_AFTER:06}"))
    results = run_ranks(2, train, runs, (2, 1))[0]
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def lines_of(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def test_every_family_is_there() -> None:
    assert {family_of(name) for name, _ in CASES.values()} == set(families())


@pytest.mark.parametrize("case", CASES)
def test_goes_on_with_the_same_losses_on_another_mesh(undisturbed: Path, resumed: Path, case: str) -> None:
    wanted, found = (lines_of(folder / case, "step") for folder in (undisturbed, resumed))
    assert [line["step"] for line in found] == [1, 2, 3, 4]
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in wanted], rel=1e-9)
    assert len({line["loss"] for line in wanted}) == STEPS
    ends = [lines_of(folder / case, "evaluation")[-1]["test_loss"] for folder in (undisturbed, resumed)]
    assert ends[1] == pytest.approx(ends[0], rel=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_an_export_is_the_network_of_that_name(
    undisturbed: Path, resumed: Path, case: str, tmp_path: Path
) -> None:
    """The file loads into `build(name, **options)` on one device, which computes what the workers computed."""
    data = make_data(case_config(case, tmp_path))
    x, target = data.test.fetch(torch.arange(len(data.test)), 0)
    x = normalise(x, data.normalisation, torch.float64)
    outputs: list[Tensor] = []
    for folder in (undisturbed, resumed):
        commands.export(folder / case, tmp_path / "model.safetensors", "", Console(quiet=True))
        name, options = CASES[case]
        network = build(name, in_channels=2, num_classes=5, **options).double()
        network.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
        with torch.no_grad():
            outputs.append(network.eval()(x))
    measured = json.loads((resumed / "results.json").read_text())[case]["test_loss"]
    assert float(F.cross_entropy(outputs[1], target)) == pytest.approx(measured, rel=1e-9)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("case", RECORDED)
def test_bases_are_recorded_alike_on_every_mesh(undisturbed: Path, resumed: Path, case: str) -> None:
    """RUN/basis has every step's gradients once, whoever computed them, and the last state's similarities; figures."""
    wanted, found = (read_gradient_flow(folder / case) for folder in (undisturbed, resumed))
    assert found.keys() == wanted.keys()
    for name, samples in wanted.items():
        assert [sample["step"] for sample in found[name]] == [0, 1, 2, 3]
        for sample, expected in zip(found[name], samples, strict=True):
            assert sample == pytest.approx(expected, rel=1e-8)
            assert expected["max"] > expected["mean"] > 0
    a, b = (load_file(f / case / "basis/coefficient_similarity.safetensors") for f in (undisturbed, resumed))
    assert a.keys() == b.keys()
    for name, matrix in a.items():
        torch.testing.assert_close(b[name], matrix, rtol=1e-5, atol=1e-6)
    for name in ("gradient_flow.png", "coefficient_similarity.png"):
        assert (resumed / case / "basis" / name).read_bytes().startswith(b"\x89PNG")
