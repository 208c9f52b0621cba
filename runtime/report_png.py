"""The report's pictures for papers: PNG by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anabranch.runtime.errors import ConfigError
from anabranch.runtime.report_data import RunData
from anabranch.runtime.report_svg import smoothed

_PARTS = ("data", "forward", "backward", "exchange", "reduction", "optimizer", "idle")
_COLOURS = {
    "forward": "#3b6fb6",
    "backward": "#6a57b0",
    "transfer": "#b8791f",
    "wait": "#c23b4b",
    "other": "#b9c0c7",
}


def write_pictures(runs: Sequence[RunData], stem: Path) -> list[Path]:
    """STEM-curves.png of all runs; of each profile -parts, -timeline. Raises ConfigError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("--png needs matplotlib: pip install matplotlib, or leave it out") from None
    written = []

    def save(figure: Any, name: str) -> None:
        path = stem.with_name(f"{stem.name}-{name}.png")
        figure.savefig(path, dpi=200, bbox_inches="tight")
        written.append(path)

    if any(run.steps for run in runs):
        figure = Figure(figsize=(7, 2.6))
        left, right = figure.subplots(1, 2)
        for run in runs:
            points = [(float(s["step"]), float(s["loss"])) for s in run.steps]
            if points:
                left.plot(*zip(*smoothed(points, max(1, len(points) // 100)), strict=True), label=run.name)
            tested = [(e["step"], 100 * e["test_accuracy"]) for e in run.evaluations]
            if tested:
                right.plot(*zip(*tested, strict=True), marker=".", label=run.name)
        left.set(xlabel="step", ylabel="training loss")
        right.set(xlabel="step", ylabel="test accuracy (%)")
        if len(runs) > 1:
            left.legend(fontsize=7)
        figure.tight_layout()
        save(figure, "curves")
    for number, run in enumerate(runs):
        if run.profile:
            suffix = f"-{number}" if len(runs) > 1 else ""
            save(_parts(Figure, run.profile), f"parts{suffix}")
            save(_timeline(Figure, run.profile), f"timeline{suffix}")
    return written


def _parts(figure_of: Any, profile: dict[str, Any]) -> Any:
    ranks = profile["ranks"]
    figure = figure_of(figsize=(7, 0.8 + 0.35 * len(ranks)))
    axes = figure.subplots()
    left = [0.0] * len(ranks)
    for part in _PARTS:
        values = [1e3 * rank["parts"][part]["p50"] for rank in ranks]
        axes.barh([f"rank {rank['rank']}" for rank in ranks], values, left=left, label=part)
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("ms a step")
    axes.legend(ncols=4, fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def _timeline(figure_of: Any, profile: dict[str, Any]) -> Any:
    from anabranch.runtime.report_charts import drawn

    num = len(profile["ranks"])
    figure = figure_of(figsize=(7, 0.8 + 0.4 * num))
    axes = figure.subplots()
    for rank in range(num):
        for kind, _, start, seconds in drawn(profile["timeline"]["spans"], rank):
            axes.broken_barh(
                [(1e3 * start, 1e3 * seconds)],
                (rank - 0.4, 0.8),
                facecolors=_COLOURS[kind.removesuffix(" odd")],
            )
    axes.set_yticks(range(num), [f"rank {rank}" for rank in range(num)])
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    handles = [axes.barh(0, 0, color=colour, label=kind) for kind, colour in _COLOURS.items()]
    axes.legend(handles=handles, ncols=5, fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure
