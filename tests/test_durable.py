"""Durable writes: after any failure a file has its complete old or new content."""

import contextlib
import errno
import io
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from experiments.directory import durable

OLD, NEW = b"old" * 5000, b"new" * 9000
# the system calls of one write: open, write, fsync, rename, open, fsync
CALLS = 6


class Torn(io.FileIO):
    """A file whose failing call writes half of the data."""

    turn: Callable[[], bool]
    fail: Callable[[], NoReturn]

    def write(self, data: Any, /) -> int:
        if self.turn():
            super().write(bytes(data)[: len(bytes(data)) // 2])
            self.fail()
        return super().write(data)


@contextlib.contextmanager
def failing(number: int, fail: Callable[[], NoReturn]) -> Iterator[list[str]]:
    """Fail at the system call with this index; yields the names of the calls made.

    Only calls that modify or flush something on disk count.
    """
    made: list[str] = []

    def turn(name: str) -> bool:
        made.append(name)
        return len(made) == number + 1

    def tripped(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if turn(name):
                fail()
            return function(*args, **kwargs)

        return call

    def open_file(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode != "wb":
            return open(path, mode, *args, **kwargs)
        if turn("create"):
            fail()
        file = Torn(str(path), "w")
        file.turn = lambda: turn("write")
        file.fail = fail
        return io.BufferedWriter(file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", tripped("fsync", os.fsync))
        patch.setattr(os, "open", tripped("open", os.open))
        patch.setattr(Path, "open", open_file)
        for name in ("replace", "unlink", "mkdir"):
            patch.setattr(Path, name, tripped(name, getattr(Path, name)))
        yield made


def disk_full() -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def die() -> NoReturn:
    os._exit(77)


def in_a_child(action: Callable[[], object]) -> int:
    """Run an action in a child process; returns its exit code."""
    child = os.fork()
    if not child:
        try:
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_write_makes_and_replaces_a_file(tmp_path: Path) -> None:
    for content in (OLD, NEW, b""):
        durable.write(tmp_path / "file", content)
        assert (tmp_path / "file").read_bytes() == content
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_the_content_is_flushed_before_its_name_moves_and_the_directory_after(
    tmp_path: Path,
) -> None:
    with failing(-1, disk_full) as calls:
        durable.write(tmp_path / "file", NEW)
    assert calls == ["create", "write", "fsync", "replace", "open", "fsync"]
    assert len(calls) == CALLS


@pytest.mark.parametrize("number", range(CALLS))
def test_a_full_disk_at_any_call_is_raised_and_leaves_a_whole_file(
    number: int, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_bytes(OLD)
    with failing(number, disk_full) as calls, pytest.raises(OSError, match="No space left"):
        durable.write(file, NEW)
    # a rename cannot be undone
    assert file.read_bytes() == (NEW if "open" in calls else OLD)
    assert [left.name for left in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("number", range(CALLS))
def test_a_crash_at_any_call_leaves_a_whole_file(number: int, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(OLD)

    def crash() -> None:
        with failing(number, die):
            durable.write(file, NEW)

    assert in_a_child(crash) == 77
    assert file.read_bytes() in (OLD, NEW)


@pytest.mark.parametrize("error", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_fsync_is_written_all_the_same(
    error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "fsync", fsync)
    durable.write(tmp_path / "file", NEW)
    assert (tmp_path / "file").read_bytes() == NEW


def test_the_kernel_refusing_to_write_more_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(OLD)

    def write_too_much() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(NEW) - 1, len(NEW) - 1))
        with pytest.raises(OSError, match="File too large"):
            durable.write(file, NEW)

    assert in_a_child(write_too_much) == 0
    assert file.read_bytes() == OLD
    assert [left.name for left in tmp_path.iterdir()] == ["file"]


def test_a_symbolic_link_is_replaced_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(OLD)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    durable.write(tmp_path / "link", NEW)
    assert (tmp_path / "elsewhere").read_bytes() == OLD
    assert not (tmp_path / "link").is_symlink()
