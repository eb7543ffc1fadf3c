"""Ownership of a run directory: claimed by mkdir, then held by an advisory lock (flock)."""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from experiments.errors import UsageError

LOCK_SECONDS = 2.0  # timeout: a process that was just killed may still hold the lock


@contextlib.contextmanager
def explain_mkdir_errors(path: Path, key: str) -> Iterator[None]:
    """Convert the OSError of a directory that cannot be created to a UsageError."""
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"{key}={path}: cannot be created ({error.strerror}); choose a writable one"
        ) from None


def claim(path: Path, *, exact: bool) -> Path:
    """Create a directory that no other run has or can claim; returns its path.

    With `exact` (the user chose it) `path` may exist, but must not hold a run; otherwise the first
    free one of `path`, `path-2`, `path-3`, ... is created. Raises UsageError if that fails.
    """
    with explain_mkdir_errors(path, "hydra.run.dir"):
        path.parent.mkdir(parents=True, exist_ok=True)
        if exact:
            path.mkdir(exist_ok=True)
            ensure_no_run(path)
            return path
        number = 1
        while True:
            free = path if number == 1 else path.with_name(f"{path.name}-{number}")
            try:
                free.mkdir()
                return free
            except FileExistsError:
                number += 1


def ensure_no_run(path: Path) -> None:
    """Raise UsageError if a directory holds a run."""
    if (path / "run.json").exists():
        raise UsageError(
            f"hydra.run.dir={path}: already holds a run; choose another or use resume={path}"
        )


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock of a directory."""
    try:
        os.close(lock_directory(path))
    except UsageError:
        return True
    return False


def lock_directory(path: Path, timeout: float = 0.0) -> int:
    """Take the advisory lock of a directory; the kernel releases it when this process dies.

    timeout: seconds to wait if another process holds it.
    Returns the file descriptor that holds the lock. Raises UsageError if it cannot be taken.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise UsageError(f"{path}: cannot be opened ({error.strerror}); name a directory") from None
    deadline = time.monotonic() + timeout
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except OSError:
            if time.monotonic() >= deadline:
                os.close(descriptor)
                raise UsageError(
                    f"{path}: another process is running it; wait for it or stop it"
                ) from None
            time.sleep(0.05)


def remove_temporary_files(path: Path) -> None:
    """Remove temporary files left by a killed process; the caller must hold the lock."""
    for file in path.glob(".*.tmp"):
        file.unlink()


def reject_symlinks(path: Path) -> None:
    """Raise UsageError if a run directory contains a symlink: resuming the run could write to its
    target, outside the directory.
    """
    link = next((file for file in path.rglob("*") if file.is_symlink()), None)
    if link is not None:
        raise UsageError(f"{link}: is a symbolic link; replace it with a copy of its target")
