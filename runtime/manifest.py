"""A checkpoint's manifest: what its folder holds, as plain data that is checked when read.

step-000120/
    rank-0000-3f….safetensors each rank's file is on the disk first; 3f…: this attempt at writing the checkpoint
    rank-0002-3f….safetensors
    manifest.json             then this one: before, the checkpoint does not exist
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

from anabranch.runtime.errors import CheckpointError, UnreadableError
from anabranch.runtime.storage import Folder

SCHEMA = 1
MANIFEST = "manifest.json"

_FOLDER = re.compile(r"step-(\d{6,})")
_FILE = re.compile(r"rank-\d{4,}(-[0-9a-f]{16})?\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileRecord:
    """One file of a checkpoint: its size and hash."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What one checkpoint holds.

    position: plain JSON with at least "step". config_toml, plan_toml: the run's files as text. optimizer: its class's
    name. files: by name, all inside the folder. tensors: key (see keyed_state) → file. versions: of the programs that
    wrote it.
    """

    position: dict[str, Any]
    config_toml: str
    plan_toml: str
    optimizer: str
    files: dict[str, FileRecord]
    tensors: dict[str, str]
    versions: dict[str, str]

    def write(self, folder: Folder) -> None:
        """Makes the checkpoint exist; its files must be on the disk already."""
        body = {"schema": SCHEMA, **asdict(self)}
        text = json.dumps({**body, "sha256": _digest(body)}, indent=1, allow_nan=False)
        folder.write(MANIFEST, text.encode())

    @classmethod
    def read(cls, folder: Folder) -> Manifest:
        """A checkpoint's manifest. Raises CheckpointError if there is none, or not a whole one of a known schema;
        UnreadableError where that cannot be told now."""
        try:
            body = json.loads(folder.read(MANIFEST))
        except FileNotFoundError as error:
            why = error.strerror or error
            raise damaged(
                folder, MANIFEST, f"cannot be read ({why}), so the checkpoint was never finished"
            ) from error
        except OSError as error:
            raise unreadable(f"{folder}/{MANIFEST}", error) from error
        except (ValueError, RecursionError) as error:
            raise damaged(folder, MANIFEST, f"is not JSON ({error})") from error
        schema = body.get("schema") if isinstance(body, dict) else None
        if not isinstance(schema, int) or schema < 1:
            raise damaged(
                folder, MANIFEST, f"is no checkpoint's manifest: its schema is {schema!r}, not {SCHEMA}"
            )
        if schema > SCHEMA:
            raise CheckpointError(
                f"{folder}/{MANIFEST} was written by a newer anabranch: its schema is {schema}, this program reads "
                f"up to {SCHEMA}; update anabranch, or name an older checkpoint"
            )
        if body.pop("sha256", None) != _digest(body):
            raise damaged(folder, MANIFEST, "was altered: its contents do not have the sha256 that it names")
        if problem := _problem(body):
            raise damaged(folder, MANIFEST, problem)
        del body["schema"]
        files = {name: FileRecord(**record) for name, record in body.pop("files").items()}
        return cls(files=files, **body)


def step_of(name: str) -> int | None:
    """The step in the name of a checkpoint's folder; None for any other name."""
    match = _FOLDER.fullmatch(name)
    return int(match[1]) if match else None


def folder_name(step: int) -> str:
    """The name of the checkpoint after `step` steps."""
    return f"step-{step:06d}"


def file_name(rank: int, attempt: str) -> str:
    """The name of what a rank writes: no late writer of another attempt can overwrite it."""
    return f"rank-{rank:04d}-{attempt}.safetensors"


def finished(checkpoints: Folder) -> list[Folder]:
    """The folders that have a manifest, newest (highest step) first; whether it is valid is another question.

    Raises UnreadableError.
    """
    try:
        steps = {name: step for name in checkpoints.names() if (step := step_of(name)) is not None}
        newest_first = [checkpoints.child(name) for name in sorted(steps, key=lambda name: -steps[name])]
        return [folder for folder in newest_first if folder.size(MANIFEST) is not None]
    except OSError as error:
        raise unreadable(str(checkpoints), error) from error


def unreadable(place: str, error: OSError) -> UnreadableError:
    """The error for a place whose store has lost nothing, as far as can be told."""
    return UnreadableError(
        f"{place} cannot be read now ({error.strerror or error}), which says nothing against the checkpoint: see that "
        "its store answers and lets you read, then try again"
    )


def damaged(folder: Folder, name: str, problem: str) -> CheckpointError:
    """The error for a file of a checkpoint, with what to do about it."""
    step = step_of(folder.name)
    try:
        older = [o for o in finished(folder.parent()) if step is not None and (step_of(o.name) or 0) < step]
    except UnreadableError as error:
        return error
    remedy = f"the previous one is {older[0]}" if older else "there is no older one, so the run starts anew"
    return CheckpointError(f"{folder}/{name} {problem}; delete {folder}, {remedy}")


def versions() -> dict[str, str]:
    """Of the programs that decide what a checkpoint holds."""
    found = {"python": platform.python_version()}
    for name in ("anabranch", "torch", "safetensors"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "checkout"
    return found


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _problem(body: dict[str, Any]) -> str:
    """What is wrong with a whole manifest that someone else may have made; empty if nothing."""
    wanted: dict[str, type] = dict.fromkeys(("position", "files", "tensors", "versions"), dict)
    wanted |= dict.fromkeys(("config_toml", "plan_toml", "optimizer"), str)
    if different := {"schema", *wanted} ^ body.keys():
        return f"has other fields than schema {SCHEMA}: {', '.join(sorted(different))}"
    for field, kind in wanted.items():
        if not isinstance(body[field], kind):
            return f"holds no {kind.__name__} as {field}"
    if not isinstance(body["position"].get("step"), int):
        return "names no step in its position"
    for name, record in body["files"].items():
        if not _FILE.fullmatch(name):
            return f"names a file {name!r}: only rank-….safetensors inside the folder is allowed"
        if not isinstance(record, dict) or record.keys() != {"bytes", "sha256"}:
            return f"describes {name} by {record!r}, not by bytes and sha256"
        if not isinstance(record["bytes"], int) or not _SHA256.fullmatch(str(record["sha256"])):
            return f"describes {name} by {record!r}, which is no size and sha256"
    for key, name in body["tensors"].items():
        if not isinstance(name, str) or name not in body["files"]:
            return f"places {key} in {name!r}, which is not among its files"
    return ""
