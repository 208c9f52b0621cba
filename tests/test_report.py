"""report.html in a real browser, from whole and torn runs."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shutil
import subprocess
import time
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from test_profile import synthetic_profile

from anabranch.runtime.callbacks import MetricsFile
from anabranch.runtime.cli import main
from anabranch.runtime.errors import ConfigError
from anabranch.runtime.profile_file import write_profile
from anabranch.runtime.report import write_report
from anabranch.runtime.report_charts import part_seconds
from anabranch.runtime.report_data import read_run
from anabranch.runtime.report_page import page
from anabranch.runtime.trackers import Tracker, tracker
from anabranch.schedulers import BranchPlacement, Plan, format_plan
from anabranch.schedulers.plan import SAMPLE

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
BROWSERS_OWN = (
    ".google.com",
    ".googleapis.com",
    ".gvt1.com",
)  # what it asks for at its start, whatever the page
NO_BROWSER = "no Chromium found: install chromium to test the report in a browser"
WIDTHS = [320, 390, 1280]
# What each frame finds out about itself. Keyboard: Tab goes through what has a tabIndex of 0 in the order of the
# document (no key is pressed): so what is in `order` is reached, and what scrolls or opens must be. `ring`: it shows.
PROBE = r"""<script>
const all = (what, from = document) => [...from.querySelectorAll(what)];
for (const e of all('details')) e.open = true;
const charts = all('svg[role=img]');
const named = charts.every(s => s.getAttribute('aria-label'));
const order = all('*').filter(e => e.tabIndex >= 0 && e.getClientRects().length);
const needs = all('*').filter(e => e.matches('a[href], summary, pre') || e.scrollWidth > e.clientWidth + 1 &&
  ['auto', 'scroll'].includes(getComputedStyle(e).overflowX));
const missed = needs.filter(e => !order.includes(e)).map(e => e.outerHTML.slice(0, 80));
const ring = order.every(e => { e.focus({focusVisible: true});
  const { outlineStyle, outlineWidth } = getComputedStyle(e);
  return document.activeElement === e && outlineStyle === 'solid' && parseFloat(outlineWidth) >= 2; });
document.activeElement.blur();
const box = e => e.getBoundingClientRect();
const apart = charts.filter(s => { const ticks = all('.tick', s).map(box).filter(b => b.width);
  return ticks.some((a, i) => ticks.some((b, j) => i < j && a.right > b.left && b.right > a.left
                                                   && a.bottom > b.top + 1 && b.bottom > a.top + 1)); })
  .map(s => s.getAttribute('aria-label'));
const cut = all('.plot').flatMap(plot => all('text, .names span', plot).filter(e => box(e).width && (
  box(e).left < box(plot).left || box(e).right > box(plot).right || box(e).bottom > box(plot).bottom + 1)))
  .map(e => [e.textContent, box(e).right, box(e.closest('.plot')).right]);
const letters = all('svg text, .names span').map(t => parseFloat(getComputedStyle(t).fontSize));
const rgba = text => { const [r, g, b, a = 1] = text.match(/[\d.]+/g).map(Number);
  return text.startsWith('rgb') ? [r / 255, g / 255, b / 255, a] : [r, g, b, a]; };  // else color(srgb r g b)
const luminance = c => [0.2126, 0.7152, 0.0722].reduce((sum, share, i) =>
  sum + share * (c[i] <= 0.04045 ? c[i] / 12.92 : ((c[i] + 0.055) / 1.055) ** 2.4), 0);
const behind = e => { for (; e; e = e.parentElement) {
  const c = rgba(getComputedStyle(e).backgroundColor); if (c[3]) return c; } return [1, 1, 1, 1]; };
const contrasts = all('body *').filter(e => !e.matches('script, title') && [...e.childNodes].some(
  n => n.nodeType === 3 && n.data.trim())).map(e => {
  const style = getComputedStyle(e), ink = rgba(e.closest('svg') ? style.fill : style.color);
  const [low, high] = [luminance(ink), luminance(behind(e))].sort((a, b) => a - b);
  return [(high + 0.05) / (low + 0.05), `${e.tagName} ${e.className} ${e.textContent.slice(0, 30)}`]; });
contrasts.sort((a, b) => a[0] - b[0]);
parent.postMessage(JSON.stringify({scroll: document.documentElement.scrollWidth, width: innerWidth, named, missed, ring,
  positive: all('[tabindex]').filter(e => e.tabIndex > 0).length, tabs: order.length,
  dark: matchMedia('(prefers-color-scheme: dark)').matches, ground: getComputedStyle(document.body).backgroundColor,
  apart, cut, charts: charts.length, tables: all('table').length, texts: contrasts.length, faintest: contrasts[0],
  least: Math.min(...letters)}), '*');
