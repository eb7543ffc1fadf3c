"""The files of a run's checkpoints, as their names tell. Imports no torch."""

import re
from dataclasses import dataclass
from pathlib import Path

# zero-padded so that names sort in most listings; longer numbers take more digits
NAME = re.compile(r"step-(\d{9,})-epoch-(\d{5,})(-best)?-([0-9a-f]{16})\.safetensors")


@dataclass(frozen=True, order=True)
class Entry:
    """A checkpoint on disk, parsed from its file name; sorts by position in the run."""

    step: int
    epochs: int
    best: bool
    digest: str
    file: Path


def entries(directory: Path) -> list[Entry]:
    """The checkpoints on disk, oldest first."""
    found = [(NAME.fullmatch(file.name), file) for file in directory.glob("step-*")]
    return sorted(
        Entry(int(match[1]), int(match[2]), match[3] is not None, match[4], file)
        for match, file in found
        if match
    )
