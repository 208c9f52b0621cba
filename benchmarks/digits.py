"""The default run as a user starts it, once for each seed: test accuracy, seconds of training, start to first step."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from anabranch.benchmarks.record import RESULTS, write_record

_FIELDS = ("test_accuracy", "train_seconds", "median_step_s", "start_to_first_step_s", "steps")


def run(*, seeds: int = 3, folder: Path = RESULTS) -> dict[str, Any]:
    """`anabranch train --seed S` for S = 0 …; writes the record. Raises RuntimeError when a run fails."""
    runs = []
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as place:
            command = [sys.executable, "-m", "anabranch.runtime", "train", "--seed", str(seed), "--json",
                       "--run-dir", str(Path(place, "run"))]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"seed {seed} failed:\n{done.stderr}")
        result = json.loads(done.stdout.splitlines()[-1])
        runs.append({"seed": seed, **{field: result[field] for field in _FIELDS}})
    record = {
        "runs": runs,
        "median_test_accuracy": statistics.median(run["test_accuracy"] for run in runs),
        "most_train_seconds": max(run["train_seconds"] for run in runs),
        "median_start_to_first_step_s": statistics.median(run["start_to_first_step_s"] for run in runs),
    }
    return {**record, "path": str(write_record("digits", record, folder))}
