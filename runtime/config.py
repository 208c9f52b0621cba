"""The configuration: one frozen dataclass per TOML section, and `Config`, which holds them all.

The text under a field is its only documentation: `anabranch train --help` prints it, with the default that stands
above it. Units are in it; "0:" or "empty:" says what the value that means "choose for me" does. A value's type is
checked when the configuration is read (`from_dict`), its range and its fit to the others by `Config.check`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_type_hints

from anabranch.runtime.config_rules import check_rules
from anabranch.runtime.gross_config import GrossConfig
from anabranch.runtime.redact import redacted
from anabranch.runtime.schema import check_keys, typed


@dataclass(frozen=True)
class ModelConfig:
    """`[model]`: the network."""

    name: str = "multi_resnet"
    """A family (multi_resnet), a ready name (`anabranch models`), or your own factory "package.module:MyNet"."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the family or factory, e.g. `--model.options.depth 20`. A family's in_channels and
    num_classes come from the data unless given here; your own factory gets what is given. A source that gives
    model.name starts without the options of those below it."""


@dataclass(frozen=True)
class DataConfig:
    """`[data]`: what is learned."""

    name: str = "digits"
    """digits (built in, 8x8 grey), cifar10, cifar100, imagenet, places365, image_folder (train/ and val/ with a folder
    a class), synthetic, or your own factory "package.module:make_dataset". A source that gives it starts without the
    path and options of those below it."""
    path: str = ""
    """Folder of the dataset's files (cifar10, cifar100, image folders); empty: the dataset needs none."""
    augment: Literal["none", "crop", "flip_crop", "affine", "area_crop", "area_crop_hsl"] = "none"
    """crop: pad training samples by crop_padding and crop them at random; flip_crop: mirror half of them besides;
    affine: turn, scale, shear and shift them at random. Of image folders: area_crop: crops by area (8 to 100 %) and
    aspect (3/4 to 4/3), half of them mirrored; area_crop_hsl: noise on hue, saturation and lightness besides."""
    eval_crops: int = 1
    """Crops of each test sample whose predictions are averaged: 1, or 10 (four corners and the centre, mirrored too; of
    images without a margin, of images padded by crop_padding)."""
    on_bad_image: Literal["stop", "skip"] = "stop"
    """Of image folders, where a file cannot be read: stop, or say so and take the next one."""
    crop_padding: int = 4
    """Pixels of padding on each side, which is the largest shift of a crop; of affine: the largest shift."""
    affine_degrees: float = 12.0
    """Of affine: the largest rotation to either side, in degrees."""
    affine_scale: float = 0.12
    """Of affine: the largest natural logarithm of the scale, to either side."""
    affine_shear: float = 0.15
    """Of affine: the largest tangent of the shear, to either side."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the dataset, as model.options are the model's."""
    loader_workers: int = 0
    """Processes per worker that prepare samples; 0: the worker itself prepares them."""


@dataclass(frozen=True)
class OptimizerConfig:
    """`[optimizer]`: how a step changes the parameters."""

    name: Literal["sgd", "adamw"] = "sgd"
    """sgd uses momentum and nesterov, adamw betas and eps; both use lr and weight_decay."""
    lr: float = 0.1
    """Peak learning rate per step; see lr_schedule."""
    momentum: float = 0.9
    """Momentum of sgd, in [0, 1)."""
    nesterov: bool = True
    """Nesterov's form of the momentum."""
    weight_decay: float = 5e-4
    """Of sgd added to the gradient (L2), of adamw decoupled; 0: none."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of adamw's two running means, each in [0, 1)."""
    eps: float = 1e-8
    """Term added to adamw's denominator."""
    clip_norm: float = 0.0
    """Largest global L2 norm of the gradient, every parameter counted once; 0: off."""


