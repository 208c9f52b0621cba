"""The main job on real input: trains under Ray, stops, goes on elsewhere, says what is wrong before it starts."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from anabranch.cluster import WorkerError, connect, placement, ray_calls
from anabranch.runtime import commands
from anabranch.runtime.callbacks import Callback
from anabranch.runtime.cli import main
from anabranch.runtime.config import Config
from anabranch.runtime.config_file import load_resumed
from anabranch.runtime.errors import CheckpointError, ConfigError, DataError
from anabranch.runtime.recorder import PARTS
from anabranch.schedulers import PlanError

CLI = [sys.executable, "-m", "anabranch.runtime"]
SMALL: dict[str, dict[str, Any]] = {
    "model": {"name": "multi_resnet", "options": {"depth": 8, "num_branches": 3}},
    "data": {"name": "digits", "augment": "crop", "crop_padding": 1},
    "train": {"epochs": 1, "max_steps": 8, "batch_size": 32, "bn_batch_size": 16, "precision": "fp64"},
    "checkpoint": {"every_epochs": 4 / 45},  # every fourth step
    # chosen, for runs that are to be equal to the last bit: what is measured may turn out otherwise in another process
    "mesh": {"execution": "fused", "memory_format": "contiguous"},
}


@pytest.fixture(scope="module", autouse=True)
def ray() -> Iterator[None]:
    """One local cluster for this file; four workers' places on however many cores there are, a thread each."""
    with pytest.MonkeyPatch.context() as patch, connect(num_cpus=4):
        patch.setattr(placement, "thread_share", lambda num_cpus, num_ranks: 1)
        yield


def config(folder: Path, *layers: Mapping[str, Any]) -> Config:
    return Config.from_dict(SMALL, {"launch": {"run_dir": str(folder)}}, *layers)


def train(config: Config) -> dict[str, Any]:
    config.check()
    result = commands.train(config, Console(quiet=True))
    assert result is not None
    return result


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "step"]


def _assert_parts_add_up(folder: Path, num_ranks: int) -> None:
    """What metrics.jsonl says of every step: all parts on every rank, nearly nothing left over."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first, *steps = [line for line in lines if line["kind"] == "step"]
    assert first["times_s"]["step"] == [0.0] * num_ranks  # times are of the step before: building was none
    for rank in range(num_ranks):
        for line in steps:
            times = {part: of_ranks[rank] for part, of_ranks in line["times_s"].items()}
            assert set(times) == {*PARTS, "unattributed"}
            assert 2 * times["step"] == pytest.approx(sum(times.values()), abs=1e-5)
            assert line["memory_bytes"][rank] > 2**20
            assert line["images_per_s"] > 0
        left = [line["times_s"]["unattributed"][rank] / line["times_s"]["step"][rank] for line in steps]
        assert statistics.median(left) <= 0.02


def test_the_local_cluster_is_lean() -> None:
    """No dashboard, autoscaler, log reader: they are most of the seconds that Ray takes to start."""
    commands = "\n".join(
        Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        for pid in alive(descendants(os.getpid()))
    )
    assert "gcs_server" in commands
    assert "raylet" in commands
    assert not re.findall(r"dashboard\.py|monitor\.py", commands)
    assert "--minimal" in commands


def test_learns_the_digits_with_branches_on_two_workers(tmp_path: Path) -> None:
    """The default network; a smaller one's step is so short that another test on the cores is a part of it."""
    layer = {
        "model": {"options": {"depth": 14, "num_branches": 4}},
        "train": {"epochs": 2, "max_steps": 0, "bn_batch_size": 0, "precision": "fp32"},
        "checkpoint": {"every_epochs": 1},
    }
    result = train(config(tmp_path / "run", layer))
    # eight seeds: 0.894 to 0.950, and another kind of CPU rounds otherwise; chance is 0.1
    assert result["test_accuracy"] > 0.85
    assert result["steps"] == 2 * 45
    assert 0 < result["median_step_s"] < result["train_seconds"]
    assert result["run_dir"] == str(tmp_path / "run")
    _assert_parts_add_up(tmp_path / "run", num_ranks=2)
    resolved = (tmp_path / "run" / "config.toml").read_text()
    assert "bn_batch_size = 16" in resolved  # 32 samples ÷ 2 workers, as a number
    plan = (tmp_path / "run" / "plan.toml").read_text()
    assert "counts = [2, 2]" in plan
    assert len(losses(tmp_path / "run")) == 90
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "step-000045",
        "step-000090",
    ]


