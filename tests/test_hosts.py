"""Two hosts of network namespaces: the doctor, faults of the network, the profile and where its ranks are."""

from __future__ import annotations

from pathlib import Path

import pytest

from anabranch.benchmarks import hosts
from anabranch.benchmarks.two_hosts import why_not


@pytest.mark.optin
@pytest.mark.skipif(bool(why_not()), reason=why_not())
@pytest.mark.timeout(600)
def test_two_hosts(tmp_path: Path) -> None:
    """Every fault of the network is named; a slow wire is transfer, and not waiting for a rank."""
    record = hosts.run(folder=tmp_path)
    assert all(record["doctor"]["passed"]), record["doctor"]["checks"]
    for fault in record["faults"]:
        assert fault["named"], fault
        assert fault["seconds"] < 60, fault
    fast, slow = record["profiles"]
    assert [rank["host"] for rank in slow["ranks"]] == ["10.77.7.1", "10.77.7.2"]
    assert slow["transfer_s"] > 2 * fast["transfer_s"]
    assert slow["transfer_s"] > 4 * max(slow["wait_s"])
    assert record["verify_without_shared_folder"]["code"] == 0
