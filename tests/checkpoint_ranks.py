"""What the ranks of the checkpoint tests do; importable by them."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import fsspec  # type: ignore[import-untyped]
import torch
from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]
from parity_cases import seeded
from safetensors.torch import load_file
from torch import Tensor

from anabranch.blocks.convert import prepare
from anabranch.blocks.random import fold
from anabranch.runtime import checkpoints, durable
from anabranch.runtime.branch_state import by_branch
from anabranch.runtime.checkpoint import Checkpoint
from anabranch.runtime.checkpoints import Checkpoints
from anabranch.runtime.config import OptimizerConfig
from anabranch.runtime.deal import deal_step
from anabranch.runtime.errors import CheckpointError
from anabranch.runtime.loss import cross_entropy
from anabranch.runtime.manifest import FileRecord, Manifest, folder_name, step_of
from anabranch.runtime.mesh import make_mesh
from anabranch.runtime.model_spec import spec_of
from anabranch.runtime.optimizer import make_optimizer
from anabranch.runtime.parallel_network import ParallelNetwork, branch_tensors, parallelize
from anabranch.runtime.pending_save import PendingSave, Record
from anabranch.runtime.reference import ReferenceStep
from anabranch.runtime.step import TrainStep
from anabranch.runtime.storage import Folder, LocalFolder, open_folder
from anabranch.runtime.tensor_file import save_file
from anabranch.runtime.verify import Trial, micro_batches
from anabranch.schedulers import BranchPlacement, Plan

SAMPLE = BranchPlacement("sample")
CONFIG_TOML, PLAN_TOML = "[train]\nseed = 0\n", "[mesh]\ndata = 1\n"
OPTIMIZERS = {"sgd": OptimizerConfig(lr=0.05), "adamw": OptimizerConfig(name="adamw", lr=0.01)}


def branches(*held: tuple[int, ...]) -> BranchPlacement:
    return BranchPlacement("branch", held)


PLACEMENTS: dict[tuple[str, str], list[BranchPlacement]] = {  # by block: five branches each; 3, 2, 2; 3 each
    ("basic", "uneven"): [
        branches((1, 4), (0, 2, 3)), SAMPLE, branches((), (0, 1, 2, 3, 4)), branches((0, 1, 2), (3, 4))
    ],
    ("basic", "mixed"): [SAMPLE, branches((0, 1, 2, 3), (4,)), branches((2, 3), (0, 1, 4)), SAMPLE],
    ("unequal", "uneven"): [branches((2,), (0, 1)), branches((), (0, 1)), branches((), (0, 1))],
    ("unequal", "mixed"): [SAMPLE, branches((1,), (0,)), branches((1,), (0,))],
    ("tuple", "uneven"): [branches((1,), (0, 2)), SAMPLE],
}  # fmt: skip


def make_plan(network: str, data: int, branch: int, name: str = "sample") -> Plan:
    """Of the network's blocks: all "sample", or the placements of that name."""
    blocks = spec_of(seeded(network)).by_name
    placements = PLACEMENTS.get((network, name), [SAMPLE] * len(blocks))
    edges: Any = ("replicated", "sample") if branch > 1 else ("sample", "sample")
    return Plan(data, branch, dict(zip(blocks, placements, strict=True)), *edges)


@dataclass(frozen=True)
class Job:
    """Training steps start..stop under a plan, from a checkpoint (if start > 0), saved after those of `save_after`."""

    network: str
    plan: Plan
    run_dir: Path
    stop: int
    optimizer: str = "sgd"
    precision: str = "fp64"
    start: int = 0
    source: Path | None = None
    save_after: tuple[int, ...] = field(default=())


def place(
    network: str, plan: Plan, precision: str, optimizer: str
) -> tuple[ParallelNetwork, torch.optim.Optimizer]:
    whole = seeded(network).to(torch.float64 if precision == "fp64" else torch.float32)
    parallel = parallelize(whole, plan, make_mesh(plan.data, plan.branch))
    return parallel, make_optimizer(OPTIMIZERS[optimizer], parallel.parameters())


