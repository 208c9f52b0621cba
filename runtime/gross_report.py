"""The result of a group-size search for people: a table like the GroSS paper's Table 3, and a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

from rich.console import Console
from rich.table import Table

_HEADER = ("configuration", "multiply-adds", "series (validation)", "alone (test)", "against the fixed one")


def rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The table's cells, a limit's configurations together: the fixed one that sets it, then those found."""
    tuned = {tuple(row["sizes"]): row["test_accuracies"] for row in result["tuned"]}
    found = {tuple(row["sizes"]): row for row in result["configurations"]}
    cells: list[tuple[str, ...]] = []
    for limit in result["limits"]:
        baseline = tuple(limit["baseline"] or ())
        for sizes in [baseline, *map(tuple, limit["winners"])]:
            if not sizes:
                continue
            row, accuracies = found[sizes], tuned[sizes]
            better = ""
            if baseline and sizes != baseline:
                better = f"{100 * (mean(accuracies) - mean(tuned[baseline])):+.2f}"
            name = " ".join(map(str, sizes)) + (" (fixed)" if sizes == baseline else "")
            spread = f" ({100 * pstdev(accuracies):.2f})" if len(accuracies) > 1 else ""
            cells.append(
                (
                    name,
                    f"{row['macs']:,}",
                    f"{100 * row['validation_accuracy']:.2f} %",
                    f"{100 * mean(accuracies):.2f} %{spread}",
                    better,
                )
            )
    return cells


def print_table(console: Console, result: Mapping[str, Any]) -> None:
    """The table, after the full network's accuracy."""
    full = result["full"]
    console.print(
        f"full network: {full['macs']:,} multiply-adds, test accuracy {100 * full['test_accuracy']:.2f} %",
        highlight=False,
    )
    table = Table(*_HEADER, box=None, pad_edge=False)
    for row in rows(result):
        table.add_row(*row)
    console.print(table)


def write_table(path: Path, result: Mapping[str, Any]) -> None:
    """The table in Markdown, with how it was made."""
    full, given = result["full"], result["gross"]
    lines = [
        f"Full network: {full['macs']:,} multiply-adds, test accuracy {100 * full['test_accuracy']:.2f} %.",
        "",
        "|" + "|".join(_HEADER) + "|",
        "|" + "---|" * len(_HEADER),
        *("|" + "|".join(row) + "|" for row in rows(result)),
        "",
        f"{len(result['configurations'])} configurations evaluated on {result['num_validation']:,} validation samples, "
        f"{result['num_test']:,} test samples; sampling temperature {given['temperature']:g}; configurations tuned "
        f"alone {given['repeats']} times (mean, standard deviation).",
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def draw(path: Path, result: Mapping[str, Any]) -> bool:
    """The plot (PNG) of accuracy against multiply-adds; False, and no file, where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4.5), layout="constrained", dpi=150)
    axes = figure.add_subplot()

    def points(configurations: Sequence[Mapping[str, Any]], accuracies: Sequence[float]) -> tuple[Any, Any]:
        return [c["macs"] / 1e6 for c in configurations], [100 * accuracy for accuracy in accuracies]

    everything = result["configurations"]
    axes.scatter(
        *points(everything, [c["validation_accuracy"] for c in everything]),
        s=8,
        color="0.6",
        label="series, each configuration (validation)",
    )
    macs = {tuple(c["sizes"]): c for c in everything}
    baselines = {tuple(limit["baseline"]) for limit in result["limits"] if limit["baseline"]}
    for fixed, marker, label in ((True, "s", "fixed, alone (test)"), (False, "^", "found, alone (test)")):
        some = [row for row in result["tuned"] if (tuple(row["sizes"]) in baselines) == fixed]
        if some:
            means = [mean(row["test_accuracies"]) for row in some]
            axes.scatter(
                *points([macs[tuple(row["sizes"])] for row in some], means), marker=marker, label=label
            )
    full = result["full"]
    axes.axhline(100 * full["test_accuracy"], color="0.3", lw=0.8, ls=":", label="full network (test)")
    axes.set_xlabel("multiply-adds of a sample (million)")
    axes.set_ylabel("accuracy (%)")
    axes.legend(fontsize="small")
    figure.savefig(path)
    return True
