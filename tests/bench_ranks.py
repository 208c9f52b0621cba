"""What tests of benchmarks run on every rank."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from anabranch.benchmarks.table5_row import measure_row
from anabranch.benchmarks.table5_sides import Row
from anabranch.runtime import audit


def row(rank: int, world_size: int, variants: list[str]) -> dict[str, dict[str, Any]]:
    """A row of Table V, two rounds, plans timed in as few as there may be; told: nothing."""
    with mock.patch.object(audit, "time_plans", partial(audit.time_plans, rounds=8)):
        return measure_row(rank, Row(8, 2, fold=18), variants, 2, 1, 1.0, 0.0, False)


def row_alone(rank: int, world_size: int, variants: list[str]) -> list[dict[str, dict[str, Any]]]:
    """A row of two ranks, one after the other in this process, on a wire on which nothing travels."""
    dist.destroy_process_group()
    found = []
    for virtual in (0, 1):
        dist.init_process_group("fake", store=FakeStore(), rank=virtual, world_size=2)
        torch.manual_seed(1)
        found.append(
            measure_row(virtual, Row(8, 2, fold=18, whole_groups=True), variants, 2, 1, 1.0, 0.0, False)
        )
        dist.destroy_process_group()
    return found
