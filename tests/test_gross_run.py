"""The pipeline of `anabranch gross`: its result, other meshes, stops and resumes, what it refuses."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gross_cases
import pytest
import torch
from gross_cases import QUICK, quick_config, searched
from ranks import run_ranks
from safetensors.torch import load_file

from anabranch.blocks.gross import convolutions, response_loss, series_network
from anabranch.blocks.group_search import configuration_macs, series_layers, set_group_sizes
from anabranch.blocks.group_series import Bottleneck, differences
from anabranch.runtime.assemble import make_data
from anabranch.runtime.checkpoints import Checkpoints
from anabranch.runtime.data.augment import normalise
from anabranch.runtime.data.batches import epoch_order
from anabranch.runtime.errors import ConfigError
from anabranch.runtime.gross_report import rows
from anabranch.runtime.gross_space import chosen
from anabranch.runtime.group_evaluation import outputs
from anabranch.runtime.held_out import keep_out

Result = dict[str, Any]
_MOVES = ("status", "phases", "run_dir", "table", "plot")  # what a run says of its own way and place


def found(result: Result) -> Result:
    """What must not depend on how it was come by."""
    return {key: value for key, value in result.items() if key not in _MOVES}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Result:
    result: Result = run_ranks(1, gross_cases.search, str(tmp_path_factory.mktemp("run")))[0]
    return result


def trained(folder: str | Path, stage: str, network: torch.nn.Module) -> torch.nn.Module:
    """A network as a stage left it."""
    newest = Checkpoints(Path(folder) / "stages" / stage).newest()
    assert newest is not None
    newest.load_into(network, None)
    return network


def layers_of(folder: str | Path, name: str, size: int) -> Bottleneck:
    """A fit, as the search keeps it."""
    tensors = load_file(Path(folder) / "stages" / "terms" / f"{name}-{size}.safetensors")
    return Bottleneck(tensors["p"], tensors["r"], tensors["q"])


def test_every_configuration_is_evaluated(undisturbed: Result) -> None:
    """By the tree, over the validation samples: what the network itself says at these sizes."""
    assert len(undisturbed["configurations"]) == 3 * 4
    assert undisturbed["num_validation"] == round(0.2 * 1437)
    network = trained(undisturbed["run_dir"], "series-tune", series_network(searched())).eval()
    data = make_data(quick_config())
    _, validation = keep_out(data, 0.2, 0)
    x, labels = validation.test.fetch(torch.arange(len(validation.test)), 0)
    x = normalise(x, data.normalisation, torch.float64)
    accuracies = set()
    for row in undisturbed["configurations"]:
        set_group_sizes(network, row["sizes"])
        hits = int((network(x).argmax(1) == labels).sum())
        assert row["validation_accuracy"] == hits / len(labels)
        assert row["macs"] == configuration_macs(network, row["sizes"])
        accuracies.add(row["validation_accuracy"])
    assert len(accuracies) > 3
    assert max(accuracies) > 0.8 * undisturbed["full"]["test_accuracy"], "the series is the trained network's"


def test_the_tree_gives_each_configurations_output() -> None:
    network = gross_cases.seeded(gross_cases.small_series).eval()
    wanted = {7: (1, 8), 2: (4, 1), 5: (1, 2), 9: (1, 8)}
    x = torch.randn(3, 2, 8, 8, dtype=torch.float64)
    given = dict(outputs(network, wanted, x))
    assert given.keys() == wanted.keys()
    for key, sizes in wanted.items():
        set_group_sizes(network, sizes)
        assert torch.equal(given[key], network(x))


def test_the_best_within_the_limit_are_tuned_alone(undisturbed: Result) -> None:
    (limit,) = undisturbed["limits"]
    by_sizes = {tuple(c["sizes"]): c for c in undisturbed["configurations"]}
    assert tuple(limit["baseline"]) == (2, 2)
    assert limit["macs"] == by_sizes[2, 2]["macs"]
    allowed = [c for s, c in by_sizes.items() if c["macs"] <= limit["macs"] and s != (2, 2)]
    best = sorted(allowed, key=lambda c: -c["validation_accuracy"])[1]["validation_accuracy"]
    winners = [by_sizes[tuple(sizes)] for sizes in limit["winners"]]
    assert len(winners) == 2
    assert all(c in allowed and c["validation_accuracy"] >= best for c in winners)
    assert [tuple(row["sizes"]) for row in undisturbed["tuned"]] == [(2, 2), *map(tuple, limit["winners"])]
    assert all(0.3 < row["test_accuracies"][0] <= 1 for row in undisturbed["tuned"])
    assert undisturbed["full"]["test_accuracy"] > 0.5


def test_reconstruction_minimises_the_response_error(undisturbed: Result) -> None:
    """Of a configuration alone: the first step's loss is Eq. 9 of the fitted terms against the trained network."""
    folder = Path(undisturbed["run_dir"])
    full = trained(folder, "full", searched())
    fixed = series_network(full, {name: [2] for name in convolutions(full)})
    for name, layer in series_layers(fixed).items():
        layer.load([layers_of(folder, name, 2)])
    data, _ = keep_out(make_data(quick_config()), 0.2, 0)
    x, _ = data.train.fetch(epoch_order(len(data.train), 0, 0)[:200], 0)
    x = normalise(x, data.normalisation, torch.float64)
    metrics = (folder / "stages" / "alone-2-2-0-reconstruct" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in metrics if json.loads(line)["kind"] == "step"]
    assert losses[0] == pytest.approx(float(response_loss(fixed, full, x).detach().mean()), rel=1e-9)
    assert losses[-1] < 0.95 * losses[0]


