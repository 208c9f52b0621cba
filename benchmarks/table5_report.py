"""Table V's record as a table for the terminal and as pictures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from anabranch.benchmarks.table5_sides import DEPTH
from anabranch.runtime.compiling import COMPILED
from anabranch.runtime.report_svg import number, ticks

_STYLE = """<style>
text { font: 12px sans-serif; fill: #333 }
.paper { fill: #3b6fb6 } .shared { fill: #b8791f } .baseline { fill: #b9c0c7 }
@media (prefers-color-scheme: dark) { text { fill: #ddd } }
</style>"""
_COLOURS = {"baseline": "#b9c0c7", "paper": "#3b6fb6", "shared": "#b8791f"}
Entry = Mapping[str, Any]


def print_table(record: Mapping[str, Any], console: Console) -> None:
    """Every row with every variant; below it what the letters mean and the means over the rows."""
    table = Table(title="Table V: milliseconds a step", title_justify="left", box=None, pad_edge=False)
    columns = (
        "row", "", "ms", "speed-up over b (95 %)", "images/s", "peak MiB", "sent MiB", "format", "paper ms", "",
    )  # fmt: skip
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index in (0, 1, 7, 9) else "right", no_wrap=True)
    before = ""
    for entry in record["rows"]:
        name = row_name(entry)
        if name != before and before:
            table.add_section()
        peak = entry.get("peak_memory_bytes")
        table.add_row(
            name if name != before else "",
            entry["variant"],
            f"{1e3 * entry['median_s']:,.1f}",
            _ratio(entry),
            f"{entry['images_per_s']:,.0f}",
            "?" if peak is None else f"{peak / 2**20:,.0f}",
            f"{entry['sent_bytes_per_rank'] / 2**20:,.1f}",
            "last" if entry["memory_format"] == "channels_last" else "contig.",
            str(entry["paper_ms"] or ""),
            _note(entry),
        )
        before = name
    console.print(table, highlight=False)
    shown = {entry["variant"] for entry in record["rows"]}
    for variant, words in record["variant_names"].items():
        if variant in shown:
            console.print(f"  {variant}: {words}", highlight=False, soft_wrap=True)
    for fold in sorted({entry["fold"] for entry in record["rows"]} - {1}):
        console.print(
            f"fold {fold}: other networks than Table V's, 1/{fold} of their depth: compare neither milliseconds nor "
            f"ratios with the whole ones. 3 of {3 * DEPTH // fold} blocks begin a stage (of the whole, 3 of "
            f"{3 * DEPTH}): those have one pre-activation for all branches, which is faster",
            style="yellow", highlight=False, soft_wrap=True,
        )  # fmt: skip
    for (variant, precision, label), (mean, least, num) in summary(record["rows"]).items():
        console.print(
            f"{variant} ({precision}, {label}): {mean:.3f} times as fast as b in the geometric mean of {num} rows, "
            f"least {least:.3f}",
            highlight=False, soft_wrap=True,
        )  # fmt: skip


def summary(entries: Iterable[Entry]) -> dict[tuple[str, str, str], tuple[float, float, int]]:
    """By variant, precision and label: geometric mean of the speed-ups over (b), the least of them, and their number.

    Of rows of one branch group, which the paper's table has; not of hybrid ones.
    """
    found: dict[tuple[str, str, str], list[float]] = {}
    for entry in entries:
        if entry["variant"] not in ("a", "b") and "speed_up" in entry and entry["row_mesh"].startswith("1x"):
            key = entry["variant"], entry["precision"], entry["label"]
            found.setdefault(key, []).append(entry["speed_up"])
    return {
        key: (math.exp(sum(map(math.log, ratios)) / len(ratios)), min(ratios), len(ratios))
        for key, ratios in found.items()
    }


def row_name(entry: Entry) -> str:
    """As in "32x4 fp32", with the mesh of a hybrid row."""
    hybrid = "" if entry["row_mesh"].startswith("1x") else f":{entry['row_mesh']}"
    return f"{entry['batch']}x{entry['num_branches']}{hybrid} {entry['precision']}"


def _ratio(entry: Entry) -> str:
    if "speed_up" not in entry:
        return ""
    low, high = entry["speed_up_interval_95"]
    return f"{entry['speed_up']:.3f} ({low:.3f}–{high:.3f})"


def _note(entry: Entry) -> str:
    notes = [] if entry["label"] == "measured" else [entry["label"]]
    notes += [] if entry["is_papers_network"] else ["not the paper's"]
    notes += [f"= {entry['same_as']}"] if entry.get("same_as") else []
    notes += filter(None, [_compiled(entry)])
    return ", ".join(notes)


def _compiled(entry: Entry) -> str:
    """What became of torch.compile, where it was asked for."""
    found = entry.get("compiled") or entry.get("how_to_run", {}).get("compiled")
    if isinstance(found, str):
        return COMPILED if found == COMPILED else "not compiled"
    return f"{sum(one == COMPILED for one in found.values())}/{len(found)} compiled" if found else ""


def _kind(entry: Entry) -> str:
    return (
        "baseline" if entry["variant"] in ("a", "b") else "paper" if entry["is_papers_network"] else "shared"
    )


def write_pictures(record: Mapping[str, Any], stem: Path) -> list[Path]:
    """STEM.svg, and STEM.png where matplotlib is installed: speed-up over (b) of every row and variant."""
    entries = [entry for entry in record["rows"] if "speed_up" in entry]
    if not entries:
        return []
    labelled = [
        (f"{row_name(entry)} {entry['variant']}{'' if entry['measured'] else ' *'}", entry)
        for entry in entries
    ]
    written = [stem.with_suffix(".svg")]
    written[0].write_text(_svg(labelled), encoding="utf-8")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return written
    written.append(stem.with_suffix(".png"))
    _png(Figure, labelled, written[1])
    return written


def _svg(labelled: Sequence[tuple[str, Entry]]) -> str:
    """One bar a row, as a file that stands by itself."""
    left, width, height = 120, 720, 24 * len(labelled) + 30
    scale = (width - left - 12) / max(entry["speed_up"] for _, entry in labelled)
    body = ""
    for index, (label, entry) in enumerate(labelled):
        y = 24 * index + 4
        body += (
            f'<text x="{left - 6}" y="{y + 13}" text-anchor="end">{escape(label)}</text>'
            f'<rect class="{_kind(entry)}" x="{left}" y="{y}" width="{scale * entry["speed_up"]:.1f}" height="18">'
            f"<title>{escape(label)}: {number(entry['speed_up'])} ×</title></rect>"
        )
    for tick in ticks(0.0, (width - left - 12) / scale):
        body += f'<text x="{left + tick * scale:.1f}" y="{height - 8}" text-anchor="middle">{number(tick)} ×</text>'
    name = "speed-up over the tuned baseline; * predicted"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{name}" '
        f'viewBox="0 0 {width} {height}">{_STYLE}{body}</svg>'
    )


def _png(figure_of: Any, labelled: Sequence[tuple[str, Entry]], path: Path) -> None:
    figure = figure_of(figsize=(7, 0.9 + 0.2 * len(labelled)))
    axes = figure.subplots()
    values = [entry["speed_up"] for _, entry in labelled]
    spread = [
        [abs(entry["speed_up"] - entry["speed_up_interval_95"][side]) for _, entry in labelled]
        for side in (0, 1)
    ]
    colours = [_COLOURS[_kind(entry)] for _, entry in labelled]
    places = range(len(labelled))
    axes.barh(places, values, xerr=spread, color=colours, error_kw={"linewidth": 0.8})
    axes.set_yticks(places, [label for label, _ in labelled], fontsize=7)
    axes.axvline(1.0, color="#333", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("times as fast as the tuned baseline (b); orange: not the paper's network; * predicted")
    figure.savefig(path, dpi=150, bbox_inches="tight")
