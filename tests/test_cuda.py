"""Parity on one GPU: `pytest -m optin tests/test_cuda.py`. Several ranks share it, for correctness, never for times."""

from __future__ import annotations

import pytest
import torch
from parity_cases import Case, S, parity
from ranks import run_ranks

EVERYTHING = {
    "execution": "auto", "memory_format": "channels_last", "overlap": "on", "recompute": True, "chunks": 2,
}  # fmt: skip
ALONE = [
    Case("basic", (1, 1), (S,)),
    Case("bottleneck", (1, 1), (S,), trial=EVERYTHING),
    Case("unequal", (1, 1), (S,), trial={"accumulation": 2}),
]
TOGETHER = [
    Case("basic", (1, 2), ((3, 2),), "rr"),
    Case("basic4", (1, 2), ((4, 0), S, (1, 3), (2, 2)), "ss", trial={"execution": "mixed"}),
    Case("basic4", (2, 1), (S,), trial={"bn_batch_size": 16}),
    Case("shared", (1, 2), ((2, 1), S, (0, 3), (1, 2)), "rs", trial=EVERYTHING),
    Case("bottleneck", (1, 2), ((2, 1), S, (0, 3), (1, 2)), "rr", trial=EVERYTHING),
    Case("unequal", (1, 2), ((2, 1), (1, 1), (1, 1)), "sr", trial={"bn_batch_size": 16}),
    Case("basic", (2, 2), ((3, 2), S, (5, 0), (2, 3)), "ss"),
]

pytestmark = [
    pytest.mark.optin,
    pytest.mark.timeout(900),  # each rank compiles a GPU's kernels once
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
@pytest.mark.parametrize("cases", [ALONE, *([case] for case in TOGETHER)], ids=lambda cases: cases[0].id)
def test_parity_on_a_gpu(cases: list[Case], backend: str) -> None:
    (first, *others) = run_ranks(cases[0].world_size, parity, cases, "cuda", timeout_s=600, backend=backend)
    assert all(reports == first for reports in others), "all ranks get the same report"
    for case, report in zip(cases, first, strict=True):
        assert report.max_relative_difference <= case.bound, (case.id, report)