def test_all_sizes_are_trained_and_nothing_else(tmp_path: Path) -> None:
    """At temperature 0 every size is drawn; stem, linear layers and biases stay the full network's."""
    run_ranks(1, gross_cases.search, str(tmp_path), replace(QUICK, temperature=0.0), "configurations")
    full = trained(tmp_path, "full", searched())
    series = trained(tmp_path, "series-tune", series_network(searched()))
    for name, layer in series_layers(series).items():
        terms = differences([layers_of(tmp_path, name, size) for size in layer.sizes])
        for index, term in enumerate(terms):
            for now, fitted in zip((layer.p[index], layer.r[index], layer.q[index]), term, strict=True):
                assert not torch.equal(now, fitted), f"size {layer.sizes[index]} of {name}"
    frozen = set(dict(series.named_parameters())) & set(dict(full.named_parameters()))
    assert len(frozen) == 2 + 2 + 4
    assert all(torch.equal(series.get_parameter(name), full.get_parameter(name)) for name in frozen)


def test_the_choice_within_a_limit() -> None:
    """The most accurate first, the cheaper of equals, never the configuration that sets the limit."""
    table = [((1,), 10, 0.5), ((2,), 20, 0.9), ((3,), 25, 0.9), ((4,), 30, 0.7), ((8,), 40, 0.95)]
    everything = [dict(zip(("sizes", "macs", "validation_accuracy"), row, strict=True)) for row in table]
    assert chosen(((2,), 30), everything, 2)["winners"] == [(3,), (4,)]
    assert chosen((None, 30), everything, 2)["winners"] == [(2,), (3,)]
    assert chosen((None, 29), everything, 9)["winners"] == [(2,), (3,), (1,)]


def test_the_report(undisturbed: Result) -> None:
    cells = rows(undisturbed)
    assert [row[0] for row in cells] == [
        "2 2 (fixed)",
        *(" ".join(map(str, s)) for s in undisturbed["limits"][0]["winners"]),
    ]
    assert cells[0][4] == ""
    change = undisturbed["tuned"][1]["test_accuracies"][0] - undisturbed["tuned"][0]["test_accuracies"][0]
    assert cells[1][4] == f"{100 * change:+.2f}"
    table = Path(undisturbed["table"]).read_text()
    assert all("|" + "|".join(row) + "|" in table for row in cells)
    assert "12 configurations evaluated on 287 validation samples, 360 test samples" in table
    plot = Path(undisturbed["plot"]).read_bytes()
    assert plot.startswith(b"\x89PNG")
    stored = json.loads((Path(undisturbed["run_dir"]) / "result.json").read_text())
    assert stored["configurations"][0]["sizes"] == [1, 1]


