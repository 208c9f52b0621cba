"""What others may hook into a run: metrics writers, trackers, users' own code."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anabranch.runtime.durable import write_bytes
from anabranch.runtime.manifest import step_of
from anabranch.runtime.plain_json import plain_json
from anabranch.runtime.redact import redacted

if TYPE_CHECKING:
    from anabranch.runtime.parallel_network import ParallelNetwork


class Callback:
    """Told of a run's events in the training loop: be quick. Metrics are plain numbers and text.

    `on_gradients` and `on_trained` are told on every rank and may use collectives, which all ranks then must; the
    others on rank 0 only.
    """

    def on_gradients(self, step: int, network: ParallelNetwork) -> None:
        """On every rank, when every p.grad of a step is whole (all samples, the regularizer's part too), before
        clipping and the update. step: from 0."""

    def on_trained(self, network: ParallelNetwork) -> None:
        """On every rank, once, after the last step of a run that was not stopped before, its evaluation and
        checkpoint."""

    def on_step(self, metrics: Mapping[str, Any]) -> None:
        """After every step: step, epoch, loss, accuracy, lr, step_time_s (with the wait for its samples),
        images_per_s."""

    def on_evaluation(self, metrics: Mapping[str, Any]) -> None:
        """After every evaluation: step, epoch, test_loss, test_accuracy."""

    def on_checkpoint(self, path: Path | str) -> None:
        """After a checkpoint is complete on disk: some steps later, at the next one or at the run's
        end. path: a str where it is a URL."""

    def on_mesh(self, mesh: Mapping[str, Any]) -> None:
        """Where the run goes on with fewer or more replicas: step (the last one done), data, branch."""

    def on_warning(self, text: str) -> None:
        """Where something is not as it was: steps that take longer, and why."""

    def on_end(self, result: Mapping[str, Any]) -> None:
        """Once, when the run ends without an error."""

    def close(self) -> None:
        """Last of all, after an error too: end what is open."""


class MetricsFile(Callback):
    """Writes RUN/metrics.jsonl: one JSON object a line, {"kind": "step" | "evaluation" | …, "step": …, …}.

    A number that is not finite, as the loss of a run that diverged, is null.

    path: its folder is made, for with checkpoint.url rank 0's host need not see the driver's. from_step: where the run
    goes on; lines of later steps, which a killed run left, are dropped. on_failure: is told, once, where lines cannot
    be written any more (a full disk), which is no end of a training.
    """

    def __init__(
        self,
        path: Path,
        every_steps: int = 1,
        from_step: int = 0,
        on_failure: Callable[[str], object] = warnings.warn,
    ) -> None:
        kept = (
            [line for line in whole_lines(path) if json.loads(line)["step"] <= from_step] if from_step else []
        )
        if kept:
            write_bytes(path, "".join(kept).encode())
        path.parent.mkdir(parents=True, exist_ok=True)
        # whole lines, though the process be killed
        self._file = path.open("a" if kept else "w", encoding="utf-8", buffering=1)
        self._path, self._every, self._on_failure = path, every_steps, on_failure
        self._has_failed = False
        self._step = from_step
        told = [line["step"] for line in map(json.loads, kept) if line["kind"] == "step"]
        self.last_told = told[-1] if told else 0  # step of the last line that is there already

    def on_step(self, metrics: Mapping[str, Any]) -> None:
        self._step = metrics["step"]
        if self._step % self._every == 0:
            self._write("step", metrics)

    def on_evaluation(self, metrics: Mapping[str, Any]) -> None:
        self._write("evaluation", metrics)

    def on_checkpoint(self, path: Path | str) -> None:
        self._write("checkpoint", {"step": step_of(Path(path).name), "path": str(path)})

    def on_mesh(self, mesh: Mapping[str, Any]) -> None:
        self._write("mesh", mesh)

    def on_warning(self, text: str) -> None:
        self._write("warning", {"step": self._step, "text": text})

    def close(self) -> None:
        with self._told_once():
            self._file.close()

    def _write(self, kind: str, values: Mapping[str, Any]) -> None:
        plain = values if kind == "step" else redacted(dict(values))  # a step's are numbers, and many
        with self._told_once():
            self._file.write(plain_json({"kind": kind, **plain}) + "\n")

    @contextmanager
    def _told_once(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._has_failed:
                self._has_failed = True
                self._on_failure(
                    f"{self._path} lacks lines from step {self._step} on: {error.strerror or error}"
                )


def whole_lines(path: Path) -> list[str]:
    """The whole lines of a file of JSON objects, none where there is no file; a killed run leaves half a line."""
    if not path.exists():
        return []
    return [
        line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("}\n")
    ]
