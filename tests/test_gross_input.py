"""What `anabranch gross` is given: group sizes, limits, another run's network, folders; refused before it trains."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import gross_cases
import pytest
import torch
from gross_cases import QUICK, quick_config, searched
from ranks import run_ranks
from rich.console import Console

from anabranch.blocks import ModelError
from anabranch.blocks.gross import series_network
from anabranch.cluster import WorkerContext
from anabranch.runtime import commands
from anabranch.runtime.assemble import make_data
from anabranch.runtime.checkpoints import Checkpoints
from anabranch.runtime.cli import parse
from anabranch.runtime.config import Config
from anabranch.runtime.config_file import load_config
from anabranch.runtime.errors import ConfigError
from anabranch.runtime.gross_space import check_search, search_space, settings_of
from anabranch.runtime.gross_stages import write_json
from anabranch.runtime.trainer import Trainer

LAYERS = ["blocks.stage1.block1.conv", "blocks.stage2.block1.conv"]


def test_the_space_has_the_given_group_sizes() -> None:
    space = search_space(searched(), replace(QUICK, sizes=(1, 4, 8), baselines=(8,), max_macs=10**6))
    assert space.layers == dict(zip(LAYERS, [[1, 4], [1, 4, 8]], strict=True))
    assert {c.sizes for c in space.configurations} == {(a, b) for a in (1, 4) for b in (1, 4, 8)}
    largest = space.configurations[-1]
    assert space.limits == [((4, 8), largest.macs), (None, 10**6)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": (1, 3, 4)}, r"gross.sizes is \[1, 3, 4\], but of blocks.stage1.block1.conv group sizes .* divide"),
        ({"sizes": (8,)}, r"gross.sizes is \[8\], but of blocks.stage1"),
        ({"baselines": (3,)}, r"gross.baselines has 3, the network's layers have group sizes \[\[1"),
        ({"max_macs": 10}, "gross.max_macs is 10, the smallest configuration has 5536: allow that"),
        ({"baselines": ()}, "gross.baselines is empty and gross.max_macs is 0: give one"),
        ({"tune_milestones": (3, 2)}, r"gross.tune_milestones is \[3, 2\]: the epochs must ascend"),
        ({"full": "/nowhere"}, "/nowhere is no run"),
    ],
)  # fmt: skip
def test_settings_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_search(searched(), replace(quick_config(), gross=replace(QUICK, **changes)))


@pytest.mark.parametrize("in_a_file", [False, True])
def test_an_automatic_plan_is_refused(in_a_file: bool, tmp_path: Path) -> None:
    """Nothing is measured for it: it would be data parallelism, and nobody told."""
    (tmp_path / "plan.toml").write_text('[mesh]\ndata = 1\nbranch = 2\nscheduler = "auto"\n')
    plan = str(tmp_path / "plan.toml") if in_a_file else "auto"
    config = Config.from_dict(quick_config().to_dict(), {"mesh": {"plan": plan}})
    with pytest.raises(ConfigError, match=r"mesh\.plan is .*, an automatic one, .*: give --plan data"):
        check_search(searched(), replace(config, gross=QUICK))


def test_nothing_starts_with_wrong_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command refuses before a worker runs and before a folder is made."""
    monkeypatch.setattr("anabranch.runtime.driver.Driver.run", lambda *args, **kwargs: pytest.fail("started"))
    config = load_config("digits-gross", {"launch": {"launcher": "none", "run_dir": str(tmp_path / "run")}})
    with pytest.raises(ConfigError, match=r"gross\.max_macs is 1"):
        commands.gross(replace(config, gross=replace(config.gross, max_macs=1)), Console(quiet=True))
    other = load_config("digits", {"launch": {"launcher": "none", "run_dir": str(tmp_path / "run")}})
    with pytest.raises(ModelError, match="no convolution to decompose"):
        commands.gross(other, Console(quiet=True))
    assert not (tmp_path / "run").exists()


def test_a_folder_with_something_else(tmp_path: Path) -> None:
    config = Config.from_dict(quick_config().to_dict(), {"launch": {"run_dir": str(tmp_path)}})
    check_search(searched(), replace(config, gross=QUICK))
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(
        ConfigError, match=r"holds a training, not a group-size search: start one .* --gross\.full"
    ):
        check_search(searched(), replace(config, gross=QUICK))
    (tmp_path / "stages").mkdir()
    write_json(tmp_path / "stages" / "settings.json", settings_of(replace(config, gross=QUICK)))
    check_search(searched(), replace(config, gross=QUICK))
    with pytest.raises(ConfigError, match=r"has results of gross\.temperature = 1\.0, now it is 2\.0"):
        check_search(searched(), replace(config, gross=replace(QUICK, temperature=2.0)))


def test_a_configuration_without_the_section(tmp_path: Path) -> None:
    path = tmp_path / "plain.toml"
    path.write_text('[model]\nname = "gross_net"\n')
    with pytest.raises(ConfigError, match=r"plain\.toml has no \[gross\] section: add one"):
        parse(["gross", str(path)])
    call = parse(["gross", str(path), "--gross.winners", "3"])
    assert call is not None
    assert call.arguments["config"].gross.winners == 3
    default = parse(["gross"])
    assert default is not None
    assert default.arguments["config"] == load_config("digits-gross")


def test_another_runs_network_is_decomposed(tmp_path: Path) -> None:
    """Its newest checkpoint, which is at a URL, becomes the full network, and stays usable when that run is gone."""
    run, folder = tmp_path / "run", tmp_path / "search"
    run.mkdir()
    url = f"file://{run}/bucket"
    config, context = (
        quick_config({"train": {"epochs": 2}, "checkpoint": {"url": url}}),
        WorkerContext(0, 1, 0, "localhost", "cpu", 1, "", "gloo"),
    )
    (run / "config.toml").write_text(config.to_toml())
    data = make_data(config)
    trained = Trainer(searched(), data, config, context=context, run_dir=run).fit()
    gross = replace(QUICK, full=str(run), tune_epochs=1, winners=1)
    assert run_ranks(1, gross_cases.search, str(folder), gross, "block terms")[0]["stopped"]
    wanted, kept = searched(), searched()
    newest = Checkpoints(run, url=url).newest()
    assert newest is not None
    newest.load_into(wanted, None)
    shutil.rmtree(run)
    result = run_ranks(1, gross_cases.search, str(folder), gross)[0]
    assert result["full"]["test_accuracy"] == trained["test_accuracy"]
    assert result["status"]["step"] == result["status"]["num_steps"] == 6 * (1 + 1 + 2 * (1 + 1))
    copied = Checkpoints(folder / "stages" / "full").newest()
    assert copied is not None
    copied.load_into(kept, None)
    assert all(torch.equal(a, b) for a, b in zip(kept.parameters(), wanted.parameters(), strict=True))
    series = series_network(searched())
    tuned = Checkpoints(folder / "stages" / "series-tune").newest()
    assert tuned is not None
    tuned.load_into(series, None)
    for name in ("stem.conv.weight", "head.fc1.weight"):  # frozen since
        assert torch.equal(series.get_parameter(name), wanted.get_parameter(name)), (
            "it is what was decomposed"
        )
