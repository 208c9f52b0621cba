"""The report's charts, each with its numbers beside it as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from statistics import median
from typing import Any

from anabranch.runtime import report_svg as svg
from anabranch.runtime.profile_table import ms
from anabranch.runtime.report_data import RunData
from anabranch.runtime.report_tables import folded, key, scroll, table

PARTS = {
    "data": "c1", "forward": "forward", "backward": "backward", "exchange": "transfer", "reduction": "c3",
    "optimizer": "c5", "idle": "c7",
}  # fmt: skip
_KINDS = ("forward", "backward", "transfer", "wait", "other")


def curves(runs: Sequence[RunData]) -> str:
    """Loss (smoothed) and accuracy over steps; a run has one colour, its test is dashed."""
    found, many = "", len(runs) > 1
    loss: dict[str, tuple[str, list[svg.Point]]] = {}
    accuracy: dict[str, tuple[str, list[svg.Point]]] = {}
    for number, run in enumerate(runs):
        prefix, colour = f"{run.name}: " if many else "", f"c{number % 8}"
        if run.steps:
            if points := run.losses:
                loss[f"{prefix}loss"] = colour, svg.smoothed(points, max(1, len(points) // 100))
            hits = [(float(step["step"]), 100 * float(step["accuracy"])) for step in run.steps]
            accuracy[f"{prefix}training"] = colour, svg.smoothed(hits, max(1, len(hits) // 50))
        tested = [(float(e["step"]), 100 * float(e["test_accuracy"])) for e in run.evaluations]
        if tested:
            accuracy[f"{prefix}test"] = f"{colour} dashed", tested
    for name, unit, series in (("Loss", "", loss), ("Accuracy", " (%)", accuracy)):
        if series:
            points_of = {label: points for label, (_, points) in series.items()}
            kinds = [kind for kind, _ in series.values()]
            rows = [
                [label, f"{x:.0f}", svg.number(y)]
                for label, points in points_of.items()
                for x, y in svg.thinned(points, 12)
            ]
            found += f"<h3>{name}{unit}</h3>{key(list(series), kinds)}"
            found += svg.lines(f"{name} over steps", points_of, kinds, "step")
            found += folded(f"{name}, in numbers", ["curve", "step", f"{name.lower()}{unit}"], rows)
    return found


def part_seconds(run: RunData) -> tuple[list[dict[str, float]], list[float]]:
    """By rank: seconds a step by part, and those that no part accounts for: the middle of all steps. Of the profile,
    else of the run's metrics; empty where neither has them.
    """
    if run.profile:
        ranks = run.profile["ranks"]
        of_ranks = [{p: rank["parts"][p]["p50"] for p in PARTS} for rank in ranks]
        return of_ranks, [rank["unattributed"] * rank["step_s"]["p50"] for rank in ranks]
    timed = [step["times_s"] for step in run.timed_steps]
    num = len(timed[0]["step"]) if timed else 0
    of_ranks = [{p: median(t[p][r] for t in timed) for p in PARTS} for r in range(num)]
    return of_ranks, [median(t["unattributed"][r] for t in timed) for r in range(num)]


def parts(run: RunData) -> str:
    """Bars of `part_seconds`."""
    of_ranks, rest = part_seconds(run)
    if not of_ranks:
        return ""
    named = [(f"rank {r}", {p: 1e3 * s for p, s in seconds.items()}) for r, seconds in enumerate(of_ranks)]
    chart = svg.rows(
        "Where a step's time goes, by rank",
        [(n, [svg.stacked(n, [(PARTS[p], p, value) for p, value in v.items()], "ms")]) for n, v in named],
        "ms",
    )
    cells = [
        [name, *(svg.number(values[p]) for p in PARTS), svg.number(1e3 * left)]
        for (name, values), left in zip(named, rest, strict=True)
    ]
    return (
        f"<h3>Where the time goes</h3>{key(list(PARTS), list(PARTS.values()))}{chart}"
        "<p>exchange: with the other ranks of its group, waiting included; reduction: waiting for gradients.</p>"
        + table("Where the time goes, in numbers", ["ms", *PARTS, "unattributed"], cells)
    )


def timeline(profile: Mapping[str, Any]) -> str:
    """One step, all ranks; under each rank's bar the plan's prediction, where there is one, on the same scale."""
    found, predicted = profile["timeline"], profile["prediction"] or {"timeline": [], "total_s": 0.0}
    named, cells = [], []
    for rank in range(len(profile["ranks"])):
        lanes = [drawn(found["spans"], rank)]
        cells.append([f"rank {rank}", *_sums_of(found["spans"], rank)])
        if predicted["timeline"]:
            lanes.append(drawn_prediction(predicted["timeline"], rank))
            cells.append([f"rank {rank}, predicted", *_sums_predicted(predicted["timeline"], rank)])
        named.append((f"rank {rank}", [[(k, w, 1e3 * s, 1e3 * n) for k, w, s, n in lane] for lane in lanes]))
    both = bool(predicted["timeline"])
    chart = svg.rows(
        "Timeline of one step, all ranks", named, "ms", 1e3 * max(found["step_s"], predicted["total_s"]),
        height=44 if both else 26,
    )  # fmt: skip
    said = "Of each rank the upper bar was measured, the lower one predicted. " if both else ""
    head = ["ms", "forward", "backward", "transfer", "wait", "other"]
    return (
        f"<h3>One step, all ranks</h3>{key(_KINDS, _KINDS)}<p>{said}Neighbouring blocks differ in shade.</p>"
        + scroll("Timeline", chart, "scroll wide")
        + table("Timeline, in numbers", head, cells)
        + folded(
            "Every interval of the step",
            ["rank", "what", "start ms", "ms", "of it wait ms"],
            _intervals(found["spans"]),
        )
        + (
            folded("Every interval predicted", ["rank", "what", "start ms", "ms"], _foretold(predicted))
            if both
            else ""
        )
    )


def drawn(spans: Sequence[Sequence[Any]], rank: int) -> list[svg.Bar]:
    """(class, words, start, seconds) measured: parts below, elements upon them, exchanges as wait and transfer on top.

    Neighbouring elements differ in shade.
    """
    found: list[tuple[int, svg.Bar]] = []
    turn = 0
    for number, part, element, op, start, seconds, wait in spans:
        if number != rank:
            continue
        words = f"rank {rank}: {part} {element} {op} {ms(seconds)} ms"
        if op:
            found.append((2, ("wait", f"{words}, waits {ms(wait)} ms", start, wait)))
            found.append((2, ("transfer", words, start + wait, seconds - wait)))
        elif element:
            turn += 1
            found.append((1, (f"{part}{' odd' if turn % 2 else ''}", words, start, seconds)))
        else:
            found.append((0, ("other", words, start, seconds)))
    return [one for _, one in sorted(found, key=lambda pair: pair[0])]


def drawn_prediction(spans: Sequence[Sequence[Any]], rank: int) -> list[svg.Bar]:
    """The same of a prediction's [rank, phase, element, kind, start, seconds]."""
    found = []
    for turn, (number, phase, element, kind, start, seconds) in enumerate(spans):
        if number == rank:
            shade = " odd" if turn % 2 else ""
            work = f"{phase}{shade}" if phase in ("forward", "backward") else "other"
            words = f"rank {rank}, predicted: {phase} {element} {kind} {ms(seconds)} ms"
            found.append((work if kind == "compute" else kind, words, start, seconds))
    return found


