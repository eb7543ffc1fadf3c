"""Pictures are beside the numbers: one that cannot be drawn costs a line, no result."""

import sys
import warnings
from collections.abc import Callable
from pathlib import Path


def draw(file: Path, picture: Callable[[], bytes]) -> bytes | None:
    """The PNG for a file; None if it cannot be drawn, told in one line on standard error.

    picture: imports matplotlib itself, so that a broken installation counts, too.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # a box stands for it
            return picture()
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"warning: {file}: not drawn ({reason}); the numbers are complete", file=sys.stderr)
        return None