def work(rank: int, world_size: int, jobs: list[Job]) -> None:
    """Does each job."""
    for job in jobs:
        parallel, optimizer = place(job.network, job.plan, job.precision, job.optimizer)
        if job.source is not None:
            Checkpoint.open(job.source).load_into(parallel, optimizer)
            assert_holds(parallel, optimizer, tensors_of(job.source))
        step, case = TrainStep(parallel, optimizer, cross_entropy(), precision=job.precision), trial()
        for index in range(job.start, job.stop):
            ids, deals = batch(index, job.plan.data, job.plan.branch)
            step.gradients(micro_batches(parallel, case, ids, deals, fold(0, index), "cpu"))
            step.apply(OPTIMIZERS[job.optimizer].lr)
            if index + 1 in job.save_after:
                position = {"epoch": 0, "step_in_epoch": index + 1, "step": index + 1}
                saved = Checkpoints(job.run_dir)
                saved.save(
                    parallel, optimizer, position=position, config_toml=CONFIG_TOML, plan_toml=PLAN_TOML
                )
                saved.finish(parallel)


def trial() -> Trial:
    """40 random samples."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(40, 2, 8, 8, generator=generator, dtype=torch.float64)
    return Trial(x, torch.randint(5, (40,), generator=generator), 16, 4)


def batch(index: int, data: int, branch: int) -> tuple[Tensor, Any]:
    """Step `index`'s samples, 16 or (each third step) 8 of 40, and their deal in BN groups of 4."""
    start = index % 3 * 16
    ids = torch.arange(start, min(start + 16, 40))
    return ids, deal_step(len(ids), bn_batch_size=4, data=data, branch=branch, samples=None, accumulation=1)


def one_device(network: str, optimizer: str, steps: int) -> torch.nn.Module:
    """The network trained by the reference."""
    whole = prepare(seeded(network)).double()
    case = trial()
    reference = ReferenceStep(
        whole, make_optimizer(OPTIMIZERS[optimizer], whole.parameters()), cross_entropy()
    )
    for index in range(steps):
        ids, deals = batch(index, 1, 1)
        reference.gradients(case.x[ids], case.target[ids], ids, deals, fold(0, index))
        reference.apply(OPTIMIZERS[optimizer].lr)
    return whole


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint by key, without its manifest."""
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


def assert_holds(
    network: ParallelNetwork, optimizer: torch.optim.Optimizer, stored: dict[str, Tensor]
) -> None:
    """Every tensor here is, to the bit, the stored one of each of its branches."""
    owners, compared = branch_tensors(network), 0
    aliases = {
        id(p): sorted(n for n, q in network.named_parameters(remove_duplicate=False) if q is p)
        for p in network.parameters()
    }
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        name = aliases[id(tensor)][0] if id(tensor) in aliases else name
        for key, part in by_branch(name, tensor, owners).items():
            assert torch.equal(part, stored[f"network/{key}"]), key
            compared += 1
        for slot, value in optimizer.state.get(tensor, {}).items():
            assert isinstance(value, Tensor)
            for key, part in by_branch(name, tensor, owners).items():
                mine = by_branch(name, value, owners)[key] if value.shape == tensor.shape else value
                assert torch.equal(mine, stored[f"optimizer.{slot}/{key}"]), (slot, key)
                assert mine.shape == part.shape or slot == "step"
                compared += 1
    with_state = sum(bool(optimizer.state.get(p)) for p in network.parameters() if p.numel())
    assert with_state == sum(p.numel() > 0 for p in network.parameters())
    assert compared > 20


# ------------------------------------------------------------------------------------------------- killed while saving


class Crash(BaseException):
    """Ends a save as a kill would: nothing catches it."""


def stamp(network: ParallelNetwork, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Makes every number of the state the step's, so that a mixture of two checkpoints shows."""
    with torch.no_grad():
        for tensor in [*network.parameters(), *network.buffers()]:
            tensor.fill_(step)
        for parameter in network.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.full_like(parameter, step)


def stamped(checkpoint: Checkpoint) -> int:
    """The step of a whole checkpoint, whose every number is that step."""
    checkpoint.verify()
    stored, step = tensors_of(checkpoint.path), int(checkpoint.position["step"])
    assert stored.keys() == checkpoint.manifest.tensors.keys()
    assert len(stored) > 20
    assert all(bool((tensor == step).all()) for tensor in stored.values())
    return step


def save_stamped(
    run_dir: Path, place_of: tuple[ParallelNetwork, torch.optim.Optimizer], step: int, keep: int = 2
) -> None:
    stamp(*place_of, step)
    position = {"epoch": 0, "step_in_epoch": step, "step": step}
    saved = Checkpoints(run_dir, keep)
    saved.save(*place_of, position=position, config_toml=CONFIG_TOML, plan_toml=PLAN_TOML)
    saved.finish(place_of[0])


