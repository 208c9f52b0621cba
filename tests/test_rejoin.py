"""A rank that cannot join the groups that are formed again waits for another order, and says why."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from anabranch.blocks import build
from anabranch.cluster import WorkerContext
from anabranch.runtime import Config, Trainer, worker
from anabranch.runtime.assemble import local_cluster, make_network, make_plan
from anabranch.runtime.callbacks import Callback, MetricsFile
from anabranch.runtime.checkpoint import Checkpoint
from anabranch.runtime.checkpoints import Checkpoints
from anabranch.runtime.data.load import load_data
from anabranch.runtime.errors import CheckpointError, ConfigError, UnreadableError
from anabranch.runtime.generation import Generation
from anabranch.runtime.job import Job
from anabranch.runtime.launch import alone
from anabranch.runtime.manifest import Manifest
from anabranch.runtime.mesh import Mesh
from anabranch.runtime.model_spec import spec_of
from anabranch.runtime.position import Position
from anabranch.runtime.process_group import process_group
from anabranch.runtime.step import StepResult, TrainStep
from anabranch.runtime.storage import LocalFolder, StorageError, open_folder
from anabranch.runtime.trainer import Rewound

CONFIG = {
    "train": {"batch_size": 8, "epochs": 1},
    "mesh": {"execution": "fused"},
    "checkpoint": {"every_epochs": 0},
}
NUM_STEPS = 4


class LosesAPeer(Callback):
    """Before the third step."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.has_lost = False

    def on_gradients(self, step: int, network: Any) -> None:
        if step == 2 and not self.has_lost:
            self.has_lost = True
            raise ConnectionError("connection closed by peer")

    def on_step(self, metrics: Mapping[str, Any]) -> None:
        self.steps.append(metrics["step"])


class FailsToJoin(Trainer):
    """Once, in the first generation that is formed again."""

    error: Exception | None

    def _join(self, generation: Generation) -> None:
        if self.context.generation == 1 and self.error is not None:
            raise self.error
        super()._join(generation)


def controller(
    context: WorkerContext,
    states: list[dict[str, Any]],
    times: int = 2,
    sources: Mapping[str, int] = MappingProxyType({}),
) -> None:
    """Lets the one rank go on where it stands, whenever it waits. sources: who is filled from whom."""
    for generation in range(times):
        while context.status()["waits"] != generation:
            time.sleep(0.01)
        state = context.quiesce(generation, 30.0)
        assert state is not None, "it waits"
        states.append(state)
        order = {
            "action": "discard",
            "step": state["committed"],
            "sources": dict(sources),
            "leader": 0,
            "of_plan": [0],
            "was": 1,
        }
        context.give_order({**order, "place": {"generation": generation + 1}})


def trainer(error: Exception | None, run_dir: Path | None = None) -> tuple[FailsToJoin, LosesAPeer]:
    torch.manual_seed(0)
    context = replace(alone(environ={"OMP_NUM_THREADS": "1"}), recovers=True)
    images = [(torch.zeros(1, 8, 8, dtype=torch.uint8), index % 2) for index in range(8 * NUM_STEPS)]
    network = build("multi_resnet", in_channels=1, num_classes=2, depth=8, num_branches=2)
    losing = LosesAPeer()
    made = FailsToJoin(
        network,
        (images, images[:8]),
        Config.from_dict(CONFIG),
        context=context,
        callbacks=[losing],
        run_dir=run_dir,
    )
    made.error = error
    return made, losing


def test_it_waits_and_goes_on_with_the_next_order() -> None:
    made, losing = trainer(RuntimeError("an odd end of a store"))
    threading.Thread(target=controller, args=(made.context, []), daemon=True).start()
    result = made.fit()
    assert (result["steps"], made.context.generation) == (NUM_STEPS, 2)
    assert losing.steps == [1, 2, 3, 4]
    assert (
        made.context.status()["warning"] == "rank 0 could not join again: RuntimeError: an odd end of a store"
    )


