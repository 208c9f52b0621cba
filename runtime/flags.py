"""The configuration's flags: `--section.field` for every field, and the short names of the most used."""

from __future__ import annotations

import inspect
import os
import tomllib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from cyclopts import CoercionError, Group, Parameter, Token

from anabranch.runtime import config as config_module
from anabranch.runtime import gross_config
from anabranch.runtime.config import SECTIONS, Config
from anabranch.runtime.config_file import DEFAULT_CONFIG, load_config, load_resumed
from anabranch.runtime.errors import ConfigError
from anabranch.runtime.schema import field_docs, suggest

Command = TypeVar("Command", bound=Callable[..., object])

ENV_PREFIX = "ANABRANCH_"
SHORT_FLAGS = {
    "model.name": "--model",
    "data.name": "--data",
    "train.epochs": "--epochs",
    "train.loss": "--loss",
    "train.seed": "--seed",
    "mesh.num_workers": "--num-workers",
    "mesh.shape": "--mesh",
    "mesh.plan": "--plan",
    "checkpoint.resume": "--resume",
    "launch.launcher": "--launcher",
    "launch.address": "--address",
    "launch.run_dir": "--run-dir",
    "launch.min_replicas": "--min-replicas",
}


@cache
def _config_flags(*sections: str) -> tuple[inspect.Parameter, ...]:
    """One keyword parameter, section__field, for every field of these sections."""
    flags = []
    defaults, docs = Config(), field_docs(config_module, gross_config)
    for number, section in enumerate(sections):
        kind = SECTIONS[section]
        group = Group(section, sort_key=number + 1)
        for name, hint in get_type_hints(kind).items():
            names = [f"--{section}.{name}".replace("_", "-")]
            if short := SHORT_FLAGS.get(f"{section}.{name}"):
                names.append(short)
            flags.append(
                inspect.Parameter(
                    f"{section}__{name}",
                    inspect.Parameter.KEYWORD_ONLY,
                    default=getattr(getattr(defaults, section), name),
                    annotation=Annotated[hint, _flag(hint, names, group, docs[kind.__name__, name])],
                )
            )
    return tuple(flags)


def with_config_flags(command: Command) -> Command:
    """Give the command, in place of its `**given`, the configuration's flags; only those that were given reach it."""
    return _with_flags(command, *(section for section in SECTIONS if section != "gross"))


def with_gross_flags(command: Command) -> Command:
    """The same with the flags of `[gross]` too."""
    return _with_flags(command, *SECTIONS)


def _with_flags(command: Command, *sections: str) -> Command:
    signature = inspect.signature(command, eval_str=True)
    parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    parameters += _config_flags(*sections)
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _flag(hint: Any, names: list[str], group: Group, doc: str) -> Parameter:
    many = get_origin(hint) is tuple and ... in get_args(hint)
    return Parameter(
        name=names,
        group=group,
        help=doc,
        converter=whole_numbers if hint is int or (many and int in get_args(hint)) else None,
        consume_multiple=many,
        negative_iterable=(),
        show_choices=get_origin(hint) is Literal and "" not in get_args(hint),
    )


def whole_numbers(hint: Any, tokens: Sequence[Token]) -> int | tuple[int, ...]:
    """A flag's converter of whole numbers, one or for a tuple many: cyclopts would round 1.5 to 2."""
    numbers = []
    for token in tokens:
        try:
            numbers.append(int(token.value))
        except ValueError:
            raise CoercionError(msg=f'"{token.value}" is not a whole number', token=token) from None
    return tuple(numbers) if get_origin(hint) is tuple else numbers[0]


def config_from_flags(
    name_or_path: str, given: Mapping[str, Any], *, default: str = DEFAULT_CONFIG, made_plan: bool = True
) -> Config:
    """The file's (or the default's) configuration under what flags and environment gave.

    default: digits counts for its own dataset alone; with another the fields' defaults do. made_plan: a run that is
    resumed goes on with the plan that was made for it; else with a new one made alike.
    """
    _check_environment()
    sections: dict[str, dict[str, Any]] = {}
    for parameter, value in given.items():
        section, name = parameter.split("__")
        if name == "options":
            value = {key.replace("-", "_"): _toml_value(item) for key, item in value.items()}
        sections.setdefault(section, {})[name] = value
    resume = sections.get("checkpoint", {}).get("resume", "")
    if not name_or_path and resume not in ("", "auto"):
        return load_resumed(Path(resume), sections, made_plan=made_plan)
    dataset = sections.get("data", {}).get("name", DEFAULT_CONFIG)
    if not name_or_path and default == DEFAULT_CONFIG != dataset:  # digits is a recipe for the digits
        config = Config.from_dict(sections)
        config.check()
        return config
    return load_config(name_or_path or default, sections)


def _toml_value(item: Any) -> Any:
    """An option's value: text is read as TOML where it is (20, true, [4, 4, 3], "quoted"), else stays itself."""
    try:
        return tomllib.loads(f"value = {item}")["value"] if isinstance(item, str) else item
    except tomllib.TOMLDecodeError:
        return item


def _check_environment() -> None:
    """Raise ConfigError for a variable that names a section but none of its fields."""
    known = [
        f"{ENV_PREFIX}{section}_{name}".upper()
        for section, kind in SECTIONS.items()
        for name in kind.__match_args__
    ]
    options = tuple(f"{name}_" for name in known if name.endswith("_OPTIONS"))
    sections = tuple(f"{ENV_PREFIX}{section}_".upper() for section in SECTIONS)
    for name in sorted(os.environ):
        if name.startswith(sections) and name not in known and not name.startswith(options):
            raise ConfigError(
                f"environment variable {name} is no field of the configuration{suggest(name, known)}"
            )