def tuple_place(world_size: int) -> tuple[ParallelNetwork, torch.optim.Optimizer]:
    return place(
        "tuple", make_plan("tuple", 1, world_size, "uneven" if world_size == 2 else "sample"), "fp32", "sgd"
    )


def save_steps(rank: int, world_size: int, run_dir: Path, steps: list[int], keep: int = 2) -> None:
    """Saves stamped checkpoints of these steps."""
    here = tuple_place(world_size)
    for step in steps:
        save_stamped(run_dir, here, step, keep)


def save_tested(rank: int, world_size: int, run_dir: Path, accuracies: dict[int, float | None]) -> None:
    """Saves these steps with these test accuracies, two and the best of which stay."""
    network, optimizer = tuple_place(world_size)
    saved = Checkpoints(run_dir, 2, keep_best=True)
    for step, accuracy in accuracies.items():
        position = {"step": step} if accuracy is None else {"step": step, "test_accuracy": accuracy}
        saved.save(network, optimizer, position=position, config_toml=CONFIG_TOML, plan_toml=PLAN_TOML)
        saved.finish(network)


def save_until_killed(rank: int, world_size: int, run_dir: Path, moments: Sequence[float]) -> None:
    """Saves checkpoint after checkpoint, noting each finished one, and is killed so many saves later.

    moments: by rank, after its second save, in times of that one.
    """
    here = tuple_place(world_size)
    newest = Checkpoints(run_dir).newest()
    first = 1 if newest is None else stamped(newest) + 1
    torch.distributed.barrier()  # none starts to save while another still looks
    for step in itertools.count(first):
        begun = time.monotonic()
        save_stamped(run_dir, here, step)
        (run_dir / f"finished-{rank}").write_text(f"{step:09d}")
        if step == first + 1:
            delay_s = moments[rank] * (time.monotonic() - begun)
            threading.Timer(delay_s, os.kill, (os.getpid(), signal.SIGKILL)).start()


def crash_everywhere(rank: int, world_size: int, folder: Path, damaged: bool) -> tuple[int, int]:
    """Ends the save of step 3 at its first, second, … change of the file system, each in a folder of its own.

    There are checkpoints 1 and 2, what a killed run left of another and (if `damaged`) a torn 3. Returns the number of
    such moments and after how many of them checkpoint 3 was there.
    """
    here = tuple_place(world_size)
    template = folder / "template"
    for step in (1, 2, 3) if damaged else (1, 2):
        save_stamped(template, here, step, keep=3)
    leftover = template / "checkpoints" / "step-000000"
    leftover.mkdir()
    (leftover / "rank-0000.safetensors").write_bytes(b"half")
    if damaged:
        flip_bit(next((template / "checkpoints" / "step-000003").glob("rank-0000-*.safetensors")))
    done = 0
    for moment in itertools.count():
        run_dir = folder / f"run{moment}"
        shutil.copytree(template, run_dir)
        survived = crashes_at(moment, lambda run_dir=run_dir: save_stamped(run_dir, here, 3))  # type: ignore[misc]
        told: list[str] = []
        newest = Checkpoints(run_dir).newest(told.append)
        assert newest is not None, f"none left at moment {moment}"
        step = stamped(newest)
        assert step in (2, 3), f"{step} is the newest at moment {moment}"
        assert not told or (damaged and step == 2), told
        done += step == 3
        assert step == 3 or not survived
        save_stamped(run_dir, here, 3)  # the run goes on
        assert names_in(run_dir / "checkpoints") == ["step-000002", "step-000003"]
        left = names_in(run_dir / "checkpoints/step-000003")
        assert [name[:9] for name in left] == ["manifest.", "rank-0000"]
        again = Checkpoints(run_dir).newest()
        assert again is not None
        assert stamped(again) == 3
        if survived:
            return moment, done
        shutil.rmtree(run_dir)
    raise AssertionError


