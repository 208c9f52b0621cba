"""The default run as a user starts it: what part of a step its workers wait for the batch."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from anabranch.benchmarks.record import RESULTS, write_record
from anabranch.runtime.errors import ConfigError

_WARM_UP = 5  # steps that set kernels and threads up
_ASKED = 0.01


def run(*, steps: int = 200, folder: Path = RESULTS) -> dict[str, Any]:
    """`anabranch train` for so many steps; writes the record.

    Of each rank the median and the 90th percentile, over the steps, of seconds waited ÷ seconds of the same step; a
    step that begins an epoch counts too. Raises ConfigError for too few steps, RuntimeError when the run fails.
    """
    if steps < 2 * _WARM_UP:
        raise ConfigError(
            f"--steps is {steps}: take at least {2 * _WARM_UP}, the first {_WARM_UP} do not count"
        )
    with tempfile.TemporaryDirectory() as place:
        run_dir = Path(place, "run")
        command = [sys.executable, "-m", "anabranch.runtime", "train", "--train.max-steps", str(steps), "--json",
                   "--run-dir", str(run_dir)]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the run failed:\n{done.stderr}")
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    times = [line["times_s"] for line in lines if "times_s" in line][_WARM_UP:]
    by_rank = [_of_rank(times, rank) for rank in range(len(times[0]["step"]))]
    record = {
        "steps": len(times),
        "ranks": by_rank,
        "worst_median": max(rank["median"] for rank in by_rank),
        "worst_p90": max(rank["p90"] for rank in by_rank),
        "asked": {"worst_median": _ASKED},
        "met": all(rank["median"] < _ASKED for rank in by_rank),
    }
    return {**record, "path": str(write_record("data_wait", record, folder))}


def _of_rank(times: list[dict[str, list[float]]], rank: int) -> dict[str, Any]:
    data_s, step_s = ([one[part][rank] for one in times] for part in ("data", "step"))
    shares = [data / step for data, step in zip(data_s, step_s, strict=True)]
    return {
        "median": statistics.median(shares),
        "p90": statistics.quantiles(shares, n=10)[-1],
        "of_all_time": sum(data_s) / sum(step_s),
        "median_step_s": statistics.median(step_s),
        "data_s": data_s,
        "step_s": step_s,
    }
