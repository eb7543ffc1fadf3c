"""Standard streams that cannot end a run: closed, on a full disk, or a terminal that has gone."""

import atexit
import contextlib
import errno
import io
import os
import sys
from typing import Any, TextIO

PIPE_CLOSED = (errno.EPIPE, errno.ESHUTDOWN)


def protect(*, ignore_closed_pipes: bool = False) -> None:
    """Make standard output and error ones whose write errors are told once and then ignored.

    A pipe that its reader has closed still raises BrokenPipeError, unless `ignore_closed_pipes`.
    Closed descriptors are opened on /dev/null: else the next file that is opened would get one of
    their numbers, and with it what was printed.
    """
    open_closed_descriptors()
    for name in ("stdout", "stderr"):
        stream: TextIO | None = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
            setattr(sys, name, tolerant(stream, name, ignore_closed_pipes=ignore_closed_pipes))
    # what Python flushes at its exit, after these, would be reported with exit code 120
    atexit.register(flush_quietly)


def open_closed_descriptors() -> None:
    """Open the standard descriptors that are closed on /dev/null."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            descriptor = os.open(os.devnull, os.O_RDWR)
            if descriptor != number:
                os.dup2(descriptor, number)
                os.close(descriptor)
            os.set_inheritable(number, True)


def tolerant(stream: io.TextIOWrapper, name: str, *, ignore_closed_pipes: bool) -> TextIO:
    """A stream on the same descriptor. What cannot be encoded is written as an escape sequence."""
    with contextlib.suppress(OSError):
        stream.flush()
    raw = TolerantFile(stream.fileno(), name, ignore_closed_pipes=ignore_closed_pipes)
    return io.TextIOWrapper(
        raw if stream.write_through else io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors="backslashreplace" if stream.errors == "strict" else stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


class TolerantFile(io.FileIO):
    """A descriptor whose write errors are reported once and then ignored."""

    def __init__(self, descriptor: int, name: str, *, ignore_closed_pipes: bool) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._stream, self._ignore_closed_pipes = name, ignore_closed_pipes
        self._reported = False

    def write(self, content: Any, /) -> int:
        try:
            return super().write(content)
        except OSError as error:
            closed = error.errno in PIPE_CLOSED
            if closed and not self._ignore_closed_pipes:
                raise
            if not closed and not self._reported:
                self._reported = True
                self.report(error)
            return memoryview(content).nbytes

    def report(self, error: OSError) -> None:
        """Tell on standard error what is lost, unless that is the stream itself."""
        if self._stream == "stdout":
            print(f"warning: standard output cannot be written ({error.strerror}); what is printed "
                  "is lost, the files are not", file=sys.stderr)  # fmt: skip


def printable(text: str) -> str:
    """A text from outside, such as someone else's run directory, as one harmless line: control
    characters, which could steer a terminal, as escape sequences.
    """
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode()
        for char in text
    )


def flush_quietly() -> None:
    """Flush both streams; what their readers do not take any more is lost."""
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except (OSError, ValueError):  # ValueError: it is closed
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)
