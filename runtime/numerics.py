"""What float32 means on a GPU.

TF32 rounds the factors of a product to 10 bits of mantissa and sums in float32. Left alone, cuDNN's convolutions use it
and matrix products do not: "fp32" would be neither. On CPUs both precisions are the same. Needs no torch to be read.
"""

from __future__ import annotations


def numerics(precision: str) -> dict[str, object]:
    """What `use_numerics` makes of a `train.precision`, for records."""
    tf32 = precision == "tf32"
    return {"precision": precision, "cuda_matmul_tf32": tf32, "cudnn_tf32": tf32}


def use_numerics(precision: str) -> None:
    """TF32 in this process for "tf32", and nowhere for any other `train.precision`."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
