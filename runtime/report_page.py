"""report.html: one page without links, scripts or anything else from outside; every chart has its numbers as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from string import Template
from typing import Any

from anabranch.runtime import report_svg as svg
from anabranch.runtime.profile_table import lines, ms
from anabranch.runtime.report_data import RunData

_PARTS = {
    "data": "c1", "forward": "forward", "backward": "backward", "exchange": "transfer", "reduction": "c3",
    "optimizer": "c5", "idle": "c7",
}  # fmt: skip


def page(runs: Sequence[RunData]) -> str:
    """The whole page: what the runs have in common first, then each."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"
    body = "" if len(runs) == 1 else _contents(runs) + _compared(runs)
    body += "".join(_run(run, number, len(runs) > 1) for number, run in enumerate(runs))
    colours = "\n".join(
        f".line.c{i} {{ stroke: var(--c{i}); }} rect.c{i}, i.c{i} {{ fill: var(--c{i}); background: var(--c{i}); }}"
        for i in range(8)
    )
    colours += "".join(
        f"\ni.{kind} {{ background: var(--{kind}); }}"
        for kind in ("forward", "backward", "transfer", "wait", "other")
    )
    colours += "\n.scroll svg.small { min-width: 0; max-width: 42rem; }"
    template = (resources.files("anabranch.runtime") / "templates" / "report.html").read_text(
        encoding="utf-8"
    )
    return Template(template).substitute(title=escape(title), colours=colours, body=body)


def _run(run: RunData, number: int, many: bool) -> str:
    found = (
        f'<section aria-labelledby="run{number}"><h2 id="run{number}">{escape(run.name)}</h2>' if many else ""
    )
    found += "".join(f'<p class="note">{escape(note)}</p>' for note in run.notes)
    profile = run.profile
    if profile:
        found += f"<h3>Result</h3><ul>{''.join(f'<li>{escape(line)}</li>' for line in _result(profile))}</ul>"
    if run.steps and not many:
        found += curves([run])
    found += _parts(run)
    if profile:
        found += _timeline(profile) + _prediction(profile)
    found += _placement(run)
    if profile:
        found += _blocks(profile) + _exchanges(profile)
    return found + ("</section>" if many else "")


def _result(profile: Mapping[str, Any]) -> list[str]:
    step_s, mesh = profile["steps"]["step_s"], profile["mesh"]
    first = (
        f"{len(profile['ranks'])} ranks ({mesh[0]} x {mesh[1]}, data x branch), a step takes {ms(step_s['p50'])} ms; "
        f"95 % of {profile['steps']['measured']} steps up to {ms(step_s['p95'])} ms"
    )
    return [first, *lines(profile)]


def _contents(runs: Sequence[RunData]) -> str:
    links = "".join(f'<li><a href="#run{i}">{escape(run.name)}</a></li>' for i, run in enumerate(runs))
    return f'<nav aria-label="Runs"><ul>{links}</ul></nav>'


