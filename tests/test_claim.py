"""The lock of a directory: who excludes whom, on which file systems, and what it leaves."""

import errno
import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments.directory.claim import LOCK_FILE, Lock, is_locked, lock_directory
from experiments.errors import UsageError


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Lock]:
    """A lock on `tmp_path`."""
    lock = lock_directory(tmp_path)
    yield lock
    lock.close()


def fails_with(number: int, *, only_files: bool = False) -> Callable[[int, int], None]:
    """A `flock` of a file system on which it fails."""

    def flock(descriptor: int, operation: int) -> None:
        if not (only_files and os.path.isdir(f"/proc/self/fd/{descriptor}")):
            raise OSError(number, os.strerror(number))

    return flock


def test_a_locked_directory_cannot_be_locked_again(tmp_path: Path, held: Lock) -> None:
    with pytest.raises(UsageError, match="another process is running it"):
        lock_directory(tmp_path)
    held.close()
    lock_directory(tmp_path).close()


def test_the_lock_is_on_a_file_open_for_writing_as_nfs_requires(tmp_path: Path, held: Lock) -> None:
    """A lock on the directory alone would not be seen by another machine."""
    with (tmp_path / LOCK_FILE).open("r+b") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_process_that_locks_the_directory_as_0_1_0_did_is_excluded_and_excludes(
    tmp_path: Path, held: Lock
) -> None:
    old = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    with pytest.raises(BlockingIOError):
        fcntl.flock(old, fcntl.LOCK_EX | fcntl.LOCK_NB)
    held.close()
    fcntl.flock(old, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert is_locked(tmp_path)
    with pytest.raises(UsageError, match="another process is running it"):
        lock_directory(tmp_path)
    os.close(old)
    assert not is_locked(tmp_path)


def test_looking_whether_it_is_locked_creates_no_file(tmp_path: Path) -> None:
    assert not is_locked(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("lock_file", [True, False], ids=["now", "of version 0.1.0"])
def test_whether_it_is_locked_is_seen_where_one_may_only_read(
    tmp_path: Path, lock_file: bool
) -> None:
    if lock_file:
        (tmp_path / LOCK_FILE).touch(0o444)
    tmp_path.chmod(0o555)
    assert not is_locked(tmp_path)
    directory = os.open(tmp_path / LOCK_FILE if lock_file else tmp_path, os.O_RDONLY)
    fcntl.flock(directory, fcntl.LOCK_EX)
    assert is_locked(tmp_path)
    os.close(directory)
    tmp_path.chmod(0o755)


def test_two_that_look_at_once_do_not_take_each_other_for_its_holder(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).touch()
    with (tmp_path / LOCK_FILE).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        assert not is_locked(tmp_path)


def test_a_symbolic_link_in_place_of_the_lock_is_refused_and_creates_nothing(
    tmp_path: Path,
) -> None:
    target = tmp_path / "target"
    (tmp_path / LOCK_FILE).symlink_to(target)
    with pytest.raises(UsageError, match=r"\.lock: is a symbolic link; remove it$"):
        lock_directory(tmp_path)
    assert not target.exists()


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_what_is_no_regular_file_is_no_lock(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    make(tmp_path / LOCK_FILE)
    with pytest.raises(UsageError, match=r"\.lock: "):
        lock_directory(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_a_run_goes_on_and_a_line_says_what_that_means(
    tmp_path: Path,
    number: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(fcntl, "flock", fails_with(number))
    lock_directory(tmp_path).close()
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {tmp_path}: cannot be locked here ({os.strerror(number)})")
    assert "would not exclude each other" in line


def test_without_locks_on_directories_the_file_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = fcntl.flock

    def flock(descriptor: int, operation: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EBADF, "")
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    lock = lock_directory(tmp_path)
    with pytest.raises(UsageError, match="another process is running it"):
        lock_directory(tmp_path)
    lock.close()
    assert capsys.readouterr().err == ""


def test_a_lock_that_fails_for_another_reason_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", fails_with(errno.EIO, only_files=True))
    with pytest.raises(UsageError, match=r"\.lock: cannot be locked \(Input/output error\)"):
        lock_directory(tmp_path)


def test_a_process_that_the_holder_forks_does_not_hold_it_after_the_holder(tmp_path: Path) -> None:
    """As DataLoader's workers, which outlive a killed process by seconds."""
    (forked, tell), (wait, go) = os.pipe(), os.pipe()
    holder = os.fork()
    if not holder:
        try:
            os.close(go)
            lock_directory(tmp_path)
            if os.fork():
                signal.pause()
            os.write(tell, b"x")
            os.read(wait, 1)
        finally:
            os._exit(0)
    os.close(tell)
    os.read(forked, 1)
    assert is_locked(tmp_path)
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    assert not is_locked(tmp_path)
    os.close(go)  # ends the forked process


def test_a_forked_process_releases_no_lock_of_its_parent(tmp_path: Path, held: Lock) -> None:
    child = multiprocessing.get_context("fork").Process(target=int)
    child.start()
    child.join()
    assert is_locked(tmp_path)


def test_a_program_that_the_holder_starts_does_not_inherit_it(tmp_path: Path, held: Lock) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        held.close()
        assert not is_locked(tmp_path)
        process.communicate(b"\n")
