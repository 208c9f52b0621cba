"""The machine that figures were measured on, and where what was measured is kept."""

from __future__ import annotations

import hashlib
import os
import platform
import secrets
from contextlib import suppress
from functools import cache
from pathlib import Path

from anabranch import blocks
from anabranch.runtime.durable import replace_file


def processor() -> str:
    """The processor's model as the system names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def cache_folder() -> Path:
    """Where measured costs are kept: $XDG_CACHE_HOME/anabranch, else ~/.cache/anabranch."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "anabranch"


def keep(path: Path, content: bytes) -> bool:
    """Writes a file there, whole or not at all: other jobs and hosts may write the same one at the same time.

    False where the folder cannot be written, or is full: what is not kept is measured again next time.
    """
    aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            aside.write_bytes(content)
            replace_file(path, aside)
            return True
        finally:
            aside.unlink(missing_ok=True)
    return False


@cache
def code_digest() -> str:
    """Of the blocks' source: figures of other code say nothing of this one."""
    digest = hashlib.sha256()
    for path in sorted(Path(blocks.__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
