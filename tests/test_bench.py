"""`anabranch bench`: small rows of Table V on real ranks, a kill and its resumption, what the record says."""

from __future__ import annotations

import io
import json
import math
import re
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_ranks import baselines, compiled_baseline, row, row_alone
from ranks import run_ranks
from rich.console import Console

from anabranch.benchmarks import collectives, data_parallel, scaling, step_parts, table5, table5_report
from anabranch.benchmarks.plain_resnet import plain_pre_resnet
from anabranch.benchmarks.record import RESULTS
from anabranch.benchmarks.table5_sides import VARIANTS, Row, faster_format, network_of, setting_of
from anabranch.blocks import build
from anabranch.blocks.errors import ModelError
from anabranch.runtime.errors import ConfigError
from anabranch.schedulers import parse_plan

TINY = Row(8, 2, fold=18)
BENCH = [sys.executable, "-m", "anabranch.runtime", "bench"]


def test_the_baseline_is_our_pre_resnet_in_plain_torch() -> None:
    torch.manual_seed(0)
    ours = build("pre_resnet", depth=14).double()
    plain = plain_pre_resnet(ours).double()
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    results = []
    for network in (ours, plain):
        y = network(x)
        network.zero_grad()  # stem and classifier are the same modules
        y.square().sum().backward()
        results.append(
            (y, sum(float(p.grad.norm()) ** 2 for p in network.parameters() if p.grad is not None))
        )
    torch.testing.assert_close(results[1], results[0])
    assert not [
        m
        for m in plain.modules()
        if "anabranch" in type(m).__module__ and "benchmarks" not in type(m).__module__
    ]
    with pytest.raises(ModelError, match="no plain form"):
        plain_pre_resnet(build("multi_resnet", depth=8, num_branches=2))


@pytest.mark.parametrize(
    ("num_branches", "deeper", "multi"), [(2, 3_477_850, 3_454_586), (6, 10_477_402, 10_361_082)]
)
def test_rows_are_the_papers_networks(num_branches: int, deeper: int, multi: int) -> None:
    """Table V's integers; the shared form has fewer."""
    found = {
        name: sum(p.numel() for p in network_of(Row(32, num_branches), name).parameters()) for name in "bcde"
    }
    assert found == {"b": deeper, "c": multi, "d": multi, "e": multi}
    assert sum(p.numel() for p in network_of(Row(32, num_branches), "d_shared").parameters()) < multi


@pytest.mark.parametrize("fold", [1, 6, 18])
def test_a_stage_begins_with_a_shared_block_at_any_depth(fold: int) -> None:
    """So a folded network has relatively more of them: with one block a stage nothing is left that differs."""
    row = Row(32, 2, fold=fold)
    networks = [network_of(row, variant) for variant in ("d", "d_shared")]
    num_blocks = 54 // fold
    assert [
        sum(getattr(block, "preact", "") == "shared" for block in network.modules()) for network in networks
    ] == [3, num_blocks]
    shapes = [{name: p.shape for name, p in network.named_parameters()} for network in networks]
    assert (shapes[0] == shapes[1]) == (fold == 18)
    assert ("d_shared" in table5.parse_variants("", fold)) == (fold < 18)