Calls = dict[str, int]


@pytest.fixture(scope="module")
def undisturbed_calls(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Calls]:
    """Eight steps in fp64, a checkpoint after each fourth, on a 1×2 mesh; and the calls to Ray that they took."""
    folder = tmp_path_factory.mktemp("undisturbed")
    ray_calls.clear()
    result = train(config(folder))
    assert len(losses(folder)) == 8
    return folder, result["ray_calls"]


@pytest.fixture(scope="module")
def undisturbed(undisturbed_calls: tuple[Path, Calls]) -> Path:
    return undisturbed_calls[0]


@pytest.fixture(scope="module")
def stopped_calls(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Calls]:
    """Half of these steps, in the same way."""
    folder = tmp_path_factory.mktemp("stopped")
    ray_calls.clear()
    return folder, train(config(folder, {"train": {"max_steps": 4}}))["ray_calls"]


@pytest.fixture
def stopped(stopped_calls: tuple[Path, Calls], tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped_calls[0], tmp_path / "stopped"))


@pytest.mark.parametrize(
    "mesh",
    [
        {"num_workers": 4, "shape": "2x2", "plan": "even"},
        # test_checkpoint.py and test_families.py go on with these by default, in processes that are there already
        pytest.param({"num_workers": 2, "shape": "2x1", "plan": "data"}, marks=pytest.mark.optin),
        pytest.param({"num_workers": 1, "shape": "1x1", "plan": "even"}, marks=pytest.mark.optin),
    ],
    ids=["2x2", "2x1", "1x1"],
)
def test_goes_on_with_the_same_losses_on_another_mesh(
    mesh: dict[str, Any], undisturbed: Path, stopped: Path
) -> None:
    given = {"mesh": mesh, "train": {"max_steps": 8}, "checkpoint": {"resume": str(stopped)}}
    train(load_resumed(stopped, given))
    assert losses(stopped)[:4] == losses(undisturbed)[:4]
    assert losses(stopped)[4:] == pytest.approx(losses(undisturbed)[4:], rel=1e-9)


def test_goes_on_bit_equal_under_the_same_plan(undisturbed: Path, stopped: Path) -> None:
    train(load_resumed(stopped, {"train": {"max_steps": 8}, "checkpoint": {"resume": str(stopped)}}))
    assert losses(stopped) == losses(undisturbed)


def test_ray_is_outside_the_step(
    undisturbed_calls: tuple[Path, Calls], stopped_calls: tuple[Path, Calls]
) -> None:
    """Ray calls over N and over 2N steps differ only by the once-a-second watch."""
    twice, once = (
        {name: n for name, n in calls.items() if not name.startswith(("watch", "start_wait"))}
        for _, calls in (undisturbed_calls, stopped_calls)
    )
    assert once == twice
    assert once["run"] == 2


class Recorder(Callback):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.tested: list[float] = []

    def on_step(self, metrics: Mapping[str, Any]) -> None:
        self.steps.append(metrics["step"])

    def on_evaluation(self, metrics: Mapping[str, Any]) -> None:
        self.tested.append(metrics["test_accuracy"])


