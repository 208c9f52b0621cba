"""`anabranch report`: one self-contained page of one run or several, and the same pictures as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anabranch.runtime.errors import ConfigError
from anabranch.runtime.report_data import read_run
from anabranch.runtime.report_page import page
from anabranch.schedulers.wording import shown


def write_report(runs: Sequence[Path], output: Path | None = None, *, png: bool = False) -> dict[str, Any]:
    """output (default: report.html in the first run), runs, notes, pictures.

    Raises ConfigError where a folder is no run, or the page cannot be written.
    """
    output = output or runs[0] / "report.html"
    pictures: list[Path] = []
    try:
        found = [read_run(path) for path in runs]
        output.write_text(page(found), encoding="utf-8")
        if png:
            from anabranch.runtime.report_png import write_pictures

            pictures = write_pictures(found, output.with_suffix(""))
    except OSError as error:
        raise ConfigError(
            f"{output} cannot be written: {error.strerror}; choose another with --output"
        ) from error
    except (LookupError, TypeError, ArithmeticError, AttributeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        names = ", ".join(map(str, runs))
        raise ConfigError(
            f"{names}: a file of the run was altered (profile.json, metrics.jsonl, audit.json or plan.toml: "
            f"{type(error).__name__}: {shown(str(error))}); profile again, or delete it"
        ) from error
    many = len(found) > 1
    notes = [f"{run.name}: {note}" if many else note for run in found for note in run.notes]
    return {
        "output": str(output),
        "runs": [str(run.path) for run in found],
        "notes": notes,
        "pictures": [str(path) for path in pictures],
    }
