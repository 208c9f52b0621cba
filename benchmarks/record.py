"""Records of measurements: raw samples with hardware, versions, commit and command, as one JSON file each."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from anabranch.runtime.machine import processor
from anabranch.runtime.numerics import numerics

_RECORDS = Path(__file__).resolve().parent / "results"
RESULTS = _RECORDS if _RECORDS.is_dir() else Path("results")  # an installed package has none


def environment() -> dict[str, Any]:
    """What a figure depends on and cannot say itself."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),  # without AVX512 bf16 is slow
        "cores": len(os.sched_getaffinity(0)),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numerics": numerics("fp32"),  # of workers; a case in another precision says so
        "allocator": os.environ.get("LD_PRELOAD", "glibc, freed memory kept"),
        "commit": _commit(),
        "command": _command(),
    }


def write_record(name: str, record: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Writes results/NAME.json with the environment; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"name": name, "environment": environment(), **record}, indent=1) + "\n")
    return path


def _command() -> str:
    is_verb = sys.argv[1:2] == ["bench"]
    return " ".join(
        [*(["anabranch"] if is_verb else ["python", "-m", "anabranch.benchmarks"]), *sys.argv[1:]]
    )


def _commit() -> str:
    """The checkout's commit, with "+changes" where files but records differ from it; empty outside a checkout."""
    try:
        git = ["git", "-C", str(Path(__file__).parent)]
        head = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "--", ":/", ":(exclude,top)benchmarks/results"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        return head.strip() + ("+changes" if dirty.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return ""
