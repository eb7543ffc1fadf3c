"""Who owns a run directory: claimed once by mkdir, locked for as long as a process runs in it."""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from experiments.errors import UsageError

LOCK_SECONDS = 2.0  # a process that was killed a moment ago may still hold the lock


@contextlib.contextmanager
def explain_mkdir_errors(path: Path, key: str) -> Iterator[None]:
    """Tell in one line, as UsageError, that a directory cannot be made."""
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"{key}={path}: cannot be made ({error.strerror}); name one that can be written"
        ) from None


def claim(path: Path, *, exact: bool) -> Path:
    """Make a directory for a run that no other run has or gets; returns its path.

    With `exact` (the person named it) it may exist, but must not hold a run; else the first
    free one of `path`, `path-2`, `path-3`, ... is made. Raises UsageError when it cannot be.
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
    """Raise UsageError where a directory holds a run."""
    if (path / "run.json").exists():
        raise UsageError(
            f"hydra.run.dir={path}: holds a run already; name another or resume={path}"
        )


def is_locked(path: Path) -> bool:
    """Whether a process runs in a directory at this moment."""
    try:
        os.close(lock_directory(path))
    except UsageError:
        return True
    return False


def lock_directory(path: Path, patience: float = 0.0) -> int:
    """Lock a directory for as long as this process lives; the kernel lets go when it dies.

    patience: seconds to wait for another process that holds it. Raises UsageError.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise UsageError(f"{path}: cannot be opened ({error.strerror}); name a directory") from None
    until = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except OSError:
            if time.monotonic() >= until:
                os.close(descriptor)
                raise UsageError(
                    f"{path}: another process is running it; wait for it or stop it"
                ) from None
            time.sleep(0.05)


def remove_temporary_files(path: Path) -> None:
    """Remove the temporary files that a killed process left in a directory; call with its lock."""
    for left in path.glob(".*.tmp"):
        left.unlink()


def reject_symlinks(path: Path) -> None:
    """Raise UsageError where a file in a run directory leads elsewhere: who goes on with the run
    would write there.
    """
    link = next((file for file in path.rglob("*") if file.is_symlink()), None)
    if link is not None:
        raise UsageError(f"{link}: is a symbolic link, which may lead anywhere; copy what it means")
