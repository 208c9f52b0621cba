"""Checkpoints: any plan to any plan, to the bit under the same one; a good one left after any kill; torn ones named."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from checkpoint_ranks import (
    Job,
    batch,
    cancelled_behind,
    crash_either,
    crash_everywhere,
    flip_bit,
    load_parts,
    make_plan,
    names_in,
    one_device,
    replaced_behind,
    save_apart,
    save_behind,
    save_steps,
    save_tested,
    save_unanswered,
    save_until_killed,
    stamped,
    tensors_of,
    trial,
    work,
)
from parity_cases import NETWORKS, seeded
from ranks import run_ranks
from safetensors.torch import load_file

from anabranch.blocks import build
from anabranch.cluster.actors import Worker
from anabranch.cluster.failures import Failure
from anabranch.runtime import checkpoints, pending_save
from anabranch.runtime.checkpoint import Checkpoint
from anabranch.runtime.checkpoints import Checkpoints
from anabranch.runtime.errors import CheckpointError, ConfigError, UnreadableError
from anabranch.runtime.export import export_state
from anabranch.runtime.launch import alone
from anabranch.runtime.pending_save import PendingSave
from anabranch.runtime.recovery_policy import _retries
from anabranch.runtime.storage import LocalFolder

CASES = [("unequal", "sgd"), ("unequal", "adamw"), ("basic", "sgd"), ("basic", "adamw")]
MESHES = {"1x1": (1, 1, "sample"), "2x1": (2, 1, "sample"), "1x2": (1, 2, "uneven"), "2x2": (2, 2, "mixed")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps of each case on 1x2, uneven, saved after two and after four; in a folder per case and precision."""
    folder = tmp_path_factory.mktemp("undisturbed")
    jobs = []
    for network, optimizer in CASES:
        plan = make_plan(network, 1, 2, "uneven")
        for precision in ("fp64", "fp32"):
            run_dir = folder / f"{network}-{optimizer}-{precision}"
            jobs.append(Job(network, plan, run_dir, 4, optimizer, precision, save_after=(2, 4)))
    run_ranks(2, work, jobs)
    return folder


