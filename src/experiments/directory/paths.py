"""How paths are shown."""

from pathlib import Path


def display_path(path: Path) -> str:
    """A path as one would type it here: relative where it lies below the working directory."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
