"""report.html: one page without links, scripts or anything else from outside; every chart has its numbers as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from string import Template
from typing import Any

from anabranch.runtime import report_charts as charts
from anabranch.runtime import report_tables as tables
from anabranch.runtime.profile_table import lines, ms
from anabranch.runtime.report_data import RunData
from anabranch.runtime.report_svg import number

Facts = list[tuple[str, str]]


def page(runs: Sequence[RunData]) -> str:
    """The whole page: what the runs have in common first, then each."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"
    body = "" if len(runs) == 1 else _contents(runs) + _compared(runs)
    body += "".join(_run(run, number, len(runs) > 1) for number, run in enumerate(runs))
    kinds = (*(f"c{i}" for i in range(8)), "forward", "backward", "transfer", "wait", "other")
    colours = "\n".join(
        f"rect.{kind} {{ fill: var(--{kind}); }} .line.{kind} {{ stroke: var(--{kind}); }} "
        f"i.{kind} {{ --own: var(--{kind}); }}"
        for kind in kinds
    )
    template = (resources.files("anabranch.runtime") / "templates" / "report.html").read_text(
        encoding="utf-8"
    )
    return Template(template).substitute(title=escape(title), colours=colours, body=body)


def _run(run: RunData, number: int, many: bool) -> str:
    found = (
        f'<section aria-labelledby="run{number}"><h2 id="run{number}">{escape(run.name)}</h2>' if many else ""
    )
    profile = run.profile
    found += _facts([*(_of_profile(profile) if profile else []), *_of_metrics(run)])
    found += "".join(f'<p class="note">{escape(note)}</p>' for note in run.notes)
    if profile:
        found += f"<h3>Result</h3><ul>{''.join(f'<li>{escape(line)}</li>' for line in lines(profile))}</ul>"
    if run.steps and not many:
        found += charts.curves([run])
    found += charts.parts(run)
    if profile:
        found += charts.timeline(profile) + charts.prediction(profile)
    found += tables.placement(run)
    if run.audit:
        found += tables.timed_plans(run.audit, _step_s(run))
    if profile:
        found += tables.blocks(profile) + tables.exchanges(profile)
    return found + ("</section>" if many else "")


def _facts(facts: Facts) -> str:
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in facts)
    return f'<dl class="facts">{items}</dl>' if items else ""


def _of_profile(profile: Mapping[str, Any]) -> Facts:
    step_s, mesh, ranks = profile["steps"]["step_s"], profile["mesh"], profile["ranks"]
    exposed = max(
        sum(rank["parts"][part]["p50"] for part in ("exchange", "reduction")) / rank["step_s"]["p50"]
        for rank in ranks
    )
    return [
        ("a step", f"{ms(step_s['p50'])} ms"),
        (f"95 % of {profile['steps']['measured']} steps", f"≤ {ms(step_s['p95'])} ms"),
        ("ranks", str(len(ranks))),
        ("mesh, data × branch", f"{mesh[0]} × {mesh[1]}"),
        ("communication, most", f"{100 * exposed:.0f} %"),
        ("memory, most", f"{max(rank['memory_bytes'] for rank in ranks) / 2**20:.0f} MiB"),
    ]


def _of_metrics(run: RunData) -> Facts:
    if not run.steps:
        return []
    last, tests = run.steps[-1], [e["test_accuracy"] for e in run.evaluations]
    facts = [("steps trained", str(last["step"])), ("last loss", number(last["loss"]))]
    if tests:
        facts += [("test accuracy", f"{100 * tests[-1]:.2f} %")]
    return [*facts, ("images/s", f"{_images_per_s(run):.0f}")]


def _step_s(run: RunData) -> float | None:
    """The middle of a run's steps, else of its profile's."""
    times = sorted(step["step_time_s"] for step in run.steps)
    if times:
        return float(times[len(times) // 2])
    return float(run.profile["steps"]["step_s"]["p50"]) if run.profile else None


def _images_per_s(run: RunData) -> float:
    """The middle: a last batch may be short."""
    rates = sorted(step["images_per_s"] for step in run.steps)
    return float(rates[len(rates) // 2])


def _contents(runs: Sequence[RunData]) -> str:
    links = "".join(f'<li><a href="#run{i}">{escape(run.name)}</a></li>' for i, run in enumerate(runs))
    return f'<nav aria-label="Runs"><ul>{links}</ul></nav>'


def _compared(runs: Sequence[RunData]) -> str:
    rows = []
    for run in runs:
        last, tests = run.steps[-1] if run.steps else {}, [e["test_accuracy"] for e in run.evaluations]
        step_s = _step_s(run)
        rows.append(
            [
                run.name,
                str(last.get("step", "–")),
                number(last["loss"]) if last else "–",
                f"{100 * tests[-1]:.2f} %" if tests else "–",
                f"{100 * max(tests):.2f} %" if tests else "–",
                ms(step_s) if step_s is not None else "–",
                f"{_images_per_s(run):.0f}" if last else "–",
            ]
        )
    head = ["run", "steps", "last loss", "test accuracy", "best", "ms/step", "images/s"]
    return f"<h3>Side by side</h3>{tables.table('Runs side by side', head, rows)}" + charts.curves(runs)
