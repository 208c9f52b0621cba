"""The training loop of one rank: epochs of steps, evaluation, checkpoints. The same under every launcher.

    from anabranch.runtime import Config, Trainer
    result = Trainer(network, data, Config.from_dict({"train": {"epochs": 5}})).fit()      # this process alone

Under torchrun each process does the same; with a plan over several ranks it takes its part.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from anabranch.blocks.convert import prepare
from anabranch.blocks.random import fold
from anabranch.cluster import WorkerContext
from anabranch.runtime.agreement import on_all_ranks
from anabranch.runtime.assemble import in_precision, local_cluster, make_loss, make_penalty, make_plan, settle
from anabranch.runtime.basis_record import BasisRecord
from anabranch.runtime.callbacks import Callback, MetricsFile
from anabranch.runtime.checkpoint import Checkpoint, Checkpoints
from anabranch.runtime.checksum import check_replicas
from anabranch.runtime.config import Config
from anabranch.runtime.data.augment import augment_keys, augmented, normalise, ten_crops
from anabranch.runtime.data.batches import batches, epoch_order
from anabranch.runtime.data.load import bundle_of
from anabranch.runtime.data.sources import BatchSource, DataBundle
from anabranch.runtime.deal import Deal, deal_step
from anabranch.runtime.drift import DriftWatch
from anabranch.runtime.launch import alone, choose_launcher, from_environment
from anabranch.runtime.loss import LossFunction, step_share
from anabranch.runtime.lr_schedule import Plateau, learning_rate
from anabranch.runtime.mesh import make_mesh
from anabranch.runtime.model_spec import spec_of
from anabranch.runtime.optimizer import make_optimizer
from anabranch.runtime.parallel_network import RankBatch, parallelize
from anabranch.runtime.process_group import process_group
from anabranch.runtime.recorder import by_part
from anabranch.runtime.step import MicroBatch, TrainStep, autocast, num_correct
from anabranch.schedulers import Plan, format_plan


class Trainer:
    """Trains a network under a plan, as the configuration says.

    network: one-device module with stem, blocks, head; consumed. data: what `load_data` gives, or map-style (train,
    test). plan: where the branches run; None asks `[mesh]`. context: this rank's place; None reads it from the
    environment (torchrun, srun), else one process. run_dir: for metrics and checkpoints; None writes none. callbacks:
    told on rank 0.
    """

    def __init__(
        self,
        network: nn.Module,
        data: DataBundle | tuple[Any, ...],
        config: Config | None = None,
        *,
        plan: Plan | None = None,
        context: WorkerContext | None = None,
        loss: LossFunction | None = None,
        run_dir: Path | None = None,
        resume: Checkpoint | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.context = context or (from_environment() if choose_launcher() == "env" else alone())
        config = config or Config()
        config.check()
        if plan is None:
            prepare(network)
            plan = make_plan(
                config, spec_of(network), local_cluster(self.context.world_size, self.context.host)
            )
        self.plan, self.config = plan, settle(config, plan)
        if isinstance(data, tuple):
            data = bundle_of(data, seed=config.train.seed, loader_workers=config.data.loader_workers)
        self.data, self.loss = data, loss or make_loss(config)
        self.run_dir, self.resume = run_dir, resume
        self.device = torch.device(self.context.device)
        self.num_train = len(self.data.train)
        self.steps_per_epoch = -(-self.num_train // config.train.batch_size)
        self.num_steps = config.train.epochs * self.steps_per_epoch  # what the learning rate's schedule spans
        self.last_step = min(config.train.max_steps or self.num_steps, self.num_steps)
        self._network, self._callbacks = network, list(callbacks)

    def fit(self) -> dict[str, Any]:
        """Trains to the end (or until asked to stop); plain data: test_accuracy, train_seconds, median_step_s, …"""
        with process_group(self.context, self.config.launch.timeout_s):
            try:
                return self._fit()
            finally:
                for callback in self._callbacks:
                    callback.close()

    def evaluate(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Accuracy and loss of a checkpoint on the test samples, each counted once."""
        with process_group(self.context, self.config.launch.timeout_s):
            self._set_up()
            checkpoint.load_into(self.network, None)
            return {**self._evaluate(), "unreadable": self._unreadable()}

    def _set_up(self) -> None:
        train = self.config.train
        self.mesh = make_mesh(self.plan.data, self.plan.branch, self.device.type)
        network = in_precision(self.config, self._network)
        self.network = parallelize(network, self.plan, self.mesh, execution=self.config.mesh.execution).to(
            self.device
        )
        self.optimizer = make_optimizer(self.config.optimizer, self.network.parameters())
        self.step = TrainStep(
            self.network,
            self.optimizer,
            self.loss,
            precision=train.precision,
            clip_norm=self.config.optimizer.clip_norm,
            penalty=make_penalty(self.config),
        )
        self.dtype = next(self.network.parameters()).dtype

    def _fit(self) -> dict[str, Any]:
        publish, config = self.context.publish, self.config
        publish(phase="building", num_steps=self.last_step, num_epochs=config.train.epochs)
        self._set_up()
        done, plateau = 0, Plateau(config.lr_schedule)
        if self.resume is not None:
            self.resume.load_into(self.network, self.optimizer)
            done = int(self.resume.position["step"])
            plateau.load(self.resume.position.get("plateau", {}))
        checkpoints = self._checkpoints()
        if self.run_dir and self.context.rank == 0:
            path = self.run_dir / "metrics.jsonl"
            self._callbacks.insert(0, MetricsFile(path, config.profile.metrics_every_steps, done))
        if self.run_dir and (every := config.profile.basis_every_steps):
            self._callbacks.append(BasisRecord(self.network, self.run_dir / "basis", every, done))
        save_every = max(1, round(config.checkpoint.every_epochs * self.steps_per_epoch))
        eval_every = config.train.eval_every_epochs * self.steps_per_epoch
        times: list[float] = []
        first_step_at, saved_at, tested_at, result = 0.0, -1, -1, {}
        stopped = False
        started = time.perf_counter()
        recorder, steps = self.network.recorder, self._steps(done)
        drift, slower, replan = DriftWatch(self._rank_names()), False, False
        recorder.end_step()  # what came before belongs to no step
        while True:
            with recorder.span("data"):
                prepared = next(steps, None)
            if prepared is None:
                break
            step, ids, micro_batches = prepared
            begun = time.perf_counter()
            outcome = self.step.gradients(micro_batches, stop=self.context.stop_requested is not None)
            for callback in self._callbacks:
                callback.on_gradients(step, self.network)
            lr = plateau.scale * learning_rate(
                config.lr_schedule, config.optimizer.lr, step, self.steps_per_epoch, self.num_steps
            )
            self.step.apply(lr)
            times.append(time.perf_counter() - begun)
            first_step_at = first_step_at or time.time()
            done, stopped = step + 1, outcome.stop
            epoch = step // self.steps_per_epoch
            metrics: dict[str, Any] = {
                "step": done,
                "epoch": epoch,
                "loss": outcome.loss,
                "accuracy": outcome.num_correct / len(ids),
                "lr": lr,
                "step_time_s": times[-1],
                "images_per_s": len(ids) / times[-1],
                "times_s": by_part(outcome.times),
                "memory_bytes": outcome.memory_bytes,
            }
            with recorder.span("idle"):
                publish(phase="training", **metrics)
                self._tell("on_step", metrics)
                warning = drift.observe(metrics["times_s"])
                if warning:
                    publish(warning=warning)
                    self._tell("on_warning", warning)
                if stopped:
                    break
                if eval_every and done % eval_every == 0:
                    result, tested_at = self._evaluate(done), done
                    plateau.observe(**result)
                if checkpoints and config.checkpoint.every_epochs and done % save_every == 0:
                    self._save(checkpoints, done, plateau, result if tested_at == done else {})
                    saved_at = done
                # The times are the same on all ranks, hence so is this.
                slower = slower or bool(warning)
                if (
                    config.mesh.replan
                    and slower
                    and done % self.steps_per_epoch == 0
                    and done < self.last_step
                ):
                    replan = True
                    break
        if not stopped and not replan and tested_at != done:
            result, tested_at = self._evaluate(done), done
        train_seconds = time.perf_counter() - started
        if checkpoints:
            if saved_at != done:
                self._save(checkpoints, done, plateau, result if tested_at == done else {})
            self._told_saved(checkpoints.finish(self.network))
        if not stopped and not replan:
            for callback in self._callbacks:
                callback.on_trained(self.network)
        result |= {
            "train_seconds": train_seconds,
            "median_step_s": statistics.median(times) if times else None,
            "first_step_at": first_step_at,
            "steps": done,
            "run_dir": str(self.run_dir or ""),
            "unreadable": self._unreadable(),
            "stopped": "replan" if replan else self._reason() if stopped else None,
        }
        publish(phase="stopped" if stopped else "done")
        self._tell("on_end", result)
        return result

    def _steps(self, done: int) -> Iterator[tuple[int, Tensor, list[MicroBatch]]]:
        """(step, the step's sample indices, this rank's micro-batches) from step `done` on, prepared ahead."""
        train = self.config.train
        for epoch in range(done // self.steps_per_epoch, -(-self.last_step // self.steps_per_epoch)):
            order = epoch_order(self.num_train, train.seed, epoch)
            first = done % self.steps_per_epoch if epoch == done // self.steps_per_epoch else 0
            last = min(self.steps_per_epoch, self.last_step - epoch * self.steps_per_epoch)
            steps = [order[i * train.batch_size : (i + 1) * train.batch_size] for i in range(first, last)]
            deals = [self._deals(len(ids), train.bn_batch_size, train.accumulation) for ids in steps]
            rows = [
                [self.network.rank_batch(d, len(ids)) for d in ds]
                for ids, ds in zip(steps, deals, strict=True)
            ]
            fetched = self._fetch(self.data.train, steps, rows, epoch)
            for index, (ids, parts) in enumerate(zip(steps, rows, strict=True)):
                step = epoch * self.steps_per_epoch + first + index
                key = fold(train.seed, step)
                yield step, ids, [self._micro_batch(*next(fetched), ids, part, key, epoch) for part in parts]

    def _reason(self) -> str:
        return self.context.stop_requested or "by another rank"

    def _rank_names(self) -> list[str]:
        named = [name for row in self.plan.devices or () for name in row]
        return named or [f"rank {rank}" for rank in range(self.plan.world_size)]

    def _deals(self, num_samples: int, bn_batch_size: int, accumulation: int = 1) -> list[Deal]:
        mesh = self.mesh
        return deal_step(
            num_samples, bn_batch_size=min(bn_batch_size, num_samples), data=mesh.data, branch=mesh.branch,
            samples=self.plan.samples, accumulation=accumulation,
        )  # fmt: skip

    def _fetch(
        self, source: BatchSource, steps: Sequence[Tensor], rows: Sequence[Sequence[RankBatch]], epoch: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(x, target) of the rows that the stem takes, one pair a micro-batch."""
        wanted = [
            ids[part.range_of(self.network.input_rows).start : part.range_of(self.network.input_rows).stop]
            for ids, parts in zip(steps, rows, strict=True)
            for part in parts
        ]
        for batch in batches(source, wanted, epoch, self.device):
            yield batch.x_NCHW, batch.labels

    def _micro_batch(
        self, x: Tensor, target: Tensor, ids: Tensor, rows: RankBatch, key: int, epoch: int
    ) -> MicroBatch:
        own, group = (ids[r.start : r.stop].to(self.device) for r in (rows.own_range, rows.group_range))
        x = normalise(x, self.data.normalisation, self.dtype)
        if self.config.data.augment in ("crop", "flip_crop", "affine"):
            mine = own if self.network.input_rows == "own" else group
            keys = augment_keys(self.config.train.seed, epoch, mine)
            x = augmented(x, keys, self.config.data)
        return MicroBatch(x, target, rows.with_samples(own, group, key))

    @torch.no_grad()
    def _evaluate(self, step: int = 0) -> dict[str, Any]:
        self.context.publish(phase="evaluating")
        self.network.eval()
        size, num = self.config.train.eval_batch_size, len(self.data.test)
        steps = [torch.arange(i, min(i + size, num)) for i in range(0, num, size)]
        rows = [[self.network.rank_batch(self._deals(len(ids), 1)[0], len(ids))] for ids in steps]
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        fetched = self._fetch(self.data.test, steps, rows, 0)
        for (x, target), (part,) in zip(fetched, rows, strict=True):
            with autocast(self.config.train.precision, self.device):
                output = self._predicted(normalise(x, self.data.normalisation, self.dtype), part)
                target = self.network.to_output_rows(target, part)
                sums[0] += step_share(self.loss, output, target, num)
            sums[1] += num_correct(output, target)
        sums *= self.step.output_share
        dist.all_reduce(sums)
        loss, hits = sums.tolist()
        metrics = {"test_loss": loss, "test_accuracy": hits / num}
        self.context.publish(**metrics)
        self._tell("on_evaluation", {"step": step, "epoch": step / self.steps_per_epoch, **metrics})
        return metrics

    def _unreadable(self) -> dict[str, str]:
        """Files of the data that could not be read, on any rank, and why. Collective."""
        found: dict[str, str] = {}
        for told in on_all_ranks(self.mesh, self.device, self.data.unreadable, "count unreadable files"):
            found |= told
        return found

    def _predicted(self, x: Tensor, rows: RankBatch) -> Tensor:
        """The network's outputs; of several crops the logarithm of their classes' mean probabilities."""
        data = self.config.data
        if data.eval_crops == 1:
            return self.network(x, rows)  # type: ignore[no-any-return]
        crops = ten_crops(x, self.data.image_size, data.crop_padding)
        logits = [self.network(crop, rows) for crop in crops]
        exact = torch.promote_types(logits[0].dtype, torch.float32)  # half precisions would lose the mean
        logs = torch.stack([y.to(exact).log_softmax(1) for y in logits])
        return logs.logsumexp(0) - math.log(len(crops))

    def _checkpoints(self) -> Checkpoints | None:
        def on_failure(text: str) -> None:  # from the thread that saves
            self.context.publish(warning=text)

        keep = self.config.checkpoint.num_to_keep
        url = self.config.checkpoint.url
        if self.run_dir is None:
            return None
        best = self.config.checkpoint.keep_best
        return Checkpoints(self.run_dir, keep, keep_best=best, url=url, on_failure=on_failure)

    def _told_saved(self, where: str) -> None:
        if where:
            self._tell("on_checkpoint", where if "://" in where else Path(where))

    def _save(self, checkpoints: Checkpoints, step: int, plateau: Plateau, tested: dict[str, Any]) -> None:
        """Begins a checkpoint, which is written while the next steps run."""
        self.context.publish(phase="saving")
        check_replicas(self.network)
        position: dict[str, Any] = {
            "step": step,
            "epoch": step // self.steps_per_epoch,
            "step_in_epoch": step % self.steps_per_epoch,
        }
        if plateau.follows:
            position["plateau"] = plateau.state()
        if "test_accuracy" in tested:
            position["test_accuracy"] = tested["test_accuracy"]
        before = checkpoints.save(
            self.network, self.optimizer, position=position, config_toml=self.config.to_toml(),
            plan_toml=format_plan(self.plan),
        )  # fmt: skip
        self._told_saved(before)

    def _tell(self, event: str, *arguments: Any) -> None:
        if self.context.rank == 0:
            for callback in self._callbacks:
                getattr(callback, event)(*arguments)