def test_trainer_in_python_tells_its_callbacks() -> None:
    from anabranch.blocks import build
    from anabranch.runtime import Trainer
    from anabranch.runtime.data.load import load_data

    recorder = Recorder()
    network = build("multi_resnet", depth=8, num_branches=2, in_channels=1)
    chosen = Config.from_dict(
        SMALL, {"train": {"max_steps": 3, "precision": "bf16"}, "mesh": {"plan": "data"}}
    )
    result = Trainer(network, load_data("digits"), chosen, callbacks=[recorder]).fit()
    assert recorder.steps == [1, 2, 3]
    assert recorder.tested == [result["test_accuracy"]]


def test_eval_and_export_read_a_run(undisturbed: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from anabranch.blocks import build

    quiet = Console(quiet=True)
    tested = commands.evaluate(undisturbed, "", quiet)
    assert tested is not None
    lines = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    assert (
        tested["test_accuracy"]
        == [line for line in lines if line["kind"] == "evaluation"][-1]["test_accuracy"]
    )
    commands.export(undisturbed, tmp_path / "model.safetensors", "", quiet)
    build("multi_resnet", depth=8, num_branches=3, in_channels=1).load_state_dict(
        load_file(tmp_path / "model.safetensors"), strict=True
    )


def test_verify_says_how_far_the_plan_is_from_one_device() -> None:
    result = commands.verify(
        Config.from_dict(SMALL, {"mesh": {"num_workers": 2, "shape": "1x2"}}),
        2,
        True,
        1e-9,
        Console(quiet=True),
    )
    assert result is not None
    assert result["max_relative_difference"] <= 1e-9
    assert result["num_compared"] > 50


USER_CODE = """
import torch
from anabranch.blocks import build

def broken_loss(output, target):
    if torch.distributed.get_rank() == 1:
        with open("raised", "a") as file:
            file.write("once ")
        raise ValueError("my own mistake")
    return torch.nn.functional.cross_entropy(output, target, reduction="none")

def broken_net():
    return build("multi_resnet", depth=8, num_branches=undefined_name)
"""


@pytest.fixture
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "theirs.py").write_text(USER_CODE)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("theirs", None)
    if str(tmp_path) in sys.path:
        sys.path.remove(str(tmp_path))


def test_a_failing_worker_is_told_once_with_rank_and_host(user_folder: Path) -> None:
    """After another process tried the same step and failed alike: the run has ended then."""
    with pytest.raises(WorkerError) as raised:
        train(config(user_folder / "run", {"train": {"loss": "theirs:broken_loss"}}))
    message = str(raised.value)
    assert "rank 1 on host" in message
    assert message.count("ValueError: my own mistake") == 1
    assert "theirs.py" in message
    assert "onnection" not in message
    assert (user_folder / "raised").read_text() == "once once "


def test_a_failing_factory_is_told_with_the_users_line(user_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"theirs\.py.*line 13(.|\n)*undefined_name"):
        train(config(user_folder / "run", {"model": {"name": "theirs:broken_net"}}))
    assert not (user_folder / "run").exists()


PLAN = '[mesh]\ndata = 1\nbranch = 2\n[[blocks]]\nmatch = "{match}"\nsplit = "branch"\n{branches}\n'

BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("too many workers", {"mesh": {"num_workers": 9}}, PlanError, r"9.*4"),
    ("bn group above the batch", {"train": {"bn_batch_size": 33}}, ConfigError, r"bn_batch_size.*33"),
    ("bn group above the micro-batch", {"train": {"accumulation": 4}}, ConfigError, r"bn_batch_size is 16.*8"),
    ("no such archive", {"data": {"name": "cifar10", "path": "/nowhere"}}, DataError, "/nowhere"),
    ("nccl without CUDA", {"launch": {"backend": "nccl"}}, ValueError, "nccl.*CUDA"),
    ("unmatched block", {"mesh": {"plan": ("stage1.*", 'branches = "even"')}}, PlanError, r"stage2\.block1"),
    ("rule that matches nothing", {"mesh": {"plan": ("stage9.*", 'branches = "even"')}}, PlanError, r"stage9"),
    ("counts that do not sum", {"mesh": {"plan": ("stage*", "counts = [3, 3]")}}, PlanError, r"3.*6"),
    ("no such scheduler", {"mesh": {"plan": "evn"}}, PlanError, r"evn.*even"),
    ("not a run", {"checkpoint": {"resume": "/nowhere"}}, ConfigError, "/nowhere"),
]  # fmt: skip


