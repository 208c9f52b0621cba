"""What a report is made of: a run's folder, read as far as it goes."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from anabranch.runtime.errors import ConfigError
from anabranch.runtime.profile_file import profile_folder, read_profile
from anabranch.schedulers import BranchPlacement
from anabranch.schedulers.model_spec import EDGES
from anabranch.schedulers.plan_file import BlockRule
from anabranch.schedulers.plan_reader import parse_plan


@dataclass(frozen=True)
class RunData:
    """steps, evaluations: lines of metrics.jsonl. profile, audit: None where the run has none. placements: see
    `_placements`. notes: what was missing, torn or left out, for people.
    """

    name: str
    path: Path
    steps: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    profile: dict[str, Any] | None = None
    placements: dict[str, Any] = field(default_factory=dict)
    audit: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def losses(self) -> list[tuple[float, float]]:
        """(step, loss) of the steps that have a finite one: a run may diverge."""
        found = ((float(step["step"]), step["loss"]) for step in self.steps)
        return [(step, float(loss)) for step, loss in found if loss is not None and math.isfinite(loss)]

    @property
    def timed_steps(self) -> list[dict[str, Any]]:
        """The steps with seconds by part and rank, of as many ranks as the last: a run may go on with fewer.

        A line has those of the step before; after a start or a recovery there is none, and they are zeros.
        """
        timed = _timed(self.steps)
        return [step for step in timed if _num_ranks(step) == _num_ranks(timed[-1])]


def read_run(path: Path) -> RunData:
    """Raises ConfigError where the folder has neither metrics nor a profile, or a file that is not ours."""
    if not path.is_dir():
        raise ConfigError(f"{path} is no folder: give a run's, which `anabranch train` prints at its end")
    metrics, profile_path = path / "metrics.jsonl", profile_folder(path) / "profile.json"
    if not profile_path.is_file():
        profile_path = path / "profile.json"
    if not metrics.is_file() and not profile_path.is_file():
        raise ConfigError(
            f"{path} has neither metrics.jsonl nor profile.json: give the folder of a run that trained "
            "(`anabranch train`; with checkpoint.url metrics.jsonl is in that folder on rank 0's host) or was profiled "
            "(`anabranch profile`)"
        )
    notes: list[str] = []
    lines = _lines(metrics, notes) if metrics.is_file() else []
    if not lines:
        notes.append("no metrics: there are no curves")
    profile = read_profile(profile_path) if profile_path.is_file() else None
    if profile is None:
        again = f"`anabranch profile {path / 'config.toml'} --run-dir {path}`"
        notes.append(f"no profile: {again} measures blocks and ranks")
    elif profile_path.parent != path:
        notes += _differences(path, profile_path.parent)
    audit_path = path / "audit.json"
    try:
        audit = json.loads(audit_path.read_text(encoding="utf-8")) if audit_path.is_file() else None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{audit_path}: no audit of a plan ({error}): delete it, or plan again") from None
    placements = _placements(path / "plan.toml", profile)
    steps, evaluations = (
        [line for line in lines if line.get("kind") == kind] for kind in ("step", "evaluation")
    )
    run = RunData(path.absolute().name, path, steps, evaluations, profile, placements, audit, notes)
    if num := len(steps) - len(run.losses):
        notes.append(f"the loss of {num} of {len(steps)} steps is not finite: the curve leaves them out")
    timed = run.timed_steps
    if len(timed) < len(_timed(steps)):
        notes.append(
            f"the run did not always have as many ranks: times by rank are of its steps with {_num_ranks(timed[-1])}, "
            f"{_ranges(timed, steps)}"
        )
    return run


def _timed(steps: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [step for step in steps if "times_s" in step and any(step["times_s"]["step"])]


def _num_ranks(step: Mapping[str, Any]) -> int:
    return len(step["times_s"]["step"])


def _ranges(some: Sequence[Mapping[str, Any]], steps: Sequence[Mapping[str, Any]]) -> str:
    """Which of the steps they are, as in "1 to 20, 41 to 60"."""
    kept = {step["step"] for step in some}
    runs = [list(of) for is_kept, of in groupby((s["step"] for s in steps), kept.__contains__) if is_kept]
    return ", ".join(f"{numbers[0]} to {numbers[-1]}" for numbers in runs)


def _lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, up to the first that is not one."""
    text = path.read_text(encoding="utf-8", errors="replace")
    found: list[dict[str, Any]] = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            last = f", the last step is {found[-1].get('step')}" if found else ""
            notes.append(f"{path.name} breaks off in line {number} (a killed run): used up to there{last}")
            break
        found.append(value)
    return found


def _differences(run: Path, profiled: Path) -> list[str]:
    """What the profile was not of: what makes its steps others than the run's."""
    if not all(
        (folder / name).exists() for folder in (run, profiled) for name in ("plan.toml", "config.toml")
    ):
        return []  # a Trainer's own, from Python
    notes = []
    if (run / "plan.toml").read_text(encoding="utf-8") != (profiled / "plan.toml").read_text(
        encoding="utf-8"
    ):
        notes.append("the profile is of another plan than the run's: see profile/plan.toml")
    own, theirs = (
        tomllib.loads((folder / "config.toml").read_text(encoding="utf-8")) for folder in (run, profiled)
    )
    other = [f"[{name}]" for name in ("model", "data", "train") if own.get(name) != theirs.get(name)]
    if other:
        notes.append(f"the profile has another {', '.join(other)} than the run: see profile/config.toml")
    return notes


def _placements(path: Path, profile: dict[str, Any] | None) -> dict[str, Any]:
    """{"ranks": names, "rows": [name, split, [branches of each rank]]} of the profile, else of the plan's rules (a name
    is then its glob, and None all branches); empty where there is neither.
    """
    if profile is not None:
        names = [f"rank {r['rank']} · {r['host']} {r['device']}" for r in profile["ranks"]]
        rows: list[list[Any]] = []
        for element in profile["elements"]:
            held = [list(row["held"]) for row in element["ranks"]]
            rows.append([element["name"], element["split"], held])
        return {"ranks": names, "rows": rows}
    if not path.is_file():
        return {}
    plan = parse_plan(path.read_text(encoding="utf-8"), str(path))
    devices = [name for row in plan.devices or () for name in row]
    names = [f"rank {r} · {device}" for r, device in enumerate(devices)]
    names = names or [f"rank {r}" for r in range(plan.data * plan.branch)]
    rows = [[rule.match, rule.split, _held(rule, plan.branch) * plan.data] for rule in plan.rules]
    return {"ranks": names, "rows": rows}


def _held(rule: BlockRule, num_ranks: int) -> list[Sequence[int] | None]:
    """By branch rank. A run's plan has no "even": it is resolved."""
    if rule.match in EDGES:
        return [()] * num_ranks
    if rule.counts is not None:
        return [*(BranchPlacement.from_counts(rule.counts).branches or ())]
    return [*rule.branches] if isinstance(rule.branches, tuple) else [None] * num_ranks
