"""Runs of the real command line with faults planted in them, and their outcomes against an undisturbed run.

    recovered   the run went on by itself and ended; its last checkpoint is the undisturbed run's, to the bit
    resumed     it ended with a named error; the same command with --resume auto ended so
    UNNAMED     it ended without saying why (the command's own traceback, or nothing)
    HANG        it did not end within the limit
    LOST        what a finished checkpoint held was gone, or the second command failed
    DIFFERENT   it ended, with other weights
    LEFT        processes of the run were there LEFT_S after its end
    MISSED      a planted fault did not go off: the harness's own error
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from anabranch.benchmarks.injector import empty

STEPS = 24
CHECKPOINT_EVERY = 5
_CONFIG = f"""
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
[launch]
cpus_per_worker = 0.25
timeout_s = 120.0
"""
GOOD = ("recovered", "resumed")
LEFT_S = 15.0


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


@dataclass(frozen=True)
class Outcome:
    """A cell's. recovery_s: by fault, until every rank had committed a new step; None: not in this run.

    redone: steps that were finished before a fault and had to be run again (of a checkpoint's distance, by promise).
    """

    outcome: str
    recovery_s: tuple[float | None, ...]
    redone: int
    said: str
    seconds: float


def config_text(**options: str) -> str:
    """The runs' configuration; options: lines to add, by section."""
    text = _CONFIG
    for section, lines in options.items():
        text = text.replace(f"[{section}]\n", f"[{section}]\n{lines}\n")
    return text


def python_path() -> str:
    """PYTHONPATH for a process that starts in another folder."""
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join(str(Path(path).absolute()) for path in given if path)


def prepare(folder: Path, faults: Sequence[Fault], text: str) -> None:
    """What a run and its injector read, in the folder that the command is started from."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "faults.json").write_text(json.dumps([asdict(fault) for fault in faults]))
    (folder / "run.toml").write_text(text)


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


def run(folder: Path, limit_s: float, *flags: str) -> Ended:
    """`start` and `finish`."""
    begun = time.monotonic()
    return finish(folder, start(folder, *flags), limit_s, begun)


def weights(folder: Path) -> tuple[int, dict[str, bytes]]:
    """(step, key → type, shape and bytes) of a run folder's newest whole checkpoint; (−1, {}): there is none."""
    from anabranch.runtime.checkpoint import Checkpoints

    found = Checkpoints(folder).newest(on_bad=lambda _: None)
    if found is None:
        return -1, {}
    held = {}
    for path in sorted(found.path.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(key)
                head = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
                held[key] = head + tensor.contiguous().view(-1).numpy().tobytes()
    return int(found.position["step"]), held


def judge(
    folder: Path, faults: Sequence[Fault], ended: Ended, wanted: dict[str, bytes], limit_s: float, flags: Sequence[str]
) -> Outcome:  # fmt: skip
    """The outcome of a run that `run` ended; one that did not succeed is gone on with by a second command."""
    seconds, said = ended.seconds, _said(ended)
    recovery = tuple(_recovery_s(folder, index) for index in range(len(faults)))
    redone = _redone(folder)
    left = _left(folder)

    def outcome(name: str, text: str = said) -> Outcome:
        return Outcome(name, recovery, redone, text, round(seconds, 1))

    missed = [fault for index, fault in enumerate(faults) if not (folder / f"fired-{index}.json").exists()]
    if missed:
        return outcome("MISSED", f"{missed[0]} did not go off; {said}")
    if ended.code is None:
        return outcome("HANG", f"not ended in {limit_s:g} s; {ended.stderr[-2000:]}")
    if left:
        return outcome("LEFT", "; ".join(left))
    by_itself = ended.code == 0
    if not by_itself:
        driver_killed = any(fault.kind == "driver" for fault in faults)
        if not driver_killed and not _is_named(ended):
            return outcome("UNNAMED", ended.stderr[-2000:])
        for fault in faults:
            if fault.kind == "disk":
                empty(Path(fault.argument))
        before, _ = weights(folder / "run")
        (folder / "stderr").write_text("")
        again = run(folder, limit_s, "--resume", "auto", *flags)
        seconds += again.seconds
        if again.code is None:
            return outcome("HANG", f"the second command did not end in {limit_s:g} s")
        if again.code:
            return outcome("LOST", f"the second command: {_said(again)}")
        if before > 0 and f"(step {before})" not in again.stderr:
            return outcome("LOST", f"a checkpoint of step {before} was there; {again.stderr[-500:]}")
        if left := _left(folder):
            return outcome("LEFT", "; ".join(left))
    step, found = weights(folder / "run")
    if different := sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key)):
        return outcome("DIFFERENT", f"step {step}: {len(different)} of {len(wanted)} tensors, {different[:3]}")
    return outcome("recovered" if by_itself else "resumed")


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


def _steps(folder: Path) -> Iterable[dict[str, Any]]:
    return [record for record in traces(folder) if record.get("phase") == "training" and record["step"] > 0]


def _recovery_s(folder: Path, index: int) -> float | None:
    """Seconds from a fault until every rank had told a new step, past those finished before."""
    fault = fired(folder, index)
    if fault is None:
        return None
    steps = list(_steps(folder))
    before = [record for record in steps if record["time"] <= fault["time"]]
    done = max((record["step"] for record in before), default=0)
    ranks = {record["rank"] for record in steps}
    for record in steps:
        if record["time"] > fault["time"] and record["step"] > done:
            ranks.discard(record["rank"])
            if not ranks:
                return round(float(record["time"] - fault["time"]), 2)
    return None


def _redone(folder: Path) -> int:
    """The most finished steps that ranks went back."""
    last: dict[int, int] = {}
    most = 0
    for record in _steps(folder):
        most = max(most, last.get(record["rank"], 0) - record["step"] + 1)
        last[record["rank"]] = record["step"]
    return most


def _left(folder: Path) -> list[str]:
    """The run's processes that are still there after a while; they are ended."""
    begun = {}
    for record in traces(folder):
        if "started" in record:
            begun[record["pid"]] = record["started"]
    deadline = time.monotonic() + LEFT_S
    while left := [pid for pid, started in begun.items() if _started(pid) == started]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    for pid in left:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return [f"worker {pid} was there {LEFT_S:g} s after the end" for pid in left]


def _started(pid: int) -> int:
    """When a process began, in ticks; −1 where it is gone (or only its parent has not noticed)."""
    with suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if fields[0] != "Z":
            return int(fields[19])
    return -1


def _said(ended: Ended) -> str:
    if ended.code == 0:
        lines = [line for line in ended.stderr.splitlines() if line.startswith(("warning", "rank "))]
        return " | ".join(lines)[:500]
    return str(ended.result.get("error", ended.stderr[-500:]))[:500]


def _is_named(ended: Ended) -> bool:
    """Whether it ended with a message of ours: before that line there is no traceback of the command itself."""
    before, error, _ = ended.stderr.partition("\nerror: ")
    if ended.stderr.startswith("error: "):
        before, error = "", "error: "
    return bool(error) and bool(ended.result.get("error")) and "Traceback (most recent" not in before