def test_a_row(tmp_path: Path) -> None:
    """All of (c) to (f) compute one function; every variant has what the record promises."""
    variants = [name for name in VARIANTS if name != "f_shared"]  # as f and d_shared
    found, other = run_ranks(2, row, variants)
    assert {name: facts["samples_s"] for name, facts in found.items()} == {
        name: facts["samples_s"] for name, facts in other.items()
    }  # the slowest rank's, on all ranks
    entries = table5._entries(TINY, found, found, "measured", 2)
    assert [entry["variant"] for entry in entries] == variants
    for entry in entries:
        expected = {"batch": 8, "num_branches": 2, "precision": "fp32", "workers": 2, "bn_batch_size": 4}
        assert {key: entry[key] for key in expected} == expected
        assert (entry["measured"], entry["predicted"], entry["label"]) == (True, False, "measured")
        assert len(entry["samples_s"]) == 2
        assert entry["median_s"] == pytest.approx(sum(entry["samples_s"]) / 2)
        assert entry["images_per_s"] == pytest.approx(8 / entry["median_s"])
        assert entry["memory_format"] == faster_format(entry["format_probe_s"])
        assert entry["is_papers_network"] == ("shared" not in entry["variant"])
        low, high = entry["speed_up_interval_95"]
        assert low <= entry["speed_up"] <= high
    by = {entry["variant"]: entry for entry in entries}
    for name in "def":
        assert set(by[name]["how_to_run"]["execution"].values()) <= {"fused", "mixed", "looped"}
        assert by[name]["first_loss"] == pytest.approx(by["c"]["first_loss"], rel=1e-5)
    assert by["a"]["first_loss"] == pytest.approx(by["b"]["first_loss"], rel=1e-5)
    assert by["a"]["first_loss"] != pytest.approx(by["c"]["first_loss"], rel=1e-3)
    # (e) sends its activations, (d) only gradients: 4 bytes of each parameter, once on two ranks, and statistics
    num_parameters = sum(p.numel() for p in network_of(TINY, "d").parameters())
    assert 4 * num_parameters <= by["d"]["sent_bytes_per_rank"] < 4.2 * num_parameters
    assert by["e"]["sent_bytes_per_rank"] > 2 * by["d"]["sent_bytes_per_rank"]
    assert "counts = [1, 1]" in by["e"]["plan"]
    assert parse_plan(by["d"]["plan"]).mesh == (2, 1)
    audited = {one["name"]: one for one in by["f"]["audit"]}  # by the runtime's own audit
    assert {"data", by["f"]["chosen"]} <= audited.keys()
    assert (by["f"]["same_as"] == "d") == (by["f"]["chosen"] == "data")
    record = {"rows": entries, "variant_names": VARIANTS}
    assert {path.suffix for path in table5_report.write_pictures(record, tmp_path / "table5")} == {
        ".svg",
        ".png",
    }
    assert "xmlns" in (tmp_path / "table5.svg").read_text()
    console = Console(width=140, record=True, file=io.StringIO())
    table5_report.print_table(record, console)
    shown = console.export_text()
    assert shown.count("not the paper's") == 2  # in its row, and where the letters are explained
    assert "3 of 3 blocks begin a stage (of the whole, 3 of 54)" in shown


@pytest.mark.parametrize(
    ("contiguous", "channels_last", "chosen"),
    [(1.0, 0.98, "contiguous"), (1.0, 0.96, "channels_last"), (0.9, 1.0, "contiguous")],
)
def test_a_memory_format_is_left_only_for_a_clearly_faster_one(
    contiguous: float, channels_last: float, chosen: str
) -> None:
    assert faster_format({"contiguous": contiguous, "channels_last": channels_last}) == chosen


def test_on_one_gpu_all_rows_have_one_bn_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "fake")
    row = Row(8, 2, whole_groups=True)
    assert {row.bn_batch_size, replace(row, mesh=(1, 1)).bn_batch_size} == {8}
    assert setting_of(row, "contiguous").config.train.bn_batch_size == 8
    assert Row(8, 2).bn_batch_size == 4
    done = {"samples_s": [1.0]}
    (entry,) = table5._entries(row, {"e": done}, {"b": done}, "predicted", 2)
    assert (entry["bn_batch_size"], entry["reference_bn_batch_size"]) == (8, 4)


def test_ranks_that_are_not_here_are_predicted() -> None:
    (of_rank,) = run_ranks(1, row_alone, ["b", "d", "e", "f"])
    for variant in ("b", "d", "e", "f"):
        done = table5._completed([rank[variant] for rank in of_rank], "cpu")
        slowest = [max(seconds) for seconds in zip(*done["compute_samples_s"], strict=True)]
        assert done["transfer_s"] > 0
        assert done["samples_s"] == pytest.approx([seconds + done["transfer_s"] for seconds in slowest])
    # 5 GB/s at 0.7 of it and 10 µs a latency, twice for an all-reduce (schedulers.device_table)
    moved = [num_bytes for _, num_bytes, _ in of_rank[0]["b"]["exchanges"]]
    done = table5._completed([rank["b"] for rank in of_rank], "cpu")
    assert done["transfer_s"] == pytest.approx(2e-5 + moved[0] / 3.5e9)
    (entry,) = table5._entries(TINY, {"e": done}, {"b": done}, "predicted", 2)
    assert (entry["predicted"], entry["label"]) == (True, "predicted")


