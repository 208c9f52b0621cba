"""Small talk between ranks: plain data of any length, and work that all do or none."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from agreement_ranks import LENGTHS, agree, leaves, talk, timeouts, trains
from ranks import run_ranks

from anabranch.cluster.failures import failed_in_collective
from anabranch.runtime.agreement import ElsewhereError
from anabranch.runtime.errors import UnreadableError
from anabranch.runtime.manifest import Manifest
from anabranch.runtime.storage import StorageError, UrlFolder


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
    assert first[2].startswith("ElsewhereError: cannot count files: rank 1 on ")
    assert first[2].endswith("ValueError: no such file " + "x" * 600)
    assert second[2] == "ValueError: no such file " + "x" * 600


def test_all_groups_wait_as_long_as_the_first_was_told(tmp_path: Path) -> None:
    both = [33.0, 33.0]
    expected = [both, both, both, both, both, [33.0]]  # the last is of one rank
    assert run_ranks(4, timeouts, str(tmp_path / "store")) == [expected] * 4


def test_groups_that_nobody_needs_any_more_are_left(tmp_path: Path) -> None:
    """Of three meshes of four ranks: all, two along the mesh that is kept, and two groups of one rank."""
    of_all, of_two = [4, 4, 1], [4, 2, 2]
    expected = [of_all, of_two, [4, 1, 4], [5, 3], True, [3, 3], of_two, of_all]
    assert run_ranks(4, leaves) == [expected] * 4
    assert run_ranks(2, trains, str(tmp_path)) == [2, 2]


def test_a_store_that_refuses_a_connection_is_no_lost_rank() -> None:
    """Its text is a lost peer's, and no group is to be formed again for it."""
    refused = StorageError("ClientConnectorError: Connection refused")
    assert failed_in_collective(ConnectionError(str(refused)))
    assert not failed_in_collective(refused)
    assert not failed_in_collective(UnreadableError(str(refused)))
    assert not failed_in_collective(ElsewhereError(f"cannot write: rank 1 on host: {refused}"))
    for error in (refused, UnreadableError(str(refused))):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again)) == (type(error), str(error))

    class Refuses:
        def cat_file(self, path: str) -> bytes:
            raise ConnectionRefusedError(111, "Connection refused")

    folder = UrlFolder("memory://bucket")
    folder._fs = Refuses()
    with pytest.raises(StorageError, match=r"ConnectionRefusedError: .*Connection refused"):
        folder.read("manifest.json")
    with pytest.raises(UnreadableError, match="cannot be read now"):
        Manifest.read(folder)