</script>"""


def metrics(path: Path, num_steps: int = 60, num_ranks: int = 2) -> Path:
    path.mkdir(exist_ok=True)
    lines = []
    for step in range(1, num_steps + 1):
        times = {
            p: [0.01] + [0.02] * (num_ranks - 1)
            for p in ("data", "forward", "backward", "exchange", "reduction", "optimizer", "idle")
        }
        times |= {"step": [0.1] + [0.2] * (num_ranks - 1), "unattributed": [0.001] * num_ranks}
        lines.append(
            {"kind": "step", "step": step, "epoch": 0, "loss": 2 / step, "accuracy": 1 - 1 / step, "lr": 0.1,
             "step_time_s": 0.1, "images_per_s": 320.0, "times_s": times}
        )  # fmt: skip
        if step % 20 == 0:
            lines.append(
                {"kind": "evaluation", "step": step, "epoch": 0, "test_loss": 1.0, "test_accuracy": 0.9}
            )
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a thousand steps, eight ranks and sixteen blocks, all steps profiled."""
    path = metrics(tmp_path_factory.mktemp("report") / "run", 1000, 8)
    profile = synthetic_profile(num_steps=1000, num_ranks=8, num_blocks=16)
    elements = {e["name"]: [0.02, 0.03] for e in profile["elements"]}
    foretold = [
        [rank, phase, name, kind, at + 0.05 * b + later, 0.02]
        for rank in range(8)
        for at, phase in ((0.0, "forward"), (0.45, "backward"))
        for b, name in enumerate(list(elements)[:8])
        for kind, later in (("compute", 0.0), ("transfer", 0.02))
    ]
    profile["prediction"] = {"source": "measured", "total_s": 0.9, "elements": elements, "timeline": foretold}
    write_profile(profile, path / "profile.json")
    return path


def browse(page: Path, folder: Path, *flags: str) -> tuple[str, str, list[str], float]:
    """(the page as it stands at its end, standard error, hosts asked for, seconds) of a headless Chromium."""
    assert CHROMIUM is not None
    log = folder / f"net-{page.stem}.json"
    begun = time.perf_counter()
    found = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
         "--disable-component-update", "--host-resolver-rules=MAP * ~NOTFOUND", "--window-size=1400,900",
         f"--user-data-dir={folder / 'user'}",
         f"--log-net-log={log}", "--enable-logging=stderr", "--dump-dom", *flags, page.as_uri()],
        capture_output=True, text=True, timeout=280, check=True,
    )  # fmt: skip
    seconds = time.perf_counter() - begun
    started = re.findall(r'"params":\{[^{}]*"url":"([^"]+)"', log.read_text())
    hosts = {str(urlsplit(url).hostname) for url in started if url.startswith("http")}
    return found.stdout, found.stderr, [host for host in hosts if not host.endswith(BROWSERS_OWN)], seconds


