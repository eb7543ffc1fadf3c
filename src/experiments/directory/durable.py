"""Files that are either the old or the new one, whole, whatever happens in between."""

import contextlib
import os
from pathlib import Path


def write(path: Path, content: bytes) -> None:
    """Replace a file so that a crash, at any moment, leaves the old content or the new.

    The bytes are flushed to disk under a temporary name in the same directory before the name
    moves, and the directory is flushed after it. Raises OSError, with the old file untouched
    and the temporary one gone, when the disk is full or broken.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Flush a directory's names to disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
