"""The real command in a pseudo-terminal."""

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from conftest import PATIENCE


def run_in_terminal(
    directory: Path,
    columns: int,
    *arguments: str,
    code: int = 0,
    environment: Mapping[str, str] | None = None,
    interrupt_when: Callable[[str], bool] = lambda written: False,
) -> str:
    """What the real command, leaving with `code`, writes to a terminal of so many columns.

    It gets a Ctrl-C when what it has written by then is what `interrupt_when` waits for.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    command = [sys.executable, "-m", "experiments", *arguments]
    inherited = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        command,
        cwd=directory,
        env={**inherited, **(environment or {}), "TERM": "xterm"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    written, interrupted, until = b"", False, time.monotonic() + PATIENCE
    try:
        while select.select([ours], [], [], max(until - time.monotonic(), 0))[0]:
            try:
                chunk = os.read(ours, 65536)
            except OSError:  # how Linux tells that the other end is closed
                break
            if not chunk:
                break
            written += chunk
            if not interrupted and interrupt_when(written.decode(errors="ignore")):
                process.send_signal(signal.SIGINT)
                interrupted = True
        assert time.monotonic() < until, written
        assert process.wait(timeout=PATIENCE) == code, written
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    return written.decode(errors="replace")  # a signal may tear a character that is being drawn