@pytest.mark.skipif(CHROMIUM is None, reason=NO_BROWSER)
@pytest.mark.parametrize("dark", [False, True])
def test_in_a_browser(run: Path, tmp_path: Path, dark: bool) -> None:
    """In frames as wide as a small phone, a phone and a desktop: a headless window itself is never below 500."""
    write_report([run], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text().replace("</body>", f"{PROBE}</body>")
    (tmp_path / "probed.html").write_text(
        text.replace("img-src data:", "img-src data:; script-src 'unsafe-inline'")
    )
    frames = "".join(
        f'<iframe src="probed.html" style="width:{w}px;height:900px;border:0"></iframe>' for w in WIDTHS
    )
    (tmp_path / "frames.html").write_text(
        '<!DOCTYPE html><meta name="color-scheme" content="light dark"><pre></pre><script>onmessage = e => '
        f"document.querySelector('pre').textContent += e.data + '\\n'</script>{frames}"
    )
    flags = ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if dark else []
    dom, console, hosts, _ = browse(tmp_path / "frames.html", tmp_path, *flags)
    assert [line for line in console.splitlines() if "CONSOLE" in line] == []
    assert hosts == []
    told = [
        json.loads(line) for line in unescape(dom.partition("<pre>")[2].partition("</pre>")[0]).splitlines()
    ]
    assert sorted(found["width"] for found in told) == WIDTHS, "each frame told, at the width that it has"
    for found in told:
        assert found["scroll"] <= found["width"], "the page itself does not scroll sideways"
        assert found["named"]
        assert found["missed"] == [], "what scrolls or opens is reached by Tab"
        assert found["positive"] == 0, "Tab goes in the order of the document"
        assert found["tabs"] >= found["tables"]
        assert found["ring"], "what has the focus shows it"
        assert found["apart"] == [], "labels do not overlap"
        assert found["cut"] == [], "no label is cut off"
        assert found["least"] >= 11
        assert found["texts"] >= 100
        assert found["faintest"][0] >= 4.5, f"WCAG's contrast of text: {found['faintest']}"
        assert found["dark"] == dark
        assert found["ground"] == ("rgb(20, 23, 26)" if dark else "rgb(255, 255, 255)")
        assert found["charts"] >= 5
        assert found["tables"] >= found["charts"]


@pytest.mark.skipif(CHROMIUM is None, reason=NO_BROWSER)
def test_a_long_runs_report_opens_in_two_seconds(run: Path, tmp_path: Path) -> None:
    write_report([run], tmp_path / "report.html")
    (tmp_path / "empty.html").write_text("<title>x</title><body></body>")
    for _ in range(4):  # something else on the machine delays a browser too: then once more
        *_, empty = browse(tmp_path / "empty.html", tmp_path)
        dom, *_, seconds = browse(tmp_path / "report.html", tmp_path)
        if seconds - empty <= 2.0:
            break
    assert "Every interval of the step" in dom
    assert seconds - empty <= 2.0


def test_is_self_contained_and_small(run: Path, tmp_path: Path) -> None:
    write_report([run], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    links = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]+)""", text)
    assert all(link.startswith(("#", "data:")) for link in links), links
    assert "<script" not in text
    assert (tmp_path / "report.html").stat().st_size + (run / "profile.json").stat().st_size <= 20e6


def test_every_chart_has_its_numbers(run: Path) -> None:
    text = page([read_run(run)])
    for words in ("Loss, in numbers", "Accuracy, in numbers", "Where the time goes, in numbers", "Timeline, in numbers",
                  "Predicted against measured, in numbers", "Every interval of the step", "Every interval predicted",
                  "rank 7, predicted"):  # fmt: skip
        assert words in text
    assert "rank 0 (a cpu) is waited for in" in text


def test_a_run_without_a_profile_has_a_map_of_its_plan(tmp_path: Path) -> None:
    """By rule: counts, lists and samples; in two replicas."""
    path = metrics(tmp_path / "run", 5)
    placed = {f"stage1.block{i}": BranchPlacement.from_counts((2, 1)) for i in (1, 2)}
    placed |= {"stage2.block1": BranchPlacement("branch", ((0, 2), (1,))), "stage3.block1": SAMPLE}
    plan = Plan(2, 2, placed, "replicated", "sample", (("a:0", "a:1"), ("b:0", "b:1")))
    (path / "plan.toml").write_text(format_plan(plan))
    found = read_run(path)
    assert found.placements == {
        "ranks": ["rank 0 · a:0", "rank 1 · a:1", "rank 2 · b:0", "rank 3 · b:1"],
        "rows": [
            ["stem", "replicated", [(), (), (), ()]],
            ["stage1.*", "branch", [(0, 1), (2,), (0, 1), (2,)]],
            ["stage2.block1", "branch", [(0, 2), (1,), (0, 2), (1,)]],
            ["stage3.block1", "sample", [None] * 4],
            ["head", "sample", [(), (), (), ()]],
        ],
    }
    text = re.sub(r"<[^>]+>", " ", page([found]))
    assert "Placement: branches by block and rank" in text
    assert re.search(r"stage1\.\* +branch +0, 1 +2 +0, 1 +2 ", text)
    assert re.search(r"stage3\.block1 +sample +all +all +all +all ", text)


def test_what_is_missing_is_said(run: Path, tmp_path: Path) -> None:
    """A profile without metrics, metrics without a line, metrics without a profile."""
    curves, profile = "no metrics: there are no curves", "no profile: `anabranch profile "
    (tmp_path / "profile.json").write_bytes((run / "profile.json").read_bytes())
    assert write_report([tmp_path])["notes"] == [curves]
    (tmp_path / "metrics.jsonl").write_text("")
    assert write_report([tmp_path])["notes"] == [curves]
    (tmp_path / "profile.json").unlink()
    notes = write_report([tmp_path])["notes"]
    assert notes[0] == curves
    assert notes[1].startswith(profile)
    assert curves in (tmp_path / "report.html").read_text()
    assert [note[: len(profile)] for note in write_report([metrics(tmp_path / "run", 5)])["notes"]] == [
        profile
    ]


def test_a_plan_that_was_predicted_and_timed_is_compared_with_the_run(tmp_path: Path) -> None:
    path = metrics(tmp_path / "run", 30)
    plans = [
        {"name": "1x2", "predicted_step_s": 0.09, "measured_step_s": 0.12, "error": -0.25, "ratio": 0.8,
         "interval_95": [0.75, 0.85]},
        {"name": "data", "predicted_step_s": 0.13},
    ]  # fmt: skip
    (path / "audit.json").write_text(json.dumps({"chosen": "1x2", "plans": plans}))
    text = re.sub(r"<[^>]+>", " ", page([read_run(path)]))
    assert re.search(r"1x2 \(chosen\) +90\.0 +120 +-25 % +0\.800 +0\.750 to 0\.850", text)
    assert re.search(r"data +130 +– ", text)
    assert re.search(r"this run +90\.0 +100 +-10 % ", text)


def test_a_torn_run_is_used_up_to_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = metrics(tmp_path / "run", 30)
    with (path / "metrics.jsonl").open("a") as file:
        file.write(
            '{"kind": "step", "step": 31, "lo\n{"kind": "step", "step": 32, "loss": 77, "accuracy": 0}\n'
        )
    assert main(["report", str(path)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "metrics.jsonl breaks off in line 32 (a killed run): used up to there, the last step is 30" in printed
    )
    assert "breaks off in line 32" in (path / "report.html").read_text()
    assert [step["step"] for step in read_run(path).steps] == [*range(1, 31)]


def test_a_run_that_went_on_with_fewer_ranks_and_with_all_again(tmp_path: Path) -> None:
    """Times by rank are of the steps with as many as at the end, and the page says which."""
    path = metrics(tmp_path / "run", 20, 4)
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for line in lines[7:13]:
        line["times_s"] = {part: [1.0, 1.0] for part in line["times_s"]}
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    note = "times by rank are of its steps with 4, 1 to 7, 14 to 20"
    assert any(note in text for text in write_report([path])["notes"])
    assert note in (path / "report.html").read_text()
    of_ranks, _ = part_seconds(read_run(path))
    assert [round(one["forward"], 6) for one in of_ranks] == [0.01, 0.02, 0.02, 0.02]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:13]))
    assert any("its steps with 2, 8 to 13" in text for text in write_report([path])["notes"])
    assert [one["forward"] for one in part_seconds(read_run(path))[0]] == [1.0, 1.0]


def test_the_parts_of_a_step_are_the_middle_of_all(tmp_path: Path) -> None:
    """Neither a first line, which has no step before it, nor a step of seconds counts for more than one."""
    path = metrics(tmp_path / "run", 3)
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    lines[0]["times_s"] = {part: [0.0, 0.0] for part in lines[0]["times_s"]}
    for line, seconds in zip(lines[1:], (9.0, 0.01), strict=True):
        line["times_s"]["idle"] = [seconds, 0.02]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, lines[-1]]))
    found = read_run(path)
    assert [step["step"] for step in found.timed_steps] == [2, 3, 3]
    assert [one["idle"] for one in part_seconds(found)[0]] == [0.01, 0.02]


def test_a_run_that_diverged(tmp_path: Path) -> None:
    """As metrics.jsonl has it, and as older ones had: what is finite is drawn, the rest is told."""
    path = metrics(tmp_path / "run", 10)
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    file = MetricsFile(path / "metrics.jsonl")
    for line, loss in zip(lines, [2.0, 3.0, *[math.inf] * 7, math.nan], strict=True):
        file.on_step({**line, "loss": loss})
    file.on_evaluation({"step": 10, "epoch": 0, "test_loss": -math.inf, "test_accuracy": 0.1})
    file.close()
    written = (path / "metrics.jsonl").read_text()
    assert "NaN" not in written
    assert "Infinity" not in written
    for text in (written, written.replace("null", "Infinity")):
        (path / "metrics.jsonl").write_text(text)
        left_out = "the loss of 8 of 10 steps is not finite: the curve leaves them out"
        assert left_out in write_report([path])["notes"]
        assert read_run(path).losses == [(1.0, 2.0), (2.0, 3.0)]
        page_text = re.sub(r"<[^>]+>", " ", (path / "report.html").read_text())
        assert re.search(r"last loss +not finite", page_text)
    (path / "metrics.jsonl").write_text(re.sub(r'"loss": \d\.\d', '"loss": null', written))
    assert read_run(path).losses == []
    write_report([path, path], tmp_path / "both.html")


def test_runs_side_by_side(tmp_path: Path) -> None:
    paths = [metrics(tmp_path / name, 30) for name in ("one", "two & <b>")]
    result = write_report(paths, tmp_path / "both.html")
    text = (tmp_path / "both.html").read_text()
    assert "2 runs compared" in text
    assert "two &amp; &lt;b&gt;: loss" in text
    assert "<b>" not in text
    assert result["runs"] == [str(path) for path in paths]


def test_pictures(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = write_report([run], tmp_path / "paper.html", png=True)
    kinds = ("curves", "parts", "timeline", "placement", "prediction")
    names = [f"paper-{kind}.png" for kind in kinds]
    assert [Path(path).name for path in result["pictures"]] == names
    for name in names:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    plain = metrics(tmp_path / "plain", 30)
    found = write_report([plain], png=True)["pictures"]
    assert [Path(path).name for path in found] == ["report-curves.png", "report-parts.png"], "as on the page"


def test_the_curves_of_a_picture_are_the_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss; accuracy in training and in the test, of two runs."""
    figures = pytest.importorskip("matplotlib.figure")
    drawn: dict[str, Any] = {}

    def keep(figure: Any, path: Path, **how: Any) -> None:
        drawn[path.name] = [
            {str(line.get_label()): len(line.get_xdata()) for line in axes.get_lines()}
            for axes in figure.axes
        ]

    monkeypatch.setattr(figures.Figure, "savefig", keep)
    write_report([metrics(tmp_path / name, 40) for name in ("one", "two")], tmp_path / "both.html", png=True)
    accuracy = {"one: training": 40, "one: test": 2, "two: training": 40, "two: test": 2}
    assert drawn["both-curves.png"] == [{"one": 40, "two": 40}, accuracy]
    assert {*drawn} == {"both-curves.png", "both-parts-0.png", "both-parts-1.png"}


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="is no folder"):
        read_run(tmp_path / "absent")
    with pytest.raises(ConfigError, match=r"has neither metrics\.jsonl nor profile\.json"):
        read_run(tmp_path)
    old, new = metrics(tmp_path / "old"), metrics(tmp_path / "new")
    (old / "profile.json").write_text('{"schema": 0}')
    with pytest.raises(ConfigError, match="a profile of schema 0, this version reads schema 4"):
        write_report([new, old])
    assert main(["report"]) == 2
    assert "report needs a run's folder" in capsys.readouterr().err
    assert main(["report", str(new), "--output", str(tmp_path / "no" / "r.html")]) == 2


