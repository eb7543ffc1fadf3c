"""statistics.json: what a data set computed on its training split, to encode other rows with."""

import json
import stat
from pathlib import Path
from typing import Any

from experiments.directory import durable
from experiments.errors import UsageError

STATISTICS = "statistics.json"
MAX_BYTES = 100_000_000


def write(path: Path, statistics: Any) -> None:
    """Save the statistics of a run's data in its directory; None leaves no file.

    Raises UsageError if they would come back from JSON as something else.
    """
    if statistics is None:
        return
    try:
        text = json.dumps(statistics, allow_nan=False, ensure_ascii=False, indent=1)
        same = json.loads(text) == statistics
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"data: its statistics are no JSON ({error}); use dicts, lists, texts and finite "
            "numbers of Python"
        ) from None
    if not same:
        raise UsageError(
            "data: its statistics come back from JSON as others; use lists for tuples, and texts "
            "as keys"
        )
    durable.write(path / STATISTICS, text.encode(errors="surrogatepass") + b"\n")


def read(path: Path) -> Any:
    """The statistics in a run directory, which may be a stranger's; None if there are none.

    Raises UsageError if they are no JSON.
    """
    file = path / STATISTICS
    try:
        found = file.lstat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_BYTES:
            raise ValueError(f"it is no file of up to {MAX_BYTES} bytes")
        return json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(
            f"{file}: cannot be read ({error}); copy the run directory again"
        ) from None
