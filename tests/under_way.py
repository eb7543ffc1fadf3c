"""The real command while it goes on."""

import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from conftest import PATIENCE


class UnderWay:
    """The command in a session of its own, of which nothing outlives the `with` block."""

    def __init__(
        self, directory: Path, *arguments: str, environment: dict[str, str] | None = None
    ) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "experiments", *arguments],
            cwd=directory,
            env={**os.environ, **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.processes():
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()
        for pipe in (self.popen.stdout, self.popen.stderr):
            if pipe is not None:
                pipe.close()

    def wait_until(self, reached: Callable[[], bool]) -> None:
        until = time.monotonic() + PATIENCE
        while not reached():
            assert time.monotonic() < until
            assert self.popen.poll() is None, self.popen.communicate()
            time.sleep(0.01)

    def wait_for_line(self, pattern: str) -> None:
        """Read its output up to a line that begins so."""
        assert isinstance(self.popen.stdout, io.TextIOWrapper)
        for line in self.popen.stdout:
            if re.match(pattern, line):
                return
        raise AssertionError(self.popen.communicate()[1])

    def stop_reading(self) -> None:
        """Close its output, as `| head` does."""
        assert self.popen.stdout is not None
        self.popen.stdout.close()
        self.popen.stdout = None

    def end(self) -> tuple[int, str, str]:
        """Its exit code, what is left of its output, and what it wrote to standard error."""
        out, error = self.popen.communicate(timeout=PATIENCE)
        return self.popen.returncode, out or "", error

    def processes(self) -> list[str]:
        """The names of what lives in its session."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                head, _, rest = stat.read_text().rpartition(")")
            except OSError:
                continue
            state, _, _, session = rest.split()[:4]
            if int(session) == self.popen.pid and state not in "ZX":
                found.append(head)
        return found

    def outlived(self) -> list[str]:
        """What still lives after its end, and does not leave by itself."""
        until = time.monotonic() + PATIENCE
        while (left := self.processes()) and time.monotonic() < until:
            time.sleep(0.01)
        return left
