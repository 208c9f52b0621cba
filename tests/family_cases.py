"""A tiny network of every family, and its training as a launcher does it; importable by the ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from anabranch.blocks.convert import prepare
from anabranch.cluster import WorkerContext
from anabranch.runtime.assemble import local_cluster, make_data, make_network, make_plan
from anabranch.runtime.config import Config
from anabranch.runtime.job import Job
from anabranch.runtime.model_spec import spec_of
from anabranch.runtime.run_folder import RunFolder

_PATHS: dict[str, Any] = {"stem": "cifar", "channels": 8, "cardinality": 4, "base_width": 2}
_R50: dict[str, Any] = {"depth": 50, "blocks_per_stage": [3, 1, 1, 1]}
_BOTH = ["basis", "coefficients"]

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "multi_resnet": ("multi_resnet", {"depth": 8, "num_branches": 3}),
    "pre_resnet": ("pre_resnet", {"depth": 11, "block": "bottleneck"}),
    "resnext": ("resnext", {**_PATHS, "cardinality": 5, "blocks_per_stage": [2, 1]}),
    "resnext (a)": ("resnext", {**_PATHS, "form": "a", "blocks_per_stage": [1, 1]}),
    "resnet50": (
        "resnet50", {"stem": "cifar", "channels": 8, "base_width": 4, "num_slices": 2, "blocks_per_stage": [1, 1]}
    ),
    "preact_resnext": ("preact_resnext", {**_PATHS, "blocks_per_stage": [1, 1]}),
    "cru_net": (
        "cru_net", {**_PATHS, "blocks_per_stage": [1, 4], "cru_widths": [0, 12], "units_per_group": 2}
    ),
    "resnet": ("resnet", {"stem": "cifar", "width": 4, **_R50}),
    "cifar_resnet": ("cifar_resnet", {"depth": 8, "width": 4}),
    "densenet": ("densenet", {"growth": 4, "blocks_per_stage": [2, 1]}),
    "mobilenet_v2": ("mobilenet_v2", {"width": 0.125, "blocks_per_stage": [1, 1, 1, 1, 1, 1, 1]}),
    "shared_basis": (
        "c10_resnet32_s16u1x2", {"depth": 14, "width": 4, "shared": 4}
    ),
    "shared bottlenecks": (
        "shared_basis", {"base": "c100_resnet34", "width": 4, "tied": _BOTH, "bundled": True, **_R50}
    ),
    "shared resnext": (
        "c100_resnext50_s64u4", {"width": 16, "shared": 32, "bundled": True, **_R50}
    ),
    "shared densenet": ("shared_basis", {"base": "densenet", "shared": 4, "own": 1, "blocks_per_stage": [2, 1]}),
    "gross_net": ("gross_net", {"channels": [4, 8, 8], "width": 8, "image_size": 8}),
}  # fmt: skip

RECORDED = (
    "shared_basis",
    "shared bottlenecks",
)  # one with two bases a stage, one with two kinds of tied layers
STEPS, SAVED_AFTER = 4, 2


def case_config(case: str, run_dir: Path) -> Config:
    """Four steps in float64 on made-up images, a checkpoint each second; shared bases with the regularizer on."""
    name, options = CASES[case]
    return Config.from_dict(
        {
            "model": {"name": name, "options": options},
            "data": {
                "name": "synthetic", "options": {"num_samples": 40, "num_classes": 5, "image_size": 8, "in_channels": 2}
            },
            "optimizer": {"lr": 0.02},
            "lr_schedule": {"name": "constant", "warmup_epochs": 0.0},
            "train": {
                "epochs": 1, "max_steps": STEPS, "batch_size": 8, "bn_batch_size": 4, "precision": "fp64",
                "orthogonality": 10.0 if "shared" in case else 0.0,
            },
            "checkpoint": {"every_epochs": 0.4},
            "launch": {"run_dir": str(run_dir)},
            "mesh": {"execution": "fused", "memory_format": "contiguous"},  # measuring takes longer than the steps
            "profile": {"basis_every_steps": 1 if case in RECORDED else 0},
        }
    )  # fmt: skip


def train(
    rank: int, world_size: int, runs: Mapping[str, tuple[Config, str]], mesh: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """Each run, from its checkpoint unless that is ""; what the worker returns."""
    results = {}
    for case, (config, checkpoint) in runs.items():
        data = make_data(config)
        network = prepare(make_network(config, data))
        config = Config.from_dict(
            config.to_dict(), {"mesh": {"shape": "x".join(map(str, mesh)), "num_workers": 0}}
        )
        plan = make_plan(config, spec_of(network), local_cluster(world_size, "localhost"))
        if rank == 0:
            RunFolder.create(config, plan, filled_in=True)
        job = Job("train", config, plan, config.launch.run_dir, checkpoint, str(Path.cwd()))
        results[case] = job(WorkerContext(rank, world_size, rank, "localhost", "cpu", 1, "", "gloo"))
    return results
