"""Small talk between ranks: plain data of any length, and work that all do or none."""

from __future__ import annotations

from pathlib import Path

from agreement_ranks import LENGTHS, agree, talk, timeouts
from ranks import run_ranks


def test_messages_of_any_length_arrive() -> None:
    """Short ones travel in one exchange; one that is long takes all others into a second."""
    for world_size in (1, 3):
        ranks = run_ranks(world_size, talk)
        assert ranks == [ranks[0]] * world_size
        for length, told in zip(LENGTHS, ranks[0], strict=True):
            assert told == [{"rank": rank, "text": "é" * length * (rank > 0)} for rank in range(world_size)]


def test_who_fails_is_named_to_all() -> None:
    first, second = run_ranks(2, agree)
    assert first[:2] == second[:2] == [[0, 1], [{"rank": 0}, {"rank": 1}]]
    assert first[2].startswith("RuntimeError: cannot count files: rank 1 on ")
    assert first[2].endswith("ValueError: no such file " + "x" * 600)
    assert second[2] == "ValueError: no such file " + "x" * 600


def test_all_groups_wait_as_long_as_the_first_was_told(tmp_path: Path) -> None:
    both = [33.0, 33.0]
    expected = [both, both, both, both, both, [33.0]]  # the last is of one rank
    assert run_ranks(4, timeouts, str(tmp_path / "store")) == [expected] * 4
