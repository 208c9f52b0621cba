"""The training loop of one rank: epochs of steps, evaluation, checkpoints. The same under every launcher.

    from anabranch.runtime import Config, Trainer
    result = Trainer(network, data, Config.from_dict({"train": {"epochs": 5}})).fit()      # this process alone

Under torchrun each process does the same; with a plan over several ranks it takes its part.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from anabranch.blocks.convert import prepare
from anabranch.cluster import WorkerContext
from anabranch.cluster.failures import failed_in_collective
from anabranch.runtime import exchange
from anabranch.runtime.agreement import on_all_ranks
from anabranch.runtime.assemble import in_precision, local_cluster, make_loss, make_penalty, make_plan, settle
from anabranch.runtime.basis_record import BasisRecord
from anabranch.runtime.callbacks import Callback, MetricsFile
from anabranch.runtime.checkpoint import Checkpoint
from anabranch.runtime.checkpoints import Checkpoints
from anabranch.runtime.checksum import ReplicaError
from anabranch.runtime.compiling import compile_blocks, where_it_goes_on
from anabranch.runtime.config import Config
from anabranch.runtime.countdown import countdown
from anabranch.runtime.data.load import bundle_of
from anabranch.runtime.data.sources import DataBundle
from anabranch.runtime.drift import DriftWatch
from anabranch.runtime.errors import ConfigError, UnreadableError
from anabranch.runtime.evaluation import evaluate
from anabranch.runtime.exchange import wait_for
from anabranch.runtime.execution import HowToRun, how_to_run, is_ours
from anabranch.runtime.feed import Feed
from anabranch.runtime.fill import fill
from anabranch.runtime.generation import Generation
from anabranch.runtime.launch import alone, choose_launcher, from_environment
from anabranch.runtime.loss import LossFunction
from anabranch.runtime.lr_schedule import Plateau, last_step, learning_rate
from anabranch.runtime.mesh import make_mesh
from anabranch.runtime.model_spec import spec_of
from anabranch.runtime.numerics import slowness
from anabranch.runtime.optimizer import make_optimizer
from anabranch.runtime.parallel_network import parallelize
from anabranch.runtime.position import Position, check_steps, falls_due
from anabranch.runtime.process_group import gather_json, process_group
from anabranch.runtime.rank_batch import RankBatch
from anabranch.runtime.recorder import by_part
from anabranch.runtime.step import StepResult, TrainStep
from anabranch.runtime.tensor_file import not_kept
from anabranch.schedulers import Plan, format_plan


class Rewound(Exception):
    """All ranks begin anew from a checkpoint; "" for from the start."""

    def __init__(self, checkpoint: str) -> None:
        super().__init__(f"all ranks go back to {checkpoint or 'the start'}")
        self.checkpoint = checkpoint


@dataclass(frozen=True)
class _Prepared:
    """A step whose gradients are whole and kept until all ranks are so far."""

    step: int
    outcome: StepResult
    lr: float
    num_samples: int
    begun: float


class Trainer:
    """Trains a network under a plan, as the configuration says.

    network: one-device module with stem, blocks, head; consumed. data: what `load_data` gives, or map-style (train,
    test). plan: where the branches run; None asks `[mesh]`. context: this rank's place; None reads it from the
    environment (torchrun, srun), else one process. run_dir: for metrics and checkpoints; None writes none. callbacks:
    told on rank 0. leading: makes more of them, for the rank that is 0 and when it comes to be.

    Raises ConfigError where the configuration is wrong, or `resume` was trained by other steps; from `fit` where
    `run_dir` holds checkpoints and no `resume` is given.
    """

    step: TrainStep  # once it is set up

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
        leading: Callable[[], Sequence[Callback]] = tuple,
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
        if resume is not None:
            check_steps(resume.position, config.train.batch_size, self.num_train)
        self.steps_per_epoch = -(-self.num_train // config.train.batch_size)
        self.num_steps = config.train.epochs * self.steps_per_epoch  # what the learning rate's schedule spans
        self.last_step = last_step(config.train, self.num_train)
        self._network, self._callbacks = network, list(callbacks)
        self._leading, self._leads = leading, False
        self._recording: list[Callback] = []  # those of `callbacks` that were made here
        self._whole_plan = self.plan
        self._is_set_up = self._is_compiled = False
        self.checkpoints: Checkpoints | None = None
        self.position: Position | None = None  # None: this rank holds nothing yet
        self._kept: _Prepared | None = None
        self._applying = False  # half applied: no state to go on from
        self._is_save_lost = False  # that was under way when a rank was replaced: its part is not there
        self._times: list[float] = []
        self._stepped_at: dict[int, float] = {}  # by generation

    def fit(self) -> dict[str, Any]:
        """Trains to the end (or until asked to stop); plain data: test_accuracy, train_seconds, median_step_s, …

        Raises Rewound where the controller lets all ranks begin anew from a checkpoint.
        """
        self._check_folder()
        try:
            return self._fit()
        finally:
            for callback in self._callbacks:
                callback.close()

    def _check_folder(self) -> None:
        """A run that begins keeps none of another's checkpoints, and retires none."""
        begins = self.resume is None and self.context.generation == 0
        saved = self._checkpoints() if begins else None
        if saved is not None and (found := saved.newest()):
            raise ConfigError(
                f"{found.folder} is a checkpoint of a run that was in this folder: go on with it (resume=), or choose "
                "another run_dir or checkpoint.url"
            )

    def evaluate(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Accuracy and loss of a checkpoint on the test samples, each counted once."""
        with process_group(self.context, self.config.launch.timeout_s, self.config.train.precision):
            self._set_up()
            checkpoint.load_into(self.network, None)
            return {**self._evaluate(), "unreadable": self._unreadable()}

    def _set_up(self, told: dict[str, Any] | None = None, generation: Generation | None = None) -> None:
        """The network's part of this rank on the groups that stand; a second time, moved to new groups.

        told: how the ranks that go on run it. generation: whose groups they are.
        """
        self.mesh = make_mesh(self.plan.data, self.plan.branch, self.device.type)
        if generation is not None:
            generation.formed(self.mesh)  # from here on ranks wait as long as in training: loading takes time
        if not self._is_set_up:
            network = in_precision(self.config, self._network)
            if self.run_dir and (problem := not_kept(network.state_dict())):
                raise ConfigError(
                    f"the network cannot be saved: {problem}; keep it as numbers of another kind"
                )
            ours = is_ours(network)
            self.network = parallelize(network, self.plan, self.mesh).to(self.device)
            self.feed = self._feed()
            self.how_to_run = HowToRun.from_dict(told) if told else self._how_to_run(ours)
            self.how_to_run.apply(self.network)
            self.optimizer = make_optimizer(self.config.optimizer, self.network.parameters())
            self._is_set_up = True
        else:
            self.network.regroup(self.mesh)
            self.feed = self._feed()
            if "step" in vars(self):
                self.step.close()
        self.step: TrainStep = TrainStep(
            self.network,
            self.optimizer,
            self.loss,
            precision=self.config.train.precision,
            clip_norm=self.config.optimizer.clip_norm,
            penalty=make_penalty(self.config),
        )

    def _how_to_run(self, ours: bool) -> HowToRun:
        """What the run that is resumed was run with, else as configured or measured."""
        told = self.resume.position.get("how_to_run") if self.resume else None
        names = {name for name, _, _ in self.network.elements()}
        if told and names == set(told["execution"]):
            kept = where_it_goes_on(HowToRun.from_dict(told))
            if (others := kept.differs_from(self.config.mesh)) and self.context.rank == 0:
                text = f"the run goes on as it ran, whatever is asked of mesh.{', mesh.'.join(others)} now"
                self.context.publish(warning=text)
            return kept
        mesh, precision = self.config.mesh, self.config.train.precision
        told_of = countdown(self.context.publish, "timing blocks")
        found = how_to_run(
            self.network, *self._input(), mesh, precision=precision, ours=ours, on_progress=told_of
        )
        self.context.publish(phase="building")
        return found

    def _input(self) -> tuple[tuple[int, ...], RankBatch]:
        """(C, H, W) of an image, and this rank's rows of a whole step's first micro-batch."""
        train = self.config.train
        num = min(train.batch_size, self.num_train)
        rows = self.feed.rows(num, train.bn_batch_size, train.accumulation)[0]
        return (self.data.in_channels, *self.data.image_size), rows

    def _compile(self) -> None:
        """As `mesh.compile` says, or as the ranks that go on and the run that is resumed do; once.

        Not while groups are formed again: it may take longer than the others wait there.
        """
        if self._is_compiled or (self.config.mesh.compile == "off" and not self.how_to_run.compiled):
            return
        self.context.publish(phase="compiling")
        self.how_to_run = compile_blocks(
            self.network, self.how_to_run, *self._input(), precision=self.config.train.precision,
            on_eager=lambda text: self.context.publish(warning=text),
        )  # fmt: skip
        self._is_compiled = True  # not before: of ranks that lost one meanwhile all begin again
        self.context.publish(phase="building", compiled=self.how_to_run.compiled)

    def _fit(self) -> dict[str, Any]:
        """Trains, generation after generation: where another rank was lost, this one waits for an order and goes on.

        lost in a collective ── groups given up ── await_order ── apply or discard ── new groups ── fill ── train
        """
        config, context = self.config, self.context
        context.publish(phase="building", num_steps=self.last_step, num_epochs=config.train.epochs)
        if text := slowness(config.train.precision, self.device.type):
            context.publish(warning=text)
        while True:
            generation = Generation(context, config.launch.timeout_s, config.train.precision)
            formed = False
            try:
                with generation.groups():
                    self._join(generation)
                    formed = True
                    self._compile()
                    return self._train()
            except Exception as error:
                if not context.recovers or self._applying:
                    raise
                if not (context.aborted or failed_in_collective(error)):
                    # A rank that holds something stays: others may have left the groups that are formed again. So does
                    # one whose store does not answer: it may, before the next order.
                    passing = UnreadableError if self.position is None else (RuntimeError, OSError)
                    if formed or not isinstance(error, passing):
                        raise
                    text = f"rank {context.rank} could not join again: {type(error).__name__}: {error}"
                    context.publish(warning=text, not_joined=text)
            context.publish(phase="waiting for a lost rank")
            # meanwhile no checkpoint goes: the order may be to go back to it
            with self.checkpoints.held() if self.checkpoints else nullcontext():
                self._obey(context.await_order(**self._state()))

    def _state(self) -> dict[str, Any]:
        """What this rank holds, for the controller."""
        if self.position is None:
            return {"committed": None}
        done = self.position.done
        return {
            "committed": done,
            "prepared": done + (self._kept is not None),
            "tended": self.position.tended,
        }

    def _obey(self, order: dict[str, Any]) -> None:
        rewinds, place = order["action"] == "rewind", (self.context.world_size, self.context.rank)
        if self.checkpoints and (rewinds or place != (self.mesh.world_size, self.mesh.rank)):
            self.checkpoints.cancel("the ranks that were writing it go on as others")
        if rewinds:
            raise Rewound(order["checkpoint"])
        if self.position is None:
            return
        if self._kept is not None and self.position.done < order["step"]:
            self._commit(self._kept)
        else:
            self._kept = None
            self.step.discard()

    def _join(self, generation: Generation) -> None:
        """On new groups: this rank's part, filled from a checkpoint or a peer, and where the run stands."""
        order, before, told = self.context.order, self.position, dict[str, Any]()
        if order is not None:
            self.plan = self._whole_plan.on_ranks(order["of_plan"])
        if order is not None and order["action"] != "rewind":
            mine: dict[str, Any] = {"saving": self.checkpoints is not None and self.checkpoints.is_saving}
            if before:
                mine |= {"position": before.to_json(), "how_to_run": self.how_to_run.to_dict()}
            everyone = gather_json(mine, self.device)
            told = everyone[order["leader"]]
            # what a lost rank 0 had not finished nobody knows
            in_doubt = "position" not in everyone[0] and told["position"]["saved_at"] >= 0
            is_under_way = in_doubt or any(one["saving"] for one in everyone)
            self._is_save_lost = bool(order["sources"]) and is_under_way
        self._set_up(told.get("how_to_run"), generation)
        if order is None or order["action"] == "rewind":
            position = Position(replicas=order["was"] if order else self.plan.data)
            if self.resume is not None:
                self.resume.load_into(self.network, self.optimizer)
                stored = self.resume.position
                position.done = int(stored["step"])
                position.tended = int(stored.get("tended", position.done))
                position.plateau = stored.get("plateau", {})
            self.position = position  # not before all is loaded: until then this rank holds nothing
        else:
            sources = {int(rank): source for rank, source in order["sources"].items()}
            peers = {source for rank, source in sources.items() if self._same_branches(rank)}
            for source in peers:
                fill(self.network, self.optimizer, source, is_new=before is None)
            wait_for(self.device)
            self._check_groups()
            # a save that had begun may have lost a part: the last one is made again, or found whole
            self.position = Position(**{**told["position"], "saved_at": -1})
        recorder = self.network.recorder
        self.context.where = lambda: f"in {recorder.part}, the last block entered is {recorder.entered}"
        self._plateau = Plateau(self.config.lr_schedule)
        self._plateau.load(self.position.plateau)
        if self.checkpoints is None and self.run_dir:
            self.checkpoints = self._checkpoints()
            self.context.settle = self.checkpoints.settle if self.checkpoints else self.context.settle
            self._record(self.run_dir, self.position)
        elif self.run_dir and (self.context.rank == 0) != self._leads:
            self._record(self.run_dir, self.position)  # it is, or was until now, another's to tell
        self.context.publish(step=self.position.done, not_joined=None)
        if self.position.done == self.last_step:
            self._resumed()

    def _same_branches(self, rank: int) -> bool:
        return rank % self.mesh.branch == self.mesh.branch_rank

    def _record(self, run_dir: Path, p: Position) -> None:
        profile, done = self.config.profile, p.done
        # what another rank writes into since is not to be written into again
        for callback in (own := self._recording):
            callback.close()
        self._callbacks = [each for each in self._callbacks if each not in own]
        self._recording, self._leads = [], self.context.rank == 0
        if self._leads:
            path = run_dir / "metrics.jsonl"
            file = MetricsFile(
                path, profile.metrics_every_steps, done, lambda text: self.context.publish(warning=text)
            )
            self._recording = [file, *self._leading()]
            self._callbacks = [file, *self._callbacks, *self._recording[1:]]
            # The one before was lost between a step and telling of it.
            if p.metrics and file.last_told < done:
                self._tell("on_step", p.metrics)
        if every := profile.basis_every_steps:
            basis = BasisRecord(self.network, run_dir / "basis", every, done)
            self._recording.append(basis)
            self._callbacks.append(basis)

    def _go_on_resized(self, p: Position) -> None:
        """With other replicas than before: with fewer of them a lost rank may have no peer left, so it is saved."""
        p.replicas = self.plan.data
        self._tell("on_mesh", {"step": p.done, "data": self.plan.data, "branch": self.plan.branch})
        self._save_now(p)

    def _save_now(self, p: Position) -> None:
        if self.checkpoints and p.done and p.saved_at != p.done:
            self._save(self.checkpoints, p.done, self._plateau, p.result if p.tested_at == p.done else {})
            p.saved_at = p.done

    def _train(self) -> dict[str, Any]:
        """From the position to the end of the run."""
        config, p = self.config, self.position
        assert p is not None, "joined"
        recorder, steps = self.network.recorder, self.feed.steps(p.done, self.last_step)
        self._drift = DriftWatch(self._rank_names())
        self._started = time.perf_counter() - p.elapsed_s
        recorder.begin()
        try:
            if p.done > p.tended:
                self._tend(p)
            if p.replicas != self.plan.data:
                self._go_on_resized(p)
            if self._is_save_lost:  # else the next one may be long in coming
                self._save_now(p)
                self._is_save_lost = False
            while not (p.stopped or p.replan):
                begun = time.perf_counter()  # the wait for its samples is a part of a step
                with recorder.span("data"):
                    prepared = next(steps, None)
                if prepared is None:
                    break
                step, ids, micro_batches = prepared
                outcome = self.step.gradients(micro_batches, stop=self.context.stop_requested is not None)
                with recorder.span("idle"):
                    for callback in self._callbacks:
                        callback.on_gradients(step, self.network)
                self.step.clip()
                if self.context.recovers and self.mesh.world_size > 1:  # alone, its gradients are whole
                    wait_for(self.device)  # clipping and regularizers exchange too
                    self._check_groups()
                lr = self._plateau.scale * learning_rate(
                    config.lr_schedule, config.optimizer.lr, step, self.steps_per_epoch, self.num_steps
                )
                self._kept = _Prepared(step, outcome, lr, len(ids), begun)
                with recorder.span("reduction"):  # it waits for the slowest rank, as the gradients do
                    self._vote()
                self._commit(self._kept)
                with recorder.span("idle"):
                    self._tend(p)
        finally:
            steps.close()
        return self._finish(p)

    def _vote(self) -> None:
        """Passes when every rank is prepared: only then may any of them commit. Nothing where none is replaced."""
        if not self.context.recovers:
            return
        if self.mesh.world_size > 1:
            ballot = torch.zeros(1, device=self.device)
            exchange.all_reduce(ballot, self.mesh.world_group).wait()
            if self.device.type == "cuda":
                torch.cuda.current_stream().synchronize()
        self._check_groups()

    def _check_groups(self) -> None:
        """Raises where the groups were given up meanwhile, so that what they gave is nothing to go on from.

        NCCL's exchanges then end without an error and without a result; alone, no collective tells that others join.
        """
        if self.context.aborted:
            raise ConnectionError("process group: given up")

    def _commit(self, kept: _Prepared) -> None:
        """Applies a prepared step and tells of it. Local: nothing here waits for another rank."""
        p = self.position
        assert p is not None, "joined"
        self._applying = True
        self.step.apply(kept.lr)
        self._kept, p.done, p.stopped = None, kept.step + 1, kept.outcome.stop
        self._applying = False
        with self.network.recorder.span("idle"):
            self._tell_step(p, kept)

    def _tell_step(self, p: Position, kept: _Prepared) -> None:
        self._times.append(time.perf_counter() - kept.begun)
        p.first_step_at = p.first_step_at or time.time()
        p.elapsed_s = time.perf_counter() - self._started
        times = by_part(kept.outcome.times)
        p.metrics = metrics = {
            "step": p.done,
            "epoch": kept.step // self.steps_per_epoch,
            "loss": kept.outcome.loss,
            "accuracy": kept.outcome.num_correct / kept.num_samples,
            "lr": kept.lr,
            "step_time_s": self._times[-1],
            "images_per_s": kept.num_samples / self._times[-1],
            "times_s": times,
            "memory_bytes": kept.outcome.memory_bytes,
        }
        self.context.publish(phase="training", **metrics)
        self._resumed()
        self._tell("on_step", metrics)
        warning = self._drift.observe(times)
        if warning:
            self.context.publish(warning=warning)
            self._tell("on_warning", warning)
        p.slower = p.slower or bool(warning)  # the times are the same on all ranks, hence so is this

    def _resumed(self) -> None:
        """Tells when the first step after a recovery is done."""
        if self.context.generation not in self._stepped_at:
            self._stepped_at = {**self._stepped_at, self.context.generation: time.time()}
            self.context.publish(resumed=self._stepped_at)

    def _tend(self, p: Position) -> None:
        """What is due after a step. Ranks that do it again, after a recovery, begin where one of them was."""
        if p.stopped:  # at once: what is due stays so, for the run that goes on
            return
        config, done = self.config, p.done
        eval_every = config.train.eval_every_epochs * self.steps_per_epoch
        if eval_every and done % eval_every == 0 and p.tested_at != done:
            p.result, p.tested_at = self._evaluate(done), done
            self._plateau.observe(**p.result)
            p.plateau = self._plateau.state()
        save_every = config.checkpoint.every_epochs * self.steps_per_epoch
        if self.checkpoints and falls_due(done, save_every) and p.saved_at != done:
            self._save(self.checkpoints, done, self._plateau, p.result if p.tested_at == done else {})
            p.saved_at = done
        if config.mesh.replan and p.slower and done % self.steps_per_epoch == 0 and done < self.last_step:
            p.replan = True
        p.tended = done

    def _finish(self, p: Position) -> dict[str, Any]:
        done, interrupted = p.done, p.stopped or p.replan
        if not interrupted and p.tested_at != done:
            p.result, p.tested_at = self._evaluate(done), done
        train_seconds = time.perf_counter() - self._started
        if self.checkpoints:
            try:
                self._save_last(self.checkpoints, p)
            except (OSError, RuntimeError) as error:
                if isinstance(error, ReplicaError) or self.context.aborted or failed_in_collective(error):
                    raise
                self.context.publish(warning=f"the last checkpoint is tried once more: {error}")
                p.saved_at = -1
                self._save_last(self.checkpoints, p)
        if not interrupted:
            for callback in self._callbacks:
                callback.on_trained(self.network)
        result = p.result | {
            "train_seconds": train_seconds,
            "median_step_s": statistics.median(self._times) if self._times else None,
            "first_step_at": p.first_step_at,
            "steps": done,
            "run_dir": str(self.run_dir or ""),
            "unreadable": self._unreadable(),
            "how_to_run": self.how_to_run.to_dict(),
            "stopped": "replan" if p.replan else self._reason() if p.stopped else None,
        }
        self.context.publish(phase="stopped" if p.stopped else "done")
        self._tell("on_end", result)
        return result

    def _save_last(self, checkpoints: Checkpoints, p: Position) -> None:
        if p.saved_at != p.done:
            self._save(checkpoints, p.done, self._plateau, p.result if p.tested_at == p.done else {})
        self._told_saved(checkpoints.finish(self.network))
        p.saved_at = p.done

    def _feed(self) -> Feed:
        """On the groups that stand. With fewer replicas in more micro-batches: none computes more samples at a time."""
        accumulation = self.config.train.accumulation * -(-self._whole_plan.data // self.plan.data)
        return Feed(self.network, self.data, self.config, self.plan, accumulation)

    def _reason(self) -> str:
        return self.context.stop_requested or "by another rank"

    def _rank_names(self) -> list[str]:
        named = [name for row in self.plan.devices or () for name in row]
        return named or [f"rank {rank}" for rank in range(self.plan.world_size)]

    def _evaluate(self, step: int = 0) -> dict[str, Any]:
        self.context.publish(phase="evaluating")
        metrics = evaluate(self.feed, self.loss, self.step.output_share)
        self._check_groups()
        self.context.publish(**metrics)
        self._tell("on_evaluation", {"step": step, "epoch": step / self.steps_per_epoch, **metrics})
        return metrics

    def _unreadable(self) -> dict[str, str]:
        """Files of the data that could not be read, on any rank, and why. Collective."""
        found: dict[str, str] = {}
        for told in on_all_ranks(self.mesh, self.device, self.data.unreadable, "count unreadable files"):
            found |= told
        return found

    def _checkpoints(self) -> Checkpoints | None:
        def on_failure(text: str) -> None:  # from the thread that saves
            self.context.publish(warning=text)

        keep = self.config.checkpoint.num_to_keep
        url = self.config.checkpoint.url
        if self.run_dir is None:
            return None
        best = self.config.checkpoint.keep_best
        return Checkpoints(
            self.run_dir, keep, keep_best=best, url=url, on_failure=on_failure, on_wait=self._wait_for_store
        )

    def _wait_for_store(self, waited_s: float) -> None:
        """Tells that this rank lives while it waits for what it writes; leaves that where another rank is lost."""
        self._check_groups()
        self.context.publish(store_wait_s=waited_s)

    def _told_saved(self, where: str) -> None:
        if where:
            if "://" in where:  # a folder's are seen there
                self.context.publish(checkpoint=Path(where).name)
            self._tell("on_checkpoint", where if "://" in where else Path(where))

    def _save(self, checkpoints: Checkpoints, step: int, plateau: Plateau, tested: dict[str, Any]) -> None:
        """Begins a checkpoint, which is written while the next steps run."""
        self.context.publish(phase="saving")
        position: dict[str, Any] = {
            "step": step,
            "epoch": step // self.steps_per_epoch,
            "step_in_epoch": step % self.steps_per_epoch,
            "batch_size": self.config.train.batch_size,
            "num_train": self.num_train,
            "how_to_run": self.how_to_run.to_dict(),
        }
        assert self.position is not None, "joined"
        if self.position.stopped:
            position["tended"] = self.position.tended
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