@pytest.mark.parametrize(("layer", "error", "message"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_wrong_input_ends_before_any_worker_starts(
    layer: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    plan = layer.get("mesh", {}).get("plan")
    if isinstance(plan, tuple):
        path = tmp_path / "plan.toml"
        path.write_text(PLAN.format(match=plan[0], branches=plan[1]))
        layer = {"mesh": {"plan": str(path)}}
    ray_calls.clear()
    with pytest.raises(error, match=f"(?s){message}"):
        train(config(tmp_path / "run", layer))
    assert "run" not in ray_calls
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"{port} is in use"):
            train(config(tmp_path / "run", {"launch": {"port": port}}))


def test_a_checkpoint_of_another_model_or_torn_is_refused_before_workers_start(
    undisturbed: Path, tmp_path: Path
) -> None:
    other: dict[str, dict[str, Any]] = {
        "model": {"options": {"num_branches": 2}},
        "mesh": {"plan": "even"},
        "checkpoint": {"resume": str(undisturbed)},
    }
    ray_calls.clear()
    with pytest.raises(CheckpointError, match="another network"):
        train(load_resumed(undisturbed, {**other, "launch": {"run_dir": str(tmp_path / "new")}}))
    torn = tmp_path / "torn"
    subprocess.run(["cp", "-r", str(undisturbed), str(torn)], check=True)
    for file in torn.glob("checkpoints/*/*.safetensors"):
        file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match="safetensors"):
        train(load_resumed(torn, {"checkpoint": {"resume": str(torn)}}))
    assert "run" not in ray_calls


def test_a_run_is_not_overwritten(undisturbed: Path) -> None:
    with pytest.raises(ConfigError, match="holds a run already"):
        train(config(undisturbed))


LONG = [
    "train",
    "--epochs",
    "400",
    "--checkpoint.every-epochs",
    "0",
    "--model.options.depth",
    "8",
    "--mesh.execution",
    "fused",
    "--mesh.memory-format",
    "contiguous",
    "--json",
    "--run-dir",
]


def process_stat(pid: int) -> tuple[str, int] | None:
    """State and parent of a process, None where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[1])


def descendants(pid: int) -> set[int]:
    """The process's children, theirs, and so on."""
    everyone = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]
    parents = {child: stat[1] for child in everyone if (stat := process_stat(child)) is not None}
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def alive(pids: set[int]) -> set[int]:
    """Those that have not ended."""
    return {pid for pid in pids if (stat := process_stat(pid)) is not None and stat[0] != "Z"}


