"""Formatting of paths for output."""

from pathlib import Path


def display_path(path: Path) -> str:
    """A path relative to the working directory if it is below it, else unchanged."""
    try:
        directory = Path.cwd()
    except OSError:  # it has been removed
        return str(path)
    return str(path.relative_to(directory) if path.is_relative_to(directory) else path)
