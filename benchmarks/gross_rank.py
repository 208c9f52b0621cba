"""Whether a series' accuracies order its configurations as tuning each one alone would: digits, several seeds.

`anabranch gross` on the shipped digits-gross with other baselines, so that many configurations are tuned alone: the
series' accuracy on the validation samples against the accuracy on the test samples of the configuration tuned alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console

from anabranch.benchmarks.record import RESULTS, write_record
from anabranch.runtime import commands
from anabranch.runtime.config_file import load_config


def run(
    *,
    seeds: int = 3,
    winners: int = 2,
    repeats: int = 2,
    folder: Path = RESULTS,
    console: Console | None = None,
) -> dict[str, Any]:
    """Runs the search for seeds 0 …; writes the record.

    Every seed tunes 5 fixed configurations and `winners` under each one's multiply-adds alone, `repeats` times.
    """
    console = console or Console(stderr=True)
    searches = []
    for seed in range(seeds):
        config = load_config("digits-gross", {"train": {"seed": seed}})
        gross = replace(config.gross, baselines=(1, 2, 4, 8, 16), winners=winners, repeats=repeats)
        with tempfile.TemporaryDirectory() as run_dir:
            launch = replace(
                config.launch, run_dir=run_dir, launcher="none"
            )  # accuracies are the same on any mesh
            result = commands.gross(
                replace(config, gross=gross, launch=launch, mesh=replace(config.mesh, num_workers=1)), console
            )
        assert result is not None, "not under torchrun"
        series = {tuple(c["sizes"]): c for c in result["configurations"]}
        tuned = [
            {
                "sizes": row["sizes"],
                "macs": series[tuple(row["sizes"])]["macs"],
                "series_validation_accuracy": series[tuple(row["sizes"])]["validation_accuracy"],
                "alone_test_accuracies": row["test_accuracies"],
            }
            for row in result["tuned"]
        ]
        correlation = spearman(
            [row["series_validation_accuracy"] for row in tuned],
            [mean(row["alone_test_accuracies"]) for row in tuned],
        )
        searches.append(
            {"seed": seed, "full": result["full"], "rank_correlation": correlation, "tuned": tuned}
        )
    record = {
        "configuration": "digits-gross",
        "seeds": seeds,
        "rank_correlations": [search["rank_correlation"] for search in searches],
        "searches": searches,
    }
    return {**record, "path": str(write_record("gross_rank", record, folder))}


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation; equals share their mean rank. 0 where all of one are equal."""
    x, y = _ranks(a), _ranks(b)
    middle = (len(x) + 1) / 2
    products = sum((i - middle) * (j - middle) for i, j in zip(x, y, strict=True))
    squares = sum((i - middle) ** 2 for i in x) * sum((j - middle) ** 2 for j in y)
    return products / squares**0.5 if squares else 0.0


def _ranks(values: Sequence[float]) -> list[float]:
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2
        for value in values
    ]
