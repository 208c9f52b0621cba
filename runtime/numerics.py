"""What float32 means on a GPU, and where bf16 is no help.

TF32 rounds the factors of a product to 10 bits of mantissa and sums in float32. Left alone, cuDNN's convolutions use it
and matrix products do not: "fp32" would be neither. On CPUs both precisions are the same. Needs no torch to be read.
"""

from __future__ import annotations

import platform


def numerics(precision: str) -> dict[str, object]:
    """What `use_numerics` makes of a `train.precision`, for records."""
    tf32 = precision == "tf32"
    return {"precision": precision, "cuda_matmul_tf32": tf32, "cudnn_tf32": tf32}


def use_numerics(precision: str) -> None:
    """TF32 in this process for "tf32", and nowhere for any other `train.precision`."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"


def few_bits(precision: str, wire: str) -> bool:
    """Whether `verify` compares loosely in a `train.precision` over a `mesh.wire`: 8 or 10 bits lose what cancels.

    For tf32 nothing was measured: it is taken for bf16, which has fewer bits.
    """
    return precision in ("bf16", "tf32") or wire == "bf16"


def slowness(precision: str, device_type: str) -> str:
    """Why a `train.precision` is slow on this machine, "" where nothing is known of it."""
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    if precision != "bf16" or device_type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return ""
    if capability.startswith("AVX512"):
        return ""
    return (
        f'this CPU ({capability}) computes bf16 several times slower than fp32: set train.precision to "fp32"'
    )
