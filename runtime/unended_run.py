"""What a command goes on with. A run whose driver died: the same command goes on with it.

    run.json: finished ──────────▶ refused, as every folder that holds a run
              all else ─ the same training as in config.toml? ─┬─ yes ─▶ as with --resume auto
                                                               └─ no ──▶ refused, with the field that differs

torch is imported only where there is such a run: else Ray starts meanwhile.
"""

from __future__ import annotations

import tomllib
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from anabranch.runtime.config import Config
from anabranch.runtime.config_file import read_toml
from anabranch.runtime.errors import CheckpointError, ConfigError, UnreadableError
from anabranch.runtime.launch import choose_launcher
from anabranch.runtime.redact import redacted
from anabranch.runtime.run_record import RECORD, run_status

# What fixes the trajectory; the rest says where and how it runs.
_LEARNED = ("model", "data", "optimizer", "lr_schedule", "train")


def begins_here(config: Config) -> bool:
    """Whether the command goes on with no run of its own folder: it names none to go on with, or another one."""
    resume, place = config.checkpoint.resume, config.launch.run_dir
    return not resume or (
        resume != "auto" and bool(place) and Path(resume).resolve() != Path(place).resolve()
    )


def go_on(config: Config) -> Config:
    """The configuration to run with, in a folder that is locked: where the run in it did not end, that goes on.

    So does one that began from another folder's checkpoint (`resume`) and has its own by now. A `train.bn_batch_size`
    that the command leaves open is that of the run that goes on, whatever its workers. Under torchrun and srun, whose
    ranks each look for themselves, and where no checkpoint is: the configuration as it is. Raises ConfigError where it
    is another training, CheckpointError where none can be read (UnreadableError: now).
    """
    return _with_its_groups(_with_unended(config))


def _with_unended(config: Config) -> Config:
    place, launch = Path(config.launch.run_dir), config.launch
    launcher = choose_launcher(launch.launcher or ("ray" if launch.address else ""))
    if not begins_here(config) or not launch.run_dir or launcher == "env" or not (place / RECORD).exists():
        return config
    with suppress(ConfigError):  # a torn record: whoever wrote it died
        if run_status(place)["state"] == "finished":
            return config
    from anabranch.runtime.manifest import finished
    from anabranch.runtime.storage import open_folder

    if not finished(open_folder(config.checkpoint.url or place / "checkpoints")):
        return config
    before = Config.from_dict(read_toml(place / "config.toml")[1])
    config = replace(config, checkpoint=replace(config.checkpoint, resume="auto"))
    bn_batch_size = config.train.bn_batch_size or before.train.bn_batch_size
    compared = replace(config, train=replace(config.train, bn_batch_size=bn_batch_size))
    old, new = redacted(before.to_dict()), redacted(compared.to_dict())
    for section in _LEARNED:
        for name, value in new[section].items():
            if value != old[section][name]:
                raise ConfigError(
                    f"launch.run_dir {place} holds a run already that did not end, its {section}.{name} is "
                    f"{old[section][name]}, here it is {value}: make it the same to go on with it (or --resume "
                    f"{place}), or choose another folder"
                )
    return compared


def _with_its_groups(config: Config) -> Config:
    resume, url = config.checkpoint.resume, config.checkpoint.url
    if config.train.bn_batch_size or not resume or (resume == "auto" and not config.launch.run_dir):
        return config
    from anabranch.runtime.manifest import Manifest, finished
    from anabranch.runtime.run_folder import RunFolder
    from anabranch.runtime.storage import open_folder

    place = Path(config.launch.run_dir)
    if resume != "auto":
        place = Path(resume)
        url = RunFolder.open(place).config().checkpoint.url
    checkpoints = open_folder(url or place / "checkpoints")
    for folder in finished(checkpoints):
        try:
            text = Manifest.read(folder).config_toml
        except UnreadableError:
            raise
        except CheckpointError:  # told when it is to be gone on from: then an older one is
            continue
        try:
            before = Config.from_dict(tomllib.loads(text))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"the configuration in {folder} cannot be read: {error}") from error
        return replace(config, train=replace(config.train, bn_batch_size=before.train.bn_batch_size))
    return config