def test_one_plan_is_not_timed_twice_for_the_better() -> None:
    """Where ranks are not here data parallelism takes the place of a slower plan, but not of itself."""
    data = {"samples_s": [1.0, 2.0, 3.0], "mesh": "2x1"}
    for same_as, seconds, is_replaced in (
        ("", 2.5, True),
        ("", 1.5, False),
        ("e", 2.5, True),
        ("d", 2.5, False),
    ):
        auto = {"samples_s": [seconds], "same_as": same_as}
        expected = {**data, "same_as": "d_shared"} if is_replaced else auto
        assert table5._chosen(auto, data, "d_shared") == expected


def test_the_baseline_waits_for_no_bucket_before_its_last() -> None:
    for (by_gloo, by_memory), did in run_ranks(2, baselines):
        torch.testing.assert_close(by_memory, by_gloo)
        num_buckets = len(did) // 2
        assert num_buckets > 1
        assert did == ["begun"] * num_buckets + ["waited"] * num_buckets


def test_the_baseline_is_compiled_as_ours_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks alone, into the same function; one that cannot be is told, and runs as it is."""
    ((losses, told, is_compiled),) = run_ranks(1, compiled_baseline)
    assert losses == pytest.approx(losses[:1] * 3, rel=1e-5)
    assert told[0] == "compiled"
    assert told[1].startswith("torch.compile failed: ")
    num = len(is_compiled) // 3
    assert sum(is_compiled[num : 2 * num]) == 3
    assert not any(is_compiled[:num] + is_compiled[2 * num :])
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "gloo")
    assert setting_of(replace(TINY, compiled=True), "contiguous").config.mesh.compile == "on"
    assert setting_of(TINY, "contiguous").config.mesh.compile == "off"


@pytest.mark.optin
def test_a_compiled_row(tmp_path: Path) -> None:
    """By the compiler itself: kept where it is faster, told where it is not."""
    rows = table5.parse_rows("8x2", ["fp32"], 2, 18, compiled=True)
    record = table5.run(rows, ["b", "d"], rounds=2, told=False, folder=tmp_path)
    base, ours = record["rows"]
    told = [base["compiled"], *ours["how_to_run"]["compiled"].values()]
    assert all(re.fullmatch(r"compiled|not faster: \d+\.\d\d of the time", text) for text in told)
    assert record["compiled"]
    with pytest.raises(ConfigError, match="was measured with compiled = True, now it is False"):
        table5.run(
            table5.parse_rows("8x2", ["fp32"], 2, 18), ["b", "d"], rounds=2, resume=True, told=False, folder=tmp_path
        )  # fmt: skip


def children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_kill_loses_one_row(tmp_path: Path) -> None:
    """Killed in its second row, it has the first; --resume measures only the second; no worker is left behind."""
    command = [
        *BENCH,
        "table5",
        "--rows",
        "8x2,16x2",
        "--fold",
        "18",
        "--rounds",
        "2",
        "--variants",
        "b",
    ]
    path = tmp_path / "table5.json"
    process = subprocess.Popen([*command, "--out", tmp_path], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 200
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        workers: list[int] = []
        while not workers and time.monotonic() < deadline:  # the second row's: the fork server's children
            workers = [pid for child in children(process.pid) for pid in children(child)]
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    first = json.loads(path.read_text())["rows"]
    assert [entry["batch"] for entry in first] == [8]
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert workers
    assert not any(map(alive, workers))
    rows = table5.parse_rows("8x2,16x2", ["fp32"], 2, 18)
    settings: dict[str, Any] = {"rounds": 2, "resume": True, "told": False, "folder": tmp_path}
    with pytest.raises(ConfigError, match="was measured with rounds = 2, now it is 3"):
        table5.run(rows, ["b"], **(settings | {"rounds": 3}))
    record = table5.run(rows, ["b"], **settings)
    assert record["rows"] == json.loads(path.read_text())["rows"]
    assert record["rows"][0] == first[0]
    assert [entry["batch"] for entry in record["rows"]] == [8, 16]
    assert all(entry["peak_memory_bytes"] > 2**20 for entry in record["rows"])
    assert table5.run(rows, ["b"], **settings)["rows"] == record["rows"]  # nothing is left to do
    entries = [{**entry, "batch": size} for entry in first for size in (32, 16, 8)]
    assert [table5._place(entry, rows) for entry in entries] == [2, 1, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "32"], "write batch x branches"),
        (["--rows", "33x2"], "33 samples do not divide over 2 workers"),
        (["--rows", "32x4:2x2x2"], "write batch x branches"),
        (["--fold", "4"], "does not divide the 18 blocks"),
        (["--fold", "18", "--variants", "b,f_shared"], "f_shared, which at --fold 18 is f's network"),
        (["--variants", "b,g"], "there are a, b, c, d, e, f, d_shared, f_shared"),
    ],
)
def test_wrong_input(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    from anabranch.runtime.cli import main

    assert main(["bench", "table5", *arguments, "--json"]) == 2
    out, err = capsys.readouterr()
    assert message in json.loads(out)["error"]
    assert message in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table5", "--rounds", "0"], "--rounds. Must be >= 1"),
        (["table5", "--steps", "1.5"], '"1.5" is not a whole number'),
        (["collectives", "--workers", "1"], "--workers. Must be >= 2"),  # there is no group: an empty record
        (["never-slower", "--rounds", "-1"], "--rounds. Must be >= 1"),
        (["random-faults", "--mean-gap-s", "0"], "--mean-gap-s. Must be > 0"),
        (["launches", "--fold", "4"], "--fold"),
        (["data-wait", "--steps", "9"], "--steps is 9: take at least 10"),
        (["save-stall", "--width", "2000"], "--width is 2000: give a multiple of 1,024"),
        (["faults", "--cells", "nothing"], "no cell is called nothing"),
    ],
)
def test_wrong_input_is_no_traceback(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from anabranch.runtime.cli import main

    assert main(["bench", *arguments]) == 2
    assert message in (said := capsys.readouterr().err)
    assert said.startswith("error: ")


def test_cases_run_by_the_command_line() -> None:
    """`python -m anabranch.benchmarks` ends as `anabranch bench` does."""
    command = [sys.executable, "-m", "anabranch.benchmarks", "faults", "--cells", "nothing"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: no cell is called nothing")


def test_every_whole_number_is_whole() -> None:
    """cyclopts itself would round it: the words are refused that it would take."""
    from anabranch.benchmarks.__main__ import app as cases
    from anabranch.runtime.cli import app

    num = 0
    for one in (app, cases):
        for name in {*one} - {"bench", "--help", "-h", "--version"}:
            for argument in one[name].assemble_argument_collection():
                if argument.hint is int:
                    num += 1
                    assert argument.parameter.converter, f"{name} {argument.name}"
    assert num > 50


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from anabranch.runtime.cli import main;"
        "assert main(['bench', '--help']) == 0 == main(['bench', 'table5', '--help']);"
        "heavy = {'torch', 'ray', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    for case in ("table5", "scaling", "collectives", "data-parallel"):
        assert case in done.stdout


def test_records_are_named_as_the_readme_says() -> None:
    assert not [path.name for path in RESULTS.glob("*") if "-" in path.name]


def test_the_mean_is_of_the_papers_rows() -> None:
    common = {"variant": "f", "precision": "fp32", "label": "measured"}
    entries = [
        {**common, "speed_up": 2.0, "row_mesh": "1x2"},
        {**common, "speed_up": 0.5, "row_mesh": "1x2"},
        {**common, "speed_up": 9.0, "row_mesh": "2x2"},
        {**common, "variant": "b", "speed_up": 1.0, "row_mesh": "1x2"},
    ]
    ((key, (mean, least, num)),) = table5_report.summary(entries).items()
    assert key == ("f", "fp32", "measured")
    assert (mean, least, num) == pytest.approx((1.0, 0.5, 2))


@pytest.mark.optin
def test_scaling_and_collectives(tmp_path: Path) -> None:
    """A minute: every count of workers is a process tree of its own."""
    record = scaling.run(
        depth=8, num_branches=2, batch_size=8, most=4, rounds=8, plan_budget_s=2, folder=tmp_path
    )
    labels = {(one["workers"], one["label"]) for one in record["rows"]}
    assert (1, "measured") in labels
    assert (4, "predicted") in labels or (4, "measured") in labels
    for one in record["rows"]:
        is_measured = one["label"] == "measured"
        assert ("samples_s" in one, "efficiency_interval_95" in one) == (is_measured, is_measured)
        assert math.isfinite(one["efficiency"])
        if is_measured:  # paired by round
            shared = one["workers"] if one["mode"] == "strong" else 1
            pairs = zip(one["alone_s"], one["samples_s"], strict=True)
            assert one["efficiency"] == pytest.approx(statistics.median(a / (shared * b) for a, b in pairs))
    record = collectives.run(rounds=2, sizes=(1024, 65536), folder=tmp_path)
    assert {one["collective"] for one in record["rows"]} == {*collectives._NAMES}
    assert {one["num_bytes"] for one in record["rows"]} == {1024, 65536}
    over = {one["collective"]: one["transport"] for one in record["summary"]}
    assert (over["all_reduce"], over["reduce_to_samples"]) == ("gloo", "shared memory")


@pytest.mark.optin
def test_parts_of_the_step(tmp_path: Path) -> None:
    """Tiny ones: what the records promise, and that a ratio is that of its own samples."""
    found = step_parts.fused(rounds=2, branches=2, batches=(2,), folder=tmp_path)
    assert [one["stage"] for one in found["rows"]] == [1, 2, 3]
    for one in found["rows"]:
        chosen = one["samples_s"].pop(one["chosen"])
        assert {one["chosen"], *one["samples_s"]} == {"fused", "mixed", "looped"}
        for way, samples in one["samples_s"].items():
            pairs = zip(chosen, samples, strict=True)
            assert one["chosen_over"][way] == pytest.approx(sum(a / b for a, b in pairs) / 2)
        assert one["chosen_over_best"] == max(1, *one["chosen_over"].values())
    assert found["worst_chosen_over_best"] == max(one["chosen_over_best"] for one in found["rows"])
    found = step_parts.exchange(rounds=2, depth=8, branches=2, batch=4, folder=tmp_path)
    assert {*found["samples_s"]} == {"step", "compute", "collectives"}
    assert {f"stage{stage}.block1" for stage in (1, 2, 3)} <= {*found["exposed_s_by_block"]}
    # float32 of 4 samples: each block's sum, and the gradient of what its branches read
    values = [(16, 32), (32, 16), (64, 8), (16, 32), (16, 32), (32, 16)]
    assert found["bytes"] == 4 * 4 * sum(channels * size**2 for channels, size in values)
    found = step_parts.recompute(rounds=2, depth=14, branches=2, batch=8, folder=tmp_path)
    assert found["peak_ratio"] < 1
    assert json.loads(Path(found["path"]).read_text())["samples_s"].keys() == {"kept", "again"}


@pytest.mark.optin
def test_data_parallel(tmp_path: Path) -> None:
    found = data_parallel.run(rounds=2, steps=1, batch_size=4, folder=tmp_path)
    pairs = zip(found["ours_s"], found["ddp_s"], strict=True)
    assert found["ratio_median"] == pytest.approx(sum(a / b for a, b in pairs) / 2)
    low, high = found["ratio_interval_95"]
    assert low <= found["ratio_median"] <= high
    assert {*json.loads(Path(found["path"]).read_text())} >= {"ddp_shared_s", "environment"}
