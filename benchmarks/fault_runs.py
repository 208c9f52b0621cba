"""Runs of the real command line with faults planted in them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

STEPS = 24
CHECKPOINT_EVERY = 5
CONFIG = f"""
[model]
name = "multi_resnet"
options = {{ depth = 8, num_branches = 4 }}
[data]
name = "anabranch.benchmarks.injector:patterns"
[train]
epochs = 2
max_steps = {STEPS}
batch_size = 16
bn_batch_size = 4
eval_batch_size = 32
[checkpoint]
every_epochs = {CHECKPOINT_EVERY / 20}
num_to_keep = 3
[mesh]
execution = "fused"
memory_format = "contiguous"
[launch]
cpus_per_worker = 0.25
timeout_s = 120.0
"""


@dataclass(frozen=True)
class Fault:
    """One planted fault: kind and moment as `injector` names them, after `step` finished steps on `rank`."""

    kind: str
    rank: int
    moment: str
    step: int = 12
    argument: str = ""


@dataclass(frozen=True)
class Ended:
    """How a command ended. code: its exit code, None: it was killed at the limit. seconds: from its start."""

    code: int | None
    result: dict[str, Any]
    stderr: str
    seconds: float


def python_path() -> str:
    """PYTHONPATH for a process that starts in another folder."""
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join(str(Path(path).absolute()) for path in given if path)


def prepare(folder: Path, faults: Sequence[Fault]) -> None:
    """What a run and its injector read, in the folder that the command is started from."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "faults.json").write_text(json.dumps([asdict(fault) for fault in faults]))
    (folder / "run.toml").write_text(CONFIG)


def start(folder: Path, *flags: str, prefix: Sequence[str] = ()) -> subprocess.Popen[bytes]:
    """`anabranch train` in the folder, into its run/; prefix: a command that runs it elsewhere."""
    command = [
        *prefix, sys.executable, "-m", "anabranch.runtime", "train", "run.toml", "--json",
        "--run-dir", str(folder / "run"), *flags,
    ]  # fmt: skip
    environ = {**os.environ, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}
    with (folder / "stdout").open("wb") as out, (folder / "stderr").open("ab") as err:
        process = subprocess.Popen(command, cwd=folder, env=environ, stdout=out, stderr=err)
    (folder / "driver.pid").write_text(str(process.pid))
    return process


def finish(folder: Path, process: subprocess.Popen[bytes], limit_s: float, begun: float) -> Ended:
    """Waits for the command; kills it at the limit."""
    code: int | None = None
    try:
        code = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    result: dict[str, Any] = {}
    if lines := (folder / "stdout").read_text().splitlines():
        with suppress(ValueError):
            result = json.loads(lines[-1])
    stderr = (folder / "stderr").read_text(errors="replace")
    return Ended(code, result, stderr, time.monotonic() - begun)


def run(folder: Path, limit_s: float, *flags: str, prefix: Sequence[str] = ()) -> Ended:
    """`start` and `finish`."""
    begun = time.monotonic()
    return finish(folder, start(folder, *flags, prefix=prefix), limit_s, begun)


def traces(folder: Path) -> list[dict[str, Any]]:
    """What the run's processes told, in order of time; each with its pid."""
    found = []
    for path in folder.glob("trace-*.jsonl"):
        pid = int(path.stem.partition("-")[2])
        lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
        found += [{"pid": pid, **json.loads(line)} for line in lines]
    return sorted(found, key=lambda record: record["time"])


def fired(folder: Path, index: int) -> dict[str, Any] | None:
    """When and where fault `index` went off."""
    path = folder / f"fired-{index}.json"
    return json.loads(path.read_text()) if path.exists() else None