def test_a_step_whose_groups_were_given_up_is_not_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL's exchanges end then without an error, and without a sum."""
    made, losing = trainer(None)
    losing.has_lost = True
    context, states, gradients = made.context, list[dict[str, Any]](), TrainStep.gradients

    def ends_without_an_error(step: TrainStep, *arguments: Any, **options: Any) -> StepResult:
        if losing.steps == [1, 2] and context.generation == 0:
            context.quiesce(0, 0.0)
        return gradients(step, *arguments, **options)

    monkeypatch.setattr(TrainStep, "gradients", ends_without_an_error)
    monkeypatch.setattr(Mesh, "world_size", 2)  # a rank alone has all gradients: they are whole
    threading.Thread(target=controller, args=(context, states, 1), daemon=True).start()
    assert made.fit()["steps"] == NUM_STEPS
    assert [(state["committed"], state["prepared"]) for state in states] == [(2, 2)]
    assert losing.steps == [1, 2, 3, 4]


@pytest.mark.parametrize("is_saving", [False, True])
def test_a_save_that_lost_a_rank_is_made_again_at_once(
    tmp_path: Path, is_saving: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one may be an epoch away, and its part of this one is not there."""
    made, _ = trainer(None, tmp_path)
    monkeypatch.setattr(Checkpoints, "is_saving", is_saving)
    monkeypatch.setattr(Trainer, "_same_branches", lambda self, rank: False)  # nobody is there to be filled
    threading.Thread(target=controller, args=(made.context, [], 1, {"1": 0}), daemon=True).start()
    assert made.fit()["steps"] == NUM_STEPS
    saved = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert saved == {"step-000004", *(["step-000002"] if is_saving else [])}


def test_the_last_checkpoint_is_tried_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that refuses a connection then is no lost rank, and not the end of all that was learned."""
    made, losing = trainer(None, tmp_path)
    losing.has_lost = True
    refused = iter([StorageError("Connection refused")])
    write = LocalFolder.write_tensors

    def refuses_once(*arguments: Any) -> tuple[int, str]:
        for error in refused:
            raise error
        return write(*arguments)

    monkeypatch.setattr(LocalFolder, "write_tensors", refuses_once)
    assert made.fit()["steps"] == NUM_STEPS
    assert made.context.generation == 0
    assert made.context.status()["warning"] == "the last checkpoint is tried once more: Connection refused"
    assert Checkpoint.open(tmp_path / "checkpoints/step-000004").position["step"] == 4


def test_numbers_that_no_checkpoint_holds_are_told_before_the_first_step(tmp_path: Path) -> None:
    made, losing = trainer(None, tmp_path)
    made._network.register_buffer("wave", torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(ConfigError, match=r"cannot be saved: wave is of torch\.complex64"):
        made.fit()
    assert losing.steps == []


def test_who_is_rank_0_no_more_writes_no_metrics(tmp_path: Path) -> None:
    """Nor when it is rank 0 again: another one has written the file anew in between."""
    made, _ = trainer(None, tmp_path)
    files = []
    for rank, done in ((0, 0), (1, 2), (0, 4)):
        made.context.rank = rank
        made._record(tmp_path, Position(done=done))
        files.append([each for each in made._callbacks if isinstance(each, MetricsFile)])
    assert list(map(len, files)) == [1, 0, 1]
    first, last = files[0][0], files[2][0]
    assert first._file.closed
    assert not last._file.closed
    last.close()


def test_wrong_input_is_not_tried_again() -> None:
    made, _ = trainer(ConfigError("another network"))
    threading.Thread(target=controller, args=(made.context, []), daemon=True).start()
    with pytest.raises(ConfigError, match="another network"):
        made.fit()


def test_a_newcomer_that_cannot_join_is_to_be_replaced() -> None:
    """It holds nothing that the others need."""
    made, _ = trainer(RuntimeError("no memory"))
    made.context.generation = 1
    with pytest.raises(RuntimeError, match="no memory"):
        made.fit()


def test_a_newcomer_whose_store_does_not_answer_waits_for_another_order(tmp_path: Path) -> None:
    made, _ = trainer(None)
    context, states = made.context, list[dict[str, Any]]()
    context.generation = 1
    made.error = UnreadableError("step-000002 cannot be read now")
    context.order = {"action": "rewind", "of_plan": [0], "was": 1}

    def order_again() -> None:
        while context.status()["waits"] != 1:
            time.sleep(0.01)
        states.append(context.status())
        context.quiesce(1, 30.0)
        context.give_order({**(context.order or {}), "checkpoint": "", "place": {"generation": 2}})

    threading.Thread(target=order_again, daemon=True).start()
    with pytest.raises(Rewound):
        made.fit()
    assert states[0]["not_joined"].endswith("UnreadableError: step-000002 cannot be read now")


def test_a_checkpoint_to_go_back_to_that_is_gone(tmp_path: Path) -> None:
    """A rank that was cut off finished another meanwhile: all wait for the order to go back to that one."""
    context = replace(alone(environ={"OMP_NUM_THREADS": "1"}), recovers=True, generation=1)
    manifest = Manifest({"step": 4}, "", "", "SGD", {}, {}, {})
    folder = open_folder(tmp_path / "step-000004")
    folder.make()
    manifest.write(folder)
    gone, there = str(tmp_path / "step-000002"), str(tmp_path / "step-000004")
    with pytest.raises(CheckpointError, match="never finished"):
        worker._checkpoint(gone, context)  # the run's own beginning: nobody orders anything else
    context.order = {"action": "rewind", "checkpoint": gone}

    def order_again() -> None:
        while context.status()["waits"] != 1:
            time.sleep(0.01)
        context.give_order({"action": "rewind", "checkpoint": there, "place": {"generation": 2}})

    threading.Thread(target=order_again, daemon=True).start()
    found = worker._checkpoint(gone, context)
    assert found is not None
    assert found.position["step"] == 4
    assert "step-000002/manifest.json" in context.status()["not_joined"]


def test_a_checkpoint_is_loaded_when_the_groups_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are formed in seconds, by ranks that are ready; how long each then loads is another matter."""
    made, losing = trainer(None)
    losing.has_lost = True
    happened: list[str] = []
    formed = Generation.formed

    def noted(generation: Generation, mesh: Mesh) -> None:
        happened.append("formed")
        formed(generation, mesh)

    monkeypatch.setattr(Generation, "formed", noted)
    stored = {"step": 1, "how_to_run": None}
    made.resume = SimpleNamespace(
        position=stored, load_into=lambda network, optimizer: happened.append("loaded")
    )  # type: ignore[assignment]
    assert made.fit()["steps"] == NUM_STEPS
    assert happened == ["formed", "loaded"]


@pytest.mark.parametrize("action", ["apply", "discard", "rewind"])
def test_a_newcomer_opens_no_checkpoint_but_one_to_go_back_to(
    action: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """That which the run began from may be retired by now."""
    opened: list[str] = []
    order = {"action": action, "place": {"generation": 1, "rank": 0}}
    context = replace(alone(environ={"OMP_NUM_THREADS": "1"}), recovers=True, generation=-1, rank=-1)
    monkeypatch.setattr(
        context,
        "await_order",
        lambda **state: {**order, "checkpoint": "newest"} if action == "rewind" else order,
    )
    monkeypatch.setattr(Checkpoint, "open", opened.append)
    monkeypatch.setattr(worker, "Trainer", lambda *_, **__: SimpleNamespace(fit=dict))
    config = Config.from_dict(CONFIG)
    plan = make_plan(config, spec_of(make_network(config, load_data("digits"))), local_cluster(1, "here"))
    worker.train_worker(Job("train", config, plan, str(tmp_path), "retired", str(tmp_path / "gone")), context)
    assert opened == (["newest"] if action == "rewind" else [])


def test_a_group_that_could_not_be_formed_leaves_no_trace() -> None:
    """Ranks meet under a group's name, which torch counts up at every try, also at those that fail."""
    context = alone(environ={"OMP_NUM_THREADS": "1"})
    for _ in range(2):
        with pytest.raises(RuntimeError), process_group(replace(context, world_size=2), timeout_s=0.3):
            pytest.fail("rank 1 is not there")
    with process_group(context):
        assert dist.group.WORLD is not None
        assert dist.group.WORLD.group_name == "0"