def test_trackers_get_every_number(tmp_path: Path) -> None:
    seen: list[tuple[dict[str, float], int]] = []
    ended: list[bool] = []
    mine = Tracker(lambda values, step: seen.append((dict(values), step)), ended.append)
    step = json.loads((metrics(tmp_path / "run", 3) / "metrics.jsonl").read_text().splitlines()[-1])
    mine.on_step({**step, "memory_bytes": [5, 7]})
    mine.on_evaluation({"step": 3, "epoch": 0, "test_loss": 1.0, "test_accuracy": 0.9})
    mine.on_mesh({"step": 3, "data": 1, "branch": 2})
    mine.on_end({})
    mine.close()
    numbers = ("epoch", "loss", "accuracy", "lr", "step_time_s", "images_per_s")
    assert [at for _, at in seen] == [3, 3, 3]
    assert [values for values, _ in seen] == [
        {f"train/{name}": step[name] for name in numbers}
        | {f"time/{part}_s": max(seconds) for part, seconds in step["times_s"].items()}
        | {"memory/max_bytes": 7},
        {"test/epoch": 0, "test/test_loss": 1.0, "test/test_accuracy": 0.9},
        {"mesh/data": 1, "mesh/branch": 2},
    ]
    assert {*step} == {"kind", "step", "times_s", *numbers}, "and a step has no others"
    assert ended == [True]
    with pytest.raises(ConfigError, match="use tensorboard, wandb, mlflow"):
        tracker("other", tmp_path)
    for name in ("tensorboard", "wandb", "mlflow"):
        if importlib.util.find_spec(name) is None:
            with pytest.raises(ConfigError, match=rf"pip install 'anabranch\[{name}\]'"):
                tracker(name, tmp_path)
