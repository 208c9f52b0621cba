"""Writes the two analyses of shared filter bases (basis_analysis.py) beside a run:

RUN/basis/gradient_flow.jsonl                  a line each `basis_every_steps` steps: {"step", "bases": {name: {…}}}
RUN/basis/gradient_flow.png                    Figure 3, when the run ends
RUN/basis/coefficient_similarity.safetensors   |cosine| by basis, (n, n) float32, when the run ends; not where blocks
                                               share no elements
RUN/basis/coefficient_similarity.png           Figure 4, of the same
"""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

from torch import nn

from anabranch.runtime.basis_analysis import (
    GradientFlow,
    coefficient_similarity,
    plot_coefficient_similarity,
    plot_gradient_flow,
)
from anabranch.runtime.callbacks import Callback, whole_lines
from anabranch.runtime.durable import write_tensors
from anabranch.runtime.errors import ConfigError
from anabranch.runtime.parallel_network import ParallelNetwork
from anabranch.runtime.plain_json import plain_json

_FLOW = "gradient_flow.jsonl"


class BasisRecord(Callback):
    """Records during training and draws at its end; every rank makes one, rank 0 writes.

    folder: RUN/basis, made if need be. from_step: where the run goes on; lines of that step and later ones, which a
    killed run left, are dropped. Raises ConfigError as `check_recordable` does.
    """

    def __init__(
        self, network: ParallelNetwork, folder: Path, every_steps: int = 10, from_step: int = 0
    ) -> None:
        check_recordable(network)
        self.folder, self.writes = folder, network.mesh.rank == 0
        self.flow = GradientFlow(network, every_steps)
        if self.writes:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / _FLOW
            kept = [line for line in whole_lines(path) if json.loads(line)["step"] < from_step]
            path.write_text("".join(kept), encoding="utf-8")

    def on_gradients(self, step: int, network: ParallelNetwork) -> None:
        if not self.flow.on_gradients(step) or not self.writes:
            return
        newest = {name: samples.pop() for name, samples in self.flow.history.items()}
        bases = {name: {key: sample[key] for key in ("max", "mean")} for name, sample in newest.items()}
        with (self.folder / _FLOW).open("a", encoding="utf-8") as file:
            file.write(plain_json({"step": step, "bases": bases}) + "\n")

    def on_trained(self, network: ParallelNetwork) -> None:
        similarity = coefficient_similarity(network)
        if not self.writes:
            return
        if similarity:
            tensors = {name: matrix.float() for name, matrix in similarity.items()}
            write_tensors(self.folder / "coefficient_similarity.safetensors", tensors)
            plot_coefficient_similarity(similarity, self.folder / "coefficient_similarity.png")
        plot_gradient_flow({"": read_gradient_flow(self.folder.parent)}, self.folder / "gradient_flow.png")


def read_gradient_flow(run: Path) -> dict[str, list[dict[str, float]]]:
    """A run's record in the form of `GradientFlow.history`, for `plot_gradient_flow` of several runs side by side.

    Raises ConfigError for a run that recorded none.
    """
    path = run / "basis" / _FLOW
    if not path.is_file():
        raise ConfigError(f"{run} has no basis/{_FLOW}: train with --profile.basis-every-steps 10")
    history: dict[str, list[dict[str, float]]] = {}
    for line in map(json.loads, whole_lines(path)):
        for name, sample in line["bases"].items():
            read = {key: math.nan if number is None else number for key, number in sample.items()}
            history.setdefault(name, []).append({"step": line["step"], **read})
    return history


def check_recordable(network: nn.Module) -> None:
    """Raises ConfigError for a network without shared bases, and where matplotlib, which draws, is missing."""
    GradientFlow(network)
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "profile.basis_every_steps draws figures with matplotlib, which is not installed: "
            "pip install matplotlib, or set it to 0"
        )
