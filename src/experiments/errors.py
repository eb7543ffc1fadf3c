"""The exceptions shown to the user; any other one is a bug and keeps its traceback.

UsageError    invalid key, value, file or directory: one line, exit code 2
Diverged      a logged loss is infinite or NaN: the run ends, exit code 1
Interrupted   stopped at a checkpoint by a signal: exit code 128 + its number
"""

import sys
from typing import NoReturn

from experiments.stdio import printable


class UsageError(Exception):
    """A mistake of the user's, whose one-line message names the key, its value and the remedy."""


class Diverged(Exception):
    """The loss is no longer finite."""


class Interrupted(Exception):
    """The run was stopped by a signal, after it had written a checkpoint."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


def exit_with_usage_error(program: str, line: str) -> NoReturn:
    """Print a usage error in one line and exit with code 2."""
    print(f"{program}: {printable(line)}", file=sys.stderr)
    sys.exit(2)
