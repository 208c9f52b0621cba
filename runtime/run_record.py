"""run.json in a run's folder: who runs it, where it stands, when it was last heard of; and the file that stops it.

    driver, each second: run.json.tmp ──rename──▶ run.json     ◀── anabranch status, on any host that has the folder
                         stop there? ◀────────── stop          ◀── anabranch stop

Needs no torch.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from anabranch.runtime.errors import ConfigError
from anabranch.runtime.plain_json import plain_json
from anabranch.runtime.redact import redacted

RECORD, STOP = "run.json", "stop"
# A driver writes every second; a loaded one or a slow file system may be late.
SILENT_S = 15.0
_METRICS = ("epoch", "loss", "accuracy", "test_accuracy", "images_per_s", "step_time_s")


class RunRecord:
    """The driver's side. folder: the run's, "" where it is not known yet or there is none: then nothing is written."""

    def __init__(self, folder: str, what: str, address: str = "") -> None:
        self._folder = folder
        self._asked = False
        self._fields: dict[str, Any] = {
            "state": "running",
            "what": what,
            **_this_process(),
            "host": socket.gethostname(),
            "address": address,
            "started_at": time.time(),
        }
        before = None
        if folder:
            with suppress(ConfigError):  # torn: a power cut, perhaps
                before = _read(Path(folder, RECORD))
        if before and _same_process(before):  # it planned anew: not another run
            self._fields["started_at"] = before["started_at"]
        elif folder:
            with suppress(OSError):
                Path(folder, STOP).unlink()
        self._write()

    def watch(self, statuses: Sequence[Mapping[str, Any]]) -> str | None:
        """Notes the workers' statuses; "stop" where someone asked for it since."""
        first = statuses[0] if statuses else {}
        self._folder = self._folder or first.get("run_dir", "")
        step, total, step_s = first.get("step", 0), first.get("num_steps"), first.get("step_time_s")
        self._fields |= {
            "phase": first.get("phase", "starting"),
            "step": step,
            "num_steps": total,
            "left_s": (total - step) * step_s if total and step_s else None,
            "metrics": {name: first[name] for name in _METRICS if name in first},
            "workers": [
                {name: status.get(name) for name in ("rank", "host", "pid", "phase", "step")}
                for status in statuses
            ],
        }
        self._fields |= {name: first[name] for name in ("compiled", "checkpoint") if name in first}
        self._write()
        if self._folder and Path(self._folder, STOP).exists():
            self._asked = True
            with suppress(OSError):
                Path(self._folder, STOP).unlink()
        return "stop" if self._asked else None

    def note(self, **fields: Any) -> None:
        """Keeps plain values beside the others from now on."""
        self._fields |= fields

    def close(self, error: BaseException | None, stopped: str | None = None) -> None:
        """Notes how it ended. stopped: why before its end, None: it did not; "replan": to go on, so that it runs."""
        if error:
            state = "stopped" if type(error).__name__ == "StoppedError" else "failed"
        else:
            state = "running" if stopped == "replan" else "stopped" if stopped else "finished"
        self._fields |= {"state": state, "error": str(error) if error else ""}
        self._write(sync=True)

    def _write(self, sync: bool = False) -> None:
        """A folder that cannot be written to for a while stops nobody: the checkpoint's own error says more.

        sync: so that a power cut leaves it whole; where one was torn, the run counts as one that did not end.
        """
        if not self._folder or not Path(self._folder).is_dir():
            return
        self._fields["heard_at"] = time.time()
        aside = Path(self._folder, f"{RECORD}.tmp")
        with suppress(OSError):
            with aside.open("w", encoding="utf-8") as file:
                file.write(plain_json(redacted(self._fields)))
                file.flush()
                if sync:
                    os.fsync(file.fileno())
            aside.replace(aside.with_name(RECORD))


def run_status(folder: Path) -> dict[str, Any]:
    """run.json's fields with `alive`, `silent_s` (since it was heard of), `run_dir` and the newest `checkpoint`: in
    the folder, else (at a URL) the last that was told.

    state is "dead" where the record says "running" and its driver is gone: by its process ID where that is one of
    this machine's, else where it was silent for longer than SILENT_S. Raises ConfigError where there is no record.
    """
    record = _read(folder / RECORD)
    if record is None:
        raise ConfigError(
            f"{folder} has no {RECORD}: no `anabranch train` has run there; it prints a run's folder when it starts"
        )
    silent_s = max(0.0, time.time() - record["heard_at"])
    here = record["machine"] == _this_process()["machine"]
    alive = record["state"] == "running" and (_same_start(record) if here else silent_s <= SILENT_S)
    if record["state"] == "running" and not alive:
        record["state"] = "dead"
    told = record.get("checkpoint", "")
    with suppress(OSError):
        manifests = (folder / "checkpoints").glob("*/manifest.json")
        names = (path.parent.name for path in manifests)
        record["checkpoint"] = max(names, key=lambda name: (len(name), name), default=told)  # by step
    return {
        **record,
        "checkpoint": record.get("checkpoint", told),
        "alive": alive,
        "silent_s": silent_s,
        "run_dir": str(folder.absolute()),
    }


def request_stop(folder: Path, wait: bool) -> dict[str, Any]:
    """Asks a run to save and end; its status, with `wait` once it has. Raises ConfigError where none is going on."""
    status = run_status(folder)
    if not status["alive"]:
        raise ConfigError(
            f"{folder} has no run going on: it is {status['state']} at step {status.get('step', 0)}"
        )
    try:
        (folder / STOP).touch()
    except OSError as error:
        raise ConfigError(
            f"{folder / STOP} cannot be written ({error.strerror}): stop it from where the folder can be "
            f"written, or send SIGTERM to process {status['pid']} on {status['host']}"
        ) from error
    while wait and status["alive"]:
        time.sleep(0.2)
        status = run_status(folder)
    return status


def _read(path: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}): where the run is over, the same command, or --resume "
            f"{path.parent}, goes on with it and writes it anew"
        ) from error
    needed = {"state": str, "pid": int, "start": str, "machine": str, "heard_at": float, "started_at": float}
    if not isinstance(record, dict) or not all(isinstance(record.get(k), kind) for k, kind in needed.items()):
        raise ConfigError(f"{path} is not what anabranch wrote: remove it")
    return record


def _this_process() -> dict[str, Any]:
    """machine: which process IDs this one's is comparable with. start: IDs are used again."""
    machine = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        machine = f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return {"pid": os.getpid(), "start": _start(os.getpid()), "machine": machine or socket.gethostname()}


def _same_process(record: Mapping[str, Any]) -> bool:
    return all(record[name] == value for name, value in _this_process().items())


def _same_start(record: Mapping[str, Any]) -> bool:
    return bool(record["start"]) and _start(record["pid"]) == record["start"]


def _start(pid: int) -> str:
    """When a process began, in the system's ticks; "" where it has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return ""
    return "" if state in "ZX" else fields[18]