def crashes_at(moment: int, save: Callable[[], object], thread: int | None = None) -> bool:
    """Runs `save` with a crash before its moment-th change of the file system; whether it came through.

    thread: the one whose changes count; None: every thread's.
    """
    left = itertools.count(moment, -1)

    def tick() -> bool:
        return thread in (None, threading.get_ident()) and next(left) == 0

    def before(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if tick():
                raise Crash
            return function(*args, **options)

        return call

    def half_bytes(path: Path, content: bytes) -> int:
        if tick():
            with path.open("wb") as file:
                file.write(content[: len(content) // 2])
            raise Crash
        return real_write_bytes(path, content)

    def half_tensors(tensors: dict[str, Tensor], path: Path, rest: Callable[[], object]) -> tuple[int, str]:
        written = real_save_file(tensors, path, rest)
        if tick():
            os.truncate(path, path.stat().st_size // 2)
            raise Crash
        return written

    real_write_bytes, real_save_file = Path.write_bytes, save_file
    with ExitStack() as patches:
        for name in ("fsync", "replace", "mkdir", "unlink", "rmdir", "open"):
            patches.enter_context(mock.patch.object(os, name, before(getattr(os, name))))
        patches.enter_context(mock.patch.object(Path, "write_bytes", half_bytes))
        patches.enter_context(mock.patch.object(durable, "save_file", half_tensors))
        try:
            save()
        except Crash:
            return False
    return True


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip_bit(file: Path) -> None:
    """Changes one bit in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


# ---------------------------------------------------------------------------------------------------------- going wrong


def message_of(call: Callable[[], object]) -> str:
    """The text of the error that it raises."""
    try:
        call()
    except (CheckpointError, OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def load_parts(rank: int, world_size: int, cases: list[tuple[Path, str]]) -> list[str]:
    """The error of loading each checkpoint into this rank's part of each network, uneven."""
    found = []
    for folder, network in cases:
        parallel, optimizer = place(network, make_plan(network, 1, 2, "uneven"), "fp64", "sgd")
        before = [tensor.clone() for tensor in parallel.state_dict().values()]
        found.append(message_of(lambda: Checkpoint.open(folder).load_into(parallel, optimizer)))  # noqa: B023
        assert (
            all(torch.equal(a, b) for a, b in zip(before, parallel.state_dict().values(), strict=True))
            or not found[-1]
        )
    return found


def save_apart(rank: int, world_size: int, folder: Path) -> str:
    """What saving says where each rank has a run folder of its own."""
    here = tuple_place(world_size)
    return message_of(lambda: save_stamped(folder / f"rank{rank}", here, 1))


# ------------------------------------------------------------------------------------------------------- asynchronously


def save_behind(rank: int, world_size: int, run_dir: Path) -> list[str]:
    """Saves steps 1 to 4 while the state goes on changing: 2 fails on rank 1's disk, 3 on rank 0's.

    What `on_failure` was told, then what `finish` raised after 3 and gave after 4.
    """
    network, optimizer = tuple_place(world_size)
    told: list[str] = []
    saved = Checkpoints(run_dir, on_failure=told.append)
    allowed = {step: threading.Event() for step in (1, 2, 3, 4)}

    def save_file_when_allowed(
        tensors: dict[str, Tensor], path: Path, rest: Callable[[], object]
    ) -> tuple[int, str]:
        step = step_of(path.parent.name) or 0
        assert allowed[step].wait(60), "the save was not meant to be waited for"
        if step == (2 if rank else 3):
            raise OSError(28, "No space left on device")
        return save_file(tensors, path, rest)

    ended = []
    with mock.patch.object(durable, "save_file", save_file_when_allowed):
        for step in (1, 2, 3, 4):
            stamp(network, optimizer, step)
            position = {"epoch": 0, "step_in_epoch": step, "step": step}
            saved.save(network, optimizer, position=position, config_toml=CONFIG_TOML, plan_toml=PLAN_TOML)
            stamp(network, optimizer, 99)  # the next training step, long before anything is written
            allowed[step].set()
            if step >= 3:
                ended.append(message_of(lambda: saved.finish(network)))
    return [*told, *ended]


def save_unanswered(rank: int, world_size: int, run_dir: Path) -> list[str]:
    """Saves steps 1 to 4, one of which stays: the store gives no answer where 2 begins and where 3 has been written.

    What `on_failure` was told, then what `finish` raised after 2, 3 and 4.
    """
    network, optimizer = tuple_place(world_size)
    told: list[str] = []
    saved, no_answer = Checkpoints(run_dir, 1, on_failure=told.append), OSError("no answer")
    broken = {
        2: mock.patch.object(LocalFolder, "make", side_effect=no_answer),
        3: mock.patch.object(checkpoints, "finished", side_effect=no_answer),
    }
    ended = []
    for step in (1, 2, 3, 4):
        stamp(network, optimizer, step)
        position = {"epoch": 0, "step_in_epoch": step, "step": step}
        with broken.get(step, nullcontext()):
            saved.save(network, optimizer, position=position, config_toml=CONFIG_TOML, plan_toml=PLAN_TOML)
            ended.append(message_of(lambda: saved.finish(network)))
    return [*told, *ended]


def replaced_behind(rank: int, world_size: int, run_dir: Path) -> str:
    """What `finish` says where rank 1's process is another than the one that began the save, and wrote nothing."""
    network, optimizer = tuple_place(world_size)
    stamp(network, optimizer, 1)
    saved = Checkpoints(run_dir)
    dead = mock.patch.object(PendingSave, "_run") if rank else nullcontext()
    with dead:
        position = {"epoch": 0, "step_in_epoch": 1, "step": 1}
        saved.save(network, optimizer, position=position, config_toml=CONFIG_TOML, plan_toml=PLAN_TOML)
    return message_of(lambda: (Checkpoints(run_dir) if rank else saved).finish(network))


def cancelled_behind(rank: int, world_size: int, run_dir: Path) -> list[str]:
    """A save is cancelled while rank 0 waits for rank 1's part, which comes late, after the same step was saved again.

    What `on_failure` was told.
    """
    network, optimizer = tuple_place(world_size)
    told: list[str] = []
    saved = Checkpoints(run_dir, on_failure=told.append)
    late: list[PendingSave] = []
    position = {"epoch": 0, "step_in_epoch": 1, "step": 1}
    texts: dict[str, Any] = {"position": position, "config_toml": CONFIG_TOML, "plan_toml": PLAN_TOML}
    stamp(network, optimizer, 7)
    with mock.patch.object(PendingSave, "_run", lambda save: late.append(save)) if rank else nullcontext():
        saved.save(network, optimizer, **texts)
    if rank == 0:  # 1 is a process that was stopped: it hears of nothing
        saved.cancel("all go back")
    stamp(network, optimizer, 1)
    again = Checkpoints(run_dir)
    again.save(network, optimizer, **texts)
    again.finish(network)
    for each in late:  # a process that was stopped goes on
        each._run()
    again.finish(network)
    newest = Checkpoints(run_dir).newest()
    assert newest is not None
    newest.load_into(network, optimizer)
    assert all(bool((parameter == 1).all()) for parameter in network.parameters())
    return told


def crash_either(folder: Path, crashing: int) -> tuple[int, int]:
    """Two ranks' threads write checkpoint 3, and one ends at its first, second, … change of the file system.

    Afterwards checkpoint 2 is the newest, or 3 is whole. How many such moments there are; after how many 3 is there.
    """
    done = 0
    for moment in itertools.count():
        store = open_folder(folder / f"run{moment}" / "checkpoints")
        for step in (2, 3):
            target = store.child(folder_name(step))
            target.make()
            saves = two_writers(target, step, None if step == 2 else (crashing, moment))
            survived = True
            for save in reversed(saves):
                try:
                    save.join()
                except Crash:
                    survived = False
                    saves[0].give_up("the other rank is dead")
                except OSError:
                    survived = False
        newest = Checkpoints(folder / f"run{moment}").newest(lambda text: None)
        assert newest is not None, f"none left at moment {moment}"
        newest.verify()
        stored, step = tensors_of(newest.path), int(newest.position["step"])
        assert stored.keys() == newest.manifest.tensors.keys() == {"0", "1"}
        assert all(bool((tensor == step).all()) for tensor in stored.values())
        assert step == 3 or not survived
        done += step == 3
        if survived:
            assert names_in(newest.path) == [
                "manifest.json",
                "rank-0000-0123456789abcdef.safetensors",
                "rank-0001-0123456789abcdef.safetensors",
            ]
            return moment, done
    raise AssertionError


def two_writers(folder: Folder, step: int, crash: tuple[int, int] | None) -> list[PendingSave]:
    """Both ranks' parts of one save, in threads of this process."""

    def commit(records: dict[int, Record]) -> None:
        written = [record["file"] for record in records.values()]
        files = {file["name"]: FileRecord(file["bytes"], file["sha256"]) for file in written}
        keys = {key: file["name"] for file in written for key in file["keys"]}
        Manifest({"step": step}, CONFIG_TOML, PLAN_TOML, "SGD", files, keys, {}).write(folder)

    def part(rank: int) -> PendingSave:
        tensors = {str(rank): torch.full((64,), float(step))}
        return PendingSave(
            folder,
            rank,
            "0123456789abcdef",
            tensors,
            list(tensors),
            [],
            [] if rank else [1],
            None if rank else commit,
            lambda text: None,
        )

    real = PendingSave._run

    def run(save: PendingSave) -> None:
        rank = save._rank
        if crash is None or rank != crash[0]:
            return real(save)
        crashes_at(crash[1], lambda: real(save), threading.get_ident())
        return None

    with mock.patch.object(PendingSave, "_run", run):
        return [part(0), part(1)]


# ------------------------------------------------------------------------------------------------------------- at a URL


def save_at_url(rank: int, world_size: int, run_dir: Path, url: str) -> None:
    """Saves steps 1 to 3, and loads the last."""
    network, optimizer = tuple_place(world_size)
    saved = Checkpoints(run_dir, url=url)
    for step in (1, 2, 3):
        stamp(network, optimizer, step)
        position = {"epoch": 0, "step_in_epoch": step, "step": step}
        saved.save(network, optimizer, position=position, config_toml=CONFIG_TOML, plan_toml=PLAN_TOML)
        assert saved.finish(network) == f"{url}/step-{step:06d}"
    stamp(network, optimizer, 9)
    Checkpoint.open(f"{url}/step-000003").load_into(network, optimizer)
    assert all(bool((p == 3).all()) for p in network.parameters())


class Bucket(LocalFileSystem):  # type: ignore[misc]
    """Files that cannot be renamed; its `left`-th call from now on breaks off, half done."""

    protocol = "bucket"
    cachable = False
    left = -1

    def _tick(self) -> bool:
        Bucket.left -= 1
        return Bucket.left == -1

    def mv(self, *args: Any, **options: Any) -> None:
        raise NotImplementedError

    mv_file = rename = move = mv

    def pipe_file(self, path: str, value: bytes, **options: Any) -> None:
        if self._tick():
            super().pipe_file(path, value[: len(value) // 2])
            raise ConnectionResetError("bucket")
        super().pipe_file(path, value)

    def put_file(self, lpath: str, rpath: str, **options: Any) -> None:
        if self._tick():
            super().pipe_file(rpath, Path(lpath).read_bytes()[:100])
            raise RuntimeError("a service's own error")
        super().put_file(lpath, rpath)

    def rm_file(self, path: str) -> None:
        if self._tick():
            raise ConnectionResetError("bucket")
        super().rm_file(path)

    def rm(self, path: str, **options: Any) -> None:
        if self._tick():
            raise ConnectionResetError("bucket")
        super().rm(path, **options)


def save_without_renaming(rank: int, world_size: int, folder: Path) -> int:
    """Breaks off the save of step 3 at its first, second, … call; the next one is whole. How many calls there are."""
    fsspec.register_implementation("bucket", Bucket)
    network, optimizer = tuple_place(world_size)

    def save(saved: Checkpoints, step: int) -> str:
        stamp(network, optimizer, step)
        position = {"epoch": 0, "step_in_epoch": step, "step": step}
        saved.save(network, optimizer, position=position, config_toml=CONFIG_TOML, plan_toml=PLAN_TOML)
        return message_of(lambda: saved.finish(network))

    for call in itertools.count():
        Bucket.left = -1
        url = f"bucket://{folder}/run{call}"
        told: list[str] = []
        saved = Checkpoints(folder, url=url, on_failure=told.append)
        assert [save(saved, step) for step in (1, 2)] == ["", ""]
        Bucket.left = call
        failed = save(saved, 3)
        survived = Bucket.left >= 0
        Bucket.left = -1
        assert bool(told) != survived, (call, told)
        stays = any(re.search("step-000001 cannot be removed .*: remove it by hand", text) for text in told)
        assert bool(failed) == (not survived and not stays), "an old one that stays is no failure of the save"
        newest = Checkpoints(folder, url=url).newest(lambda text: None)
        assert newest is not None, f"none left at call {call}"
        step = int(newest.position["step"])
        Checkpoint.open(newest.folder).load_into(network, optimizer)
        assert step == 3 if stays or survived else step in (2, 3)
        assert all(bool((p == step).all()) for p in network.parameters())
        assert save(saved, 4) == ""
        assert "step-000004" in saved.folder.names()
        if survived:
            return call
    raise AssertionError
