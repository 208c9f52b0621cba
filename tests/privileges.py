"""What this process may do: in a container root often may not."""

from __future__ import annotations

import subprocess
import tempfile
from functools import cache


@cache
def may_mount() -> bool:
    """Whether namespaces and file systems can be made: tried, in a namespace that ends with the trial."""
    with tempfile.TemporaryDirectory() as folder:
        trial = ["unshare", "--mount", "--net", "--pid", "--fork", "mount", "-t", "tmpfs", "none", folder]
        return _works(trial)


@cache
def may_become(user: int) -> bool:
    """Whether a process of this user's can become that one."""
    return _works(["true"], user=user)


def _works(command: list[str], user: int | None = None) -> bool:
    try:
        return subprocess.run(command, capture_output=True, check=False, user=user).returncode == 0
    except OSError:  # no such command, or the change of the user is refused
        return False
