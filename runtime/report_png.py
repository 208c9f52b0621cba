"""The report's pictures for papers: PNG by matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from anabranch.runtime.errors import ConfigError
from anabranch.runtime.report_charts import drawn, drawn_prediction, part_seconds
from anabranch.runtime.report_data import RunData
from anabranch.runtime.report_svg import smoothed

_PARTS = {
    "data": "#2a8c82", "forward": "#3b6fb6", "backward": "#6a57b0", "exchange": "#b8791f", "reduction": "#a8456b",
    "optimizer": "#5f7a2e", "idle": "#6b7680",
}  # fmt: skip
_COLOURS = {
    "forward": "#3b6fb6",
    "backward": "#6a57b0",
    "transfer": "#b8791f",
    "wait": "#c23b4b",
    "other": "#b9c0c7",
}


def write_pictures(runs: Sequence[RunData], stem: Path) -> list[Path]:
    """STEM-curves.png of all runs; of each run -parts; of each profile -timeline, -placement, and -prediction where it
    has one.

    Raises ConfigError without matplotlib.
    """
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
        for index, run in enumerate(runs):
            colour, prefix = f"C{index}", f"{run.name}: " if len(runs) > 1 else ""
            if points := run.losses:
                even = smoothed(points, max(1, len(points) // 100))
                left.plot(*zip(*even, strict=True), color=colour, label=run.name)
            hits = [(float(s["step"]), 100 * float(s["accuracy"])) for s in run.steps]
            tested = [(e["step"], 100 * e["test_accuracy"]) for e in run.evaluations]
            if hits:
                even = smoothed(hits, max(1, len(hits) // 50))
                right.plot(*zip(*even, strict=True), color=colour, alpha=0.5, label=f"{prefix}training")
            if tested:
                how = {"color": colour, "marker": ".", "linestyle": "--"}
                right.plot(*zip(*tested, strict=True), **how, label=f"{prefix}test")
        left.set(xlabel="step", ylabel="training loss")
        right.set(xlabel="step", ylabel="accuracy (%)")
        right.legend(fontsize=7)
        if len(runs) > 1:
            left.legend(fontsize=7)
        figure.tight_layout()
        save(figure, "curves")
    for number, run in enumerate(runs):
        suffix = f"-{number}" if len(runs) > 1 else ""
        of_ranks, _ = part_seconds(run)
        if of_ranks:
            save(_parts(Figure, of_ranks), f"parts{suffix}")
        if run.profile:
            save(_timeline(Figure, run.profile), f"timeline{suffix}")
            save(_placement(Figure, run.profile), f"placement{suffix}")
            if run.profile["prediction"]:
                save(_prediction(Figure, run.profile), f"prediction{suffix}")
    return written


def _parts(figure_of: Any, of_ranks: Sequence[Mapping[str, float]]) -> Any:
    figure = figure_of(figsize=(7, 0.8 + 0.35 * len(of_ranks)))
    axes = figure.subplots()
    left = [0.0] * len(of_ranks)
    for part, colour in _PARTS.items():
        values = [1e3 * seconds[part] for seconds in of_ranks]
        axes.barh(
            [f"rank {rank}" for rank in range(len(of_ranks))], values, left=left, color=colour, label=part
        )
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("ms a step")
    axes.legend(ncols=4, fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def _timeline(figure_of: Any, profile: dict[str, Any]) -> Any:
    """Of each rank the measured step, below it the predicted one where there is one."""
    num, predicted = len(profile["ranks"]), (profile["prediction"] or {}).get("timeline")
    figure = figure_of(figsize=(7, 0.8 + (0.6 if predicted else 0.4) * num))
    axes = figure.subplots()
    for rank in range(num):
        lanes = [drawn(profile["timeline"]["spans"], rank)]
        lanes += [drawn_prediction(predicted, rank)] if predicted else []
        height = 0.8 / len(lanes)
        for lane, bars in enumerate(lanes):
            for kind, _, start, seconds in bars:
                axes.broken_barh(
                    [(1e3 * start, 1e3 * seconds)], (rank - 0.4 + lane * height, 0.95 * height),
                    facecolors=_COLOURS[kind.removesuffix(" odd")], alpha=0.5 if lane else 1.0, linewidth=0,
                )  # fmt: skip
    axes.set_yticks(range(num), [f"rank {rank}" for rank in range(num)])
    axes.invert_yaxis()
    axes.set_xlabel("ms; below each rank's step, pale: as predicted" if predicted else "ms")
    handles = [axes.barh(0, 0, color=colour, label=kind) for kind, colour in _COLOURS.items()]
    axes.legend(handles=handles, ncols=5, fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def _placement(figure_of: Any, profile: dict[str, Any]) -> Any:
    elements, num = profile["elements"], len(profile["ranks"])
    counts = [[len(row["held"]) for row in element["ranks"]] for element in elements]
    figure = figure_of(figsize=(1.6 + 0.7 * num, 0.6 + 0.25 * len(elements)))
    axes = figure.subplots()
    axes.imshow(counts, aspect="auto", cmap="Blues", vmin=0, vmax=2 * max(map(max, counts)) or 1)
    for y, element in enumerate(elements):
        for x, row in enumerate(element["ranks"]):
            text = ", ".join(map(str, row["held"])) or "–"
            axes.text(x, y, text, ha="center", va="center", fontsize=7)
    axes.set_xticks(range(num), [f"rank {rank}" for rank in range(num)], fontsize=7)
    axes.set_yticks(range(len(elements)), [f"{e['name']} ({e['split']})" for e in elements], fontsize=7)
    axes.tick_params(length=0)
    return figure


def _prediction(figure_of: Any, profile: dict[str, Any]) -> Any:
    """Compute of each block on its slowest rank, measured above predicted."""
    elements, predicted = profile["elements"], profile["prediction"]["elements"]
    figure = figure_of(figsize=(7, 0.8 + 0.3 * len(elements)))
    axes = figure.subplots()
    for number, part in enumerate(("forward", "backward")):
        for offset, alpha, of_part in (
            (-0.2, 1.0, [[e["over"][f"{p}_s"]["max"] for p in ("forward", "backward")] for e in elements]),
            (0.2, 0.5, [predicted.get(e["name"], (0.0, 0.0)) for e in elements]),
        ):
            axes.barh(
                [y + offset for y in range(len(elements))], [1e3 * values[number] for values in of_part], 0.36,
                left=[1e3 * sum(values[:number]) for values in of_part], color=_COLOURS[part], alpha=alpha,
                label=f"{part}, {'measured' if alpha == 1 else 'predicted'}",
            )  # fmt: skip
    axes.set_yticks(range(len(elements)), [e["name"] for e in elements], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    axes.legend(ncols=4, fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure
