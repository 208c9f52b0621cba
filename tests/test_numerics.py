"""What float32 means on a GPU is said, and the same for convolutions and matrix products."""

from __future__ import annotations

import platform
from collections.abc import Iterator

import pytest
import torch

from anabranch.runtime.launch import alone
from anabranch.runtime.numerics import numerics, slowness
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


@pytest.mark.parametrize(
    ("capability", "precision", "device", "machine", "is_slow"),
    [
        ("AVX2", "bf16", "cpu", "x86_64", True),
        ("AVX2", "fp32", "cpu", "x86_64", False),
        ("AVX512", "bf16", "cpu", "x86_64", False),
        ("AVX2", "bf16", "cuda", "x86_64", False),
        ("DEFAULT", "bf16", "cpu", "aarch64", False),  # not known
    ],
)
def test_bf16_on_a_cpu_without_it_is_told(
    capability: str, precision: str, device: str, machine: str, is_slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    text = slowness(precision, device)
    assert (capability in text and "fp32" in text) if is_slow else text == ""
