"""Kills at random moments of one run, from outside: does it end with the same weights, and how much speed is kept?"""

from __future__ import annotations

import itertools
import os
import random
import secrets
import signal
import statistics
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from anabranch.benchmarks.fault_judge import judge, started, weights
from anabranch.benchmarks.fault_runs import finish, prepare, run, start, traces
from anabranch.benchmarks.record import RESULTS, write_record
from anabranch.runtime.errors import ConfigError

_STEPS_PER_EPOCH = 20
TORCHFT_KEPT = 0.82  # of the steps were committed, at one failure a minute on 300 GPUs (its authors)


def run_random(
    *, kills: int = 30, mean_gap_s: float = 6.0, steps: int = 1500, seed: int = 0, spares: int = 0,
    limit_s: float = 1800.0, folder: Path = RESULTS,
) -> dict[str, Any]:  # fmt: skip
    """Trains on 2x2 twice; the second time a random worker is killed at exponential gaps. Writes the record.

    mean_gap_s: from one kill to the next one, whatever the run does then. Raises ConfigError where fewer than `kills`
    fit into the run: give it more steps.
    """
    flags = [
        "--mesh", "2x2", "--train.max-steps", str(steps), "--epochs", str(-(-steps // _STEPS_PER_EPOCH)),
        "--train.eval-every-epochs", "20", "--checkpoint.every-epochs", "5",
    ]  # fmt: skip
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    with tempfile.TemporaryDirectory(prefix="faults-") as root:
        plain, disturbed = Path(root, "plain"), Path(root, "disturbed")
        prepare(plain, ())
        ended = run(plain, limit_s, *flags)
        step, wanted = weights(plain / "run")
        if ended.code or step != steps:
            raise RuntimeError(f"the undisturbed run failed:\n{ended.stderr[-4000:]}")
        prepare(disturbed, ())
        flags += ["--launch.max-failures", str(10 * kills), "--launch.spares", str(spares)]
        begun, made = time.monotonic(), list[dict[str, Any]]()
        process = start(disturbed, *flags)
        dice = random.Random(seed)
        next_at = float("inf")
        while process.poll() is None and time.monotonic() - begun < limit_s and len(made) < kills:
            time.sleep(0.02)
            if next_at == float("inf") and _last_step(disturbed) > 0:
                next_at = time.monotonic() + dice.expovariate(1 / mean_gap_s)
            if time.monotonic() >= next_at and (victim := _kill_one(disturbed, dice)):
                made.append(victim)
                next_at = time.monotonic() + dice.expovariate(1 / mean_gap_s)
        ended = finish(disturbed, process, max(1.0, limit_s - (time.monotonic() - begun)), begun)
        outcome = judge(disturbed, (), ended, wanted, limit_s, flags)
        if outcome.outcome == "recovered" and len(made) < kills:
            raise ConfigError(
                f"--steps is {steps}: they were done after {len(made)} of {kills} kills; give it more"
            )
        plain_s, disturbed_s = seconds(plain)[0], seconds(disturbed)[0]
        quiet_s = seconds(disturbed)[1]
    cost_s = (disturbed_s - quiet_s) / max(1, len(made))
    record = {
        "outcome": outcome.outcome,
        "said": outcome.said,
        "kills": made,
        "steps": steps,
        "spares": spares,
        "undisturbed_s": plain_s,
        "disturbed_s": disturbed_s,
        "failures_per_minute": 60 * len(made) / disturbed_s,
        "steps_redone": outcome.redone,
        "steps_per_s_kept": quiet_s / disturbed_s,
        "steps_per_s_kept_against_the_other_run": plain_s / disturbed_s,
        "seconds_per_failure": cost_s,
        "kept_at_one_a_minute_predicted": 1 - cost_s / 60,
        "torchft_kept_at_one_a_minute": TORCHFT_KEPT,
    }
    return {**record, "path": str(write_record(f"random_faults{'_spares' * (spares > 0)}", record, folder))}


def _kill_one(folder: Path, dice: random.Random) -> dict[str, Any] | None:
    """SIGKILL of one of the run's living workers, newcomers too; None where none lives."""
    records = traces(folder)
    living = {r["pid"]: r["rank"] for r in records if "started" in r and started(r["pid"]) == r["started"]}
    if not living:
        return None
    pid = dice.choice(sorted(living))
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    return {
        "time": time.time(),
        "rank": living[pid],
        "step": max((r.get("step", 0) for r in records), default=0),
    }


def _last_step(folder: Path) -> int:
    return max((record.get("step", 0) for record in traces(folder)), default=0)


def seconds(folder: Path) -> tuple[float, float]:
    """(from the first step to the last one, what as many steps take at the run's own median).

    The median is of the time from one step to the next: what else the machine did meanwhile is in both.
    """
    first: dict[int, float] = {}
    for record in traces(folder):
        if record.get("phase") == "training" and record["step"] > 0:
            first.setdefault(record["step"], record["time"])
    times = [first[step] for step in sorted(first)]
    gaps = [after - before for before, after in itertools.pairwise(times)]
    return times[-1] - times[0], statistics.median(gaps) * len(gaps)
