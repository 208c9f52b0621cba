"""Fused or looped, and the memory format: measured once a machine, the same on all ranks, recorded."""

from __future__ import annotations

from pathlib import Path

from execution_ranks import chosen, chosen_chunks
from ranks import run_ranks

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
    assert one["calls"][1] == one["calls"][0], "what was measured is kept"
    assert one["again"] == one["first"]
    assert not one["moved"], "measuring leaves the network as it was"
    assert set(one["told"]["execution"].values()) == {"looped"}
    assert one["channels_last"]
    (folder,) = (tmp_path / "anabranch").iterdir()
    damaged = next(iter(sorted(folder.iterdir())))
    damaged.write_text("[1.0, ")
    assert run_ranks(2, chosen, str(tmp_path))[0]["first"] == one["first"], "a torn file is measured again"
    assert damaged.read_text().endswith("]")


def test_chunks_that_are_clearly_faster_are_chosen(tmp_path: Path) -> None:
    ranks = run_ranks(2, chosen_chunks, str(tmp_path))
    assert ranks[0] == ranks[1]
    # 8 samples: 16 ms of compute and 16 ms of link, or of compute and 20 ms a message
    assert ranks[0]["wide"] in (2, 4)
    assert ranks[0]["late"] == 1
    assert ranks[0]["told"] == 3


def test_json() -> None:
    how = HowToRun({"stem": "fused", "0": "looped"}, "channels_last")
    assert HowToRun.from_dict(how.to_dict()) == how
