"""Ownership of a run directory: claimed by mkdir, then held by an advisory lock (flock).

The lock is on the file `.lock` in the directory: over NFS and GlusterFS a lock on the directory
itself excludes only processes of the same machine. Version 0.1.0 locked the directory, so both are
taken.
"""

import contextlib
import errno
import fcntl
import os
import shlex
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from experiments.errors import UsageError

LOCK_FILE = ".lock"
LOCK_SECONDS = 2.0  # timeout: a process that was just killed may still hold the lock
# errors of flock on a file system that has no locks
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


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
            f"hydra.run.dir={path}: already holds a run; choose another or use "
            f"resume={shlex.quote(str(path))}"
        )


class Lock:
    """An advisory lock that this process holds; the kernel releases it when the process dies."""

    def __init__(self) -> None:
        self._descriptors: list[int] = []
        _held.add(self)

    def add(self, descriptor: int) -> None:
        """Hold an open file until the lock is closed."""
        self._descriptors.append(descriptor)

    def close(self) -> None:
        """Release the lock, also where a process that was just forked has not closed it yet."""
        for descriptor in self._descriptors:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_UN)
        self.abandon()

    def abandon(self) -> None:
        """Close the files, which releases the lock unless another process has them open."""
        _held.discard(self)
        while self._descriptors:
            os.close(self._descriptors.pop())


_held: set[Lock] = set()


def close_inherited_locks() -> None:
    """Close the locks of the parent in a forked process, such as a DataLoader's worker, which would
    otherwise hold them after the parent's death.
    """
    for lock in list(_held):
        lock.abandon()


os.register_at_fork(after_in_child=close_inherited_locks)


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock of a directory, or this cannot be determined. It creates no
    file, and a directory that may only be read will do.
    """
    for file, flags in ((path, os.O_DIRECTORY), (path / LOCK_FILE, os.O_NOFOLLOW | os.O_NONBLOCK)):
        try:
            descriptor = os.open(file, os.O_RDONLY | flags)
        except FileNotFoundError:
            continue
        except OSError:
            return True
        try:
            # shared: over NFS an exclusive lock requires a file that is open for writing
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(descriptor)
    return False


def lock_directory(path: Path, timeout: float = 0.0) -> Lock:
    """Take the advisory lock of a directory.

    timeout: seconds to wait if another process holds it.
    Raises UsageError if it cannot be taken. If the file system has no locks, a line on standard
    error says so, and the returned lock excludes nobody.
    """
    deadline = time.monotonic() + timeout
    while True:
        lock = Lock()
        try:
            if acquire(lock, path):
                return lock
        except BaseException:
            lock.close()
            raise
        lock.close()
        if time.monotonic() >= deadline:
            raise UsageError(f"{path}: another process is running it; wait for it or stop it")
        time.sleep(0.05)


def acquire(lock: Lock, path: Path) -> bool:
    """Try to take the lock of a directory; returns whether no other process holds it."""
    try:
        lock.add(directory := os.open(path, os.O_RDONLY | os.O_DIRECTORY))
    except OSError as error:
        raise UsageError(f"{path}: cannot be opened ({error.strerror}); name a directory") from None
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # only versions before the lock file rely on this lock
    lock.add(file := open_lock_file(path / LOCK_FILE))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            reason = "it is read-only" if error.errno == errno.EBADF else error.strerror
            raise UsageError(
                f"{path / LOCK_FILE}: cannot be locked ({reason}); make it writable"
            ) from None
        print(
            f"warning: {path}: cannot be locked here ({error.strerror}); two processes that use it "
            "would not exclude each other",
            file=sys.stderr,
        )
    return True


def open_lock_file(file: Path) -> int:
    """Open a lock file, creating it if missing; returns its descriptor. It stays when the lock is
    released: a process that waits for a removed file would share the directory with the next one.
    """
    flags = os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | flags, 0o666)
        except PermissionError:  # another user's; except over NFS it can be locked all the same
            descriptor = os.open(file, os.O_RDONLY | flags)
    except FileNotFoundError:
        raise UsageError(
            f"{file.parent}: cannot be locked (no permission to create {file.name} in it); "
            "make it writable"
        ) from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UsageError(f"{file}: is a symbolic link; remove it") from None
        raise UsageError(f"{file}: cannot be opened ({error.strerror})") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UsageError(f"{file}: is not a regular file; remove it")
    return descriptor


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
