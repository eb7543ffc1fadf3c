"""Formatting of paths for output."""

from pathlib import Path

from experiments.stdio import printable


def display_path(path: Path) -> str:
    """A path relative to the working directory if it is below it, else as it is; control characters
    in it as escape sequences.
    """
    try:
        directory = Path.cwd()
    except OSError:  # it has been removed
        return printable(str(path))
    return printable(str(path.relative_to(directory) if path.is_relative_to(directory) else path))
