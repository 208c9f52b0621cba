"""Plans and what they cost, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

_MIB = 2**20


def print_candidates(console: Console, outcome: Mapping[str, Any]) -> None:
    """The plans that were compared: predicted and measured step, against data parallelism, memory."""
    label = outcome["label"]
    table = Table(box=None, pad_edge=False)
    columns = ("plan", f"predicted ({label})", "exposed", "measured", "÷ data parallelism", "error", "memory")
    for column in columns:
        table.add_column(column, justify="left" if column == "plan" else "right")
    for row in outcome["plans"]:
        measured, ratio, error = "", "", ""
        if "measured_step_s" in row:
            low, high = row["interval_95"]
            measured = _ms(row["measured_step_s"])
            ratio = f"{row['ratio']:.3f} ({low:.3f} to {high:.3f})"
            error = f"{100 * row['error']:+.0f} %"
        mark = " ◄" if row["name"] == outcome["chosen"] else ""
        table.add_row(
            row["name"] + mark,
            _ms(row["predicted_step_s"]),
            _ms(row["exposed_s"]),
            measured,
            ratio,
            error,
            f"{max(row['memory_bytes']) / _MIB:,.0f} MiB",
        )
    console.print(table)
    proven = (
        "the best under its prediction"
        if not outcome["gap"]
        else f"within {100 * outcome['gap']:.1f} % of the best"
    )
    console.print(f"searched {outcome['search_s']:.2f} s; {proven}", highlight=False)
    for note in outcome["notes"]:
        console.print(f"note: {note}", highlight=False)


def print_traffic(console: Console, traffic: list[Mapping[str, Any]]) -> None:
    """Bytes that one group puts through each collective in a step."""
    for row in traffic:
        where = "across hosts" if row["across"] else "inside a host"
        console.print(
            f"{row['axis']} {row['collective']} {where}: {row['num_bytes'] / _MIB:,.1f} MiB a step",
            highlight=False,
        )


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f} ms"
