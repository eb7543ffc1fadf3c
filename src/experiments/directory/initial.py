"""Which file `init` of a config starts from, and its sha256. Imports no torch."""

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.directory.checkpoint_files import entries
from experiments.errors import UsageError


def source_name(init: Mapping[str, Any]) -> str:
    """What a config starts from, as messages and run.json name it; empty: from random weights."""
    if init.get("run"):
        return f"init.run={init['run']} ({init['checkpoint']})"
    return f"init.file={init['file']}" if init.get("file") else ""


def source_file(init: Mapping[str, Any]) -> Path:
    """The file with the weights to start from. Raises UsageError if there is none."""
    if init.get("file"):
        file = Path(init["file"])
        if not file.is_file():
            raise UsageError(f"init.file={file}: no such file; starting from its weights needs it")
        return file
    run = Path(init["run"])
    if not run.is_dir():
        raise UsageError(f"init.run={run}: no such directory; starting from its weights needs it")
    found = entries(run / "checkpoints")
    if not found:
        raise UsageError(
            f"init.run={run}: has no checkpoint; give the directory of a run that has one"
        )
    if init["checkpoint"] == "best":
        found = [entry for entry in found if entry.best]
        if not found:
            raise UsageError(f"init.run={run}: has no best checkpoint; use init.checkpoint=last")
    return found[-1].file


def source_digests(init: Mapping[str, Any]) -> dict[str, str]:
    """The sha256 of the weights to start from, by their name; empty if they are not there, which
    matters only to a run that is about to start.
    """
    try:
        file = source_file(init)
        found = file.stat()
        return {source_name(init): _digest(file, found.st_mtime_ns, found.st_size)}
    except (OSError, UsageError):
        return {}


@functools.lru_cache(maxsize=16)
def _digest(file: Path, mtime: int, size: int) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