def prediction(profile: Mapping[str, Any]) -> str:
    """Bars of predicted and measured compute of every element."""
    predicted = profile["prediction"]
    if not predicted:
        return ""
    named, cells = [], []
    for element in profile["elements"]:
        name = element["name"]
        own = [1e3 * element["over"][f"{part}_s"]["max"] for part in ("forward", "backward")]
        theirs = [1e3 * s for s in predicted["elements"].get(name, (0.0, 0.0))]
        lanes = [
            svg.stacked(f"{name} {what}", zip(_KINDS[:2], _KINDS[:2], values, strict=True), "ms")
            for what, values in (("measured", own), ("predicted", theirs))
        ]
        named.append((name, lanes))
        change = f"{100 * (sum(theirs) / sum(own) - 1):+.0f} %" if sum(own) else "–"
        cells.append([name, *map(svg.number, (*own, *theirs)), change])
    total, step = predicted["total_s"], profile["steps"]["step_s"]["p50"]
    cells.append(["whole step", ms(step), "", ms(total), "", f"{100 * (total / step - 1):+.0f} %"])
    chart = svg.rows("Measured and predicted compute by block", named, "ms", height=30)
    head = ["ms", "measured forward", "backward", "predicted forward", "backward", "difference"]
    return (
        "<h3>Predicted against measured</h3><p>Compute of each block on its slowest rank: the upper bar measured, the "
        f"lower one predicted, from costs that are {escape(predicted['source'])}.</p>{key(_KINDS[:2], _KINDS[:2])}"
        f"{chart}{table('Predicted against measured, in numbers', head, cells)}"
    )


def _sums_of(spans: Sequence[Sequence[Any]], rank: int) -> list[str]:
    """ms of a measured step by _KINDS; other: the parts that are neither forward nor backward, without exchanges."""
    mine = [s for s in spans if s[0] == rank]
    ops = [s for s in mine if s[3]]
    by_part = [
        sum(s[5] for s in mine if s[1] == part and not s[2] and not s[3])
        - sum(s[5] for s in ops if s[1] == part)
        for part in ("forward", "backward")
    ]
    wait = sum(s[6] for s in ops)
    transfer = sum(s[5] for s in ops) - wait
    whole = sum(s[5] for s in mine if not s[2] and not s[3])
    return [ms(max(x, 0.0)) for x in (*by_part, transfer, wait, whole - sum(by_part) - transfer - wait)]


def _sums_predicted(spans: Sequence[Sequence[Any]], rank: int) -> list[str]:
    sums = dict.fromkeys(_KINDS, 0.0)
    for number, phase, _, kind, _, seconds in spans:
        if number == rank:
            sums[kind if kind != "compute" else phase if phase in sums else "other"] += seconds
    return [ms(seconds) for seconds in sums.values()]


def _intervals(spans: Sequence[Sequence[Any]], most: int = 400) -> list[list[str]]:
    longest = sorted(spans, key=lambda s: -s[5])[:most]
    return [
        [str(s[0]), " ".join(filter(None, s[1:4])), ms(s[4]), ms(s[5]), ms(s[6])]
        for s in sorted(longest, key=lambda s: (s[0], s[4]))
    ]


def _foretold(predicted: Mapping[str, Any], most: int = 400) -> list[list[str]]:
    longest = sorted(predicted["timeline"], key=lambda s: -s[5])[:most]
    return [
        [str(s[0]), " ".join(filter(None, s[1:4])), ms(s[4]), ms(s[5])]
        for s in sorted(longest, key=lambda s: (s[0], s[4]))
    ]
