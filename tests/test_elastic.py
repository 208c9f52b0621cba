"""Hosts that are lost and come back: the run goes on with fewer replicas, then with all, and learns the same."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from anabranch.benchmarks.fault_runs import python_path
from anabranch.cluster import WorkerError, connect
from anabranch.cluster.ray_session import hosts
from anabranch.runtime import commands
from anabranch.runtime.checkpoints import Checkpoints
from anabranch.runtime.config import Config

STEPS = 10
CONFIG: dict[str, dict[str, Any]] = {
    "model": {"name": "faulty:make", "options": {"depth": 8, "num_branches": 4}},
    "data": {"name": "digits", "augment": "crop", "crop_padding": 1},
    "train": {
        "epochs": 1, "max_steps": STEPS, "batch_size": 32, "bn_batch_size": 8, "precision": "fp64",
    },
    "optimizer": {"clip_norm": 5.0},
    "checkpoint": {"every_epochs": 4 / 45},  # every fourth step
    "mesh": {"execution": "fused", "memory_format": "contiguous"},
    "launch": {"hang_s": 200.0},
}  # fmt: skip
NODE: dict[str, Any] = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 80 * 2**20}


class Nodes:
    """A Ray cluster of two nodes with room for one branch group each, and the folder that all runs start in."""

    def __init__(self, cluster: Any, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.other = cluster.add_node(**NODE)

    def plan(self, branch: int) -> str:
        """A plan's file: the first replica on the node that is lost, the second on the head."""
        names = {host.node_id: host.name for host in hosts()}
        nodes = (self.other.node_id, self.cluster.head_node.node_id)
        rows = [[f"{names[node]}:{index}" for index in range(branch)] for node in nodes]
        blocks = '[[blocks]]\nmatch = "*"\nsplit = "branch"\nbranches = "even"'
        path = self.folder / "plan.toml"
        path.write_text(f"[mesh]\ndata = 2\nbranch = {branch}\ndevices = {json.dumps(rows)}\n{blocks}\n")
        return str(path)

    def lose(self) -> None:
        self.cluster.remove_node(self.other, allow_graceful=False)

    def give_back(self) -> None:
        self.other = self.cluster.add_node(**NODE)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    folder, before = tmp_path_factory.mktemp("elastic"), Path.cwd()
    shutil.copy(Path(__file__).with_name("faulty.py"), folder)
    (folder / "FAULTS").write_text("[]")
    with tempfile.TemporaryDirectory(prefix="ab") as place, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", place)  # where Ray's test cluster notes its address
        patch.setenv("PYTHONPATH", python_path())  # nodes are added from another folder
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        patch.syspath_prepend(str(folder))
        from ray.cluster_utils import Cluster

        temp_dir = Path(place, "ray")
        temp_dir.mkdir()
        head = {**NODE, "temp_dir": str(temp_dir)}
        cluster = Cluster(
            initialize_head=True, head_node_args=head, shutdown_at_exit=False
        )  # threads add nodes
        try:
            found = Nodes(cluster, folder)
            with connect(cluster.address):
                os.chdir(folder)
                yield found
        finally:
            os.chdir(before)
            cluster.shutdown()  # type: ignore[no-untyped-call]


def trained(
    folder: Path, name: str, *layers: dict[str, Any], lines: list[str] | None = None
) -> dict[str, Any]:
    """A run's result, with the tensors of its last checkpoint and the loss of every step."""
    path = folder / name
    with (folder / f"{name}.txt").open("w") as file:
        config = Config.from_dict(CONFIG, {"launch": {"run_dir": str(path)}}, *layers)
        result = commands.train(config, Console(file=file, width=1000))
    assert result is not None
    checkpoint = Checkpoints(path).newest()
    assert checkpoint is not None
    files = [load_file(checkpoint.path / name) for name in checkpoint.manifest.files]
    told = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return {
        **result,
        "tensors": {key: tensor for file in files for key, tensor in file.items()},
        "losses": [line["loss"] for line in told if line["kind"] == "step"],
        "meshes": [(line["data"], line["branch"]) for line in told if line["kind"] == "mesh"],
        "text": (folder / f"{name}.txt").read_text(),
    }


