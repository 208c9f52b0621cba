"""Finds and reads configuration files: a path, or the name of one that is shipped in `configs/`."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anabranch.runtime.config import Config
from anabranch.runtime.errors import ConfigError
from anabranch.runtime.schema import FieldError, suggest

SHIPPED = Path(__file__).parent / "configs"
DEFAULT_CONFIG = "digits"


def load_config(name_or_path: str, given: Mapping[str, Mapping[str, Any]] | None = None) -> Config:
    """The file's configuration with the given values (flags, environment) over it, checked.

    Raises ConfigError; what the file is to blame for starts with "file:line: ".
    """
    given = given or {}
    path = find_config(name_or_path)
    text, data = read_toml(path)
    try:
        config = Config.from_dict(data, given)
        config.check()
    except FieldError as error:
        section, _, name = error.key.partition(".")
        line = None if name in given.get(section, {}) else line_of(text, error.key)
        raise error if line is None else FieldError(f"{path}:{line}: {error}", error.key) from None
    return config


_PLACE = {"num_workers", "shape", "plan"}  # of [mesh]: which workers run which branches


def load_resumed(run: Path, given: Mapping[str, Mapping[str, Any]], *, made_plan: bool = True) -> Config:
    """The configuration of a run that goes on, with the given values over it, checked.

    What the run learns is the run's; where it runs is the user's: a mesh, number of workers or plan that is given
    replaces all three of the run's, and the launch starts from the defaults, in the run's folder. made_plan: the plan
    is the one in the folder.
    """
    path = run / "config.toml"
    if not path.is_file():
        raise ConfigError(f"checkpoint.resume {run} is no run: it has no config.toml; give a run's folder")
    _, data = read_toml(path)
    if "mesh" not in data:  # what is written there has every section
        raise ConfigError(
            f"{path} is not whole, it has no [mesh]: give the run's own CONFIG, with --run-dir {run} --resume auto"
        )
    data.pop("launch", None)
    if _PLACE & given.get("mesh", {}).keys():
        data["mesh"] = {name: value for name, value in data["mesh"].items() if name not in _PLACE}
    elif made_plan and (run / "plan.toml").is_file():
        data["mesh"]["plan"] = str(run / "plan.toml")
    config = Config.from_dict(data, given)
    config.check()
    return config


def find_config(name_or_path: str) -> Path:
    """The file that is meant: a path has a "/", ends in .toml or exists; all else is a shipped name."""
    path = Path(name_or_path)
    if path.is_file():
        return path
    if "/" in name_or_path or path.suffix == ".toml":
        raise ConfigError(f"{name_or_path}: there is no such file")
    shipped = SHIPPED / f"{name_or_path}.toml"
    if shipped.is_file():
        return shipped
    names = [file.stem for file in sorted(SHIPPED.glob("*.toml"))]
    near = suggest(name_or_path, names)
    raise ConfigError(
        f'no configuration is called "{name_or_path}"{near or ";"} `anabranch train --list` shows all {len(names)}'
    )


def require_section(name_or_path: str, section: str) -> None:
    """Raises ConfigError unless the file has the section."""
    path = find_config(name_or_path)
    if section not in read_toml(path)[1]:
        raise ConfigError(f"{path} has no [{section}] section: add one, or give a file that has it")


def shipped_configs() -> dict[str, str]:
    """Name → description (the file's first comment line) of every shipped configuration."""
    files = sorted(SHIPPED.glob("*.toml"))
    return {file.stem: file.read_text().partition("\n")[0].lstrip("# ") for file in files}


def read_toml(path: Path) -> tuple[str, dict[str, Any]]:
    """A TOML file's text and what it says. Raises ConfigError, with the file and the line."""
    try:
        text = path.read_text(encoding="utf-8")
        return text, tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        position = re.search(r" \(at line (\d+), column \d+\)$", str(error))
        line = position[1] if position else text.count("\n") + 1
        message = str(error)[: position.start()] if position else str(error)
        raise ConfigError(f"{path}:{line}: not valid TOML: {message}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file in UTF-8") from None
    except (ValueError, RecursionError) as error:  # a number too long, tables too deep in one another
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


_PART = r"""(?:"[^"]*"|'[^']*'|[\w-]+)"""
_DOTTED = rf"({_PART}(?:\s*\.\s*{_PART})*)"
_HEADER = re.compile(rf"\s*\[\s*{_DOTTED}\s*\]")
_ASSIGNMENT = re.compile(rf"\s*{_DOTTED}\s*=")


def line_of(text: str, key: str) -> int | None:
    """The line (from 1) on which a TOML text sets the key; None if it does not.

    tomllib keeps no positions, so this reads headers and the left of each "=". A key inside an inline table is
    given the line on which the table starts.
    """
    wanted = tuple(key.split("."))
    header: tuple[str, ...] = ()
    for number, line in enumerate(text.splitlines(), start=1):
        if match := _HEADER.match(line):
            header = here = _parts(match[1])
            found = here[: len(wanted)] == wanted
        elif match := _ASSIGNMENT.match(line):
            here = header + _parts(match[1])
            found = all(a == b for a, b in zip(here, wanted, strict=False))
        else:
            continue
        if found:
            return number
    return None


def _parts(dotted: str) -> tuple[str, ...]:
    return tuple(part.strip("\"'") for part in re.findall(_PART, dotted))