def _compared(runs: Sequence[RunData]) -> str:
    rows = []
    for run in runs:
        last, tests = run.steps[-1] if run.steps else {}, [e["test_accuracy"] for e in run.evaluations]
        times = sorted(step["step_time_s"] for step in run.steps)
        step_s = (
            times[len(times) // 2]
            if times
            else run.profile["steps"]["step_s"]["p50"]
            if run.profile
            else None
        )
        rows.append(
            [
                run.name,
                str(last.get("step", "–")),
                svg.number(last["loss"]) if last else "–",
                f"{100 * tests[-1]:.2f} %" if tests else "–",
                f"{100 * max(tests):.2f} %" if tests else "–",
                ms(step_s) if step_s is not None else "–",
                f"{last['images_per_s']:.0f}" if last else "–",
            ]
        )
    head = ["run", "steps", "last loss", "test accuracy", "best", "ms/step", "images/s"]
    return f"<h3>Side by side</h3>{table('Runs side by side', head, rows)}" + curves(runs)


def curves(runs: Sequence[RunData]) -> str:
    """Loss (smoothed) and accuracy over epochs."""
    found, many = "", len(runs) > 1
    loss, accuracy = {}, {}
    for run in runs:
        prefix = f"{run.name}: " if many else ""
        if run.steps:
            points = [(float(step["step"]), float(step["loss"])) for step in run.steps]
            loss[f"{prefix}loss"] = svg.smoothed(points, max(1, len(points) // 100))
            hits = [(float(step["step"]), 100 * float(step["accuracy"])) for step in run.steps]
            accuracy[f"{prefix}training"] = svg.smoothed(hits, max(1, len(hits) // 50))
        tested = [(float(e["step"]), 100 * float(e["test_accuracy"])) for e in run.evaluations]
        if tested:
            accuracy[f"{prefix}test"] = tested
    for name, series, unit in (("Loss", loss, ""), ("Accuracy", accuracy, "%")):
        if series:
            chart = svg.lines(f"{name} over steps", series, "step", unit)
            rows = [
                [label, f"{x:.0f}", svg.number(y)]
                for label, points in series.items()
                for x, y in svg.thinned(points, 12)
            ]
            found += f"<h3>{name}</h3>{_key(list(series))}{_scroll(name, chart)}"
            found += _numbers(
                f"{name}, in numbers", ["curve", "step", f"{name.lower()} {unit}".strip()], rows
            )
    return found


def _parts(run: RunData) -> str:
    """Bars by rank: of the profile, else means of the run's metrics."""
    if run.profile:
        of_ranks = [{p: r["parts"][p]["p50"] for p in _PARTS} for r in run.profile["ranks"]]
        rest = [rank["unattributed"] * rank["step_s"]["p50"] for rank in run.profile["ranks"]]
    else:
        timed = [step["times_s"] for step in run.steps[1:] if "times_s" in step]
        if not timed:
            return ""
        num = len(timed[0]["step"])
        of_ranks = [{p: sum(t[p][r] for t in timed) / len(timed) for p in _PARTS} for r in range(num)]
        rest = [sum(t["unattributed"][r] for t in timed) / len(timed) for r in range(num)]
    rows = [(f"rank {r}", {p: 1e3 * s for p, s in parts.items()}) for r, parts in enumerate(of_ranks)]
    chart = svg.bars("Where a step's time goes, by rank", rows, "ms", _PARTS)
    cells = [
        [name, *(svg.number(parts[p]) for p in _PARTS), svg.number(1e3 * left)]
        for (name, parts), left in zip(rows, rest, strict=True)
    ]
    head = ["ms", *_PARTS, "unattributed"]
    return (
        f"<h3>Where the time goes</h3>{_key(list(_PARTS), list(_PARTS.values()))}"
        + _scroll("Where the time goes", chart)
        + "<p>exchange: with the other ranks of its group, waiting included; reduction: waiting for gradients.</p>"
        f"{table('Where the time goes, in numbers', head, cells)}"
    )


def _timeline(profile: Mapping[str, Any]) -> str:
    found = profile["timeline"]
    rows = [(f"rank {rank}", drawn(found["spans"], rank)) for rank in range(len(profile["ranks"]))]
    chart = svg.timeline("Timeline of one step, all ranks", rows, found["step_s"])
    cells = []
    for rank in range(len(profile["ranks"])):
        mine = [s for s in found["spans"] if s[0] == rank]
        ops = [s for s in mine if s[3]]
        sums = [
            sum(s[5] for s in mine if s[1] == part and s[2] and not s[3])
            - sum(s[5] for s in ops if s[1] == part and s[2])
            for part in ("forward", "backward")
        ]
        wait = sum(s[6] for s in ops)
        cells.append([f"rank {rank}", *map(ms, sums), ms(sum(s[5] for s in ops) - wait), ms(wait)])
    kinds = ("forward", "backward", "transfer", "wait", "other")
    return (
        f"<h3>One step, all ranks</h3>{_key(kinds, kinds)}{_scroll('Timeline', chart)}"
        + table("Timeline, in numbers", ["ms", "forward", "backward", "transfer", "wait"], cells)
        + _numbers(
            "Every interval of the step",
            ["rank", "what", "start ms", "ms", "of it wait ms"],
            _intervals(found),
        )
    )


def drawn(spans: Sequence[Sequence[Any]], rank: int) -> list[tuple[str, str, float, float]]:
    """Parts below, elements upon them, exchanges as wait and transfer on top."""
    drawn: list[tuple[int, tuple[str, str, float, float]]] = []
    for number, part, element, op, start, seconds, wait in spans:
        if number != rank:
            continue
        words = f"rank {rank}: {part} {element} {op} {ms(seconds)} ms"
        if op:
            drawn.append((2, ("wait", f"{words}, waits {ms(wait)} ms", start, wait)))
            drawn.append((2, ("transfer", words, start + wait, seconds - wait)))
        elif element or part in ("forward", "backward"):
            drawn.append((1 if element else 0, (part if element else "other", words, start, seconds)))
        else:
            drawn.append((0, ("other", words, start, seconds)))
    return [one for _, one in sorted(drawn, key=lambda pair: pair[0])]


def _intervals(found: Mapping[str, Any], most: int = 400) -> list[list[str]]:
    longest = sorted(found["spans"], key=lambda s: -s[5])[:most]
    return [
        [str(s[0]), " ".join(filter(None, s[1:4])), ms(s[4]), ms(s[5]), ms(s[6])]
        for s in sorted(longest, key=lambda s: (s[0], s[4]))
    ]


def _prediction(profile: Mapping[str, Any]) -> str:
    """Bars of predicted and measured compute of every element."""
    predicted = profile["prediction"]
    if not predicted:
        return ""
    rows, cells = [], []
    for element in profile["elements"]:
        name = element["name"]
        own = [1e3 * element["over"][f"{part}_s"]["max"] for part in ("forward", "backward")]
        theirs = [1e3 * s for s in predicted["elements"].get(name, (0.0, 0.0))]
        for what, (forward, backward) in (("predicted", theirs), ("measured", own)):
            rows.append((f"{name[-14:]} {what[0]}.", {"forward": forward, "backward": backward}))
        change = f"{100 * (sum(theirs) / sum(own) - 1):+.0f} %" if sum(own) else "–"
        cells.append([name, *map(svg.number, (*theirs, *own)), change])
    total, step = predicted["total_s"], profile["steps"]["step_s"]["p50"]
    cells.append(["step", "", ms(total), "", ms(step), f"{100 * (total / step - 1):+.0f} %"])
    chart = svg.bars("Predicted and measured compute by block", rows, "ms", _PARTS)
    head = ["ms, slowest rank", "predicted forward", "backward", "measured forward", "backward", "difference"]
    return (
        f"<h3>Predicted against measured</h3><p>p.: predicted, from costs that are {escape(predicted['source'])}; "
        "m.: measured, on the slowest rank.</p>"
        f"{_key(['forward', 'backward'], ['forward', 'backward'])}{_scroll('Predicted and measured', chart)}"
        f"{table('Predicted against measured, in numbers', head, cells)}"
    )


def _placement(run: RunData) -> str:
    placed = run.placements
    if "text" in placed:
        return f'<h3>Plan</h3><pre tabindex="0">{escape(placed["text"])}</pre>'
    if not placed:
        return ""
    rows = []
    for name, split, held in placed["rows"]:
        most = max((len(h) for h in held), default=0) or 1
        cells = [f"<td>{escape(name)}</td><td>{escape(split)}</td>"]
        for branches in held:
            text = ", ".join(map(str, branches)) or "–"
            share = round(60 * len(branches) / most) if branches else 0
            kind = f'class="heat" style="--share:{share}%"' if share else 'class="none"'
            cells.append(f"<td {kind}>{text}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in ("block", "split", *placed["ranks"]))
    return "<h3>Placement: branches by block and rank</h3>" + _scroll(
        "Placement", f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def _blocks(profile: Mapping[str, Any]) -> str:
    rows = []
    for element in profile["elements"]:
        for rank, row in enumerate(element["ranks"]):
            times = [
                f"{ms(row[k]['p50'])} ({ms(row[k]['p95'])})"
                for k in ("forward_s", "backward_s", "transfer_s", "wait_s")
            ]
            rows.append(
                [
                    element["name"], str(rank), *times, f"{row['bytes'] / 1e6:.2f}", f"{sum(row['flops']) / 1e9:.3g}",
                    f"{row['flops_per_s'] / 1e9:.3g}", f"{100 * row['utilisation']:.0f} %", str(row["kernels"]),
                    ms(row["gap_s"]),
                ]
            )  # fmt: skip
    head = [
        "block",
        "rank",
        "forward",
        "backward",
        "transfer",
        "wait",
        "MB",
        "GFLOP",
        "GFLOP/s",
        "used",
        "kernels",
        "gaps",
    ]
    return "<h3>Blocks</h3><p>ms a step: the middle of all steps (95 % of them).</p>" + table(
        "Blocks", head, rows
    )


def _exchanges(profile: Mapping[str, Any]) -> str:
    rows = [
        [
            f"{e['op']} {e['element']}", e["part"], str(e["calls"]), f"{e['bytes'] / 1e6:.3g}", ms(e["transfer_s"]),
            f"{e['bytes_per_s'] / 1e6:.0f}", ms(max(e["wait_s"])),
        ]
        for e in profile["exchanges"]
    ]  # fmt: skip
    head = ["exchange", "part", "calls", "MB", "transfer ms", "MB/s", "longest wait ms"]
    return f"<h3>Exchanges</h3>{table('Exchanges', head, rows)}" if rows else ""


def table(name: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls by itself, reachable by keyboard."""
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return _scroll(name, f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>")


def _numbers(name: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return f"<details><summary>{escape(name)}</summary>{table(name, head, rows)}</details>"


def _scroll(name: str, content: str) -> str:
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(name, quote=True)}">{content}</div>'


def _key(names: Sequence[str], kinds: Sequence[str] = ()) -> str:
    """A legend; kinds: the colours' classes, else numbered ones."""
    items = "".join(
        f'<li><i class="{kinds[i] if kinds else f"c{i % 8}"}"></i>{escape(name)}</li>'
        for i, name in enumerate(names)
    )
    return f'<ul class="key">{items}</ul>'