def when(happened: Path, then: Callable[[], None]) -> threading.Thread:
    """Does something once a file is there."""

    def wait() -> None:
        while not happened.exists():
            time.sleep(0.05)
        then()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    worst = max(float((found[key] - wanted[key]).abs().max()) for key in wanted if wanted[key].numel())
    assert worst < 1e-9, worst


def hold(rank: int, step: int) -> dict[str, Any]:
    return {"rank": rank, "step": step, "moment": "forward", "how": "hold"}


@pytest.fixture(scope="module")
def undisturbed(nodes: Nodes) -> dict[str, Any]:
    """The same training in one process."""
    one: dict[str, Any] = {
        "launch": {"launcher": "none"},
        "mesh": {"num_workers": 1, "shape": "1x1", "plan": "data"},
    }
    return trained(nodes.folder, "undisturbed", one)


@pytest.mark.parametrize("branch", [1, pytest.param(2, marks=pytest.mark.optin)])
def test_a_lost_host_and_its_return(nodes: Nodes, undisturbed: dict[str, Any], branch: int) -> None:
    """All of replica 0 goes: replica 1 goes on alone, its first rank leads; then there are two replicas again.

    With two branch ranks one is killed in between: without a peer both go back to the checkpoint made when the other
    replica was lost.
    """
    folder, both, one = nodes.folder, f"2x{branch}", f"1x{branch}"
    for old in folder.glob("fired-*"):
        old.unlink()
    faults = [hold(branch, 3), hold(0, 6)]
    if branch == 2:
        faults.append({"rank": 1, "step": 5, "moment": "forward", "how": "SIGKILL"})
    (folder / "FAULTS").write_text(json.dumps(faults))
    threads = [when(folder / "fired-0", nodes.lose), when(folder / "fired-1", nodes.give_back)]
    launch = {"min_replicas": 1, "cpus_per_worker": 1 / branch}
    found = trained(folder, both, {"mesh": {"plan": nodes.plan(branch)}, "launch": launch})
    for thread in threads:
        thread.join()
    shrunk, grown = found["mesh_changes"]
    assert (shrunk["before"], shrunk["mesh"], shrunk["step"]) == (both, one, 3)
    assert (grown["before"], grown["mesh"]) == (one, both)
    assert grown["step"] == (7 if branch == 1 else 6), "alone, it has all gradients of the step under way"
    assert found["meshes"] == [(1, branch), (2, branch)]
    lost, others = found["failures"][:branch], found["failures"][branch:]
    assert {failure["rank"] for failure in lost} == set(range(branch))
    assert [(each["rank"], each["action"], each["resumed_from"]) for each in others] == [(1, "rewind", 4)] * (
        branch - 1
    )
    assert f"no other host has room for its {branch} rank" in found["text"]
    assert f"the run goes on as {one} (it was {both})" in found["text"]
    assert f"has room: the run goes on as {both} (it was {one}) in" in found["text"]
    assert_close(found["tensors"], undisturbed["tensors"])
    assert found["losses"] == pytest.approx(undisturbed["losses"], abs=1e-9)
    assert len(found["losses"]) == STEPS


@pytest.mark.optin
def test_by_default_a_lost_host_ends_the_run(nodes: Nodes) -> None:
    """In one message that names it; it is there again for whoever comes next."""
    folder = nodes.folder
    for old in folder.glob("fired-*"):
        old.unlink()
    (folder / "FAULTS").write_text(json.dumps([hold(1, 3)]))
    thread = when(folder / "fired-0", nodes.lose)
    message = r"host .* was lost; no other host has room for its 1 rank: start it again, or let .*launch.min_replicas"
    with pytest.raises(WorkerError, match=message):
        trained(folder, "ended", {"mesh": {"plan": nodes.plan(1)}, "launch": {"cpus_per_worker": 1.0}})
    thread.join()
    nodes.give_back()