def test_the_progress_spans_all_stages(undisturbed: Result) -> None:
    """Steps of the full network, the series and three configurations; every phase names its stage."""
    assert (
        undisturbed["status"]["step"] == undisturbed["status"]["num_steps"] == 6 * (8 + 1 + 2 + 3 * (1 + 1))
    )
    phases = undisturbed["phases"]
    named = ["full, training", "block terms 7/7", "series-reconstruct, training", "series-tune, training",
             "configurations 0/12", "alone-2-2-0-reconstruct, training", "alone-2-2-0-tune, training"]  # fmt: skip
    positions = [phases.index(phase) for phase in named]
    assert positions == sorted(positions)


@pytest.mark.parametrize(
    "mesh",
    [
        # `test_stopped_again_and_again_it_ends_alike` runs on it by default, in turn with 1x1
        pytest.param({"shape": "1x2"}, marks=pytest.mark.optin),
        {"shape": "2x1", "plan": "data"},
    ],
    ids=["1x2", "2x1"],
)
def test_other_meshes_find_the_same(mesh: Result, undisturbed: Result, tmp_path: Path) -> None:
    results = run_ranks(2, gross_cases.search, str(tmp_path), QUICK, -1, {"mesh": mesh})
    assert found(results[0]) == found(results[1]) == found(undisturbed)
    assert any("block terms" in phase for phase in results[1]["phases"]), "the fits are dealt"


def test_stopped_again_and_again_it_ends_alike(undisturbed: Result, tmp_path: Path) -> None:
    """Each time a little further: full network, terms, series, evaluation, alone; on changing meshes."""
    stops = 0
    while True:
        world_size = 1 + stops % 2
        layer = {"mesh": {"shape": f"1x{world_size}"}}
        result = run_ranks(world_size, gross_cases.search, str(tmp_path), QUICK, 30, layer)[0]
        if result["stopped"] is None:
            break
        assert set(result) == {"stopped", "run_dir", "status", "phases"}
        stops += 1
        assert stops < 30
    assert stops > 4
    assert found(result) == found(undisturbed)
    assert result["status"]["step"] == result["status"]["num_steps"]


def test_a_finished_run_is_only_read(undisturbed: Result) -> None:
    folder = Path(undisturbed["run_dir"])
    before = {path: path.stat().st_mtime_ns for path in (folder / "stages").rglob("*.safetensors")}
    again = run_ranks(1, gross_cases.search, str(folder))[0]
    assert found(again) == found(undisturbed)
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "stages").rglob("*.safetensors")}
    assert not [phase for phase in again["phases"] if "training" in phase or "block terms" in phase]


def refused(rank: int, world_size: int, folder: str, cases: Sequence[tuple[Any, Result]]) -> list[str]:
    messages = []
    for gross, layer in cases:
        try:
            gross_cases.search(rank, world_size, folder, gross, -1, layer)
        except ConfigError as error:
            messages.append(str(error))
        else:
            messages.append("")
    return messages


def test_what_is_refused(undisturbed: Result) -> None:
    cases: list[tuple[Any, Result, str]] = [
        (replace(QUICK, temperature=4.0), {}, "has results of gross.temperature = 1.0, now it is 4.0"),
        (QUICK, {"train": {"seed": 1}}, "has results of train.seed = 0, now it is 1"),
        (replace(QUICK, baselines=(3,)), {}, "gross.baselines has 3, the network's layers have group sizes [["),
        (replace(QUICK, baselines=()), {}, "gross.baselines is empty and gross.max_macs is 0: give one"),
        (replace(QUICK, max_macs=10), {}, "gross.max_macs is 10, the smallest configuration has "),
    ]  # fmt: skip
    given = run_ranks(1, refused, undisturbed["run_dir"], [case[:2] for case in cases])[0]
    for message, (*_, wanted) in zip(given, cases, strict=True):
        assert wanted in message


