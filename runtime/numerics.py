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


def is_exact(precision: str, wire: str) -> bool:
    """Whether a network trained in a `train.precision` over a `mesh.wire` shows, where it differs, another function.

    In fewer bits than float64's it may be another order of summation, by which a ReLU's gate turns out otherwise.
    """
    return precision == "fp64" and wire == "fp32"


def tolerance_of(precision: str, wire: str) -> float:
    """The relative difference, as `verify` measures it, that rounding makes at most: of one step where not exact.

    A gradient that counts twice is 1 off. Seen of Multi-ResNets of 8 to 110 layers and of small ones: in fp32 up to
    0.042, in bf16, computed with or sent, 0.04 to 0.52. In tf32 nothing was measured: it has 10 bits, bf16 has 8.
    """
    if is_exact(precision, wire):
        return 1e-9
    return 0.8 if precision in ("bf16", "tf32") or wire == "bf16" else 0.25


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
