"""The `ray job submit` line that does what a command asked for, in the cluster instead of here."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from urllib.parse import urlsplit

from anabranch.runtime.errors import ConfigError

_DASHBOARD_PORT = 8265
_FLAGS = ("--address", "--launch.address")


def job_line(address: str, argv: Sequence[str]) -> str:
    """The line for a command's arguments. address: HOST:PORT, ray://HOST:PORT, the dashboard's http(s)://…, or auto.

    auto stays: Ray then asks the cluster itself where its dashboard is, from any of its hosts.
    """
    url = urlsplit(address if "://" in address else f"//{address}")
    known = url.scheme in ("http", "https") or address == "auto"
    dashboard = address if known else f"http://{url.hostname}:{_DASHBOARD_PORT}"
    args: list[str] = []
    skip = False
    for arg in argv:
        if not skip and not arg.startswith(tuple(f"{flag}=" for flag in _FLAGS)) and arg not in _FLAGS:
            args.append(arg)
        skip = arg in _FLAGS and not skip
    submit = ["ray", "job", "submit", "--address", dashboard, "--working-dir", ".", "--"]
    return shlex.join([*submit, "anabranch", *args, "--address", "auto"])


def check_address(address: str, argv: Sequence[str]) -> None:
    """Raise ConfigError, with the line to type, for an address that Ray's clients and job submission use."""
    address = address or os.environ.get("RAY_ADDRESS", "")
    if "://" in address:
        raise ConfigError(
            f"the Ray address {address} is for clients from outside, the program that leads a run is part of the "
            "cluster: submit it as a job, which also outlives this terminal (the token is RAY_AUTH_TOKEN or "
            "~/.ray/auth_token; --run-dir: storage that the hosts share):\n  " + job_line(address, argv)
        )


def outlive_note(address: str, argv: Sequence[str]) -> str:
    """What to say of a run on a cluster that was there before; "" where it outlives this terminal, or has its own."""
    address = address or os.environ.get("RAY_ADDRESS", "")
    if not address or "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ or "SLURM_JOB_ID" in os.environ:
        return ""
    return f"this run ends with this terminal; one that outlives it: {job_line(address, argv)}"
