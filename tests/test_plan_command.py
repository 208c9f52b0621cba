"""`anabranch plan` for machines that are not here, and what is said of wrong input; the measured way: test_measure."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from anabranch.blocks import build
from anabranch.blocks.convert import prepare
from anabranch.runtime import commands
from anabranch.runtime.config import Config
from anabranch.runtime.errors import ConfigError
from anabranch.runtime.model_spec import spec_of
from anabranch.runtime.plan_report import print_candidates, print_explanation
from anabranch.schedulers import PlanError, parse_plan, read_plan
from anabranch.schedulers.cluster_file import read_cluster
from anabranch.schedulers.costs import Batch
from anabranch.schedulers.device_table import device_kind
from anabranch.schedulers.explain import StageRow

CONFIG: dict[str, Any] = {
    "model": {
        "name": "multi_resnet",
        "options": {"depth": 14, "num_branches": 4, "width": 4, "shortcut": "B"},
    },
    "data": {"name": "synthetic"},
    "train": {"batch_size": 64},
}


def plan(output: Path | None, *layers: dict[str, Any], **given: Any) -> dict[str, Any]:
    arguments = {"devices": "", "interconnect": "", "cluster": "", "explain": False, **given}
    result = commands.plan(
        Config.from_dict(CONFIG, *layers), **arguments, output=output, console=Console(quiet=True)
    )
    assert result is not None
    return result


def test_machines_that_are_not_here(tmp_path: Path) -> None:
    """The best plan is no slower than the plans it is compared with, is written, and reads back."""
    output = tmp_path / "plan.toml"
    result = plan(output, devices="2x4xH200", interconnect="20Gbit/s", explain=True)
    rows = {row["name"]: row for row in result["plans"]}
    assert rows.keys() == {"best", "data", "all-branch", "even"}
    assert result["predicted_step_s"] == min(row["predicted_step_s"] for row in rows.values())
    assert result["data_parallel_step_s"] == rows["data"]["predicted_step_s"]
    assert result["measured_step_s"] is None
    assert result["label"] == "predicted, not calibrated"
    assert len(result["memory_bytes"]) == 8
    assert result["search_s"] < 5
    assert {row["stage"] for row in result["explain"]} <= {"stage1", "stage2", "stage3"}
    written = read_plan(output)
    assert (written.mesh[0] * written.mesh[1]) == 8
    fast = plan(output, devices="2x4xH200", interconnect="20000Gbit/s")
    assert fast["data_parallel_step_s"] < result["data_parallel_step_s"], "the wire counts"


@pytest.mark.parametrize(("bn_batch_size", "is_told"), [(0, False), (8, False), (16, True)])
def test_statistics_across_devices_are_told(bn_batch_size: int, is_told: bool, tmp_path: Path) -> None:
    """Data sheets know no price of them."""
    with (tmp_path / "printed").open("w") as printed:
        commands.plan(
            Config.from_dict(CONFIG, {"train": {"bn_batch_size": bn_batch_size}}), devices="8xH200", interconnect="",
            cluster="", explain=False, output=tmp_path / "plan.toml", console=Console(file=printed, width=300),
        )  # fmt: skip
    note = "note: BN groups of 16 samples lie on several devices"
    assert (note in (tmp_path / "printed").read_text()) == is_told


def test_a_cluster_file_and_pins(tmp_path: Path) -> None:
    cluster = tmp_path / "cluster.toml"
    cluster.write_text(
        '[[hosts]]\nname = "a"\nkind = "L4"\ndevices = 2\n[[hosts]]\nname = "b"\nkind = "L4"\nspeeds = [0.5, 0.5]\n'
        '[links]\nacross = "10Gbit/s"\n'
    )
    given = tmp_path / "given.toml"
    given.write_text(
        '[mesh]\ndata = 1\nbranch = 4\nscheduler = "optimal"\n[[blocks]]\nmatch = "stage1.*"\nsplit = "sample"\n'
        '[[pins]]\nmatch = "stage3.*"\nbranch = 0\nhost = "b"\n[[blocks]]\nmatch = "stage3.*"\nsplit = "branch"\n'
    )
    layer = {"mesh": {"plan": str(given)}}
    with pytest.raises(PlanError):
        plan(tmp_path / "plan.toml", layer, cluster=str(cluster))
    given.write_text(given.read_text().rpartition("[[blocks]]")[0])
    result = plan(tmp_path / "plan.toml", layer, cluster=str(cluster))
    network = prepare(build("multi_resnet", **CONFIG["model"]["options"], in_channels=3))
    placed = parse_plan(result["plan"]).resolve(spec_of(network), read_cluster(cluster))
    assert placed.devices is not None
    for name, block in placed.blocks.items():
        if name.startswith("stage1"):
            assert block.split == "sample"
        if name.startswith("stage3") and block.branches is not None:
            (rank,) = [rank for rank, held in enumerate(block.branches) if 0 in held]
            assert placed.devices[0][rank].startswith("b:")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"devices": "H200"}, "names no devices: write hosts x devices x kind"),
        ({"devices": "2x8xH200"}, "give the link between them"),
        ({"devices": "8xZ9000"}, "no figures for a device"),
        ({"devices": "8xL40S"}, 'no figures for a device "L40S"'),  # no L4
        ({"devices": "8xH200", "cluster": "c.toml"}, "both name machines: give one"),
        ({"interconnect": "10Gbit/s"}, "--interconnect is for --devices"),
        ({"cluster": "nowhere.toml"}, "cannot read the cluster file"),
        ({"devices": "8xH200", "interconnect": "fast"}, "is no bandwidth"),
    ],
)
def test_wrong_machines(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((PlanError, ConfigError), match=message):
        plan(tmp_path / "plan.toml", **given)
    assert not (tmp_path / "plan.toml").exists()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100"), ("A100_40G", "A100"), ("Tesla T4", "T4"), ("nvidia l4", "L4"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"), ("RTX4090", "RTX 4090"), ("NVIDIA RTX A1000", ""), ("NVIDIA T400", ""),
        ("NVIDIA L40S", ""), ("NVIDIA GH200 480GB", ""),
    ],
)  # fmt: skip
def test_a_device_is_known_by_whole_words(name: str, kind: str) -> None:
    if kind:
        assert device_kind(name).name == kind
    else:
        with pytest.raises(PlanError, match="no figures for a device"):
            device_kind(name)


def test_no_room_says_how_much_is_lacking(tmp_path: Path) -> None:
    cluster = tmp_path / "cluster.toml"
    cluster.write_text('[[hosts]]\nname = "a"\nkind = "L4"\ndevices = 2\nmemory_gb = 0.01\n')
    with pytest.raises(
        PlanError, match=r"no plan fits the devices' memory: the closest one lacks [\d,]+ bytes on a:"
    ):
        plan(tmp_path / "plan.toml", cluster=str(cluster))
    with pytest.raises(PlanError, match=r"bytes on host0:0, which has 10,000,000"):
        plan(tmp_path / "plan.toml", {"mesh": {"memory_gb": 0.01}}, devices="2xL4")


def test_the_table_marks_the_chosen_plan() -> None:
    console = Console(width=140, record=True, quiet=False, file=Path("/dev/null").open("w"))  # noqa: SIM115
    outcome = {
        "label": "measured", "chosen": "1x2", "gap": 0.0, "search_s": 0.01, "notes": ["a note"],
        "plans": [
            {"name": "1x2", "predicted_step_s": 0.09, "exposed_s": 0.01, "memory_bytes": [2**20],
             "measured_step_s": 0.1, "ratio": 0.8, "interval_95": [0.7, 0.9], "error": -0.1},
            {"name": "data", "predicted_step_s": 0.12, "exposed_s": 0.0, "memory_bytes": [2**21]},
        ],
    }  # fmt: skip
    print_candidates(console, outcome)
    text = console.export_text()
    console.file.close()
    assert "1x2 ◄" in text
    assert "0.800 (0.700 to 0.900)" in text
    assert "-10 %" in text
    assert "note: a note" in text


@pytest.mark.parametrize(
    ("least", "most", "said"),
    [
        (None, None, "at no bandwidth"), (0.0, None, "at any bandwidth"), (1.25e9, None, "from 10.00 Gbit/s"),
        (0.0, 2.5e9, "up to 20.00 Gbit/s"),
    ],
)  # fmt: skip
def test_the_explanation_says_at_which_bandwidths(
    least: float | None, most: float | None, said: str, tmp_path: Path
) -> None:
    row = StageRow("stage1", ("stage1.block1",), "sample", 0.1, 0.2, None, least, most)
    with (tmp_path / "printed").open("w") as printed:
        print_explanation(Console(file=printed, width=200), [row], Batch(64, 8))
    assert said in (tmp_path / "printed").read_text()


def test_what_is_there_is_replaced_only_where_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "plan.toml"
    own.write_text("by hand")
    with pytest.raises(ConfigError, match=r"plan\.toml is here already: .*--output plan\.toml to replace it"):
        plan(None, devices="2xA100")
    assert own.read_text() == "by hand"
    plan(Path("plan.toml"), devices="2xA100")
    assert read_plan(own).mesh is not None
    own.unlink()
    plan(None, devices="2xA100")
    assert own.is_file()
    with pytest.raises(ConfigError, match="there is no folder nowhere; give another --output"):
        plan(Path("nowhere/plan.toml"), devices="2xA100")


def test_neither_torch_nor_ray_for_help_and_json_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "anabranch.runtime", "plan", "--data", "synthetic", "--model.options.depth", "8",
               "--devices", "4xA100", "--json", "--output", str(tmp_path / "plan.toml")]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(run.stdout.splitlines()[-1])
    assert result.keys() >= {
        "plan", "predicted_step_s", "measured_step_s", "data_parallel_step_s", "search_s", "memory_bytes",
    }  # fmt: skip
    assert len(run.stdout.splitlines()) == 1
