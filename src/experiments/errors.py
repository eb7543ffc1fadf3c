"""The exceptions that mean something to the person who runs an experiment."""

import sys
from typing import NoReturn


class UsageError(Exception):
    """A mistake of the person's, told in one line: the key, its value and the remedy.

    The entrypoint prints the line and leaves with exit code 2; an exception that is none of
    these is a mistake of ours and keeps its traceback.
    """


class Diverged(Exception):
    """The loss is no longer a finite number."""


class Interrupted(Exception):
    """The run was asked to stop by a signal, whose number it holds, and did so at a checkpoint."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


def exit_with_usage_error(program: str, line: str) -> NoReturn:
    """Print in one line what is wrong with a command, and exit with code 2."""
    print(f"{program}: {line}", file=sys.stderr)
    sys.exit(2)
