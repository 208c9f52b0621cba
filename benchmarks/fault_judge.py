"""The outcome of a run with planted faults, against an undisturbed run.

recovered   the run went on by itself and ended; its last checkpoint is the undisturbed run's, to the bit
resumed     it ended with a named error; the same command with --resume auto ended so
UNNAMED     it ended without saying why (the command's own traceback, or nothing)
HANG        it did not end within the limit
LOST        what a finished checkpoint held was gone, or the second command failed
DIFFERENT   it ended, with other weights
LEFT        processes of the run were there LEFT_S after its end (cut off, when they should have ended by themselves)
MISPLACED   ranks or network interfaces on two hosts were wrong
MISSED      a planted fault did not go off: the harness's own error
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from anabranch.benchmarks.fault_runs import Ended, Fault, fired, run, traces
from anabranch.cluster.actors import ORPHANED_S

LEFT_S = 15.0
_SAID = 4000  # characters, the last ones: a traceback ends with what was wrong


@dataclass(frozen=True)
class Outcome:
    """A cell's.

    seen_s: by fault, until the controller began to recover; None: it did not, or was at it already. recovery_s: by
    fault, until every rank that goes on had committed a new step; None: not in this run. redone: steps that were
    finished before a fault and had to be run again (of a checkpoint's distance, by promise).
    """

    outcome: str
    seen_s: tuple[float | None, ...]
    recovery_s: tuple[float | None, ...]
    redone: int
    said: str
    seconds: float


def weights(folder: Path) -> tuple[int, dict[str, Tensor]]:
    """(step, tensors by key) of a run folder's newest whole checkpoint; (−1, {}): there is none."""
    from anabranch.runtime.checkpoints import Checkpoints

    found = Checkpoints(folder).newest(on_bad=lambda _: None)
    if found is None:
        return -1, {}
    files = [load_file(path) for path in (found.path / name for name in sorted(found.manifest.files))]
    return int(found.position["step"]), {key: tensor for file in files for key, tensor in file.items()}


def difference(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> tuple[float, list[str]]:
    """(largest difference of a tensor, relative to its largest element; keys of those that differ in any bit).

    A tensor that is missing, or of another type or shape, differs infinitely.
    """
    worst, keys = 0.0, []
    for key in sorted(wanted.keys() | found.keys()):
        a, b = wanted.get(key), found.get(key)
        if a is None or b is None or (a.dtype, a.shape) != (b.dtype, b.shape):
            worst = float("inf")
        elif a.numpy().tobytes() != b.numpy().tobytes():
            apart = float((a.double() - b.double()).abs().max()) / max(float(a.double().abs().max()), 1e-30)
            worst = max(worst, apart) if not isnan(apart) else float("inf")
        else:
            continue
        keys.append(key)
    return worst, keys


def judge(
    folder: Path,
    faults: Sequence[Fault],
    ended: Ended,
    wanted: Mapping[str, Tensor],
    limit_s: float,
    flags: Sequence[str],
    tolerance: float = 0.0,
    *,
    repair: Callable[[], None] = lambda: None,
    prefix: Sequence[str] = (),
) -> Outcome:
    """The outcome of a run that `run` ended; one that did not succeed is gone on with by a second command.

    tolerance: largest relative difference of a tensor; 0: to the bit. repair: called before the second command, which
    `prefix` runs where it belongs.
    """
    seconds, said = ended.seconds, _said(ended)
    seen = tuple(_seen_s(folder, index) for index in range(len(faults)))
    recovery = tuple(_recovery_s(folder, index) for index in range(len(faults)))
    redone = _redone(folder)
    left = _left(folder, LEFT_S)  # a second command begins without them, or (cut off) beside them

    def outcome(name: str, text: str = said) -> Outcome:
        return Outcome(name, seen, recovery, redone, text, round(seconds, 1))

    if ended.code is None:
        end(left)
        return outcome("HANG", f"not ended in {limit_s:g} s; {ended.stderr[-_SAID:]}")
    missed = [fault for index, fault in enumerate(faults) if not (folder / f"fired-{index}.json").exists()]
    if missed:
        return outcome("MISSED", f"{missed[0]} did not go off; {said}")
    by_itself = ended.code == 0
    if not by_itself:
        driver_killed = any(fault.kind == "driver" for fault in faults)
        if not driver_killed and not _is_named(ended):
            return outcome("UNNAMED", ended.stderr[-_SAID:])
        repair()
        before, _ = weights(folder / "run")
        (folder / "stderr").write_text("")
        again = run(folder, limit_s, "--resume", "auto", *flags, prefix=prefix)
        seconds += again.seconds
        if again.code is None:
            return outcome("HANG", f"the second command did not end in {limit_s:g} s")
        if again.code:
            return outcome("LOST", f"the second command: {_said(again)}")
        if before > 0 and f"(step {before})" not in again.stderr:
            return outcome("LOST", f"a checkpoint of step {before} was there; {again.stderr[-_SAID:]}")
        left = _left(folder, LEFT_S)
    if any(fault.kind == "network" for fault in faults):  # nobody can tell them
        left = _left(folder, ORPHANED_S)
    end(left)
    step, found = weights(folder / "run")
    apart, keys = difference(wanted, found)
    if apart > tolerance or (keys and not tolerance):
        text = f"step {step}: {len(keys)} of {len(wanted)} tensors, by up to {apart:.1e}: {keys[:3]}"
        return outcome("DIFFERENT", text)
    if left:
        return outcome("LEFT", f"{len(left)} workers were there {LEFT_S:g} s after the end")
    return outcome("recovered" if by_itself else "resumed")


def _steps(folder: Path) -> list[dict[str, Any]]:
    return [record for record in traces(folder) if record.get("phase") == "training" and record["step"] > 0]


def _seen_s(folder: Path, index: int) -> float | None:
    """Seconds from a fault until the first recovery that began after it."""
    fault, path = fired(folder, index), folder / "run" / "failures.jsonl"
    if fault is None or not path.exists():
        return None
    began = [json.loads(line)["at"] for line in path.read_text().splitlines()]
    later = [at - fault["time"] for at in began if at > fault["time"]]
    return round(min(later), 2) if later else None


def _recovery_s(folder: Path, index: int) -> float | None:
    """Seconds from a fault until every rank that steps again had told a new step, past those finished before.

    Not counted is what the process that it befell still told: a checkpoint is written while it trains.
    """
    fault = fired(folder, index)
    if fault is None:
        return None
    steps = list(_steps(folder))
    before = [record for record in steps if record["time"] <= fault["time"]]
    done = max((record["step"] for record in before), default=0)
    later: dict[int, float] = {}
    for record in steps:
        if record["time"] > fault["time"] and record["step"] > done and record["pid"] != fault.get("pid"):
            later.setdefault(record["rank"], record["time"])
    return round(max(later.values()) - fault["time"], 2) if later else None


def _redone(folder: Path) -> int:
    """The most finished steps that ranks went back."""
    last: dict[int, int] = {}
    most = 0
    for record in _steps(folder):
        most = max(most, last.get(record["rank"], 0) - record["step"] + 1)
        last[record["rank"]] = record["step"]
    return most


def _left(folder: Path, wait_s: float) -> list[int]:
    """The run's processes that are still there after a while."""
    begun = {record["pid"]: record["started"] for record in traces(folder) if "started" in record}
    deadline = time.monotonic() + wait_s
    while left := [pid for pid, at in begun.items() if started(pid) == at]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    return left


def end(pids: Sequence[int]) -> None:
    """SIGKILL."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def started(pid: int) -> int:
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
    return str(ended.result.get("error", ended.stderr))[-_SAID:]


def _is_named(ended: Ended) -> bool:
    """Whether it ended with a message of ours: before that line there is no traceback of the command itself."""
    before, error, _ = ended.stderr.partition("\nerror: ")
    if ended.stderr.startswith("error: "):
        before, error = "", "error: "
    return bool(error) and bool(ended.result.get("error")) and "Traceback (most recent" not in before
