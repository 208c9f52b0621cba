"""profile.json: made of all ranks' steps, written, read.

All times in seconds, sizes in bytes. {"p50", "p95"}: over steps; {"min", "median", "max"}: over ranks, of p50.

    schema        4; another number is another format
    mesh          [data, branch]
    steps         measured, regular (they recorded the same; all figures are of them), warm_up, step_s {p50, p95}
    ranks         by rank: host, device (the plan's, where it has devices), kind, memory_bytes, peak_flops_per_s (a
                  large matrix product), clock_error_s, step_s, parts {part: {p50, p95}}, unattributed (share of the
                  step that no part accounts for), kernels, gap_s (of all of one traced step, as of elements below)
    elements      stem, blocks, head, in order: name, split, over {figure: {min, median, max}}, ranks by rank: held
                  (branches), branches_s (of each held one, run alone: forward and backward with enter and join; empty
                  where they are one, or stacked in one tensor and so alike), forward_s, backward_s {p50, p95}
                  without exchanges, transfer_s, wait_s {p50, p95}, bytes, bytes_per_s (bytes ÷ transfer_s), flops
                  [forward, backward], flops_per_s, utilisation (of the best alike rank's peak_flops_per_s), kernels,
                  gap_s (of one traced step: how many kernels, on a CPU operators, and the time between them)
    exchanges     by op, element, part: op, bytes, calls a step, transfer_s, wait_s [of each rank], bytes_per_s
                  (bytes ÷ the group's shortest transfer; null for gradients, which travel during the backward:
                  what is seen of them is only the rest)
    stragglers    who was waited for, most first: rank, host, device, part, element, branches (all that the rank holds
                  there), branches_s (as above), branch (the only one, or clearly the slowest of them; else null: they
                  are alike), wait_s (p50 of the rank that waited longest), waiting (that rank), share (of the step)
    suggestion    null, or: text, moves [{block, branch, source, target}], predicted_s, now_s, change
    prediction    null, or: source, total_s, elements {name: [forward_s, backward_s]}, timeline as below
    timeline      one step, that of median length: step_s, spans [rank, part, element, op, start, seconds, wait]
    overhead      record_s, records {light, detailed}, told_s (a step's times of all ranks: put together, read, looked
                  at, written), share {light, detailed} (records × their cost + told_s, ÷ step),
                  measured {light, detailed}: [low, middle, high] of the ratio to steps that record nothing, 95 %
    by_step       step_s [rank][step]: at most 2000 steps
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from anabranch.runtime.durable import write_bytes
from anabranch.runtime.errors import ConfigError
from anabranch.schedulers.wording import shown

SCHEMA = 4


def profile_folder(run: Path) -> Path:
    """Where `anabranch profile --run-dir RUN` writes: RUN/profile where RUN has trained, whose config.toml, plan.toml
    and run.json stay its own; else RUN.
    """
    return run / "profile" if (run / "metrics.jsonl").is_file() else run


def write_profile(profile: dict[str, Any], path: Path) -> None:
    """Whole or not at all."""
    write_bytes(path, (json.dumps(_rounded(profile), separators=(",", ":")) + "\n").encode())


def read_profile(path: Path) -> dict[str, Any]:
    """Raises ConfigError where it is torn, no profile, or of another schema."""
    try:
        profile = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the profile: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path}: not a profile (no valid JSON: {error}): run `anabranch profile` again"
        ) from None
    schema = profile.get("schema") if isinstance(profile, dict) else None
    if schema != SCHEMA:
        raise ConfigError(
            f"{path}: a profile of schema {shown(schema)}, this version reads schema {SCHEMA}: "
            "use the version that wrote it, or run `anabranch profile` again"
        )
    return dict(profile)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value