@dataclass(frozen=True)
class LrScheduleConfig:
    """`[lr_schedule]`: the learning rate over the run."""

    name: Literal["step", "cosine", "constant", "plateau"] = "cosine"
    """step: times factor at each milestone; cosine: half a cosine from lr to lr x final_factor; constant: lr; plateau:
    times factor when the test accuracy (or loss) has not improved for `patience` tests in a row."""
    milestones: tuple[int, ...] = ()
    """Of step: the epochs, counted from 0 and ascending, at whose start lr is multiplied by factor."""
    factor: float = 0.1
    """Of step and plateau: what lr is multiplied by."""
    patience: int = 3
    """Of plateau: tests in a row without a better one, after which lr falls."""
    plateau_of: Literal["accuracy", "loss"] = "accuracy"
    """Of plateau: which of a test's results must improve."""
    min_factor: float = 1e-3
    """Of plateau: the smallest fraction of lr."""
    warmup_epochs: float = 1.0
    """Epochs (parts of one too) over which lr first rises linearly; 0: none."""
    final_factor: float = 0.0
    """Of cosine: the fraction of lr, in [0, 1], to which it falls by the end of the run."""


@dataclass(frozen=True)
class TrainConfig:
    """`[train]`: the run. These numbers and the seed fix the trajectory; the plan does not change it."""

    epochs: int = 20
    """Passes over the training samples."""
    max_steps: int = 0
    """Stop after so many steps of the epochs' (the learning rate's schedule still spans them all); 0: after all."""
    batch_size: int = 64
    """Samples per step over all workers (the global batch)."""
    bn_batch_size: int = 0
    """Samples that share one BatchNorm statistic, at most batch_size; 0: batch_size / workers / accumulation, so that
    each worker has one such group of a micro-batch; written to the run's config.toml as a number, which stays when it
    goes on with other workers."""
    accumulation: int = 1
    """Micro-batches per step, run one after another; divides the memory of activations."""
    seed: int = 0
    """Fixes the initial parameters, the order of the samples, augmentation and dropout."""
    precision: Literal["fp32", "tf32", "bf16", "fp64"] = "fp32"
    """Arithmetic of forward and backward; bf16 keeps parameters and sums in fp32; tf32: fp32 whose convolutions and
    matrix products round their factors to 10 bits of mantissa on GPUs, which fp32 never does (CPUs: as fp32)."""
    label_smoothing: float = 0.0
    """Part of the target spread evenly over all classes, in [0, 1)."""
    orthogonality: float = 0.0
    """Weight of the orthogonality penalty of shared filter bases (Eq. 7 of their paper; its authors: 10); 0: off."""
    orthogonality_normalisation: Literal["mean", "sum"] = "mean"
    """mean: the penalty over the number of Gram entries, as its authors run it; sum: as the paper prints it."""
    orthogonality_joint: bool = True
    """Whether the two bases of a basic block are orthogonal to each other too."""
    loss: str = "cross_entropy"
    """cross_entropy, or your own function "package.module:fn"."""
    eval_every_epochs: int = 1
    """Epochs from one test of the accuracy to the next; 0: only at the end."""
    eval_batch_size: int = 256
    """Samples per evaluation step over all workers."""


