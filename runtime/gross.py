"""Group-size search on a network and dataset: the pipeline of `anabranch gross`. Every rank runs it, in step.

    full         the network, trained as the configuration says, or another run's      steps
    terms        block terms of every layer and size, dealt to the ranks               a file each
    series       response reconstruction, then finetuning with drawn group sizes       steps, steps
    evaluation   every configuration on the validation samples, dealt to the ranks     a file that grows
    alone        the fixed configurations and those found: reconstruction, finetuning  steps, steps
    result       result.json, table.md, accuracy.png

A run that was stopped or killed goes on with the first stage that is not done, at its newest checkpoint. Group sizes
are drawn from (seed, step, layer), samples from (seed, epoch): nothing depends on the mesh.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from anabranch.blocks import count
from anabranch.blocks.block_term_fit import Fit, fit_block_terms, never_rising
from anabranch.blocks.convert import prepare
from anabranch.blocks.gross import ResponseLoss, series_network, train_series_only
from anabranch.blocks.group_search import series_layers, set_group_sizes
from anabranch.blocks.group_series import Bottleneck
from anabranch.cluster import WorkerContext
from anabranch.runtime.assemble import in_precision, local_cluster, make_plan, settle
from anabranch.runtime.config import Config, LrScheduleConfig
from anabranch.runtime.data.sources import DataBundle
from anabranch.runtime.durable import write_tensors
from anabranch.runtime.gross_report import draw, write_table
from anabranch.runtime.gross_space import Sizes, chosen, search_space, settings_of
from anabranch.runtime.gross_stages import Stages, StopAsked, read_json, write_json
from anabranch.runtime.group_evaluation import count_hits
from anabranch.runtime.held_out import keep_out
from anabranch.runtime.loss import LossFunction
from anabranch.runtime.model_spec import spec_of
from anabranch.runtime.process_group import process_group
from anabranch.schedulers import Plan

_PIECE = 32  # configurations a rank evaluates between two writes


def run_gross(
    network: nn.Module,
    data: DataBundle,
    config: Config,
    *,
    plan: Plan,
    context: WorkerContext,
    run_dir: Path,
) -> dict[str, Any]:
    """Runs the pipeline, or goes on with it, on this rank. Every rank calls it, with the same network.

    network: one-device, as built; its convolutions outside of branch sums are decomposed. plan: of the full network;
    the series has one made alike, and what reconstructs responses or is tuned alone is split by sample. run_dir: a
    folder that all ranks see. Returns plain data: full, configurations (sizes, macs, validation_accuracy, cheapest
    first), limits, tuned, table, plot (paths; "" for a plot where matplotlib is missing); or only stopped (why) and
    run_dir.

    Raises what `check_search` does, before it trains.
    """
    with process_group(context, config.launch.timeout_s, config.train.precision):
        stages = Stages(run_dir / "stages", context)
        search = _Search(network, data, config, plan, stages)
        try:
            result = search.run()
        except StopAsked:
            return {"stopped": context.stop_requested or "by another rank", "run_dir": str(run_dir)}
        result |= {"stopped": None, "run_dir": str(run_dir)}
        files: dict[str, str] = stages.on_first(partial(_report, run_dir, result))
        return {**result, **files}


class _Search:
    """The pipeline on one rank.

    network: the full one, trained once `run` has begun. validation: the bundle whose test samples are those kept out.
    """

    def __init__(
        self,
        network: nn.Module,
        data: DataBundle,
        config: Config,
        plan: Plan,
        stages: Stages,
    ) -> None:
        self.network, self.gross = in_precision(config, prepare(network)), config.gross
        self.stages, self.plan = stages, plan
        self.space = search_space(network, self.gross)
        self.config = settle(config, plan)
        stored = stages.claim(settings_of(self.config))
        self.config = replace(
            self.config,
            train=replace(self.config.train, bn_batch_size=stored["train"]["bn_batch_size"]),
        )
        self.series_plan = self._plan(series_network(network, self.space.layers), self.config)
        mesh = replace(self.config.mesh, plan="data", shape=f"{plan.world_size}x1")
        self.sample_plan = self._plan(network, replace(self.config, mesh=mesh))
        self.data, self.validation = keep_out(data, self.gross.validation_fraction, config.train.seed)
        self._count_steps(
            min(len(self.space.limits) * (self.gross.winners + 1), len(self.space.configurations))
        )

    def run(self) -> dict[str, Any]:
        full = self._full()
        fits = self._fit_terms()
        found = self._evaluate(self._trained_series(fits))
        limits = [chosen(limit, found, self.gross.winners) for limit in self.space.limits]
        of_limits = [sizes for limit in limits for sizes in (limit["baseline"], *limit["winners"])]
        alone = list(dict.fromkeys(sizes for sizes in of_limits if sizes is not None))
        self._count_steps(len(alone))
        return {
            "full": {"macs": count(self.network).macs, "test_accuracy": full["test_accuracy"]},
            "gross": asdict(self.gross),
            "num_validation": len(self.validation.test),
            "num_test": len(self.data.test),
            "configurations": found,
            "limits": limits,
            "tuned": [{"sizes": sizes, "test_accuracies": self._alone(sizes, fits)} for sizes in alone],
        }

    def _full(self) -> dict[str, Any]:
        where = (self.network, self.data, self.config, self.plan)
        given = self.gross.full
        return self.stages.adopt("full", Path(given), *where) if given else self.stages.train("full", *where)

    def _fit_terms(self) -> dict[str, list[Fit]]:
        """The block terms of every layer at every size. Ranks fit what they are dealt; all read all."""
        stages, folder = self.stages, self.stages.folder / "terms"
        tasks = [(name, size) for name, sizes in self.space.layers.items() for size in sizes]
        stages.on_first(lambda: folder.mkdir(parents=True, exist_ok=True))

        def path(name: str, size: int) -> Path:
            return folder / f"{name}-{size}.safetensors"

        def fit_mine() -> None:
            for number, (name, size) in enumerate(tasks):
                if stages.context.stop_requested:
                    return
                if number % stages.mesh.world_size == stages.mesh.rank and not path(name, size).exists():
                    stages.tell(f"block terms {number + 1}/{len(tasks)}")
                    fit = fit_block_terms(self.network.get_parameter(f"{name}.weight"), size)
                    errors = torch.tensor(fit.errors, dtype=torch.float64)
                    write_tensors(path(name, size), {**fit.layers._asdict(), "errors": errors})

        stages.on_all(fit_mine, "fit block terms")
        stages.check_stop()
        return {
            name: never_rising([_read_fit(path(name, size)) for size in sizes])
            for name, sizes in self.space.layers.items()
        }

    def _trained_series(self, fits: Mapping[str, Sequence[Fit]]) -> nn.Module:
        gross, series = self.gross, series_network(self.network, self.space.layers)
        _load(series, fits)
        set_group_sizes(series, "sampled")
        for layer in series_layers(series).values():
            layer.temperature = gross.temperature
        self._reconstruct("series-reconstruct", series, gross.reconstruct_lr)
        tune = self._with(gross.tune_epochs, gross.tune_lr, gross.tune_milestones)
        self.stages.train("series-tune", series, self.data, tune, self.series_plan)
        return series

    def _evaluate(self, series: nn.Module) -> list[dict[str, Any]]:
        """Every configuration's multiply-adds and accuracy on the validation samples, cheapest first."""
        stages, path = self.stages, self.stages.folder / "evaluation.json"
        hits: dict[str, int] = stages.on_first(lambda: read_json(path) or {})
        network = series.to(stages.device)
        wanted = [
            sizes for sizes in sorted(c.sizes for c in self.space.configurations) if _key(sizes) not in hits
        ]
        piece = _PIECE * stages.mesh.world_size
        for start in range(0, len(wanted), piece):
            some = wanted[start : start + piece]
            stages.tell(f"configurations {len(hits)}/{len(self.space.configurations)}")
            counted = count_hits(network, some, self.validation, self.config.train.eval_batch_size)
            hits |= {_key(sizes): n for sizes, n in zip(some, counted, strict=True)}
            stages.on_first(partial(write_json, path, hits))
            stages.check_stop()
        num = len(self.validation.test)
        return [
            {"sizes": c.sizes, "macs": c.macs, "validation_accuracy": hits[_key(c.sizes)] / num}
            for c in self.space.configurations
        ]

    def _alone(self, sizes: Sizes, fits: Mapping[str, Sequence[Fit]]) -> list[float]:
        """Test accuracies of one configuration, decomposed, reconstructed and tuned by itself, one a repeat."""
        gross, accuracies = self.gross, []
        by_layer = dict(zip(self.space.layers, sizes, strict=True))
        terms = {name: [fits[name][self.space.layers[name].index(size)]] for name, size in by_layer.items()}
        for repeat in range(gross.repeats):
            network = series_network(self.network, {name: [size] for name, size in by_layer.items()})
            _load(network, terms)
            name, seed = f"alone-{_key(sizes)}-{repeat}", self.config.train.seed + repeat
            self._reconstruct(f"{name}-reconstruct", network, gross.fixed_reconstruct_lr, seed)
            tune = self._with(gross.fixed_tune_epochs, gross.fixed_tune_lr, gross.fixed_tune_milestones, seed)
            result = self.stages.train(f"{name}-tune", network, self.data, tune, self.sample_plan)
            accuracies.append(result["test_accuracy"])
        return accuracies

    def _reconstruct(self, name: str, network: nn.Module, lr: float, seed: int | None = None) -> None:
        config = self._with(self.gross.reconstruct_epochs, lr, self.gross.reconstruct_milestones, seed)

        def loss_of(trained: nn.Module) -> LossFunction:
            return ResponseLoss(trained, self.network)

        self.stages.train(name, network, self.data, config, self.sample_plan, loss_of)

    def _with(self, epochs: int, lr: float, milestones: tuple[int, ...], seed: int | None = None) -> Config:
        """The run's configuration with a stage's numbers."""
        train = self.config.train
        schedule = LrScheduleConfig("step" if milestones else "constant", milestones, warmup_epochs=0.0)
        return replace(
            self.config,
            optimizer=replace(self.config.optimizer, lr=lr),
            lr_schedule=schedule,
            train=replace(train, epochs=epochs, max_steps=0, seed=train.seed if seed is None else seed),
        )

    def _count_steps(self, num_alone: int) -> None:
        """Tells the stages how many training steps there are, with so many configurations tuned alone."""
        gross, train = self.gross, self.config.train
        per_epoch = -(-len(self.data.train) // train.batch_size)
        full = min(train.max_steps or train.epochs * per_epoch, train.epochs * per_epoch)
        full = 0 if gross.full else full
        series = gross.reconstruct_epochs + gross.tune_epochs
        alone = num_alone * gross.repeats * (gross.reconstruct_epochs + gross.fixed_tune_epochs)
        self.stages.all_steps = full + per_epoch * (series + alone)

    def _plan(self, network: nn.Module, config: Config) -> Plan:
        """The plan of a configuration for a network on the ranks that stand."""
        cluster = local_cluster(self.plan.world_size, self.stages.context.host)
        made = make_plan(config, spec_of(network), cluster)
        names = [name for row in self.plan.devices or () for name in row]
        rows = [names[d * made.branch : (d + 1) * made.branch] for d in range(made.data)]
        return replace(made, devices=tuple(map(tuple, rows)) if names else None)


def _load(network: nn.Module, fits: Mapping[str, Sequence[Fit]]) -> None:
    """Fills a series network with fits, and leaves only its series to be trained."""
    for name, layer in series_layers(network).items():
        layer.load([fit.layers for fit in fits[name]])
    train_series_only(network)


def _report(run_dir: Path, result: Mapping[str, Any]) -> dict[str, str]:
    """Writes the result's files; their paths, empty for a plot that cannot be drawn."""
    table, plot = run_dir / "table.md", run_dir / "accuracy.png"
    write_json(run_dir / "result.json", result)
    write_table(table, result)
    return {"table": str(table), "plot": str(plot) if draw(plot, result) else ""}


def _read_fit(path: Path) -> Fit:
    tensors = load_file(path)
    errors = tuple(tensors["errors"].tolist())
    return Fit(Bottleneck(tensors["p"], tensors["r"], tensors["q"]), errors, len(errors))


def _key(sizes: Sizes) -> str:
    return "-".join(map(str, sizes))
