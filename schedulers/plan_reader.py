"""Reading a plan file: TOML, with every key and type checked and named by file and line."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anabranch.schedulers.errors import PlanError
from anabranch.schedulers.plan import check_devices, check_samples
from anabranch.schedulers.plan_file import BlockRule, PinRule, PlanFile, located
from anabranch.schedulers.wording import did_you_mean, quote, shown


def _is_int(value: object, minimum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and minimum <= value < 2**31


def _shown(value: object) -> str:
    """The value as TOML has it, or nearly."""
    try:
        return shown_text if len(shown_text := json.dumps(value, default=str)) <= 200 else shown(value)
    except (ValueError, RecursionError):
        return shown(value)


def _is_list(value: object, right: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(right(item) for item in value)


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value != ""


# key -> (is the value right?, what to write)
_Keys = Mapping[str, tuple[Callable[[Any], bool], str]]
_TOP: _Keys = {
    "mesh": (lambda v: isinstance(v, dict), "a table, [mesh]"),
    "blocks": (lambda v: _is_list(v, lambda rule: isinstance(rule, dict)), "tables, [[blocks]]"),
    "pins": (lambda v: _is_list(v, lambda pin: isinstance(pin, dict)), "tables, [[pins]]"),
}
_MESH: _Keys = {
    "data": (lambda v: _is_int(v, 1), "a positive integer, as in data = 2"),
    "branch": (lambda v: _is_int(v, 1), "a positive integer, as in branch = 2"),
    "devices": (
        lambda v: _is_list(v, lambda row: _is_list(row, _is_name)),
        'a row of "host:index" for each replica, as in devices = [["a:0", "a:1"]]',
    ),
    "filled_in": (lambda v: isinstance(v, bool), "true where the devices are no wish, else leave it out"),
    "samples": (
        lambda v: _is_list(v, lambda number: _is_int(number, 1)),
        "a positive integer for each replica, as in samples = [3, 1]",
    ),
    "scheduler": (_is_name, 'a name, as in scheduler = "even"'),
}
_RULE: _Keys = {
    "match": (_is_name, 'a block\'s name or a glob, as in match = "stage1.*"'),
    "split": (
        lambda v: v in ("sample", "branch", "replicated"),
        '"sample" or "branch" (stem, head: "sample" or "replicated")',
    ),
    "branches": (
        lambda v: v == "even" or _is_list(v, lambda row: _is_list(row, lambda index: _is_int(index, 0))),
        'a list of branches for each branch rank, as in branches = [[0, 1], [2]], or "even"',
    ),
    "counts": (
        lambda v: _is_list(v, lambda number: _is_int(number, 0)),
        "a number of branches for each branch rank, as in counts = [3, 2]",
    ),
}
_PIN: _Keys = {
    "match": (_is_name, 'a block\'s name or a glob, as in match = "stage3.*"'),
    "branch": (lambda v: _is_int(v, 0), "the number of a branch, as in branch = 0"),
    "host": (_is_name, 'a host\'s name, as in host = "node-a"'),
}


@dataclass(frozen=True)
class _Text:
    """A file's lines, to say where a key stands: tomllib does not."""

    path: str
    lines: list[str]

    def find(self, key: str, start: int = 1) -> int:
        """The first line from `start` that opens the key (key =, [key], [[key]]); `start` where none does."""
        opens = re.compile(rf"\s*\[*\s*[\"']?{re.escape(key)}[\"']?\s*[]=.]")
        return next((n for n, line in enumerate(self.lines, 1) if n >= start and opens.match(line)), start)

    def table_lines(self, name: str, num: int) -> list[int]:
        """The lines of the [[name]] headers."""
        header = re.compile(rf"\s*\[\[\s*[\"']?{name}[\"']?\s*\]\]")
        found = [number for number, line in enumerate(self.lines, 1) if header.match(line)]
        if len(found) > num:  # some stand in a multi-line string, where the text before them is not whole
            found = [number for number in found if self._is_whole(number - 1)]
        return found if len(found) == num else [self.find(name)] * num  # blocks = [{…}, …]

    def _is_whole(self, num_lines: int) -> bool:
        try:
            tomllib.loads("\n".join(self.lines[:num_lines]))
        except tomllib.TOMLDecodeError:
            return False
        return True

    def check(
        self, table: Mapping[str, Any], keys: _Keys, required: tuple[str, ...], what: str, start: int = 1
    ) -> None:
        """Every key of a table is known, of the right type, and none of the required is missing."""
        for key, value in table.items():
            at = f"{self.path}:{self.find(key, start)}"
            if key not in keys:
                raise PlanError(
                    f"{at}: {what} has no key {quote(key[:200])}{did_you_mean(key, keys)}; it has {', '.join(keys)}"
                )
            is_right, remedy = keys[key]
            if not is_right(value):
                raise PlanError(f"{at}: {key} is {_shown(value)}: write {remedy}")
        for key in required:
            if key not in table:
                raise PlanError(f"{self.path}:{start}: {what} has no {key}: write {keys[key][1]}")


