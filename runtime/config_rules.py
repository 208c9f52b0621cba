"""What the values of a configuration must satisfy beyond their types."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING

from anabranch.runtime.redact import redacted
from anabranch.runtime.schema import FieldError, suggest

if TYPE_CHECKING:
    from anabranch.runtime.config import Config

TRACKERS = ("tensorboard", "wandb", "mlflow")
IMAGE_FOLDERS = ("imagenet", "places365", "image_folder")
DATASETS = ("digits", "cifar10", "cifar100", *IMAGE_FOLDERS, "synthetic")

RANGES: dict[str, str] = {
    "data.crop_padding": "[0, inf)",
    "data.eval_crops": "[1, 10]",
    "data.affine_degrees": "[0, 180]",
    "data.affine_scale": "[0, inf)",
    "data.affine_shear": "[0, inf)",
    "data.loader_workers": "[0, inf)",
    "optimizer.lr": "(0, inf)",
    "optimizer.momentum": "[0, 1)",
    "optimizer.weight_decay": "[0, inf)",
    "optimizer.betas": "[0, 1)",
    "optimizer.eps": "(0, inf)",
    "optimizer.clip_norm": "[0, inf)",
    "lr_schedule.milestones": "[1, inf)",
    "lr_schedule.factor": "(0, inf)",
    "lr_schedule.patience": "[1, inf)",
    "lr_schedule.min_factor": "[0, 1]",
    "lr_schedule.warmup_epochs": "[0, inf)",
    "lr_schedule.final_factor": "[0, 1]",
    "train.epochs": "[1, inf)",
    "train.max_steps": "[0, inf)",
    "train.batch_size": "[1, inf)",
    "train.bn_batch_size": "[0, inf)",
    "train.accumulation": "[1, inf)",
    "train.seed": "[0, inf)",
    "train.label_smoothing": "[0, 1)",
    "train.orthogonality": "[0, inf)",
    "train.eval_every_epochs": "[0, inf)",
    "train.eval_batch_size": "[1, inf)",
    "mesh.num_workers": "[0, inf)",
    "mesh.plan_budget_s": "(0, inf)",
    "mesh.memory_gb": "[0, inf)",
    "checkpoint.every_epochs": "[0, inf)",
    "checkpoint.num_to_keep": "[1, inf)",
    "mesh.chunks": "[0, inf)",
    "launch.port": "[0, 65535]",
    "launch.cpus_per_worker": "(0, inf)",
    "launch.timeout_s": "(0, inf)",
    "launch.max_failures": "[0, inf)",
    "launch.spares": "[0, inf)",
    "launch.min_replicas": "[0, inf)",
    "launch.hang_s": "(0, inf)",
    "profile.metrics_every_steps": "[1, inf)",
    "profile.basis_every_steps": "[0, inf)",
    "gross.sizes": "[1, inf)",
    "gross.temperature": "[0, inf)",
    "gross.validation_fraction": "(0, 1)",
    "gross.reconstruct_epochs": "[1, inf)",
    "gross.reconstruct_lr": "(0, inf)",
    "gross.reconstruct_milestones": "[1, inf)",
    "gross.tune_epochs": "[1, inf)",
    "gross.tune_lr": "(0, inf)",
    "gross.tune_milestones": "[1, inf)",
    "gross.fixed_reconstruct_lr": "(0, inf)",
    "gross.fixed_tune_epochs": "[1, inf)",
    "gross.fixed_tune_lr": "(0, inf)",
    "gross.fixed_tune_milestones": "[1, inf)",
    "gross.baselines": "[1, inf)",
    "gross.max_macs": "[0, inf)",
    "gross.winners": "[1, inf)",
    "gross.repeats": "[1, inf)",
}
"""Numeric field → the interval its values lie in, in the usual notation."""


def check_rules(config: Config) -> None:
    """Raise FieldError for the first value out of its range or at odds with another; the message names the keys."""
    for key, interval in RANGES.items():
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        for number in value if isinstance(value, tuple) else (value,):
            if not _inside(number, interval):
                raise FieldError(f"{key} is {number}: it must lie in {interval}", key)
    for key, message in _broken(config):
        raise FieldError(f"{key} {message}", key)


def _inside(number: float, interval: str) -> bool:
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    above = number >= low if interval[0] == "[" else number > low
    return above and (number <= high if interval[-1] == "]" else number < high)


def _broken(config: Config) -> Iterator[tuple[str, str]]:
    """Every broken rule between fields: the key and what to say of it."""
    data, optimizer, schedule = config.data, config.optimizer, config.lr_schedule
    train, mesh = config.train, config.mesh
    for name in ("bn_batch_size", "accumulation"):
        if (value := getattr(train, name)) > train.batch_size:
            yield (
                f"train.{name}",
                f"is {value}, more than train.batch_size, {train.batch_size}: make it at most that",
            )
    if schedule.name == "step" and not schedule.milestones:
        yield (
            "lr_schedule.milestones",
            "is empty, and lr_schedule.name is step: give epochs, or take constant",
        )
    if list(schedule.milestones) != sorted(set(schedule.milestones)):
        yield "lr_schedule.milestones", f"is {list(schedule.milestones)}: the epochs must ascend"
    if optimizer.name == "sgd" and optimizer.nesterov and optimizer.momentum == 0:
        yield (
            "optimizer.nesterov",
            "is true, and optimizer.momentum is 0: give a momentum, or set nesterov to false",
        )
    if data.eval_crops not in (1, 10):
        yield "data.eval_crops", f"is {data.eval_crops}: it must be 1 or 10"
    if data.augment.startswith("area_crop") and data.name not in IMAGE_FOLDERS:
        folders = ", ".join(IMAGE_FOLDERS)
        remedy = "take another, or let a dataset of your own crop its images"
        yield "data.augment", f"is {data.augment}, which is for {folders}, not {data.name}: {remedy}"
    if mesh.replan and mesh.plan != "auto" and not is_plan_file(mesh.plan):
        yield "mesh.replan", f"is true, and mesh.plan is {mesh.plan}: only an automatic plan is made anew"
    for tracker in config.profile.trackers:
        if tracker not in TRACKERS:
            known = ", ".join(TRACKERS)
            yield "profile.trackers", f"has {tracker}: it must be of {known}{suggest(tracker, TRACKERS)}"
        elif find_spec(tracker) is None:
            yield (
                "profile.trackers",
                f"has {tracker}, which is not installed: pip install 'anabranch[{tracker}]'",
            )
    if problem := _url_problem(url := config.checkpoint.url):
        yield "checkpoint.url", f"is {redacted(url)}{problem}"
    if schedule.name == "plateau" and not train.eval_every_epochs:
        yield "lr_schedule.name", "is plateau, and train.eval_every_epochs is 0: it needs tests to follow"
    if ":" not in data.name and data.name not in DATASETS:
        known = f'{", ".join(DATASETS)}, or your own "package.module:make_dataset"'
        yield "data.name", f'is "{data.name}": it must be {known}{suggest(data.name, DATASETS)}'
    if ":" not in train.loss and train.loss != "cross_entropy":
        yield "train.loss", f'is "{train.loss}": it must be cross_entropy, or your own "package.module:fn"'
    if mesh.shape:
        axes = mesh_axes(mesh.shape)
        if axes is None:
            yield "mesh.shape", f'is "{mesh.shape}": it must be data x branch, as in "2x2"'
        elif mesh.num_workers not in (0, math.prod(axes)):
            yield (
                "mesh.shape",
                f"{mesh.shape} has {math.prod(axes)} workers, mesh.num_workers is {mesh.num_workers}: make them equal",
            )
    if config.launch.min_replicas and not config.launch.max_failures:
        yield (
            "launch.min_replicas",
            f"is {config.launch.min_replicas}, and launch.max_failures is 0: with it the first loss ends the run",
        )
    if "://" in config.launch.run_dir:
        yield (
            "launch.run_dir",
            f"is {redacted(config.launch.run_dir)}: it must be a folder; give the URL as checkpoint.url",
        )
    num_ranks = max(mesh.num_workers, math.prod(mesh_axes(mesh.shape) or (0,)))
    if config.launch.launcher == "none" and num_ranks > 1:
        yield (
            "launch.launcher",
            f"is none, which runs one worker, and [mesh] asks for {num_ranks}: take ray, or one worker",
        )


def _url_problem(url: str) -> str:
    """What is wrong with a URL of checkpoints; empty if nothing."""
    if not url:
        return ""
    if redacted(url) != url:
        return ", which holds a secret: it would be written to files; give credentials by the environment"
    protocol, found, _ = url.partition("://")
    if not found:
        return ': it must have a protocol, as in "s3://bucket/run"; for a folder use launch.run_dir'
    from fsspec import get_filesystem_class  # type: ignore[import-untyped]

    try:
        get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:
        return f": {error}"
    return ""


def is_plan_file(plan: str) -> bool:
    """Whether `mesh.plan` names a file: it ends in .toml or has a "/"; all else is a scheduler's name, or auto."""
    return plan.endswith(".toml") or "/" in plan


def mesh_axes(shape: str) -> tuple[int, int] | None:
    """Data and branch of a mesh shape: "2x4" → (2, 4); None for anything else, the empty string too."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", shape)
    return (int(match[1]), int(match[2])) if match else None