@dataclass(frozen=True)
class MeshConfig:
    """`[mesh]`: the workers and what each of them runs."""

    num_workers: int = 0
    """Worker processes, one per GPU; 0: every GPU of the cluster, else 2 on the CPU."""
    shape: str = ""
    """Mesh as data x branch, e.g. "2x2"; its product is num_workers. Empty: the plan's own."""
    plan: str = "even"
    """even (branches of every block dealt over the workers), data (every worker runs all branches on its samples),
    auto (measured and timed on the workers), another scheduler's name (optimal: with `mesh.costs`), or a plan file."""
    plan_budget_s: float = 60.0
    """Of auto: seconds for measuring; what does not fit is measured on a part of the batch and drawn out."""
    costs: str = ""
    """Of auto, and of schedulers that predict: a cost file to plan from; empty: measured once, then kept in
    ~/.cache/anabranch."""
    remeasure: bool = False
    """Of auto: measure again, whatever is kept."""
    replan: bool = False
    """Of auto under Ray: where steps have become slower, plan anew at the epoch's end and go on from its checkpoint."""
    memory_gb: float = 0.0
    """Of auto and `plan`: most bytes (in 1e9) of live tensors that a worker may have; 0: what its device has, where
    known."""
    audit: bool = True
    """Of auto: time the best plans against data parallelism, and take another only where that is surely faster."""
    execution: Literal["auto", "fused", "mixed", "looped"] = "auto"
    """fused: the branches of a worker as one wide computation; looped: one after another; mixed (of Multi-ResNets): as
    fused, but grouped convolutions branch by branch; auto: per block what a measurement at the start says, kept in
    ~/.cache/anabranch. Equal up to rounding."""
    memory_format: Literal["auto", "contiguous", "channels_last"] = "auto"
    """Where an image's channels lie in memory; auto: as measured, and contiguous for your own networks."""
    wire: Literal["fp32", "bf16"] = "fp32"
    """Precision in which partial sums travel between a block's branches; bf16: half the bytes, rounded (see verify)."""
    overlap: Literal["auto", "on", "off"] = "auto"
    """Whether a block's weight gradients (of fused branches) are computed while its input's gradient travels; auto: on
    GPUs."""
    chunks: int = 1
    """Parts of the batch in which a block's partial sums travel, each while the next is computed; 0: 1, 2 or 4, as
    timed on the workers at the start (a run that is repeated may choose another, one that is resumed keeps it)."""
    compile: Literal["off", "on"] = "off"
    """on: blocks through torch.compile, a graph for each distinct one, where a measurement at the start says that it is
    faster; those whose branches are split over workers, and what cannot be compiled, run as they are, which is told."""
    recompute: bool = False
    """Keep only what each block reads and run it again in backward: less memory, more time (two CPU workers: a quarter
    of the peak, 1.26 of the time, as measured)."""


@dataclass(frozen=True)
class CheckpointConfig:
    """`[checkpoint]`: what is saved, and where to go on from."""

    every_epochs: float = 1.0
    """Epochs (parts of one too) from one checkpoint to the next; 0: only at the end."""
    num_to_keep: int = 2
    """Newest checkpoints that are kept; they are written while the training goes on."""
    keep_best: bool = True
    """Besides these, the one with the best test accuracy of those that were tested."""
    url: str = ""
    """Where checkpoints go instead of run_dir, as "s3://bucket/run"; one run's own. What its protocol needs (s3fs,
    gcsfs) is to be installed, and credentials are the environment's. Empty: run_dir."""
    resume: str = ""
    """Run folder to go on from, or "auto": the newest checkpoint in run_dir, if there is one. Empty: start anew. With a
    folder and no CONFIG the run's configuration is taken, but for [launch]: say again where and with how many spares it
    is to run. In a run_dir where a run that began so did not end, that one goes on. A mesh, a number of workers or a
    plan that is given replaces all three of the run's; batch_size and the number of training samples stay what they
    were."""


