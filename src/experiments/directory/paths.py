"""Formatting of paths for output."""

from pathlib import Path


def display_path(path: Path) -> str:
    """A path relative to the working directory if it is below it, else unchanged."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
