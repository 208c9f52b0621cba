"""Checkpoints at a URL: the same promises where nothing can be renamed and writes break off half-way."""

from __future__ import annotations

import json
import re
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from checkpoint_ranks import save_at_url, save_without_renaming
from parity_cases import seeded
from ranks import run_ranks
from rich.console import Console

from anabranch.cluster import WorkerError
from anabranch.cluster.checks import Check
from anabranch.runtime import doctor_command
from anabranch.runtime.callbacks import MetricsFile
from anabranch.runtime.checkpoint import Checkpoint
from anabranch.runtime.checkpoints import Checkpoints
from anabranch.runtime.cli import main
from anabranch.runtime.config import Config
from anabranch.runtime.driver import _with_remedy
from anabranch.runtime.redact import redacted
from anabranch.runtime.run_record import run_status
from anabranch.runtime.schema import FieldError


def test_saved_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks; the newest two stay; another process reads them."""
    url = f"file://{tmp_path}/bucket/run"
    run_ranks(2, save_at_url, tmp_path / "nothing", url)
    assert sorted(path.name for path in (tmp_path / "bucket/run").iterdir()) == ["step-000002", "step-000003"]
    assert not (tmp_path / "nothing").exists()
    newest = Checkpoints(tmp_path, url=url).newest()
    assert newest is not None
    assert str(newest.folder) == f"{url}/step-000003"
    newest.verify()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    newest = Checkpoint.open(str(newest.folder))
    newest.verify()
    newest.load_into(seeded("tuple"), None)
    assert not list((tmp_path / "temporary").iterdir()), "a process that Ray ends clears nothing up"
    (file,) = (tmp_path / "bucket/run/step-000003").glob("rank-0001-*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    told: list[str] = []
    older = Checkpoints(tmp_path, url=url).newest(told.append)
    assert older is not None
    assert older.folder.name == "step-000002"
    assert f"step-000003/{file.name} was altered" in told[0]
    assert told[0].endswith(f"delete {url}/step-000003, the previous one is {url}/step-000002")


def test_no_renaming_and_broken_writes(tmp_path: Path) -> None:
    """At whichever call of the file system a save breaks off, a whole checkpoint is the newest readable one."""
    [calls] = run_ranks(1, save_without_renaming, tmp_path)
    assert calls >= 4


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("s3:/bucket", "must have a protocol"),
        ("nothing://bucket", "Protocol not known: nothing"),
        ("s3://me:secret@bucket/run", r"is s3://\*\*\*@bucket/run, which holds a secret"),
        ("https://a/b?sig=secret", r"is https://a/b\?sig=\*\*\*, which holds a secret"),
    ],
)
def test_wrong_url(url: str, problem: str) -> None:
    with pytest.raises(FieldError, match=problem) as caught:
        Config.from_dict({"checkpoint": {"url": url}}).check()
    assert "secret@" not in str(caught.value)
    assert "=secret" not in str(caught.value)


def test_protocol_that_is_not_installed() -> None:
    if find_spec("s3fs") is None:
        with pytest.raises(FieldError, match=r"checkpoint\.url is s3://bucket/run: .*[Ii]nstall s3fs"):
            Config.from_dict({"checkpoint": {"url": "s3://bucket/run"}}).check()


def test_secrets_stay_out_of_files() -> None:
    options: dict[str, Any] = {
        "source": "https://me:hunter2@host/data?token=hunter2&x=1",
        "many": ["ftp://hunter2@h/"],
    }
    text = Config.from_dict({"data": {"name": "a:b", "options": options}}).to_toml()
    assert "hunter2" not in text
    assert "https://***@host/data?token=***&x=1" in text
    plain = "git@host:path, a@b.c, https://host/a@b?x=1, s3://bucket/key"
    assert redacted(plain) == plain
    assert re.search(r"://\*\*\*@", redacted("redis://:pw@host"))


def test_a_run_whose_folder_holds_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its status and its error name what is at the URL all the same."""
    url, run = f"file://{tmp_path}/bucket", tmp_path / "run"
    flags = ["--launcher", "none", "--model.options.depth", "8", "--mesh.execution", "fused"]
    flags += ["--mesh.memory-format", "contiguous", "--train.eval-every-epochs", "0", "--run-dir", str(run)]
    assert main(["train", *flags, "--train.max-steps", "2", "--checkpoint.url", url]) == 0
    assert run_status(run)["checkpoint"] == "step-000002"
    assert main(["status", str(run)]) == 0
    assert "newest checkpoint: step-000002" in capsys.readouterr().out
    config = Config.from_dict({"checkpoint": {"url": url}, "launch": {"run_dir": str(run)}})
    failures = [{"action": "discard"}, {"action": "ended"}]
    said = str(_with_remedy(WorkerError("boom", {}), failures, config)).splitlines()
    assert said[1].startswith("Before this 1 lost workers were replaced")
    assert said[2] == f"Go on from the last checkpoint with: anabranch train --resume {run}"


def test_rank_0_makes_the_folder_that_the_driver_made_on_another_host(tmp_path: Path) -> None:
    for from_step in (0, 3):  # of a run that began there or elsewhere
        file = MetricsFile(tmp_path / f"run{from_step}/metrics.jsonl", from_step=from_step)
        file.on_warning("written")
        file.close()
        assert "written" in (tmp_path / f"run{from_step}/metrics.jsonl").read_text()


def test_a_run_goes_on_from_its_url_in_an_empty_folder(tmp_path: Path) -> None:
    """As on another machine; the same losses as undisturbed."""

    def losses(name: str, *more: str) -> list[tuple[int, float]]:
        folder = tmp_path / name
        flags = ["--launcher", "none", "--model.options.depth", "8", "--mesh.execution", "fused"]
        flags += ["--mesh.memory-format", "contiguous", "--train.eval-every-epochs", "0", *more]
        assert main(["train", *flags, "--run-dir", str(folder)]) == 0
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [(line["step"], line["loss"]) for line in lines if line["kind"] == "step"]

    at = ["--checkpoint.url", f"file://{tmp_path}/bucket"]
    whole = losses("whole", "--train.max-steps", "4")
    assert losses("here", *at, "--train.max-steps", "2") == whole[:2]
    assert losses("there", *at, "--train.max-steps", "4", "--resume", "auto") == whole[2:]
    assert not (tmp_path / "there" / "checkpoints").exists()


@pytest.mark.parametrize(("url", "shared"), [("", Path("/runs/a")), ("file:///bucket", None)])
def test_a_shared_folder_is_asked_for_where_checkpoints_go_there(
    url: str, shared: Path | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the doctor as by a run."""
    asked: list[object] = []

    def examine(*arguments: object) -> list[Check]:
        asked.extend(arguments)
        return []

    monkeypatch.setattr(doctor_command, "examine", examine)
    config = Config.from_dict({"checkpoint": {"url": url}, "launch": {"run_dir": "/runs/a"}})
    doctor_command.doctor(config, Console(quiet=True))
    assert asked[1] == shared


def test_the_doctor_looks_for_room_for_all_workers(tmp_path: Path) -> None:
    """A plan file's too, and for the spares."""
    (tmp_path / "plan.toml").write_text('[mesh]\ndata = 2\nbranch = 3\nscheduler = "data"\n')
    for mesh, num in (
        ({}, 0), ({"num_workers": 4}, 5), ({"shape": "2x2"}, 5), ({"plan": str(tmp_path / "plan.toml")}, 7)
    ):  # fmt: skip
        config = Config.from_dict({"mesh": mesh, "launch": {"spares": 1}})
        assert doctor_command.num_workers_of(config) == num
