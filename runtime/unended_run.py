"""A run whose driver died: the same command goes on with it.

    run.json: finished ──────────▶ refused, as every folder that holds a run
              all else ─ the same training as in config.toml? ─┬─ yes ─▶ as with --resume auto
                                                               └─ no ──▶ refused, with the field that differs

torch is imported only where there is such a run: else Ray starts meanwhile.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from anabranch.runtime.config import Config
from anabranch.runtime.config_file import read_toml
from anabranch.runtime.errors import ConfigError
from anabranch.runtime.launch import choose_launcher
from anabranch.runtime.redact import redacted
from anabranch.runtime.run_record import RECORD, run_status

# What fixes the trajectory; the rest says where and how it runs.
_LEARNED = ("model", "data", "optimizer", "lr_schedule", "train")


def go_on(config: Config) -> Config:
    """The configuration to run with, in a folder that is locked: where the run in it did not end, that goes on.

    Its `train.bn_batch_size` stays what its own workers made it. Under torchrun and srun, whose ranks each look for
    themselves, and where no checkpoint is: the configuration as it is. Raises ConfigError where it is another training.
    """
    place, launch = Path(config.launch.run_dir), config.launch
    launcher = choose_launcher(launch.launcher or ("ray" if launch.address else ""))
    if config.checkpoint.resume or not launch.run_dir or launcher == "env" or not (place / RECORD).exists():
        return config
    if run_status(place)["state"] == "finished":
        return config
    from anabranch.runtime.manifest import finished
    from anabranch.runtime.storage import open_folder

    if not finished(open_folder(config.checkpoint.url or place / "checkpoints")):
        return config
    before = Config.from_dict(read_toml(place / "config.toml")[1])
    bn_batch_size = config.train.bn_batch_size or before.train.bn_batch_size
    config = replace(
        config,
        train=replace(config.train, bn_batch_size=bn_batch_size),
        checkpoint=replace(config.checkpoint, resume="auto"),
    )
    old, new = redacted(before.to_dict()), redacted(config.to_dict())
    for section in _LEARNED:
        for name, value in new[section].items():
            if value != old[section][name]:
                raise ConfigError(
                    f"launch.run_dir {place} holds a run already that did not end, its {section}.{name} is "
                    f"{old[section][name]}, here it is {value}: make it the same to go on with it (or --resume "
                    f"{place}), or choose another folder"
                )
    return config
