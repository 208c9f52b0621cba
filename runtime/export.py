"""A checkpoint as a plain state_dict of the one-device network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.runtime.checkpoint import Checkpoint
from anabranch.runtime.durable import aside_of, own_copy, replace_file, write_tensors
from anabranch.runtime.errors import ConfigError


def export_state(checkpoint: Checkpoint, network: nn.Module, output: Path) -> dict[str, Any]:
    """Writes the whole network's state_dict, every name in it, and returns output, num_tensors and bytes.

    network: the one-device network, which is filled; the file loads into another of its class with strict=True.
    output: ends in .safetensors, or in .pt for torch.save. A tied tensor is written under each of its names.
    Raises CheckpointError if the checkpoint is not this network's, ConfigError for another ending, or where output
    cannot be written.
    """
    if output.suffix not in (".safetensors", ".pt"):
        raise ConfigError(
            f"{output} has the ending {output.suffix!r}: give it .safetensors, or .pt for torch.save"
        )
    checkpoint.load_into(network, None)
    state = {n: t for n, t in network.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.suffix == ".pt":
            with aside_of(output).open("wb") as file:  # by its name torch would raise a RuntimeError
                torch.save({name: own_copy(tensor) for name, tensor in state.items()}, file)
            replace_file(output, aside_of(output))
        else:
            write_tensors(output, state)
        return {"output": str(output), "num_tensors": len(state), "bytes": output.stat().st_size}
    except OSError as error:
        raise ConfigError(
            f"{output} cannot be written: {error.strerror or error}; choose another with --output"
        ) from error
