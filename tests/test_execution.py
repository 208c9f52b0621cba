"""Fused or looped, and the memory format: measured once a machine, the same on all ranks, recorded."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from pathlib import Path
from shutil import rmtree

import pytest
import torch
from execution_ranks import chosen, chosen_chunks, on_hosts
from ranks import run_ranks
from torch import Tensor, nn

from anabranch.blocks.branch_sum import branch_sums
from anabranch.blocks.multi_residual import MultiResidual
from anabranch.runtime import execution
from anabranch.runtime.config import MeshConfig
from anabranch.runtime.execution import HowToRun


def test_the_faster_way_is_chosen_and_kept(tmp_path: Path) -> None:
    ranks = run_ranks(2, chosen, str(tmp_path))
    for key in ("first", "again", "ran", "third", "told"):
        assert ranks[0][key] == ranks[1][key], key
    one = ranks[0]
    # block 0: a branch each, nothing to fuse; block 1: rank 0 holds both, whose fused form sleeps
    assert one["first"]["execution"]["0"] == "fused"
    assert one["first"]["execution"]["1"] == one["ran"]["blocks.1"] == "looped"
    assert one["first"]["memory_format"] == "contiguous"  # written by a user
    assert one["calls"][0] >= 4
    assert one["progress"] == [(done, one["calls"][0]) for done in range(one["calls"][0])]
    assert one["calls"][1] == one["calls"][0], "what was measured is kept"
    assert one["again"] == one["first"]
    assert not one["moved"], "measuring leaves the network as it was"
    assert set(one["told"]["execution"].values()) == {"looped"}
    assert one["channels_last"]
    kept = {
        len(json.loads(next(folder.iterdir()).read_text())): folder
        for folder in (tmp_path / "anabranch").iterdir()
    }
    assert set(kept) == {3, 6}, "the user's network is timed in its own memory format only"
    damaged = next(iter(sorted(kept[3].iterdir())))
    damaged.write_text("[1.0, ")
    assert run_ranks(2, chosen, str(tmp_path))[0]["first"] == one["first"], "a torn file is measured again"
    assert damaged.read_text().endswith("]")


def test_a_repeated_run_runs_alike_on_hosts_without_a_common_home(tmp_path: Path) -> None:
    kinds = ["one", "one"]

    def run(code: str, seconds: list[float]) -> list[list[object]]:
        return run_ranks(2, on_hosts, str(tmp_path), kinds, code, seconds)

    assert run("new", [0.5, 0.7]) == [["fused", True, [0.6]]] * 2, "the mean, on both hosts"
    assert run("new", [3.0, 3.0]) == [["fused", False, [0.6]]] * 2
    rmtree(tmp_path / "1")
    again = run("new", [3.0, 3.0])
    assert again == [["fused", False, [0.6]], ["fused", True, [0.6]]], (
        "a host that lost them takes the other's"
    )
    assert run("newer", [3.0, 3.0]) == [["looped", True, [0.6, 3.0]]] * 2, (
        "figures of other code decide nothing"
    )


def test_figures_of_two_kinds_of_devices_are_kept_apart(tmp_path: Path) -> None:
    """Both count where both run the block, and each alone decides for a run on its own kind."""
    run = partial(run_ranks, 2, on_hosts, str(tmp_path))
    assert run(["slow", "fast"], "", [5.0, 0.5]) == [["looped", True, [0.5, 5.0]]] * 2
    assert run(["fast", "fast"], "", [9.0, 9.0]) == [["fused", False, [0.5, 5.0]]] * 2


def test_chunks_that_are_clearly_faster_are_chosen(tmp_path: Path) -> None:
    ranks = run_ranks(2, chosen_chunks, str(tmp_path))
    assert ranks[0] == ranks[1]
    # 8 samples: 16 ms of compute and 16 ms of link, or of compute and 20 ms a message
    assert ranks[0]["wide"] in (2, 4)
    assert ranks[0]["late"] == 1
    assert ranks[0]["told"] == 3


def test_a_form_that_is_clearly_slower_is_not_timed_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = {("fused", False): 0.10, ("looped", False): 0.11, ("fused", True): 0.14, ("looped", True): 0.12}
    runs: Counter[tuple[str, bool]] = Counter()

    def run(side: nn.Module, x: Tensor, precision: str) -> float:
        (one,) = (each for _, each in branch_sums(side))
        way = one.execution, next(side.parameters()).is_contiguous(memory_format=torch.channels_last)
        runs[way] += len(x) > 2  # two samples: to set the kernels up
        return taken[way]

    monkeypatch.setattr(execution, "run", run)
    block = MultiResidual([nn.Conv2d(3, 3, 3, padding=1) for _ in range(2)])
    formats: list[execution.MemoryFormat] = ["contiguous", "channels_last"]
    ways = [(form, layout) for layout in formats for form in execution._FORMS]
    found = dict(zip(ways, execution._timed(block, torch.randn(8, 3, 4, 4), "fp32", ways), strict=True))
    for layout in ("contiguous", "channels_last"):
        for way in ("fused", "looped"):
            assert found[way, layout] == taken[way, layout == "channels_last"]
        assert found["mixed", layout] == found["fused", layout], "it has no grouped convolutions"
    assert runs == {("fused", False): 10, ("looped", False): 10, ("fused", True): 3, ("looped", True): 10}


def test_what_a_run_that_goes_on_keeps_is_told_where_it_is_not_what_was_asked() -> None:
    how = HowToRun({"0": "looped", "1": "fused"}, "channels_last", wire="bf16", overlap=True, chunks=2)
    assert how.differs_from(MeshConfig(wire="bf16", chunks=0)) == []
    assert how.differs_from(MeshConfig(wire="bf16", chunks=2, overlap="on", execution="looped")) == [
        "execution"
    ]
    asked = MeshConfig(execution="mixed", memory_format="contiguous", overlap="off", recompute=True)
    assert {*how.differs_from(asked)} == {
        "wire",
        "recompute",
        "chunks",
        "memory_format",
        "overlap",
        "execution",
    }


def test_json() -> None:
    how = HowToRun({"stem": "fused", "0": "looped"}, "channels_last")
    assert HowToRun.from_dict(how.to_dict()) == how