def stop_by(sig: signal.Signals, folder: Path, *more: str) -> tuple[int, dict[str, Any], set[int]]:
    """Trains in a process group of its own and sends it a signal in the middle, SIGINT to all of it as a terminal does.

    Exit code, answer, and who is left half a minute after its end: processes that were killed need a moment.
    """
    process = subprocess.Popen(
        [*CLI, *LONG, str(folder), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 280
        metrics = folder / "metrics.jsonl"
        while not (metrics.exists() and metrics.stat().st_size > 0):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "no step in 280 s"
            time.sleep(0.2)
        family = descendants(process.pid)
        (os.killpg if sig == signal.SIGINT else os.kill)(process.pid, sig)
        out, err = process.communicate(timeout=280)
    finally:
        process.kill()
    deadline = time.monotonic() + 30
    while alive(family) and time.monotonic() < deadline:
        time.sleep(0.05)
    return process.returncode, {**json.loads(out.splitlines()[-1]), "stderr": err}, alive(family)


def test_ctrl_c_saves_ends_all_processes_and_says_how_to_go_on(tmp_path: Path) -> None:
    code, answer, left = stop_by(signal.SIGINT, tmp_path / "run")
    assert code == 130
    assert not left
    assert f"--resume {tmp_path / 'run'}" in answer["error"]
    assert list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize("how", [["--launcher", "none", "--plan", "data"], ["--launcher", "ray"]])
def test_sigterm_saves_and_exits_143(how: list[str], tmp_path: Path) -> None:
    code, answer, left = stop_by(signal.SIGTERM, tmp_path / "run", *how)
    assert code == 143
    assert not left
    assert f"--resume {tmp_path / 'run'}" in answer["error"]
    assert list((tmp_path / "run" / "checkpoints").iterdir())


@contextmanager
def cores(most: int) -> Iterator[None]:
    """No more for the processes that are started inside: threads of a process round by their number."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:most])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def test_torchrun_starts_the_same_worker(tmp_path: Path, undisturbed: Path) -> None:
    layer = tmp_path / "config.toml"
    layer.write_text(Config.from_dict(SMALL).to_toml())
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with cores(2):
        done = subprocess.run(
            [
                *torchrun,
                "-m",
                "anabranch.runtime",
                "train",
                str(layer),
                "--json",
                "--run-dir",
                str(tmp_path / "run"),
            ],
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["steps"] == 8
    assert losses(tmp_path / "run") == losses(undisturbed)


def test_the_readmes_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both commands on the user's files, and the script; of each a few steps."""
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    module, plan, script = re.findall(r"```\w+\n(.*?)```", readme, re.DOTALL)
    (tmp_path / "mine.py").write_text(module)
    (tmp_path / "plan.toml").write_text(plan)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    few = {"verify": ["--steps", "1"], "train": ["--train.max-steps", "3"]}
    commands = re.findall(r"^    anabranch (\w+) (.*mine:MyNet.*)$", readme, re.MULTILINE)
    assert {verb for verb, _ in commands} == few.keys()
    for verb, flags in commands:
        assert main([verb, *flags.split(), *few[verb], "--json"]) == 0
        told = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert told["num_compared"] > 20 if verb == "verify" else told["steps"] == 3
    exec(script.replace('"epochs": 1', '"max_steps": 3'), {})
    assert 0 <= float(capsys.readouterr().out) <= 1
    sys.modules.pop("mine")


SLOWER = """
import time
import torch
from torch import nn
from anabranch.blocks import MultiResidual

class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.calls = nn.Conv2d(8, 8, 3, padding=1), 0

    def forward(self, x):
        self.calls += torch.is_grad_enabled()
        if self.calls > 70:
            time.sleep(0.05)
        return self.conv(x)

class Net(nn.Module):
    input_shape = (1, 8, 8)

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.blocks = nn.Sequential(MultiResidual([Branch(), Branch()]))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)))
"""


@pytest.mark.optin
def test_a_slower_run_is_planned_anew_at_the_epochs_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Branches that begin to sleep: told, and at the epoch's end measured and planned anew; no step is lost."""
    (tmp_path / "slower_net.py").write_text(SLOWER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    layer = {
        "model": {"name": "slower_net:Net"},
        "mesh": {"plan": "auto", "replan": True, "num_workers": 2, "plan_budget_s": 5},
        "train": {"epochs": 3, "max_steps": 0, "precision": "fp32", "bn_batch_size": 16},
        "checkpoint": {"every_epochs": 1},
    }
    config_ = Config.from_dict({"data": SMALL["data"], "train": {"batch_size": 32}}, layer)
    config_ = replace(config_, launch=replace(config_.launch, run_dir=str(tmp_path / "run")))
    result = train(config_)
    assert result["steps"] == 3 * 45
    assert len(losses(tmp_path / "run")) == 3 * 45
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (warning,) = [line for line in lines if line["kind"] == "warning"]
    assert "times as long as at first" in warning["text"]
    assert len(list((tmp_path / "run").glob("audit*.json"))) == 2
