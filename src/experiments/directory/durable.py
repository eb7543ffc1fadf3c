"""Atomic, durable file writes: after a crash a file has its old or its new content."""

import contextlib
import os
from pathlib import Path


def write(path: Path, content: bytes) -> None:
    """Replace a file so that a crash at any moment leaves either the old content or the new.

    The bytes are flushed to a temporary file in the same directory before it is renamed, and the
    directory is flushed after that. Raises OSError, with the old file untouched and the temporary
    one removed, if the disk is full or fails.
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
    """Flush a directory's entries to disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
