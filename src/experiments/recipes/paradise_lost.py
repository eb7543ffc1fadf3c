"""Milton's Paradise Lost, 454,471 characters (source: SOURCE.md beside this file)."""

from pathlib import Path
from typing import Any

from experiments.data import Data, text


def load(length: int = 128, statistics: Any = None) -> Data:
    """The last tenth for the test, and the one before it for validation.

    x, y: int64 (rows, length), as `text.load` makes them

    length: characters in a row
    """
    file = str(Path(__file__).with_name("paradise_lost.txt"))
    return text.load(file, length, statistics=statistics)
