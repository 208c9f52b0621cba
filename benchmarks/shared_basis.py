"""What the orthogonality regularizer does to shared filter bases: ‖B·Bᵀ − I‖ after training with and without it.

A ResNet-20 with 16 shared and 1 own element a convolution and two bases a stage, on the digits, from the same
parameters and in the same order of samples with λ = 0 and λ = 10 (mean normalisation). B has a stage's shared and own
elements as rows, as the penalty sees them. One process: the plan does not change what is computed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from anabranch.benchmarks.record import write_record
from anabranch.cluster import WorkerContext
from anabranch.runtime.assemble import make_data, make_network
from anabranch.runtime.callbacks import Callback
from anabranch.runtime.config import Config
from anabranch.runtime.parallel_network import ParallelNetwork
from anabranch.runtime.regularizer import OrthogonalityPenalty
from anabranch.runtime.trainer import Trainer

_MODEL: dict[str, Any] = {"name": "c10_resnet32_s16u1x2", "options": {"depth": 20}}
_WEIGHT = 10.0


def run(*, epochs: int = 20, seeds: int = 3, threads: int = 1, folder: Path | None = None) -> dict[str, Any]:
    """Trains both sides with each seed and writes the record: by seed the ratio without ÷ with, of the root of
    Σ_g ‖B_g·B_gᵀ − I‖²; and test accuracies."""
    runs = [_train(seed, weight, epochs, threads) for seed in range(seeds) for weight in (0.0, _WEIGHT)]
    pairs = list(zip(runs[::2], runs[1::2], strict=True))
    ratios = [without["distance"] / with_["distance"] for without, with_ in pairs]
    record = {
        "model": _MODEL,
        "epochs": epochs,
        "runs": runs,
        "ratio_by_seed": ratios,
        "least_ratio": min(ratios),
        "accuracy_difference_by_seed": [w["test_accuracy"] - o["test_accuracy"] for o, w in pairs],
    }
    path = write_record("shared_basis", record, folder) if folder else write_record("shared_basis", record)
    return {**record, "path": str(path)}


class _Distances(Callback):
    """‖B_g·B_gᵀ − I‖² of the trained network by basis: the penalty itself, of one basis at a time."""

    by_basis: dict[str, float]

    def on_trained(self, network: ParallelNetwork) -> None:
        penalty = OrthogonalityPenalty(1.0, "sum")
        tensors = dict(network.named_parameters(remove_duplicate=False))
        self.by_basis = {g.name: float(penalty.value([g], tensors).detach()) for g in penalty.groups(network)}


def _train(seed: int, weight: float, epochs: int, threads: int) -> dict[str, Any]:
    config = Config.from_dict(
        {
            "model": _MODEL,
            "data": {"name": "digits", "augment": "crop", "crop_padding": 1},
            "train": {"epochs": epochs, "seed": seed, "orthogonality": weight, "eval_every_epochs": 0},
        }
    )
    data, distances = make_data(config), _Distances()
    context = WorkerContext(0, 1, 0, "localhost", "cpu", threads, "", "gloo")
    result = Trainer(make_network(config, data), data, config, context=context, callbacks=[distances]).fit()
    squares = distances.by_basis
    return {
        "seed": seed,
        "orthogonality": weight,
        "distance": sum(squares.values()) ** 0.5,
        "distance_by_basis": {name: square**0.5 for name, square in squares.items()},
        "test_accuracy": result["test_accuracy"],
        "train_seconds": result["train_seconds"],
    }