@pytest.fixture(scope="module")
def resumed(undisturbed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps three and four of each case from its checkpoint of step two, on every mesh; saved after four.

    The ranks check that what they hold after loading is what is stored, to the bit.
    """
    folder = tmp_path_factory.mktemp("resumed")
    jobs: dict[int, list[Job]] = {}
    for mesh, (data, branch, name) in MESHES.items():
        for network, optimizer in CASES:
            plan = make_plan(network, data, branch, name)
            for precision in ("fp64", "fp32") if mesh == "1x2" else ("fp64",):
                run_dir = folder / f"{mesh}-{network}-{optimizer}-{precision}"
                source = undisturbed / f"{network}-{optimizer}-{precision}/checkpoints/step-000002"
                job = Job(
                    network, plan, run_dir, 4, optimizer, precision, start=2, source=source, save_after=(4,)
                )
                jobs.setdefault(data * branch, []).append(job)
    for world_size, its_jobs in jobs.items():
        run_ranks(world_size, work, its_jobs)
    return folder


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize(("network", "optimizer"), CASES)
def test_goes_on_under_another_plan(
    undisturbed: Path, resumed: Path, network: str, optimizer: str, mesh: str
) -> None:
    """Two steps after loading, all state is that of the run that was not interrupted."""
    wanted = tensors_of(undisturbed / f"{network}-{optimizer}-fp64/checkpoints/step-000004")
    found = tensors_of(resumed / f"{mesh}-{network}-{optimizer}-fp64/checkpoints/step-000004")
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert float((found[key] - tensor).abs().max()) <= 1e-9 * max(1.0, float(tensor.abs().max())), key
    before = tensors_of(undisturbed / f"{network}-{optimizer}-fp64/checkpoints/step-000002")
    assert all(
        not torch.equal(before[key], tensor) for key, tensor in wanted.items() if tensor.is_floating_point()
    )


@pytest.mark.parametrize(("network", "optimizer"), CASES)
def test_same_plan_to_the_bit(undisturbed: Path, resumed: Path, network: str, optimizer: str) -> None:
    """In float32 under the same plan, nothing tells that the run was interrupted."""
    wanted = tensors_of(undisturbed / f"{network}-{optimizer}-fp32/checkpoints/step-000004")
    found = tensors_of(resumed / f"1x2-{network}-{optimizer}-fp32/checkpoints/step-000004")
    assert found.keys() == wanted.keys()
    assert [key for key, tensor in wanted.items() if not torch.equal(found[key], tensor)] == []


trained_alone = cache(one_device)  # not to be changed


@pytest.mark.parametrize(("network", "optimizer"), CASES)
@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_export(undisturbed: Path, tmp_path: Path, network: str, optimizer: str, ending: str) -> None:
    """The file is the state_dict of the reference, trained on one device, and loads strictly into a fresh network."""
    checkpoint = Checkpoint.open(undisturbed / f"{network}-{optimizer}-fp64/checkpoints/step-000004")
    report = export_state(
        checkpoint, NETWORKS[network]().double(), output := tmp_path / f"new/model.{ending}"
    )
    state = load_file(output) if ending == "safetensors" else torch.load(output, weights_only=True)
    plain = NETWORKS[network]().double()
    plain.load_state_dict(state, strict=True)
    assert report == {"output": str(output), "num_tensors": len(state), "bytes": output.stat().st_size}
    assert output.stat().st_mode & 0o777 == 0o666 & ~current_umask()
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    reference = trained_alone(network, optimizer, 4)
    for name, tensor in reference.state_dict().items():
        assert float((state[name] - tensor).abs().max()) <= 1e-9 * max(1.0, float(tensor.abs().max())), name
    ids, _ = batch(0, 1, 1)
    x = trial().x[ids]
    torch.testing.assert_close(plain.eval()(x), reference.eval()(x), rtol=0, atol=1e-9)


def test_export_of_another_kind(undisturbed: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(undisturbed / "basic-sgd-fp64/checkpoints/step-000004")
    with pytest.raises(ConfigError, match=r"'\.bin': give it \.safetensors, or \.pt"):
        export_state(checkpoint, seeded("basic"), tmp_path / "model.bin")
    (tmp_path / "taken.pt").mkdir()
    (tmp_path / "file").touch()
    for output in ("taken.pt", "file/model.pt", "file/model.safetensors"):
        with pytest.raises(
            ConfigError, match=f"{output} cannot be written: .*; choose another with --output"
        ):
            export_state(checkpoint, seeded("basic").double(), tmp_path / output)


def test_what_a_checkpoint_holds(undisturbed: Path, resumed: Path) -> None:
    """Position and texts come back; keys name branches; a rank with nothing to write wrote nothing; no pickles."""
    folder = undisturbed / "basic-sgd-fp64/checkpoints/step-000004"
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.position == {"epoch": 0, "step_in_epoch": 4, "step": 4}
    assert (checkpoint.config_toml, checkpoint.plan_toml) == ("[train]\nseed = 0\n", "[mesh]\ndata = 1\n")
    tensors = checkpoint.manifest.tensors
    assert re.fullmatch(r"rank-0000-[0-9a-f]{16}\.safetensors", tensors["network/stem.conv.weight"])
    key = (
        "blocks.stage1.block1.convs.0.weight"  # branches 1 and 4 on the first rank, 0, 2 and 3 on the second
    )
    writers = [int(tensors[f"optimizer.momentum_buffer/{key}@{b}"][5:9]) for b in range(5)]
    assert writers == [1, 0, 1, 1, 0]
    for file in folder.iterdir():
        assert file.name == "manifest.json" or file.read_bytes()[8:10] == b'{"'
    mixed = (resumed / "2x2-basic-sgd-fp64/checkpoints/step-000004").iterdir()  # its second replica is a copy
    assert sorted(path.name[:9] for path in mixed) == ["manifest.", "rank-0000", "rank-0001"]


def test_other_network(undisturbed: Path) -> None:
    """Loading what is not ours says which tensors differ, on each rank's part, and changes nothing."""
    runs = {path.name: path / "checkpoints/step-000004" for path in undisturbed.iterdir()}
    wrong = (
        r"^checkpoint .*/step-000004 cannot be used: it is of another network: .* its config.toml describes$"
    )
    with pytest.raises(CheckpointError, match=wrong) as caught:  # four branches, not five
        Checkpoint.open(runs["basic-sgd-fp64"]).load_into(seeded("basic4").double(), None)
    assert " tensors are unexpected (network/blocks.stage1.block1.convs.0.weight@4, " in str(caught.value)
    with pytest.raises(CheckpointError, match=r"float64 there and float32 here: go on with the precision"):
        Checkpoint.open(runs["basic-sgd-fp64"]).load_into(seeded("basic"), None)
    network = seeded("basic").double()
    with pytest.raises(CheckpointError, match="its optimizer is SGD, this run's is AdamW: go on with SGD"):
        Checkpoint.open(runs["basic-sgd-fp64"]).load_into(network, torch.optim.AdamW(network.parameters()))
    options: dict[str, Any] = {
        "depth": 0,
        "num_branches": 5,
        "blocks_per_stage": (2, 1, 1),
        "in_channels": 2,
        "num_classes": 3,
    }
    narrow = build("multi_resnet", **options).double()
    shapes = r"2 tensors have another shape \(network/head.fc.bias: \(5,\) stored, \(3,\) here"
    with pytest.raises(CheckpointError, match=shapes):
        Checkpoint.open(runs["basic-sgd-fp64"]).load_into(narrow, None)
    parts = [runs["basic-sgd-fp64"], runs["unequal-sgd-fp64"]]
    for messages in run_ranks(2, load_parts, [(p, n) for p in parts for n in ("basic", "unequal")]):
        assert messages[0] == messages[3] == ""
        assert all("tensors are missing" in messages[i] and "are unexpected" in messages[i] for i in (1, 2))


# -------------------------------------------------------------------------------------------------- torn and forged


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the checkpoints 1 and 2 of two ranks, every number of which is 1 or 2; its files without attempts."""
    folder = tmp_path_factory.mktemp("saved")
    run_ranks(2, save_steps, folder, [1, 2])
    for file in folder.glob("checkpoints/*/rank-*"):
        manifest = file.with_name("manifest.json")
        plain = f"{file.name[:9]}.safetensors"
        manifest.write_text(manifest.read_text().replace(file.name, plain))
        rewritten(lambda body: None)(file.parent)
        file.rename(file.with_name(plain))
    return folder


@pytest.fixture
def run_dir(two_saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(two_saved, tmp_path / "run"))


def rewritten(change: Callable[[dict[str, Any]], object], sign: bool = True) -> Callable[[Path], object]:
    """Changes the manifest as someone would who can also compute hashes."""

    def tear(folder: Path) -> None:
        body = json.loads((folder / "manifest.json").read_text())
        change(body)
        if sign:
            del body["sha256"]
            body["sha256"] = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        (folder / "manifest.json").write_text(json.dumps(body))

    return tear


def renamed(name: str) -> Callable[[dict[str, Any]], object]:
    def change(body: dict[str, Any]) -> None:
        body["files"][name] = body["files"].pop("rank-0001.safetensors")
        body["tensors"] = {k: name if v == "rank-0001.safetensors" else v for k, v in body["tensors"].items()}

    return change


def halve(name: str) -> Callable[[Path], object]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


FILE, MANIFEST = "rank-0001.safetensors", "manifest.json"
TORN: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (halve(FILE), rf"{FILE} has \d+ bytes, the manifest says \d+"),
    "one bit": (lambda folder: flip_bit(folder / FILE), f"{FILE} was altered: its sha256 is"),
    "missing": (lambda folder: (folder / FILE).unlink(), rf"{FILE} is missing, the manifest names it with \d+ bytes"),
    "a folder": (lambda folder: (folder / FILE).rename(folder / "x").with_name(FILE).mkdir(), f"{FILE} is missing"),
    "half a manifest": (halve(MANIFEST), f"{MANIFEST} is not JSON"),
    "empty manifest": (lambda folder: (folder / MANIFEST).write_text(""), f"{MANIFEST} is not JSON"),
    "deep manifest": (lambda folder: (folder / MANIFEST).write_text("[" * 200_000), f"{MANIFEST} is not JSON"),
    "binary manifest": (lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe{}"), f"{MANIFEST} is not JSON"),
    "list": (lambda folder: (folder / MANIFEST).write_text("[1]"), "is no checkpoint's manifest"),
    "position altered": (rewritten(lambda b: b["position"].update(step=7), sign=False), f"{MANIFEST} was altered"),
    "schema 0": (rewritten(lambda b: b.update(schema=0)), "its schema is 0, not 1"),
    "schema as text": (rewritten(lambda b: b.update(schema="1")), "its schema is '1', not 1"),
    "path up": (rewritten(renamed("../step-000001/rank-0001.safetensors")), "only rank-….safetensors inside"),
    "absolute path": (rewritten(renamed("/etc/passwd")), "names a file '/etc/passwd': only"),
    "unknown file": (rewritten(lambda b: b["tensors"].update(x="rank-0009.safetensors")), "places x in"),
    "no step": (rewritten(lambda b: b["position"].clear()), "names no step"),
    "no plan": (rewritten(lambda b: b.pop("plan_toml")), "has other fields than schema 1: plan_toml"),
    "odd plan": (rewritten(lambda b: b.update(plan_toml=[])), "holds no str as plan_toml"),
    "odd size": (rewritten(lambda b: b["files"][FILE].update(bytes="9")), "which is no size and sha256"),
    "odd record": (rewritten(lambda b: b["files"].update({FILE: 3})), "not by bytes and sha256"),
}  # fmt: skip


@pytest.mark.parametrize("case", TORN)
def test_torn(run_dir: Path, case: str) -> None:
    """The error names the file, what is wrong and what to do; the previous checkpoint is used, and that is told."""
    tear, problem = TORN[case]
    folder = run_dir / "checkpoints/step-000002"
    tear(folder)
    with pytest.raises(CheckpointError, match=problem) as caught:
        Checkpoint.open(folder).verify()
    assert str(caught.value).endswith(
        f"; delete {folder}, the previous one is {run_dir / 'checkpoints/step-000001'}"
    )
    told: list[str] = []
    newest = Checkpoints(run_dir).newest(told.append)
    assert newest is not None
    assert stamped(newest) == 1
    assert told == [str(caught.value)]
    with pytest.warns(UserWarning, match="delete"):
        Checkpoints(run_dir).newest()


def no_answer() -> Iterator[Any]:
    """The ways in which a store refuses to give the newest checkpoint, which is whole."""
    refuses = OSError(5, "Input/output error")
    for name in ("local", "read", "size", "names"):
        with mock.patch.object(LocalFolder, name, side_effect=refuses) as patched:
            yield patched


def test_a_store_that_does_not_answer_has_lost_nothing(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No older one is gone on from, none is removed, nobody is told to delete it; and it is tried again."""
    monkeypatch.setattr(checkpoints, "_PAUSES_S", (0.0, 0.0))
    saved, told = Checkpoints(run_dir), list[str]()
    for refusing in no_answer():
        with pytest.raises(UnreadableError, match=r"cannot be read now \(Input/output error\)") as caught:
            saved.newest(told.append)
        assert "delete" not in str(caught.value)
        assert refusing.call_count == 3
        with pytest.raises(OSError, match="Input/output error"):
            saved._prepare(saved.folder.child("step-000002"), 2)
    files = (run_dir / "checkpoints/step-000002" / f"rank-000{rank}.safetensors" for rank in (0, 1))
    answers = [OSError(5, "Input/output error"), *map(nullcontext, files)]
    with mock.patch.object(LocalFolder, "local", side_effect=answers):
        newest = saved.newest(told.append)
    assert newest is not None
    assert stamped(newest) == 2
    assert told == []
    error = pickle.dumps(UnreadableError("cannot be read now"))
    assert _retries(Failure(0, "host", "", in_collective=False, exception=error))
    assert not _retries(Failure(0, "host", "", False, pickle.dumps(CheckpointError("was altered"))))


def test_altered_file_is_not_loaded(run_dir: Path) -> None:
    """Loading hashes what it reads; the network keeps what it had."""
    flip_bit(run_dir / "checkpoints/step-000001" / FILE)
    network = seeded("tuple")
    with pytest.raises(
        CheckpointError, match=rf"{FILE} was altered.*there is no older one, so the run starts anew"
    ):
        Checkpoint.open(run_dir / "checkpoints/step-000001").load_into(network, None)
    assert all(
        torch.equal(a, b) for a, b in zip(network.parameters(), seeded("tuple").parameters(), strict=True)
    )


def test_newer_schema(run_dir: Path) -> None:
    """A newer program's checkpoint is not called damaged: nobody is told to delete it."""
    rewritten(lambda body: body.update(schema=2, more=[]))(run_dir / "checkpoints/step-000002")
    newer = "was written by a newer anabranch: its schema is 2, this program reads up to 1"
    with pytest.raises(CheckpointError, match=newer) as caught:
        Checkpoint.open(run_dir / "checkpoints/step-000002")
    assert "delete" not in str(caught.value)


def test_reading_runs_no_code(run_dir: Path) -> None:
    """A pickle in place of a file, with the right size and hash, is an error and is not run."""
    folder, victim = run_dir / "checkpoints/step-000002", run_dir / "ran"

    class Forged:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (victim,)

    content = pickle.dumps(Forged())
    (folder / FILE).write_bytes(content)
    record = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    rewritten(lambda body: body["files"].update({FILE: record}))(folder)
    with pytest.raises(CheckpointError, match=f"{FILE} cannot be read as safetensors"):
        Checkpoint.open(folder).load_into(seeded("tuple"), None)
    assert not victim.exists()


def test_nothing_saved(tmp_path: Path) -> None:
    """No run, no folder, or one without a manifest: there is no checkpoint."""
    assert Checkpoints(tmp_path / "none").newest() is None
    (tmp_path / "checkpoints/step-000001").mkdir(parents=True)
    assert Checkpoints(tmp_path).newest() is None
    with pytest.raises(CheckpointError, match=r"manifest.json cannot be read \(No such file or directory\)"):
        Checkpoint.open(tmp_path / "checkpoints/step-000001")


# -------------------------------------------------------------------------------------------------- saving, and kills


def test_keeps_the_newest(tmp_path: Path) -> None:
    """num_to_keep stay; what cannot be read is left and counts for nothing, as does what is no checkpoint."""
    folder = tmp_path / "checkpoints"
    run_ranks(1, save_steps, tmp_path, [8, 9, 10, 11], 3)
    assert names_in(folder) == ["step-000009", "step-000010", "step-000011"]
    rewritten(lambda body: body.update(schema=2))(tmp_path / "checkpoints/step-000010")
    (tmp_path / "checkpoints/notes").mkdir()
    run_ranks(1, save_steps, tmp_path, [12, 1_000_000], 2)
    assert names_in(folder) == ["notes", "step-000010", "step-000012", "step-1000000"]
    run_ranks(
        1, save_steps, tmp_path, [13], 1
    )  # gone on from 12 in spite of the later one: the new one stays
    assert names_in(folder) == ["notes", "step-000010", "step-000013"]


def test_keeps_the_best(tmp_path: Path) -> None:
    """Besides the newest, the one with the highest accuracy, until a better one comes."""
    accuracies = {1: 0.5, 2: 0.9, 3: None, 4: 0.9, 5: 0.4, 6: 0.3, 7: 0.2}
    run_ranks(1, save_tested, tmp_path, accuracies)
    assert names_in(tmp_path / "checkpoints") == ["step-000004", "step-000006", "step-000007"]
    run_ranks(1, save_tested, tmp_path, {8: 0.95, 9: 0.1, 10: 0.1})
    assert names_in(tmp_path / "checkpoints") == ["step-000008", "step-000009", "step-000010"]


def test_a_whole_one_stays(run_dir: Path) -> None:
    """Saving a step again leaves a whole checkpoint of it as it is, and replaces a torn one."""
    folder = run_dir / "checkpoints/step-000002"
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    run_ranks(2, save_steps, run_dir, [2])
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    flip_bit(folder / FILE)
    run_ranks(2, save_steps, run_dir, [2])
    assert stamped(Checkpoint.open(folder)) == 2


def test_copied(two_saved: Path, tmp_path: Path) -> None:
    Checkpoint.open(two_saved / "checkpoints/step-000002").copy_to(tmp_path / "new/step-000002")
    assert stamped(Checkpoint.open(tmp_path / "new/step-000002")) == 2


@pytest.mark.parametrize("damaged", [False, True])
def test_killed_at_every_write(tmp_path: Path, damaged: bool) -> None:
    """Wherever a save ends, the previous checkpoint or the new one is whole, and the next save clears up."""
    [(moments, done)] = run_ranks(1, crash_everywhere, tmp_path, damaged)
    assert moments >= 20
    assert 3 <= done <= moments - 10  # some after the manifest, some before


def test_killed_at_random(tmp_path: Path) -> None:
    """Two ranks killed while they save, again and again: what was finished is there, or a newer one."""
    chosen = random.Random(5)
    for kills in range(1, 7):
        moments = [chosen.uniform(0, 3) for _ in range(2)]
        with pytest.raises(AssertionError, match=r"died|onnection"):  # the other may hear of it first
            run_ranks(2, save_until_killed, tmp_path, moments)
        finished = max(int(path.read_text() or 0) for path in tmp_path.glob("finished-*"))
        newest = Checkpoints(tmp_path).newest()
        assert newest is not None
        assert stamped(newest) >= max(finished, 2 * kills), "each finishes two"


def test_one_rank_cannot_write(tmp_path: Path) -> None:
    """Every rank hears of it and none waits; there is no checkpoint."""
    first, second = run_ranks(2, save_apart, tmp_path)
    assert second.startswith("OSError: ")
    assert "must be one that all ranks share" in second
    assert first.startswith(
        f"ElsewhereError: cannot write {tmp_path}/rank0/checkpoints/step-000001: rank 1 on "
    )
    assert "must be one that all ranks share" in first
    assert Checkpoints(tmp_path / "rank0").newest() is None


def test_saved_behind_the_training(tmp_path: Path) -> None:
    """A checkpoint holds the state of its step, whatever comes after; a disk that is full is told, and none is torn."""
    first, second = run_ranks(2, save_behind, tmp_path)
    rank_1_failed, rank_0_failed, third, fourth = first
    assert re.fullmatch(
        r".*step-000002 is not saved, the checkpoint before it stays: .* rank 1 on .*No space.*",
        rank_1_failed,
    )
    assert re.fullmatch(r".*step-000003 is not saved, .*: rank 0 on .*No space.*", rank_0_failed)
    assert third == "OSError: [Errno 28] No space left on device"
    assert second[1].startswith("ElsewhereError: cannot write")
    assert fourth == second[2] == ""
    assert names_in(tmp_path / "checkpoints") == ["step-000001", "step-000004"]
    for name in names_in(tmp_path / "checkpoints"):
        assert stamped(Checkpoint.open(tmp_path / "checkpoints" / name)) == int(name[-1])


def test_a_store_that_gives_no_answer_for_a_moment(tmp_path: Path) -> None:
    """Before a save that one is not made, after it old ones stay longer: both are told, and the training goes on."""
    first, second = run_ranks(2, save_unanswered, tmp_path)
    folder = tmp_path / "checkpoints"
    assert first == [
        f"{folder}/step-000002 is not saved, the checkpoint before it stays: OSError: no answer",
        "old checkpoints stay until the next save: no answer",
        "",
        "OSError: no answer",
        "",
        "",
    ]
    assert second[1].startswith(f"ElsewhereError: cannot write {folder}: rank 0 on ")
    assert [second[0], *second[2:]] == ["", "", ""]
    assert names_in(folder) == ["step-000004"]


def test_a_rank_is_replaced_while_saving(tmp_path: Path) -> None:
    """Nobody waits for what a dead rank was to write."""
    messages = run_ranks(2, replaced_behind, tmp_path)
    assert all("a rank was replaced meanwhile" in message for message in messages)
    assert Checkpoints(tmp_path).newest() is None


def test_a_cancelled_save_and_its_late_writer(tmp_path: Path) -> None:
    """The save is told of as given up; what is written late for it changes nothing of the one that followed."""
    told, nothing = run_ranks(2, cancelled_behind, tmp_path)
    assert nothing == []
    assert len(told) == 1
    assert "step-000001 is not saved, the checkpoint before it stays" in told[0]
    assert told[0].endswith("all go back")


class SlowFolder(LocalFolder):
    """A store that takes what is written when it is told to."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        path.mkdir(parents=True)
        self.takes = threading.Event()

    def write_tensors(self, *arguments: Any) -> tuple[int, str]:
        assert self.takes.wait(60)
        return super().write_tensors(*arguments)


@pytest.fixture
def slow(tmp_path: Path) -> tuple[SlowFolder, list[str], list[str], Callable[..., PendingSave]]:
    """A slow folder; what was done there and told; rank 0's save into it."""
    folder, done, told = SlowFolder(tmp_path / "step-000001"), list[str](), list[str]()

    def save(others: Sequence[int] = ()) -> PendingSave:
        return PendingSave(
            folder, 0, "0123456789abcdef", {"x": torch.ones(1)}, ["x"], [], list(others),
            lambda records: done.append("committed"), told.append, lambda: done.append("retired"),
        )  # fmt: skip

    return folder, done, told, save


def test_who_waits_for_a_slow_store_looks_at_the_groups(slow: Any) -> None:
    """Where they were given up it leaves at once, and the save comes to nothing."""
    folder, done, told, save = slow
    pending, waited = save(), list[float]()

    def on_wait(waited_s: float) -> None:
        waited.append(waited_s)
        if len(waited) == 3:
            raise ConnectionError("process group: given up")

    with pytest.raises(ConnectionError):
        pending.join(on_wait)
    assert waited == sorted(waited)
    pending.give_up("all go back")
    assert not folder.takes.is_set(), "nobody waits for it"
    folder.takes.set()
    with pytest.raises(OSError, match="all go back"):
        pending.join()
    assert done == []
    assert len(told) == 1


@pytest.mark.parametrize("then", ["goes on", "given up", "settled"])
def test_no_checkpoint_goes_while_all_are_told_where_to_go_back_to(slow: Any, then: str) -> None:
    """Else a save that ends just then would retire the one that the controller chose."""
    folder, done, _, save = slow
    pending = save()
    with pending.held():
        folder.takes.set()
        with pytest.raises(TimeoutError):
            pending.join(lambda waited_s: (_ for _ in ()).throw(TimeoutError) if waited_s > 0.5 else None)
        assert done == ["committed"]
        assert not pending.is_under_way
        if then == "given up":  # all go back: the older one is read now
            pending.give_up("all go back")
        if then == "settled":  # the run ends: nobody goes back
            pending.settle(10.0)
            assert done == ["committed", "retired"]
    pending.join()
    assert done == ["committed", *(["retired"] if then != "given up" else [])]


def test_before_the_process_ends_a_save_does(slow: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own part whole, others' waited for a little: their processes may be gone."""
    monkeypatch.setattr(pending_save, "_EXIT_S", 0.2)
    folder, done, told, save = slow
    pending = save(others=[1])
    threading.Timer(0.2, folder.takes.set).start()
    pending.settle(30.0)
    assert len(told) == 1
    assert "rank 1 did not write its part before the run ended" in told[0]
    assert done == []
    worker = Worker({})
    worker._context = alone(environ={"OMP_NUM_THREADS": "1"})
    worker._context.settle = told.append
    worker.settle(7.0)
    assert told[1:] == [7.0]


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_killed_at_every_write(tmp_path: Path, rank: int) -> None:
    """The other's thread ends too, and the previous checkpoint or the new one is whole."""
    moments, done = crash_either(tmp_path, rank)
    assert moments >= 5
    assert 1 <= done <= moments - 3


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
