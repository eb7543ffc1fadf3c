"""Atomic, durable file writes: after a crash a file has its old or its new content."""

import contextlib
import errno
import os
from pathlib import Path

# errors of fsync on a file system that has none, or none for directories
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF)


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
            sync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Flush a directory's entries to disk, unless it must not be opened for reading."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except PermissionError:
        return
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def sync(descriptor: int) -> None:
    """Flush an open file or directory to disk, where the file system can do so. Raises OSError if
    the disk is full or fails.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
