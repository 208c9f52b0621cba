"""Configuration, the parallel step, data, checkpoints, the command line. Names load on first use: torch is heavy."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anabranch.runtime.config import Config as Config
    from anabranch.runtime.parallel_network import parallelize as parallelize
    from anabranch.runtime.trainer import Trainer as Trainer

_MODULES = {"Config": "config", "Trainer": "trainer", "parallelize": "parallel_network"}
__all__ = ["Config", "Trainer", "parallelize"]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
