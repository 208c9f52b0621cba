"""The report's tables: each scrolls by itself, and is reached by keyboard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from anabranch.runtime.profile_table import ms
from anabranch.runtime.report_data import RunData
from anabranch.runtime.report_svg import number

_TIMED = ("forward_s", "backward_s", "transfer_s", "wait_s")


def table(name: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column names its row."""
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return scroll(name, f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>")


def folded(name: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that is opened by a click or a key."""
    return f"<details><summary>{escape(name)}</summary>{table(name, head, rows)}</details>"


def scroll(name: str, content: str, kind: str = "scroll") -> str:
    """What may be wider than the page."""
    label = escape(name, quote=True)
    return f'<div class="{kind}" role="region" tabindex="0" aria-label="{label}">{content}</div>'


def key(names: Sequence[str], kinds: Sequence[str]) -> str:
    """A legend: names and the classes of their colours, in the order of the bars."""
    items = "".join(
        f'<li><i class="{kind}"></i>{escape(name)}</li>' for name, kind in zip(names, kinds, strict=True)
    )
    return f'<ul class="key">{items}</ul>'


def placement(run: RunData) -> str:
    """The map of branches, by block and rank; by the plan's rules where no profile has the blocks."""
    placed = run.placements
    if not placed:
        return ""
    rows = []
    for name, split, held in placed["rows"]:
        most = max((len(h) for h in held if h), default=0) or 1
        cells = [f'<th scope="row">{escape(name)}</th><td>{escape(split)}</td>']
        for branches in held:
            text = "all" if branches is None else ", ".join(map(str, branches)) or "–"
            share = 50 if branches is None else round(50 * len(branches) / most)
            kind = f'class="heat" style="--share:{share}%"' if share else 'class="none"'
            cells.append(f"<td {kind}>{text}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    head = '<th scope="col">block</th><th scope="col">split</th>'
    for text in placed["ranks"]:
        rank, _, where = text.partition(" · ")
        head += f'<th scope="col">{escape(rank)}<small>{escape(where)}</small></th>'
    return "<h3>Placement: branches by block and rank</h3>" + scroll(
        "Placement", f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def blocks(profile: Mapping[str, Any]) -> str:
    """Every element on every rank."""
    rows = [
        [
            element["name"], str(rank), *(f"{ms(row[k]['p50'])} ({ms(row[k]['p95'])})" for k in _TIMED),
            f"{row['bytes'] / 1e6:.2f}", f"{row['bytes_per_s'] / 1e6:.0f}" if row["bytes"] else "–",
            number(sum(row["flops"]) / 1e9), number(row["flops_per_s"] / 1e9), f"{100 * row['utilisation']:.0f} %",
            str(row["kernels"]), ms(row["gap_s"]),
        ]
        for element in profile["elements"]
        for rank, row in enumerate(element["ranks"])
    ]  # fmt: skip
    head = [
        "block", "rank", "forward", "backward", "transfer", "wait", "MB", "MB/s", "GFLOP", "GFLOP/s", "used", "kernels",
        "gaps",
    ]  # fmt: skip
    said = (
        "<p>Times in ms a step: the middle of all steps (95 % of them). MB/s: while transferring. used: of a large "
        "matrix product's rate. gaps: ms in which no kernel ran (on a CPU: no operator).</p>"
    )
    return f"<h3>Blocks</h3>{said}{table('Blocks', head, rows)}"


def exchanges(profile: Mapping[str, Any]) -> str:
    """Every kind of collective."""
    rows = [
        [
            f"{e['op']} {e['element']}", e["part"], str(e["calls"]), f"{e['bytes'] / 1e6:.3g}", ms(e["transfer_s"]),
            "–" if e["bytes_per_s"] is None else f"{e['bytes_per_s'] / 1e6:.0f}", ms(max(e["wait_s"])),
        ]
        for e in profile["exchanges"]
    ]  # fmt: skip
    head = ["exchange", "part", "calls", "MB", "transfer ms", "MB/s", "longest wait ms"]
    return f"<h3>Exchanges</h3>{table('Exchanges', head, rows)}" if rows else ""


def timed_plans(audit: Mapping[str, Any], step_s: float | None) -> str:
    """The plans that were predicted and timed before the run, against plain data parallelism; step_s: of the run."""
    rows = []
    for one in audit["plans"]:
        measured, interval = one.get("measured_step_s"), one.get("interval_95")
        rows.append(
            [
                f"{one['name']}{' (chosen)' if one['name'] == audit['chosen'] else ''}",
                ms(one["predicted_step_s"]),
                "–" if measured is None else ms(measured),
                "–" if measured is None else f"{100 * one['error']:+.0f} %",
                f"{one['ratio']:.3f}" if interval else "–",
                f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else "–",
            ]
        )
    if step_s is not None:
        (chosen,) = (one["predicted_step_s"] for one in audit["plans"] if one["name"] == audit["chosen"])
        rows.append(["this run", ms(chosen), ms(step_s), f"{100 * (chosen / step_s - 1):+.0f} %", "–", "–"])
    head = ["plan", "predicted ms", "measured ms", "difference", "of data parallelism's time", "95 %"]
    return f"<h3>Plans, predicted and timed</h3>{table('Plans, predicted and timed', head, rows)}"
