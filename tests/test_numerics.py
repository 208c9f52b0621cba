"""What float32 means on a GPU is said, and the same for convolutions and matrix products."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from anabranch.runtime.launch import alone
from anabranch.runtime.numerics import numerics
from anabranch.runtime.process_group import process_group


@pytest.fixture(autouse=True)
def flags() -> Iterator[None]:
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = cuda.allow_tf32, cudnn.allow_tf32
    yield
    cuda.allow_tf32, cudnn.allow_tf32 = before


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp64"])
def test_a_workers_flags_are_those_of_the_precision(precision: str) -> None:
    """cuDNN's own default, TF32, is switched off for fp32, in a group that stands already too; records say the same."""
    threads = torch.get_num_threads()
    try:
        with process_group(alone(), precision="fp64" if precision == "tf32" else "tf32"):
            for _ in range(2):
                with process_group(alone(), precision=precision):
                    told = numerics(precision)
                    assert told["precision"] == precision
                    assert torch.backends.cuda.matmul.allow_tf32 is told["cuda_matmul_tf32"]
                    assert torch.backends.cudnn.allow_tf32 is told["cudnn_tf32"]
                    assert told["cudnn_tf32"] == (precision == "tf32")
    finally:
        torch.set_num_threads(threads)