def test_samples_are_kept_out_of_training() -> None:
    data = make_data(quick_config())
    rest, validation = keep_out(data, 0.25, 3)
    parts = [rest.train.ids, validation.test.ids]  # type: ignore[attr-defined]
    assert sorted(torch.cat(parts).tolist()) == list(range(1437))
    assert len(validation.test) == 359
    assert rest.test is data.test
    x, labels = validation.test.fetch(torch.tensor([5, 2]), 0)
    wanted = data.train.fetch(parts[1][[5, 2]], 0)
    assert torch.equal(x, wanted[0])
    assert torch.equal(labels, wanted[1])
    assert torch.equal(parts[1], keep_out(copy.copy(data), 0.25, 3)[1].test.ids)  # type: ignore[attr-defined]
    assert not torch.equal(parts[1], keep_out(data, 0.25, 4)[1].test.ids)  # type: ignore[attr-defined]
    for fraction in (0.0, 1.0):
        with pytest.raises(ConfigError, match="keep some out, and some in"):
            keep_out(data, fraction, 0)


COMMAND = [
    sys.executable, "-m", "anabranch.runtime", "gross", "--launcher", "none", "--json",
    "--model.options.channels", "[4, 4, 8]", "--model.options.width", "32", "--epochs", "2",
    "--train.batch-size", "200", "--gross.tune-epochs", "3", "--gross.tune-milestones", "2",
    "--gross.reconstruct-epochs", "1",
    "--gross.reconstruct-milestones", "1", "--gross.fixed-tune-epochs", "1", "--gross.fixed-tune-milestones", "1",
    "--gross.baselines", "2", "--gross.winners", "1", "--mesh.execution", "fused", "--mesh.memory-format", "contiguous",
]  # fmt: skip


def test_the_command_goes_on_after_a_kill(tmp_path: Path) -> None:
    """Killed while the series is trained, it is resumed by its folder alone, and says what it found."""
    run = tmp_path / "run"
    first = subprocess.Popen(
        [*COMMAND, "--run-dir", str(run)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=_one_core,
    )
    metrics = run / "stages" / "series-tune" / "metrics.jsonl"
    while not metrics.exists() and first.poll() is None:
        time.sleep(0.02)
    first.kill()
    assert first.wait() == -signal.SIGKILL, "it ended before it could be killed"
    assert not (run / "result.json").exists()
    full = (run / "stages" / "full" / "done.json").stat().st_mtime_ns
    again = [*COMMAND[:4], "--resume", str(run), "--launcher", "none", "--json"]
    done = subprocess.run(again, capture_output=True, text=True, check=False, preexec_fn=_one_core)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert len(result["configurations"]) == 3 * 3
    assert [len(limit["winners"]) for limit in result["limits"]] == [1]
    assert Path(result["plot"]) == run / "accuracy.png"
    assert "2 2 (fixed)" in done.stderr
    assert (run / "stages" / "full" / "done.json").stat().st_mtime_ns == full, "it was not trained again"


def _one_core() -> None:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.optin), 2])
def test_killed_at_every_stage_it_ends_alike(world_size: int, undisturbed: Result, tmp_path: Path) -> None:
    """By SIGKILL on the last rank, before a checkpoint, between them, among the fits, the configurations' pieces."""
    stages = ["full, evaluating", "block terms 4/", "series-tune, saving", "alone-2-2-0-tune, training"]
    for stage in stages[world_size - 1 :: 2]:
        with pytest.raises(AssertionError, match="died"):
            run_ranks(world_size, gross_cases.killed, str(tmp_path), stage)
    result = run_ranks(3 - world_size, gross_cases.search, str(tmp_path))[0]
    assert found(result) == found(undisturbed)


def test_a_network_without_convolutions_to_decompose_is_told_before_workers_start(tmp_path: Path) -> None:
    command = [*COMMAND[:4], "--launcher", "none", "--model", "multi_resnet", "--model.options.depth", "8",
               "--model.options.num-branches", "2", "--run-dir", str(tmp_path / "run")]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2, run.stderr
    assert "no convolution" in run.stderr