@dataclass(frozen=True)
class LaunchConfig:
    """`[launch]`: how the workers are started."""

    launcher: Literal["", "ray", "env", "none"] = ""
    """ray (actors on a cluster), env (torchrun or srun started this process as one rank), or none (one worker, in this
    process). Empty: env under torchrun (RANK and WORLD_SIZE are set) or srun of several tasks, where no address is
    given, else ray."""
    address: str = ""
    """Address of the Ray cluster, HOST:PORT, or auto (this host's); ray:// and http:// ones are answered with the job
    to submit. Empty: the running one (RAY_ADDRESS), else one on this machine for the run."""
    run_dir: str = ""
    """Folder for the run's config.toml, plan.toml, metrics.jsonl and checkpoints/, in which the same command goes on
    with a run that did not end; empty: a new one under runs/."""
    backend: Literal["", "gloo", "nccl"] = ""
    """gloo or nccl, which carries tensors between workers; empty: nccl on GPUs, gloo on CPUs."""
    port: int = 0
    """TCP port at which rank 0 gathers the workers; 0: a free one."""
    cpus_per_worker: float = 1.0
    """CPU cores that Ray sets aside for a worker; its threads are at most as many (at least 1)."""
    timeout_s: float = 600.0
    """Seconds after which a worker that does not start, or a collective that does not end, is an error."""
    max_failures: int = 3
    """Losses (of a worker, or of all on a host at once) that a run under Ray makes good; 0: the first one ends it."""
    spares: int = 0
    """Workers more than the mesh needs, which have loaded everything and replace a lost one in a moment."""
    min_replicas: int = 0
    """Fewest replicas (branch groups) that a run under Ray goes on with while no host has room for lost workers; it
    takes them in again when one has. 0: as many as the mesh has, so that such a loss ends the run."""
    hang_s: float = 30.0
    """Seconds without a step (at least ten steps' time) after which a worker counts as hanging and is replaced."""


@dataclass(frozen=True)
class ProfileConfig:
    """`[profile]`: what is measured on the way."""

    metrics_every_steps: int = 1
    """Steps from one line of metrics.jsonl to the next."""
    basis_every_steps: int = 0
    """Steps from one record of the gradients in shared filter bases to the next (their paper: 10), in RUN/basis/ with
    figures of them and, where blocks share elements, of the coefficients' similarity, which need matplotlib; 0: off."""
    trackers: tuple[str, ...] = ()
    """Where metrics go besides metrics.jsonl: tensorboard, wandb, mlflow; each needs its package."""


@dataclass(frozen=True)
class Config:
    """Everything about a run. `gross` counts for `anabranch gross` alone.

    `Config()` is a Multi-ResNet of depth 14, k = 4, on the digits.
    """

    model: ModelConfig = field(
        default_factory=lambda: ModelConfig("multi_resnet", {"depth": 14, "num_branches": 4})
    )
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lr_schedule: LrScheduleConfig = field(default_factory=LrScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    gross: GrossConfig = field(default_factory=GrossConfig)

    @classmethod
    def from_dict(cls, *layers: Mapping[str, Any]) -> Config:
        """The defaults, overlaid with each layer in turn ({section: {field: value}}, as TOML gives it).

        Options are overlaid key by key. A layer that names a model or a dataset drops the options and the path
        below it: they belong to another one. Raises FieldError on an unknown key or a value of another type.
        """
        merged: dict[str, dict[str, Any]] = asdict(cls())
        for layer in layers:
            check_keys(layer, SECTIONS)
            for section, given in layer.items():
                hints = get_type_hints(SECTIONS[section])
                values = {
                    name: typed(f"{section}.{name}", value, hints[name]) for name, value in given.items()
                }
                if "options" in hints:
                    if "name" in given:
                        plain = asdict(SECTIONS[section]())
                        merged[section] |= {name: plain[name] for name in _OF_A_NAME & plain.keys()}
                    values["options"] = {**merged[section]["options"], **values.get("options", {})}
                merged[section].update(values)
        return cls(**{section: SECTIONS[section](**values) for section, values in merged.items()})

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Every field of every section; `from_dict` reads it back."""
        return asdict(self)

    def to_toml(self) -> str:
        """The whole configuration as TOML, which reads back identically but for secrets in URLs: they are "***"."""
        import tomli_w

        return tomli_w.dumps(redacted(self.to_dict()))

    def check(self) -> None:
        """Raise FieldError for the first value that is out of its range or at odds with another."""
        check_rules(self)


_OF_A_NAME = {"options", "path"}  # a model's and a dataset's own
SECTIONS: dict[str, type[Any]] = get_type_hints(Config)
"""Section name → its dataclass."""