def read_plan(path: str | Path) -> PlanFile:
    """Read a plan file. Raises PlanError, with file and line, when it is missing, torn or has a wrong key."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise PlanError(f"{path}: cannot read the plan file: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise PlanError(f"{path}:{line}: the plan file is not UTF-8 text: write it as UTF-8") from None
    return parse_plan(text, str(path))


def parse_plan(text: str, path: str = "plan") -> PlanFile:
    """A plan file's text. path: for messages. Raises PlanError as `read_plan`."""
    lines = text.split("\n")
    try:
        content = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # a number too long for int, tables too deep in one another
        found = re.search(r"at line (\d+)", str(error))
        raise PlanError(f"{path}:{found[1] if found else len(lines)}: not valid TOML: {error}") from None
    return _plan_file(content, _Text(path, lines))


def _plan_file(content: dict[str, Any], text: _Text) -> PlanFile:
    text.check(content, _TOP, ("mesh",), "a plan file")
    mesh, mesh_line = content["mesh"], text.find("mesh")
    text.check(mesh, _MESH, ("data", "branch"), "[mesh]", mesh_line)
    if "devices" in mesh:
        with located(f"{text.path}:{text.find('devices', mesh_line)}"):
            check_devices(mesh["devices"], mesh["data"], mesh["branch"])
    if "samples" in mesh:
        with located(f"{text.path}:{text.find('samples', mesh_line)}"):
            check_samples(mesh["samples"], mesh["data"])
    tables, pins = content.get("blocks", []), content.get("pins", [])
    return PlanFile(
        mesh["data"],
        mesh["branch"],
        rules=tuple(
            _rule(table, text, line)
            for table, line in zip(tables, text.table_lines("blocks", len(tables)), strict=True)
        ),
        devices=tuple(map(tuple, mesh["devices"])) if "devices" in mesh else None,
        samples=tuple(mesh["samples"]) if "samples" in mesh else None,
        scheduler=mesh.get("scheduler"),
        source=text.path,
        pins=tuple(
            _pin(table, text, line)
            for table, line in zip(pins, text.table_lines("pins", len(pins)), strict=True)
        ),
        filled_in=mesh.get("filled_in", False),
    )


def _pin(table: dict[str, Any], text: _Text, line: int) -> PinRule:
    text.check(table, _PIN, ("match", "branch", "host"), "[[pins]]", line)
    return PinRule(table["match"], table["branch"], table["host"], line)


def _rule(table: dict[str, Any], text: _Text, line: int) -> BlockRule:
    text.check(table, _RULE, ("match", "split"), "[[blocks]]", line)
    given = [key for key in ("branches", "counts") if key in table]
    if len(given) != (table["split"] == "branch"):
        raise PlanError(
            f"{text.path}:{line}: split = {quote(table['split'])} with {' and '.join(given) or 'nothing'}: "
            'split = "branch" needs one of branches = [[0, 1], [2]], counts = [2, 1], branches = "even"; '
            "the other splits none"
        )
    branches = table.get("branches")
    return BlockRule(
        table["match"],
        table["split"],
        branches=tuple(map(tuple, branches)) if isinstance(branches, list) else branches,
        counts=tuple(table["counts"]) if "counts" in table else None,
        line=line,
    )
